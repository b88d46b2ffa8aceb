"""Element types and export dtypes: the one table that every other name is derived from.

An *element type* is what a tensor is made of, under the name that numpy, torch and the manifest
share (``float32``). An *export dtype* is what ``--dtype`` takes (``fp32``, ``int8``, ``mixed``): it
says how matrices are stored, which backends have it, and how far it may be from full precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gemma3_export.errors import InputError
from gemma3_export.limits import MAX_KLD, check_number

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT_MAX_KLD",
    "ELEMENT_TYPES",
    "EXPORT_DTYPES",
    "FLOAT_DTYPES",
    "ROUNDINGS",
    "DType",
    "ElementType",
    "ExportDtype",
    "dtype_choices",
    "element_type",
    "export_dtype",
    "require_max_kld",
    "torch_dtype",
]

DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8"]
ROUNDINGS = ("auto", "gptq", "q4_0")  # how int4 rounds, as --rounding takes it
DEFAULT_MAX_KLD = 0.01  # nats per token: what 8-bit weights stay within with room to spare


@dataclass(frozen=True, kw_only=True, slots=True)
class ElementType:
    """One element type under every name that a library has for it."""

    name: DType  # numpy's (which lacks bfloat16), torch's and the manifest's
    size_bytes: int
    onnx: int  # onnx.TensorProto.DataType, which onnx_ir shares
    ort_type: str  # what onnxruntime's NodeArg.type says
    safetensors: str


ELEMENT_TYPES: dict[DType, ElementType] = {
    item.name: item
    for item in (
        ElementType(
            name="float64", size_bytes=8, onnx=11, ort_type="tensor(double)", safetensors="F64"
        ),
        ElementType(
            name="float32", size_bytes=4, onnx=1, ort_type="tensor(float)", safetensors="F32"
        ),
        ElementType(
            name="float16", size_bytes=2, onnx=10, ort_type="tensor(float16)", safetensors="F16"
        ),
        ElementType(
            name="bfloat16", size_bytes=2, onnx=16, ort_type="tensor(bfloat16)", safetensors="BF16"
        ),
        ElementType(
            name="int64", size_bytes=8, onnx=7, ort_type="tensor(int64)", safetensors="I64"
        ),
        ElementType(name="int8", size_bytes=1, onnx=3, ort_type="tensor(int8)", safetensors="I8"),
        ElementType(name="uint8", size_bytes=1, onnx=2, ort_type="tensor(uint8)", safetensors="U8"),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportDtype:
    """A storage format of the model's matrices, as ``--dtype`` names it."""

    name: str  # as --dtype takes it
    element: DType | None  # of all weights; None: matrices are stored as integers
    backends: tuple[str, ...]  # that can run it
    is_calibrated: bool = False  # made with calibration text
    is_per_channel: bool = False  # one scale per output, not per block; for ort on the CPU
    has_block_size: bool = False  # --block-size applies
    max_kld: float = DEFAULT_MAX_KLD  # default budget, mean nats per token from full precision
    file_suffix: str = ""  # of graphs, as on the Hub: see bundle/variants.py
    half_file_suffix: str = ""  # the same before f16 or bf16, if activations are in that type

    @property
    def is_quantized(self) -> bool:
        """Return True if matrices are stored as integers."""
        return self.element is None

    @property
    def has_half_activations(self) -> bool:
        """Return True if a quantized graph can compute in half precision."""
        return bool(self.half_file_suffix)


EXPORT_DTYPES: dict[str, ExportDtype] = {
    item.name: item
    for item in (
        ExportDtype(name="fp32", element="float32", backends=("onnx", "torchscript", "pt2")),
        ExportDtype(
            name="bf16",
            element="bfloat16",
            backends=("onnx", "torchscript", "pt2"),
            file_suffix="bf16",
        ),
        ExportDtype(
            name="fp16",
            element="float16",
            backends=("onnx", "torchscript", "pt2"),
            file_suffix="fp16",
        ),
        ExportDtype(
            name="int8",
            element=None,
            backends=("onnx", "torchscript"),
            has_block_size=True,
            file_suffix="quantized",
            half_file_suffix="q8",
        ),
        ExportDtype(
            name="w8a8",
            element=None,
            backends=("onnx",),
            is_per_channel=True,
            file_suffix="w8a8",
        ),
        ExportDtype(
            name="keep",
            element=None,
            backends=("onnx",),
            file_suffix="keep",
            half_file_suffix="keep_",
        ),
        ExportDtype(
            name="int4",
            element=None,
            backends=("onnx",),
            is_calibrated=True,
            has_block_size=True,
            max_kld=0.1,
            file_suffix="q4",
            half_file_suffix="q4",
        ),
        ExportDtype(
            name="mixed",
            element=None,
            backends=("onnx",),
            is_calibrated=True,
            has_block_size=True,
            max_kld=0.05,
            file_suffix="mixed",
            half_file_suffix="mixed_",
        ),
    )
}
FLOAT_DTYPES = tuple(item.name for item in EXPORT_DTYPES.values() if not item.is_quantized)


def dtype_choices(backend: str) -> tuple[str, ...]:
    """Return the export dtypes that ``backend`` can run, the default first."""
    return tuple(item.name for item in EXPORT_DTYPES.values() if backend in item.backends)


def export_dtype(name: str, backend: str) -> ExportDtype:
    """Return the export dtype called ``name``.

    Raises:
        InputError: ``backend`` cannot run it, or it does not exist.
    """
    choices = dtype_choices(backend)
    if name not in choices:
        raise InputError(f"dtype {name!r} is not supported here; choose {', '.join(choices)}")
    return EXPORT_DTYPES[name]


def element_type(name: str) -> ElementType:
    """Return the element type called ``name``: ``float32``, or ``fp32`` as ``--dtype`` says.

    Raises:
        InputError: it is unknown, or stores matrices as integers.
    """
    for item in ELEMENT_TYPES.values():
        if name == item.name:
            return item
    exported = EXPORT_DTYPES.get(name)
    if exported is None or exported.element is None:
        raise InputError(
            f"{name!r:.40} is not a floating-point type; choose {', '.join(FLOAT_DTYPES)}"
        )
    return ELEMENT_TYPES[exported.element]


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for an element type, by its long or short name.

    Raises:
        InputError: as :func:`element_type`.
    """
    import torch

    found = getattr(torch, element_type(name).name)
    assert isinstance(found, torch.dtype)
    return found


def require_max_kld(max_kld: float) -> float:
    """Return ``max_kld``, mean nats per token, if it is a possible budget.

    Raises:
        InputError: it is not a positive number of at most 100.
    """
    return check_number(
        "max_kld, in nats per token such as 0.05,", max_kld, 0, MAX_KLD, is_open=True
    )
