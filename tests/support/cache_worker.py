"""Allocate a cache over the CUDA stub, in another interpreter, and print what is in its memory.

The stub fills new device memory with ones, as a GPU leaves what was there. Arguments: the bundle,
and 0 to leave out the clearing. Prints a JSON object: bytes of the cache, and how many are not 0.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from pathlib import Path

import onnxruntime

from gemma3_export.runtimes.onnx import token_transfer
from gemma3_export.runtimes.onnx.caches import InPlaceCache
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime


def contents(bundle: Path, *, clears: bool) -> dict[str, int]:
    """Return the number of bytes in a new cache, and of those that are not zero."""
    onnxruntime.preload_dlls = lambda: None  # real libraries would replace the stub
    if not clears:
        vars(token_transfer)["copier"] = lambda device: lambda source, target, size: None
    runtime = OnnxRuntime(bundle, device="cuda")
    ctypes.CDLL(None).gemma3_stub_fill_memory()
    cache = runtime.new_cache(3, 40)
    assert isinstance(cache, InPlaceCache)
    memory = b"".join(
        ctypes.string_at(buffer.data_ptr(), math.prod(shape) * cache.dtype.itemsize)
        for buffer, shape in zip(cache.buffers, cache.shapes, strict=True)
    )
    return {"bytes": len(memory), "nonzero": len(memory) - memory.count(0)}


if __name__ == "__main__":
    print(json.dumps(contents(Path(sys.argv[1]), clears=sys.argv[2] == "1")))
