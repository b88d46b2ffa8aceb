"""Add to ``config.json`` what transformers.js needs to open a bundle's graphs for browsers.

transformers.js finds the graph of a dtype by its file name (see ``variants.py``). It has to be told
that weights are in a file of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma3_export.bundle.manifest import REMEDY, Graph
from gemma3_export.config import CONFIG_NAME
from gemma3_export.records import read_json
from gemma3_export.staging import write_text_atomically

__all__ = ["WEB_DTYPES", "transformers_js_config", "write_transformers_js_config"]

KEY = "transformers.js_config"
# The dtypes of graphs for browsers, and what transformers.js calls them.
WEB_DTYPES = {"fp32": "fp32", "int8": "q8"}


def write_transformers_js_config(folder: Path, graphs: Sequence[Graph]) -> None:
    """Replace the entry in a bundle's ``config.json``; see :func:`transformers_js_config`.

    Raises:
        InputError: it cannot be read.
        Gemma3ExportError: the disk is full or not writable.
    """
    path = folder / CONFIG_NAME
    data = read_json(path, remedy=REMEDY)
    data[KEY] = transformers_js_config(graphs)
    write_text_atomically(path, json.dumps(data, indent=2) + "\n")


def transformers_js_config(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Return the entry for a bundle's graphs.

    With fp32 and int8, transformers.js takes int8 for WebAssembly and fp32 for WebGPU by itself.
    """
    dtypes = [WEB_DTYPES[graph.dtype] for graph in graphs if graph.target == "web"]
    only = {"dtype": dtypes[0]} if len(dtypes) == 1 else {}
    # Version 3 also reads kv_cache_dtype.
    return {**only, "kv_cache_dtype": "float32", "use_external_data_format": True}
