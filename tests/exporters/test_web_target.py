"""Exports for browsers: the interface that transformers.js looks for, and 8-bit products."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import GENAI_CONFIG, WEB_DTYPES, BlockFormat, Bundle
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.parity import ParityReport, VerifyOptions, verify
from gemma3_export.reference.weights.block_matrix import quantize
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.source import RandomSource
from tests.support.exported_bundles import accept_changes, made_once
from tests.support.tiny_models import tiny_config

SEED = 5
CONFIG = tiny_config(num_hidden_layers=2, layer_types=("sliding_attention", "full_attention"))
# With random weights the two best tokens are almost equally likely.
OPTIONS = VerifyOptions(decode_steps=8, greedy_steps=4, min_top1=0.85)
# WebAssembly has no kernel for the first, and only slow ones for the second.
FORBIDDEN = {"GatherBlockQuantized", "MatMulNBits"}


def web_bundle(dtype: str) -> Bundle:
    return Bundle(made_once("web", export_both), dtype)


def export_both(path: Path) -> None:
    writers = [OnnxWriter(target="web", dtype=dtype) for dtype in WEB_DTYPES]
    export_bundle(RandomSource(CONFIG, SEED), path, *writers)


def graph_of(bundle: Bundle) -> onnx.GraphProto:
    path = bundle.file(bundle.graph("onnx").path)
    return onnx.load(path, load_external_data=False).graph


def check(bundle: Bundle) -> ParityReport:
    return verify(
        open_runtime(bundle, "onnx"),
        open_bundle_weights(bundle, "onnx"),
        options=OPTIONS,
        full_source=RandomSource(CONFIG, SEED),
    )


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_web_export_computes_what_the_reference_computes(dtype: str) -> None:
    report = check(web_bundle(dtype))
    assert report.passed
    names = [case.name for case in report.cases]
    assert any(name.startswith("float-") for name in names) == (dtype == "int8")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_number_of_logits_is_a_required_scalar(dtype: str) -> None:
    bundle = web_bundle(dtype)
    session = onnxruntime.InferenceSession(bundle.file(bundle.graph("onnx").path))
    inputs = {value.name: value for value in session.get_inputs()}
    assert inputs["num_logits_to_keep"].shape == []
    assert not session.get_overridable_initializers()
    ids = np.array([[7, 5, 3]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for name, value in inputs.items():
        if name.startswith("past_key_values"):
            feeds[name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    wanted = (0, 1, 2)
    logits = [
        session.run(["logits"], feeds | {"num_logits_to_keep": np.array(count)})[0]
        for count in wanted
    ]
    assert [found.shape[1] for found in logits] == [3, 1, 2]
    np.testing.assert_allclose(logits[1], logits[0][:, -1:], rtol=1e-4, atol=1e-5)


def test_transformers_js_finds_both_graphs_and_their_weights(tmp_path: Path) -> None:
    path = web_bundle("fp32").path
    files = {file.name for file in (path / "onnx").iterdir()}
    names = ("model.onnx", "model_quantized.onnx")
    assert files == {f"{name}{part}" for name in names for part in ("", "_data")}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    settings = {"kv_cache_dtype": "float32", "use_external_data_format": True}
    assert config["transformers.js_config"] == settings
    assert not (path / GENAI_CONFIG).exists()  # it would not feed num_logits_to_keep
    one = tmp_path / "one"
    export_bundle(RandomSource(CONFIG, SEED), one, OnnxWriter(target="web", dtype="int8"))
    config = json.loads((one / "config.json").read_text(encoding="utf-8"))
    assert config["transformers.js_config"] == {"dtype": "q8", **settings}
    Bundle(one).check_files()


def test_int8_uses_operators_with_fast_kernels_and_stores_the_tied_embedding_once() -> None:
    bundle = web_bundle("int8")
    graph = graph_of(bundle)
    found = [node.op_type for node in graph.node]
    assert FORBIDDEN.isdisjoint(found)
    assert found.count("MatMulInteger") == 4 * 2 + 1
    stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8 and t.dims]
    assert len(stored) == 4 * 2 + 1  # the embedding is the head
    parameters = sum(int(np.prod(tensor.dims)) for tensor in stored)
    matrices = sum(np.prod(shape) for _, shape in CONFIG.weight_shapes() if len(shape) == 2)
    assert parameters == matrices


def test_a_changed_8_bit_weight_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(web_bundle("int8").path, path)
    right = open_bundle_weights(Bundle(path, "int8"), "onnx")
    read = {name: right.read(name).clone() for name in dict(CONFIG.weight_shapes())}
    codes = "model.layers.1.mlp.down_proj.weight.codes"
    (tensor,) = (item for item in graph_of(Bundle(path, "int8")).initializer if item.name == codes)
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(path / "onnx" / place["location"], mode="r+")
    length = int(place["length"])
    data[int(place["offset"]) :][: length // 8] ^= 16
    data.flush()
    accept_changes(path)

    class Unchanged(RandomSource):
        activation_blocks = right.activation_blocks

        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            return read[name][start:stop]

    report = verify(
        open_runtime(Bundle(path, "int8"), "onnx"), Unchanged(CONFIG, SEED), options=OPTIONS
    )
    assert not report.passed


def test_the_rotation_spreads_outliers_that_one_scale_per_row_would_not_survive() -> None:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(16, 96, generator=generator)
    weights[:, 7] *= 60
    rotated = BlockFormat.rotated_rows(96)
    assert (rotated.rotation, rotated.block_size) == (32, 96)
    error = (quantize(weights, rotated).dequantize() - weights).square().mean()
    plain = weights.abs().amax(1, keepdim=True) / 127
    plain_error = ((weights / plain).round() * plain - weights).square().mean()
    assert error < plain_error / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "target web supports fp32 and int8 only"),
        ({"dtype": "int8", "block_size": 64}, "target web has one scale per row"),
        ({"dtype": "int8", "activations": "fp16"}, "target web computes in fp32"),
    ],
)
def test_what_browsers_cannot_run_is_rejected(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(
            RandomSource(CONFIG, SEED),
            tmp_path / "bundle",
            OnnxWriter(target="web", **options),  # type: ignore[arg-type]
        )
    assert not (tmp_path / "bundle").exists()


def test_rows_that_cannot_be_rotated_are_rejected(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=40, num_hidden_layers=1, layer_types=("full_attention",))
    with pytest.raises(InputError, match="40 columns, not a multiple of 16"):
        export_bundle(
            RandomSource(config, SEED), tmp_path / "b", OnnxWriter(target="web", dtype="int8")
        )
