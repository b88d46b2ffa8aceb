"""The files around the weights that Hugging Face tools read: configs and tokenizer.

Bundles and Hugging Face folders get the same files from here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.config import CONFIG_NAME, GENERATION_CONFIG_NAME, Gemma3Config, config_to_json
from gemma3_export.staging import write_text_atomically

if TYPE_CHECKING:
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["generation_config_to_json", "write_hf_metadata"]

# Gemma's recommended sampling. This project's own default is greedy decoding.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
# The last minor version that writes configs like ours. Where there is none, 4.57 warns that the
# tokenizer may split text wrongly, and recommends an argument with which it crashes.
TRANSFORMERS_VERSION = "4.57.1"
# About the library that wrote a file, or the caches that it uses.
LIBRARY_KEYS = ("_from_model_config", "cache_implementation", "transformers_version")


def write_hf_metadata(
    folder: Path,
    config: Gemma3Config,
    tokenizer: Tokenizer | None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json``, ``generation_config.json`` and the tokenizer's files to ``folder``.

    Args:
        folder: the bundle or Hugging Face folder.
        config: the model.
        tokenizer: with its chat templates and other settings.
        generation: the source's ``generation_config.json``, if it has one.

    Raises:
        Gemma3ExportError: the disk is full or not writable.
    """
    data = config_to_json(config) | {"transformers_version": TRANSFORMERS_VERSION}
    _write_json(folder / CONFIG_NAME, data)
    _write_json(folder / GENERATION_CONFIG_NAME, generation_config_to_json(config, generation))
    if tokenizer is not None:
        tokenizer.save(folder)


def generation_config_to_json(
    config: Gemma3Config, generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of ``generation_config.json``: special tokens and sampling defaults.

    The source's defaults are carried over; Gemma's replace missing ones.
    """
    tokens = config_to_json(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    carried = {
        key: value
        for key, value in (generation or SAMPLING).items()
        if key not in names and key not in LIBRARY_KEYS
    }
    return {name: tokens[name] for name in names} | carried


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(data, indent=2) + "\n")
