"""The converters give our weights to the peers; these tests need no peer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.peers import WORKERS
from gemma3_export.api.exporting import open_weights


def load_worker(name: str) -> ModuleType:
    """Load a worker as its own Python does: from its path, outside any package."""
    spec = importlib.util.spec_from_file_location(name, WORKERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_llama_cpp_gets_a_gguf_with_the_same_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    file = tmp_path / "model.gguf"
    load_worker("llama_cpp_worker").write_gguf(tiny_folder, file)
    config = tiny_folder / "config.json"
    with (
        open_weights(str(tiny_folder)) as ours,
        open_weights(str(file), config_path=config) as back,
    ):
        shapes = dict(ours.config.weight_shapes())
        assert dict(back.config.weight_shapes()) == shapes
        for name in shapes:
            # Norms are stored plus one, which rounds.
            np.testing.assert_allclose(back.read(name), ours.read(name), rtol=0, atol=1e-7)


def test_bytes_per_token_exclude_tables_that_are_only_indexed(tmp_path: Path) -> None:
    worker = load_worker("onnx_bytes")
    tables = {
        "embedding": np.zeros((10, 4), np.float32),
        "head": np.zeros((4, 10), np.float16),
        "tied": np.zeros((8, 4), np.float32),
    }
    nibbles = helper.make_tensor("nibbles", TensorProto.UINT4, [3, 3], np.zeros(9, np.uint8))
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["row"]),
        helper.make_node("Gather", ["tied", "ids"], ["other"]),
        helper.make_node("MatMul", ["row", "head"], ["logits"]),
        helper.make_node("MatMul", ["row", "tied"], ["more"]),
        helper.make_node("DequantizeLinear", ["nibbles", "scale"], ["small"]),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in tables.items()]
    graph = helper.make_graph(nodes, "g", [], [], [*initializers, nibbles])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert worker.bytes_per_token(tmp_path / "model.onnx") == 4 * 10 * 2 + 8 * 4 * 4 + 5
