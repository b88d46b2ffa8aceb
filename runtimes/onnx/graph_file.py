"""Open an ``.onnx`` file that another tool made, without trusting it.

The file is parsed, never executed. Its external data must be in its own folder, and its operators
must be those of ONNX and ONNX Runtime, so that no library has to be loaded for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gemma3_export.dtypes import ELEMENT_TYPES, DType
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import check_regular

__all__ = ["GraphFile", "open_graph_file"]

MAX_GRAPH_BYTES = 2**31 - 1  # of a protobuf message; larger weights are external data
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
QUANTIZED_OPERATORS = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QAttention",
    "QGemm",
    "QMoE",
    "QuantizeLinear",
}
WINDOWED_CACHE = "sliding_window_cache"  # an attribute of GroupQueryAttention
PRECISION: tuple[DType, ...] = ("bfloat16", "float16", "float32", "float64")  # lowest first


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphFile:
    """Facts about a graph that another tool made."""

    path: Path
    producer: str  # name and version of the tool, as far as the file says
    operators: Counter[str]  # in the graph, its subgraphs and its functions
    matrix_dtype: DType  # lowest floating-point precision of the stored matrices
    data_files: tuple[Path, ...]  # external data

    @property
    def quantized_operators(self) -> list[str]:
        """Return the operators that show that matrices are stored in blocks of integers."""
        return sorted(
            name
            for name in self.operators
            if name in QUANTIZED_OPERATORS or name.startswith("QLinear")
        )


def open_graph_file(path: Path) -> GraphFile:
    """Parse and check the file at ``path``; weights in external data are not read.

    Raises:
        InputError: it is not a graph, refers to files outside its folder, has operators that need
            a library of their own, or caches only the sliding window.
        UnavailableError: the package ``onnx`` is missing.
    """
    model = _parsed(path)
    _check_operators(path, model)
    _check_caches(path, model)
    tensors = list(_tensors(model))
    files = dict.fromkeys(
        _data_file(path, tensor) for tensor in tensors if tensor.data_location == tensor.EXTERNAL
    )
    names = {item.onnx: item.name for item in ELEMENT_TYPES.values()}
    stored = {names.get(tensor.data_type) for tensor in tensors if len(tensor.dims) > 1}
    return GraphFile(
        path=path,
        producer=f"{model.producer_name} {model.producer_version}".strip() or "an unnamed tool",
        operators=Counter(node.op_type for node in _nodes(model)),
        matrix_dtype=next((dtype for dtype in PRECISION if dtype in stored), "float32"),
        data_files=tuple(files),
    )


def _parsed(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise UnavailableError(
            'checking this graph needs the package onnx; run: pip install "gemma3-export[export]"'
        ) from error
    size = check_regular(path)
    if size > MAX_GRAPH_BYTES:
        raise InputError(
            f"{path} has {size} bytes, more than the 2 GiB that an ONNX file may have; save it "
            "with external data"
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base class
        raise InputError(f"{path} is not an ONNX graph: {error!r:.200}") from error
    if not model.graph.node:
        raise InputError(f"{path} is not an ONNX graph: it has no nodes")
    return model


def _graphs(model: Any) -> Iterator[Any]:
    """Yield the graph, its functions, and the subgraphs of their nodes."""
    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += attribute.graphs


def _nodes(model: Any) -> Iterator[Any]:
    for graph in _graphs(model):
        yield from graph.node


def _tensors(model: Any) -> Iterator[Any]:
    """Yield every stored tensor: initializers and attributes, at any depth."""
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse_tensors = [*attribute.sparse_tensors]
            if attribute.HasField("sparse_tensor"):
                sparse_tensors.append(attribute.sparse_tensor)
            for sparse in sparse_tensors:
                yield from (sparse.values, sparse.indices)


def _check_operators(path: Path, model: Any) -> None:
    """Reject operators that only a custom library implements.

    Raises:
        InputError: naming the first one.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in functions:
            raise InputError(
                f"{path} has the operator {node.domain}::{node.op_type}, which neither ONNX nor "
                "ONNX Runtime defines; libraries of custom operators are not loaded, so export "
                "the model without it"
            )


def _check_caches(path: Path, model: Any) -> None:
    """Reject caches that hold only the window, which have to be allocated in one exact size.

    Raises:
        InputError: a layer has one.
    """
    for node in _nodes(model):
        if any(item.name == WINDOWED_CACHE and item.i for item in node.attribute):
            raise InputError(
                f"{path} caches only the sliding window in the node {node.name!r:.60}, which needs "
                "its own runtime; verify the bundle that it belongs to, or model.onnx beside it"
            )


def _data_file(path: Path, tensor: Any) -> Path:
    """Return the file with the external data of ``tensor``.

    Its real path must be beside the graph or below, in the graph's folder as it is named or as it
    really is: a cache of the Hub links both files into one folder of blobs.

    Raises:
        InputError: the file is outside, or is missing.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    what = f"{path} stores {tensor.name[:60]!r} in {location[:120]!r}"
    if not parts or location.startswith("/") or ".." in parts or "\\" in location:
        raise InputError(f"{what}, which is not a file in its own folder; export the model again")
    file = path.parent.joinpath(*parts)
    size = check_regular(file)
    folders = (path.parent.resolve(), path.resolve().parent)
    if not any(file.resolve().is_relative_to(folder) for folder in folders):
        raise InputError(
            f"{what}, a link that leads out of its folder; replace it with the file itself"
        )
    try:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    except ValueError as error:
        raise InputError(f"{what} at a place that is not a number; export it again") from error
    if not 0 <= end <= size:
        raise InputError(f"{what} up to byte {end}, but the file has {size}; copy it again")
    return file
