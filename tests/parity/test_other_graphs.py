"""Graphs that other tools exported: right ones pass, wrong ones are caught and located."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError
from gemma3_export.parity import GroundTruth, ParityReport, VerifyOptions, verify
from gemma3_export.parity.cases import ragged_batch
from gemma3_export.parity.sequences import sequences_for
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.runtimes.onnx.graph_file import open_graph_file
from gemma3_export.runtimes.onnx.graph_interface import cache_place
from gemma3_export.runtimes.onnx.third_party import ThirdPartyRuntime
from tests.support import other_graphs
from tests.support.exported_bundles import exported_bundle, source_of
from tests.support.other_graphs import CONFIG, Change, write_graph
from tests.support.tiny_models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = VerifyOptions(decode_steps=12, greedy_steps=6)


@pytest.fixture(scope="module")
def ground_truth() -> GroundTruth:
    source = source_of()
    return GroundTruth.for_runtime(
        ReferenceRuntime(load_reference(source)), source, options=OPTIONS
    )


def hold(path: Path, ground_truth: GroundTruth | None) -> ParityReport:
    runtime = ThirdPartyRuntime(path, CONFIG, device="cpu", threads=1)
    return verify(runtime, source_of(), options=OPTIONS, ground_truth=ground_truth)


@pytest.mark.parametrize(
    ("change", "target", "side"),
    [
        (other_graphs.without_num_logits, "portable", "left"),
        (other_graphs.without_num_logits, "ort", "right"),
        (other_graphs.scalar_logits_to_keep, "portable", "left"),
        (other_graphs.named_as_tuples, "portable", "left"),
        (other_graphs.as_transformers_exports, "portable", "left"),
        (other_graphs.with_fixed_caches, "portable", None),
        (other_graphs.one_token_at_a_time, "portable", None),
    ],
)
def test_a_right_graph_passes_under_every_interface(
    change: Change, target: str, side: str | None, ground_truth: GroundTruth, tmp_path: Path
) -> None:
    path = write_graph(tmp_path / "model.onnx", change, target=target)
    assert ThirdPartyRuntime(path, CONFIG, device="cpu").padding_side == side
    report = hold(path, ground_truth)
    assert report.passed, report.to_json()
    assert report.candidate["made_by"].startswith("another tool")  # type: ignore[attr-defined]
    assert ("padded" in {case.name for case in report.cases}) == (side is not None)


def test_caches_in_half_precision_are_judged_by_its_noise_floor(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", other_graphs.with_half_caches)
    report = hold(path, None)
    assert report.passed, report.to_json()
    assert report.noise_floor_dtype == "float16"


@pytest.mark.parametrize(
    ("change", "is_joined"),
    [(other_graphs.as_transformers_exports, True), (other_graphs.without_num_logits, False)],
)
def test_rows_of_different_lengths_are_joined_if_the_graph_takes_positions(
    change: Change, is_joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = ThirdPartyRuntime(write_graph(tmp_path / "model.onnx", change), CONFIG, device="cpu")
    batches: list[int] = []

    def run(ids: Any, *arguments: Any) -> Any:
        batches.append(len(ids))
        return ThirdPartyRuntime._run(runtime, ids, *arguments)

    monkeypatch.setattr(runtime, "_run", run)
    sequences = sequences_for(CONFIG, OPTIONS, None)
    list(ragged_batch(runtime, sequences=sequences, window=CONFIG.sliding_window))
    assert (3 in batches) == is_joined


def test_a_missing_window_is_found_at_its_edge(ground_truth: GroundTruth, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "model.onnx", other_graphs.without_window)
    report = hold(path, ground_truth)
    verdicts = {case.name: case.passed for case in report.cases}
    assert verdicts["prefill-6"]
    assert not verdicts["prefill-7"]
    assert not verdicts["decode"]
    found = report.divergence
    assert found is not None
    assert (found.layer, found.block, found.position) == (1, "self_attn.attend", 6)
    assert "the error starts at the edge of the window of 6" in found.explanation
    assert "inferred from the caches" in found.explanation


def test_an_inexact_scale_of_the_embedding_is_found(
    ground_truth: GroundTruth, tmp_path: Path
) -> None:
    path = write_graph(tmp_path / "model.onnx", other_graphs.with_rounded_embedding_scale)
    report = hold(path, ground_truth)
    assert not report.passed
    found = report.divergence
    assert found is not None
    assert (found.layer, found.position) == (1, 0)
    assert "the scale of the embedding" in found.explanation
    assert "times larger" not in found.explanation


def test_a_missing_window_is_not_hidden_by_a_defect_before_it(
    ground_truth: GroundTruth, tmp_path: Path
) -> None:
    changes = (other_graphs.with_rounded_embedding_scale, other_graphs.without_window)
    report = hold(write_graph(tmp_path / "model.onnx", *changes), ground_truth)
    assert report.divergence is not None
    assert "from position 6 on, errors are" in report.divergence.explanation


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("past_key_values.3.key", (3, 0)),
        ("past_key_values_3_value", (3, 1)),
        ("past_key_values_key_cache_12", (12, 0)),
        ("past_value_0", (0, 1)),
        ("past_key_values_4_1", (4, 1)),
        ("present_key_values.5.key", (5, 0)),
        ("present.0.value", (0, 1)),
        ("input.cache.layers.7.keys", (7, 0)),
        ("input.cache.layers.7._sliding_window_tensor", None),
        ("past_key_values", None),
        ("past_0", None),
        ("logits", None),
    ],
)
def test_caches_are_recognized_by_name(name: str, place: tuple[int, int] | None) -> None:
    assert cache_place(name) == place


def with_an_unknown_input(model: Any) -> None:
    other_graphs.add_input(model, "token_type_ids", onnx.TensorProto.INT64, ["batch", "sequence"])


def with_a_custom_operator(model: Any) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


def with_a_quantized_operator(model: Any) -> None:
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["logits"], ["a", "b", "c"])
    model.graph.node.append(node)


def with_embeddings_as_input(model: Any) -> None:
    other_graphs.replace_input(model, "input_ids", "tokens")
    next(value for value in model.graph.input if value.name == "input_ids").name = "tokens"


def without_logits(model: Any) -> None:
    other_graphs.replace_output(model, "logits", "scores")
    next(value for value in model.graph.output if value.name == "logits").name = "scores"


def without_present(model: Any) -> None:
    value = next(value for value in model.graph.output if value.name == "present.2.key")
    model.graph.output.remove(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_an_unknown_input, r"'token_type_ids' cannot be fed"),
        (with_a_custom_operator, r"has the operator com\.example::Shape"),
        (with_a_quantized_operator, r"is quantized \(it has DynamicQuantizeLinear\)"),
        (with_embeddings_as_input, r"'tokens' cannot be fed"),
        (without_logits, r"no output logits"),
        (without_present, r"present tensor of past_key_values\.2\.key"),
    ],
)
def test_a_graph_that_cannot_be_fed_is_rejected(
    change: Change, message: str, tmp_path: Path
) -> None:
    path = write_graph(tmp_path / "model.onnx", change)
    with pytest.raises(InputError, match=message):
        ThirdPartyRuntime(path, CONFIG, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4, "layer_types": CONFIG.layer_types[:4]}, "for 5 layers"),
        ({"head_dim": 18}, "2 key-value heads of 18"),
        ({"vocab_size": 98}, "logits for 97 tokens, and the weights have 98"),
    ],
)
def test_a_graph_of_another_model_is_rejected(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_graph(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=message):
        ThirdPartyRuntime(path, tiny_config(**changes), device="cpu")


@pytest.mark.parametrize(
    "location", ["../model.onnx_data", "/etc/passwd", "data/../../secret", "", "..\\secret"]
)
def test_external_data_outside_the_folder_is_rejected(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Bundle(exported_bundle("portable")).file("onnx"), folder)
    (tmp_path / "model.onnx_data").write_bytes((folder / "model.onnx_data").read_bytes())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == t.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="not a file in its own folder"):
        open_graph_file(folder / "model.onnx")


def test_external_data_behind_a_link_out_of_the_folder_is_rejected(tmp_path: Path) -> None:
    folder, data = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(Bundle(exported_bundle("portable")).file("onnx"), folder)
    (folder / "model.onnx_data").rename(data)
    (folder / "model.onnx_data").symlink_to(data)
    with pytest.raises(InputError, match="a link that leads out of its folder"):
        open_graph_file(folder / "model.onnx")


def test_a_cache_of_the_hub_is_opened_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.copytree(Bundle(exported_bundle("portable")).file("onnx"), blobs)
    snapshot.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx_data"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    file = open_graph_file(snapshot / "model.onnx")
    assert file.data_files == (snapshot / "model.onnx_data",)


def test_truncated_external_data_is_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Bundle(exported_bundle("portable")).file("onnx"), folder)
    data = folder / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"up to byte \d+, but the file has \d+"):
        open_graph_file(folder / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x07"])
def test_a_file_that_is_not_a_graph_is_rejected(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not an ONNX graph"):
        open_graph_file(path)


def test_a_graph_that_caches_only_its_window_names_the_graph_to_verify() -> None:
    graphs = exported_bundle("ort") / "onnx"
    with pytest.raises(InputError, match=r"caches only the sliding window.*model\.onnx beside it"):
        open_graph_file(graphs / "model_windowed.onnx")
    open_graph_file(graphs / "model.onnx")
