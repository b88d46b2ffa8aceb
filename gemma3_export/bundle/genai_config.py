"""Write ``genai_config.json``, with which onnxruntime-genai opens a bundle's ONNX graph.

Format: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma3_export.bundle.manifest import Graph
from gemma3_export.bundle.signature import Signature
from gemma3_export.config import Gemma3Config
from gemma3_export.staging import write_text_atomically

__all__ = ["GENAI_CONFIG", "genai_config_to_json", "write_genai_config"]

GENAI_CONFIG = "genai_config.json"
MODEL_TYPE = "gemma3_text"
# Its share-buffer cache is allocated for the longest text at once, which for a whole context of
# 131,072 tokens is tens of gigabytes. Callers can ask for more, up to the context.
MAX_LENGTH = 8192
# The sampling settings of generation_config.json that it has under the same names.
SEARCH_KEYS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def write_genai_config(
    folder: Path, config: Gemma3Config, graph: Graph, generation: Mapping[str, Any]
) -> None:
    """Write the file to a bundle's folder; see :func:`genai_config_to_json`.

    Raises:
        Gemma3ExportError: the disk is full or not writable.
    """
    data = genai_config_to_json(config, graph, generation)
    write_text_atomically(folder / GENAI_CONFIG, json.dumps(data, indent=2) + "\n")


def genai_config_to_json(
    config: Gemma3Config, graph: Graph, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of ``genai_config.json``.

    Args:
        config: the model.
        graph: the bundle's ONNX graph.
        generation: the content of ``generation_config.json``.
    """
    signature = Signature.of(config, cache_dtype=graph.cache_dtype)
    tokens = {
        name: generation[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if generation[name] is not None
    }
    search = {
        key: generation[key] for key in SEARCH_KEYS if isinstance(generation.get(key), (int, float))
    }
    return {
        "model": {
            "type": MODEL_TYPE,
            **tokens,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    **graph.session_entries,
                    "provider_options": [],
                },
                "filename": graph.path,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": {
                    "input_ids": signature.input_ids.name,
                    "attention_mask": signature.attention_mask.name,
                    "past_key_names": template(signature.past_keys[0].name),
                    "past_value_names": template(signature.past_values[0].name),
                },
                "outputs": {
                    "logits": signature.logits.name,
                    "present_key_names": template(signature.present_keys[0].name),
                    "present_value_names": template(signature.present_values[0].name),
                },
            },
        },
        "search": {
            **search,
            "max_length": min(config.max_position_embeddings, MAX_LENGTH),
            # Fused attention extends a cache in place; standard operators return a longer one.
            "past_present_share_buffer": graph.target == "ort",
        },
    }


def template(first: str) -> str:
    """Return a name of layer 0 as the format string of all layers' names."""
    return first.replace(".0.", ".%d.")
