"""The files around the weights that Hugging Face tools read: configs and tokenizer.

Bundles and Hugging Face folders get the same files from here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.config import CONFIG_NAME, GENERATION_CONFIG_NAME, Gemma3Config, config_to_json
from gemma3_export.staging import write_text_atomically

if TYPE_CHECKING:
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["generation_config_to_json", "write_hf_metadata"]

# Gemma's recommended sampling. This project's own default is greedy decoding.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}


def write_hf_metadata(folder: Path, config: Gemma3Config, tokenizer: Tokenizer | None) -> None:
    """Write ``config.json``, ``generation_config.json`` and the tokenizer's files to ``folder``.

    Raises:
        Gemma3ExportError: the disk is full or not writable.
    """
    _write_json(folder / CONFIG_NAME, config_to_json(config))
    _write_json(folder / GENERATION_CONFIG_NAME, generation_config_to_json(config))
    if tokenizer is not None:
        tokenizer.save(folder)


def generation_config_to_json(config: Gemma3Config) -> dict[str, Any]:
    """Return the content of ``generation_config.json``: special tokens and sampling defaults."""
    tokens = config_to_json(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: tokens[name] for name in names} | SAMPLING


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(data, indent=2) + "\n")
