"""Download a checkpoint from the Hugging Face Hub, with clear errors."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from gemma3_export.config import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
)
from gemma3_export.hub_errors import explain_hub_error

__all__ = ["download"]

PATTERNS = [
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    "*.safetensors",
    "adapter_config.json",
    "adapter_model.bin",
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
]
# Other subfolders hold other formats.
OTHER_FOLDERS = ["[!a]*/*", "a[!d]*/*", "*/*.json", "*/*.safetensors"]
ALTERNATIVES = (
    "Alternatively, use local weights (--weights FOLDER, FILE.safetensors or FILE.gguf), or try "
    "the model that comes with this package (--weights demo)."
)


def download(hub_id: str, *, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Download config, tokenizer and safetensors of ``hub_id``; return folder and commit.

    Raises:
        InputError: the repository or revision does not exist, or access is denied.
        UnavailableError: the Hub cannot be reached.
    """
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            token=token,
            allow_patterns=PATTERNS,
            ignore_patterns=OTHER_FOLDERS,
        )
    except Exception as error:  # HTTP library, disk and Hub have no common error type
        raise explain_hub_error(
            error, "download", hub_id, revision=revision, hint=ALTERNATIVES
        ) from error
    return Path(folder), Path(folder).name
