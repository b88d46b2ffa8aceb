"""The model of GPU speeds: its page is current, and its figures follow from known facts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuda_model
from gemma3_export.api.exporting import export_onnx, open_weights
from gemma3_export.config import config_to_json, default_layer_types, preset
from tests.runtimes.test_device_decoding import counted

REPOSITORY = Path(__file__).parents[2]


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    tables = "\n".join(cuda_model.model_lines(cuda_model.Assumptions())) + "\n"
    page = (REPOSITORY / "docs" / "cuda.md").read_text(encoding="utf-8")
    assert page == cuda_model.page_with(tables), "run python -m benchmarks.cuda_model --write"
    assert "A model, not a measurement" in page


def test_bytes_are_those_of_the_model() -> None:
    config = preset("270m").config
    weights = [cuda_model.weight_bytes(config, form) for form in cuda_model.FORMATS.values()]
    assert weights[0] == 2 * config.num_parameters
    assert weights[0] > weights[1] > weights[2] > weights[0] / 4
    stored, read = (cuda_model.cache_bytes(config, 4096, is_read=flag) for flag in (False, True))
    assert stored == 4096 * 18 * 2 * 256 * 2
    assert read == (4096 * 3 + 512 * 15) * 2 * 256 * 2


def test_a_cuda_graph_helps_if_the_host_is_the_bottleneck() -> None:
    assumed = cuda_model.Assumptions()
    card = cuda_model.CARDS[0]

    def gain(size: str) -> float:
        config = preset(size).config
        with_graph, without = (
            cuda_model.tokens_per_s(config, None, card, assumed, has_graph=flag)
            for flag in (True, False)
        )
        return float(with_graph / without)

    assert gain("270m") > 2
    assert gain("27b") == 1


@pytest.mark.placement
@pytest.mark.parametrize("layers", [1, 3])
def test_the_number_of_kernels_is_what_the_stub_counts(layers: int, tmp_path: Path) -> None:
    config = replace(
        preset("270m").config,
        num_hidden_layers=layers,
        layer_types=default_layer_types(layers),
        vocab_size=2048,
        intermediate_size=128,
    )
    source = open_weights(config_path=written(config_to_json(config), tmp_path), random_seed=0)
    bundle = export_onnx(source, tmp_path / "out", dtype="bf16", verify=False).path
    for graph, expected in (
        (False, cuda_model.kernels(config)),
        (True, cuda_model.LAUNCHES_WITH_GRAPH),
    ):
        step = counted(bundle, graph=graph, top_k=None)["steps"][-1]
        found = step["launches"] + step["library_calls"] + step["graph_launches"]
        assert found == expected, "count again, and run python -m benchmarks.cuda_model --write"


def written(config: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
