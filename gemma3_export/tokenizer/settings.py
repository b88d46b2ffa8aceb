"""What surrounds a tokenizer: its special tokens, chat templates and other settings.

Hugging Face folders keep them in ``tokenizer_config.json`` and a few files next to it, and GGUF
files in their metadata. They belong to a fine-tune as much as its weights do, so exports carry
them over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gemma3_export.config import TOKENIZER_CONFIG_NAME, load_json_object
from gemma3_export.errors import InputError
from gemma3_export.files import read_text

__all__ = [
    "ADDITIONAL_TEMPLATES",
    "CHAT_TEMPLATE_JINJA",
    "DEFAULT_TEMPLATE",
    "TokenizerSettings",
    "settings_from_folder",
    "settings_from_gguf",
]

CHAT_TEMPLATE_JINJA = "chat_template.jinja"
CHAT_TEMPLATE_JSON = "chat_template.json"  # of processors, which multimodal models have
ADDITIONAL_TEMPLATES = "additional_chat_templates"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
MAX_TEMPLATE_BYTES = 2**20
# Keys of tokenizer_config.json that are about code, files or the library that wrote it, or that
# tokenizer.json has already.
DROPPED_KEYS = {
    *("added_tokens_decoder", "auto_map", "backend", "chat_template", "device_map", "files_loaded"),
    *("init_inputs", "is_local", "local_files_only", "name_or_path", "processor_class"),
    *("response_schema", "slow_tokenizer_class", "sp_model_kwargs", "special_tokens_map_file"),
    *("tokenizer_class", "tokenizer_file", "transformers_version", "vocab_file"),
}
GGUF_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "mask_token": "mask",
}


class MetadataReader(Protocol):
    """The interface that ``gguf_file.GgufFile`` and ``gguf.GGUFReader`` share."""

    def get_field(self, key: str) -> Any:
        """Return an object whose ``contents()`` is the value of ``key``, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSettings:
    """Settings that came with a tokenizer; empty if none did.

    Attributes:
        special_tokens: ``bos_token``, ``eos_token`` and the like, which templates use as variables.
            A token that is declared absent is None.
        templates: Jinja source of the chat templates by name.
        other: other entries of ``tokenizer_config.json``, such as ``model_max_length``.
    """

    special_tokens: Mapping[str, str | None] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    def template(self, name: str | None, *, has_tools: bool) -> str | None:
        """Return the source of a template, None if there are no templates.

        Args:
            name: which of several templates; None chooses as transformers does.
            has_tools: the conversation has tools.

        Raises:
            InputError: the template does not exist, or none is the default.
        """
        if name is None and not self.templates:
            return None
        wanted = [TOOL_TEMPLATE] * has_tools + [DEFAULT_TEMPLATE] if name is None else [name]
        for candidate in wanted:
            if candidate in self.templates:
                return self.templates[candidate]
        known = ", ".join(sorted(self.templates)) or "none"
        asked = "no default chat template" if name is None else f"no chat template {name!r:.60}"
        raise InputError(f"the tokenizer has {asked}; choose among: {known}")


def settings_from_folder(folder: Path) -> TokenizerSettings:
    """Read the settings next to a ``tokenizer.json``.

    Raises:
        InputError: a file is damaged.
    """
    config_path = folder / TOKENIZER_CONFIG_NAME
    config = load_json_object(config_path) if config_path.is_file() else {}
    legacy_path = folder / SPECIAL_TOKENS_MAP
    # Like transformers, which reads this older file only where the newer entry is missing.
    if "added_tokens_decoder" not in config and legacy_path.is_file():
        config |= load_json_object(legacy_path)
    where = str(config_path)
    special: dict[str, str | None] = {}
    other: dict[str, Any] = {}
    for key, value in config.items():
        if key in DROPPED_KEYS:
            continue
        if key.endswith("_token") and not isinstance(value, bool):
            special[key] = _token_text(value, f"{where}: {key}")
        elif key == "extra_special_tokens" and isinstance(value, Mapping):
            named = {name: _token_text(token, f"{where}: {key}") for name, token in value.items()}
            special |= named
        else:
            other[key] = value
    templates = _read_templates(folder, config.get("chat_template"), where)
    return TokenizerSettings(special_tokens=special, templates=templates, other=other)


def settings_from_gguf(reader: MetadataReader) -> TokenizerSettings:
    """Read the settings in the metadata of a GGUF file.

    Raises:
        InputError: an entry has the wrong type.
    """
    tokens = reader.get_field("tokenizer.ggml.tokens")
    special: dict[str, str | None] = {}
    for key, name in GGUF_TOKENS.items():
        token_id = _contents(reader, f"tokenizer.ggml.{name}_token_id")
        if token_id is None or tokens is None:
            continue
        pieces = tokens.contents()
        if type(token_id) is not int or not 0 <= token_id < len(pieces):
            raise InputError(
                f"tokenizer.ggml.{name}_token_id is {token_id!r:.60}, but there are {len(pieces)} "
                "tokens; convert the file again"
            )
        special[key] = pieces[token_id]
    templates: dict[str, str] = {}
    names = _contents(reader, "tokenizer.chat_templates") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"tokenizer.chat_templates is {names!r:.60}; it must be a list of names; convert the "
            "file again"
        )
    for name in (DEFAULT_TEMPLATE, *names):
        key = "tokenizer.chat_template"
        key = key if name == DEFAULT_TEMPLATE else f"{key}.{name}"
        source = _contents(reader, key)
        if source is not None:
            templates[name] = _template_text(source, key)
    return TokenizerSettings(special_tokens=special, templates=templates)


def _read_templates(folder: Path, configured: object, where: str) -> dict[str, str]:
    """Read all templates of a folder; separate files take precedence, as in transformers."""
    templates: dict[str, str] = {}
    if isinstance(configured, list):
        for entry in configured:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
                raise InputError(f"{where}: chat_template has the entry {entry!r:.80}; name it")
            templates[entry["name"]] = _template_text(entry.get("template"), where)
    elif isinstance(configured, Mapping):
        for name, source in configured.items():
            templates[name] = _template_text(source, where)
    elif configured is not None:
        templates[DEFAULT_TEMPLATE] = _template_text(configured, where)
    files = {DEFAULT_TEMPLATE: folder / CHAT_TEMPLATE_JINJA}
    files |= {path.stem: path for path in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))}
    from_files = {name: _read_template(path) for name, path in files.items() if path.is_file()}
    if from_files:
        return from_files
    processor = folder / CHAT_TEMPLATE_JSON
    if not templates and processor.is_file():
        source = load_json_object(processor).get("chat_template")
        if source is not None:
            templates[DEFAULT_TEMPLATE] = _template_text(source, str(processor))
    return templates


def _read_template(path: Path) -> str:
    text = read_text(path, limit_bytes=MAX_TEMPLATE_BYTES)
    # Python's text files, which transformers reads, have no other line ends.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _template_text(source: object, where: str) -> str:
    if not isinstance(source, str):
        raise InputError(f"{where}: the chat template is {source!r:.60}; it must be a string")
    return source


def _token_text(token: object, where: str) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise InputError(f"{where} is {json.dumps(token):.80}; it must be the text of a token")
    return token


def _contents(reader: MetadataReader, key: str) -> object:
    entry = reader.get_field(key)
    if entry is None:
        return None
    try:
        value: object = entry.contents()
    except UnicodeDecodeError as error:
        raise InputError(f"{key} is not UTF-8 ({error}); convert the file again") from error
    return value
