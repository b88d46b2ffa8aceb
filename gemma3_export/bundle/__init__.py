"""The exported folder: manifest, graph signature, quantized block formats, inspection."""

from gemma3_export.bundle.block_format import (
    CODES,
    LOOKUP_SCALES,
    MINIMUMS,
    SCALES,
    ZERO_POINTS,
    BlockFormat,
    StoredTensor,
    block_tensors,
    common_format,
)
from gemma3_export.bundle.bundle import Bundle
from gemma3_export.bundle.hf_metadata import write_hf_metadata
from gemma3_export.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    ONNX_TARGETS,
    PARITY,
    RUNTIMES,
    FileRecord,
    Graph,
    Manifest,
    WeightRecipe,
    read_manifest,
    sha256_of,
    write_manifest,
)
from gemma3_export.bundle.signature import (
    MODEL_PREFIX,
    WINDOW_MARGIN,
    Axis,
    Signature,
    TensorSpec,
    window_capacity,
)

__all__ = [
    "CODES",
    "FORMAT_VERSION",
    "LOOKUP_SCALES",
    "MANIFEST",
    "MINIMUMS",
    "MODEL_PREFIX",
    "ONNX_TARGETS",
    "PARITY",
    "RUNTIMES",
    "SCALES",
    "WINDOW_MARGIN",
    "ZERO_POINTS",
    "Axis",
    "BlockFormat",
    "Bundle",
    "FileRecord",
    "Graph",
    "Manifest",
    "Signature",
    "StoredTensor",
    "TensorSpec",
    "WeightRecipe",
    "block_tensors",
    "common_format",
    "read_manifest",
    "sha256_of",
    "window_capacity",
    "write_hf_metadata",
    "write_manifest",
]
