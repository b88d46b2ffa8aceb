"""Exported ONNX graphs: interface, operators, weights, and no trace of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from gemma3_export.bundle import Bundle, TensorSpec
from gemma3_export.errors import InputError
from gemma3_export.exporters import decoder_step
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx import trace, writer
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.reference import model
from gemma3_export.reference.model import RMSNorm
from gemma3_export.reference.weights import WeightSource
from gemma3_export.reference.weights.bundle_weights import OnnxWeights
from tests.support.exported_bundles import (
    TARGETS,
    VARIANTS,
    export_tiny,
    exported_bundle,
    source_of,
)
from tests.support.shared_traces import is_patched
from tests.support.tiny_models import tiny_config

EXPORTS = [
    ("ort", "irregular"),
    ("portable", "irregular"),
    ("ort", "one sliding layer, many tokens"),
    ("portable", "all full, one kv head, untied"),
]
ONNX_TYPES = {"int64": onnx.TensorProto.INT64, "float32": onnx.TensorProto.FLOAT}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=EXPORTS, ids=", ".join)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return Bundle(exported_bundle(*request.param))


def graph_path(bundle: Bundle) -> Path:
    return bundle.file(bundle.graph("onnx").path)


def load(bundle: Bundle, *, with_data: bool = False) -> onnx.ModelProto:
    return onnx.load(graph_path(bundle), load_external_data=with_data)


def variant_of(bundle: Bundle) -> str:
    return next(name for name, config in VARIANTS.items() if config == bundle.config)


def described(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    axes = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, tensor.elem_type, axes


def expected(spec: TensorSpec) -> tuple[str, int, tuple[int | str, ...]]:
    return spec.name, ONNX_TYPES[spec.dtype], spec.axes


def test_inputs_and_outputs_are_the_signature(bundle: Bundle) -> None:
    graph, signature = load(bundle).graph, bundle.signature(bundle.graph("onnx"))
    assert [described(value) for value in graph.input] == [expected(s) for s in signature.inputs]
    assert [described(value) for value in graph.output] == [expected(s) for s in signature.outputs]
    defaults = {tensor.name: tensor for tensor in graph.initializer}
    assert {value.name for value in graph.input} & defaults.keys() == {"num_logits_to_keep"}
    assert numpy_helper.to_array(defaults["num_logits_to_keep"]).tolist() == [0]


def test_every_weight_is_stored_once(bundle: Bundle) -> None:
    data = graph_path(bundle).with_name("model.onnx_data")
    parameters = 4 * bundle.config.num_parameters
    pages = 4096 * len(bundle.graph("onnx").weights)  # each tensor starts on a page boundary
    assert parameters <= data.stat().st_size <= parameters + pages
    stored = [tensor.name for tensor in load(bundle).graph.initializer if tensor.external_data]
    assert sorted(stored) == sorted(bundle.graph("onnx").weights)
    names = [n for recipe in bundle.graph("onnx").weights.values() for n in recipe.names]
    assert sorted(names) == sorted(dict(bundle.config.weight_shapes()))


def test_a_bundle_is_barely_larger_than_its_parameters() -> None:
    bundle = Bundle(exported_bundle("ort", "one sliding layer, many tokens"))
    files = (graph_path(bundle), graph_path(bundle).with_name("model.onnx_data"))
    size = sum(file.stat().st_size for file in files)
    assert size == pytest.approx(4 * bundle.config.num_parameters, rel=0.01)


def test_graphs_pass_the_checker(bundle: Bundle) -> None:
    onnx.checker.check_model(graph_path(bundle), full_check=True)


def test_portable_graphs_have_standard_operators_only() -> None:
    model = load(Bundle(exported_bundle("portable")))
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert not model.functions


def test_fused_graphs_have_one_attention_node_per_layer_in_config_order() -> None:
    bundle = Bundle(exported_bundle("ort"))
    model, config = load(bundle), bundle.config
    assert {opset.domain for opset in model.opset_import} == {"", "com.microsoft"}
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == config.num_hidden_layers
    tables: dict[bool, set[str]] = {True: set(), False: set()}
    for layer, node in enumerate(nodes):
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        window = config.sliding_window if config.is_sliding(layer) else -1
        assert found["local_window_size"] == window, layer
        assert found["scale"] == pytest.approx(config.attention_scale, rel=1e-6)
        assert found["num_heads"] == config.num_attention_heads
        assert found["kv_num_heads"] == config.num_key_value_heads
        assert found["do_rotary"] == 1
        assert list(node.input[3:5]) == [
            f"past_key_values.{layer}.key",
            f"past_key_values.{layer}.value",
        ]
        assert list(node.output[1:]) == [f"present.{layer}.key", f"present.{layer}.value"]
        tables[config.is_sliding(layer)] |= set(node.input[7:9])
    assert all(len(names) == 2 for names in tables.values()), "one cosine and sine table a kind"
    assert not tables[True] & tables[False]


def test_stored_bytes_follow_from_source_and_recipes(bundle: Bundle) -> None:
    source = source_of(variant_of(bundle))
    stored = {t.name: t for t in load(bundle, with_data=True).graph.initializer}
    for name, recipe in bundle.graph("onnx").weights.items():
        expected_tensor = torch.cat([source.read(part) for part in recipe.names])
        if recipe.transposed:
            expected_tensor = expected_tensor.T
        assert np.array_equal(numpy_helper.to_array(stored[name]), expected_tensor.numpy()), name


def test_weights_read_back_from_a_bundle_are_bit_equal(bundle: Bundle) -> None:
    source, weights = source_of(variant_of(bundle)), OnnxWeights(bundle)
    for name, shape in bundle.config.weight_shapes():
        assert torch.equal(weights.read(name), source.read(name)), name
        rows = slice(shape[0] // 3, shape[0] // 2)
        assert torch.equal(weights.read(name, rows.start, rows.stop), source.read(name)[rows])
        assert torch.equal(torch.cat(list(weights.chunks(name, max_bytes=999))), source.read(name))


def test_bundles_contain_no_paths_of_this_machine(bundle: Bundle) -> None:
    forbidden = rb"\.py\b|Traceback|site-packages|" + re.escape(str(REPOSITORY).encode())
    forbidden += rb"|" + re.escape(str(bundle.path.parent).encode())
    for file in bundle.path.rglob("*"):
        if file.is_file() and file.name != "model.onnx_data":
            found = re.search(rb".{0,40}(" + forbidden + rb").{0,40}", file.read_bytes())
            assert found is None, (file.name, found)


@pytest.mark.parametrize("target", TARGETS)
def test_two_exports_are_byte_equal(target: str, tmp_path: Path) -> None:
    first, second = exported_bundle(target), export_tiny(tmp_path / "again", target)
    names = {file.relative_to(first) for file in first.rglob("*")}
    assert names == {file.relative_to(second) for file in second.rglob("*")}
    for name in names:
        if (first / name).is_file():
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_error_for_weights_that_are_not_finite_names_the_tensor(tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.k_proj.weight"

    class Damaged(type(source_of())):  # type: ignore[misc]
        def read(self, wanted: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            tensor: torch.Tensor = super().read(wanted, start, stop)
            if wanted == name:
                tensor.view(-1)[-1] = torch.nan
            return tensor

    source: WeightSource = Damaged(tiny_config(), 1)
    with pytest.raises(InputError, match=rf"{re.escape(name)} has 1 values"):
        export_bundle(source, tmp_path / "out", OnnxWriter())
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


def test_unknown_targets_and_dtypes_are_rejected() -> None:
    with pytest.raises(InputError, match="ort or portable"):
        OnnxWriter(target="cuda")
    with pytest.raises(InputError, match="fp32"):
        OnnxWriter(dtype="fp8")


def test_exports_of_a_fresh_and_of_a_shared_trace_are_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two traces give the same bytes, and tests may share one; see tests/support/shared_traces."""
    for name in ("first", "shared"):
        export_tiny(tmp_path / name, "ort")
    monkeypatch.setattr(writer, "trace_onnx", trace.trace_onnx)
    export_tiny(tmp_path / "fresh", "ort")
    fresh, shared = (Bundle(tmp_path / name).manifest.files for name in ("fresh", "shared"))
    assert fresh == shared


@pytest.mark.parametrize(
    ("owner", "name"),
    [(RMSNorm, "forward"), (model, "rotate"), (decoder_step, "dynamic_shapes"), (trace, "TARGETS")],
)
def test_tests_that_replace_a_part_of_the_model_do_not_share_traces(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_patched()
    monkeypatch.setattr(owner, name, None)
    assert is_patched()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_tracing_the_largest_model_needs_no_memory_for_its_weights() -> None:
    program = r"""
import re
from pathlib import Path
from gemma3_export.exporters.onnx.passes import MODEL_PASSES, GraphPlan, apply_passes
from gemma3_export.exporters.onnx.trace import trace_onnx
from gemma3_export.config.presets import preset

config = preset("27b").config
model, recipes = trace_onnx(config, "ort")
apply_passes(MODEL_PASSES, model, GraphPlan(config=config))
kinds = [
    "sliding_attention" if node.attributes["local_window_size"].value > 0 else "full_attention"
    for node in model.graph
    if node.op_type == "GroupQueryAttention"
]
assert tuple(kinds) == config.layer_types
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5e9, "108 GB of weights, but torch and a graph in memory"
