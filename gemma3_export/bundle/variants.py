"""Variants of a bundle: the same weights in several dtypes, and the names of their files.

A variant is named after the options that made it: ``fp32``, ``int8``, or ``int4-fp16`` for ``int4``
with fp16 activations. A bundle has at most one graph per runtime and variant.

Files are named as on the Hugging Face Hub, where transformers.js looks for them. The name follows
the dtype even if the folder has no other variant, so a variant that is added later renames nothing:

    fp32       model.onnx            int8         model_quantized.onnx
    bf16       model_bf16.onnx       int4         model_q4.onnx
    fp16       model_fp16.onnx       int4-fp16    model_q4f16.onnx
"""

from __future__ import annotations

from gemma3_export.dtypes import EXPORT_DTYPES, FLOAT_DTYPES, DType

__all__ = ["DEFAULT_STEM", "graph_stem", "variant_name"]

DEFAULT_STEM = "model"
FULL_PRECISION: DType = "float32"


def variant_name(dtype: str, activations: DType = FULL_PRECISION) -> str:
    """Return the name of the variant with weights in ``dtype``.

    Args:
        dtype: as ``--dtype`` takes it.
        activations: element type of a quantized graph's activations; ignored for other dtypes.
    """
    short = _half_activations(dtype, activations)
    return dtype if short is None else f"{dtype}-{short}"


def graph_stem(dtype: str, activations: DType = FULL_PRECISION) -> str:
    """Return the name of a variant's graph without its extension, such as ``model_q4f16``.

    Args:
        dtype: as for :func:`variant_name`.
        activations: as for :func:`variant_name`.
    """
    short = _half_activations(dtype, activations)
    exported = EXPORT_DTYPES[dtype]
    if short is None:
        suffix = exported.file_suffix
    else:
        suffix = exported.half_file_suffix + short.replace("fp16", "f16")
    return f"{DEFAULT_STEM}_{suffix}" if suffix else DEFAULT_STEM


def _half_activations(dtype: str, activations: DType) -> str | None:
    """Return a quantized graph's half precision as ``--activations`` names it."""
    if not EXPORT_DTYPES[dtype].has_half_activations or activations == FULL_PRECISION:
        return None
    names = {EXPORT_DTYPES[name].element: name for name in FLOAT_DTYPES}
    return names.get(activations)
