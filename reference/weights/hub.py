"""Download a checkpoint from the Hugging Face Hub, with clear errors."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gemma3_export.config import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
)
from gemma3_export.errors import InputError, UnavailableError

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
DENIED = (401, 403)


def download(hub_id: str, *, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Download config, tokenizer and safetensors of ``hub_id``; return folder and commit.

    Raises:
        InputError: the repository or revision does not exist, or access is denied.
        UnavailableError: the Hub cannot be reached.
    """
    at = f"{hub_id} (revision {revision})" if revision else hub_id
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            token=token,
            allow_patterns=PATTERNS,
            ignore_patterns=OTHER_FOLDERS,
        )
    except GatedRepoError as error:
        raise InputError(
            f"access to {at} is gated: accept its license at https://huggingface.co/{hub_id}, "
            f"then set HF_TOKEN or run `hf auth login`. {ALTERNATIVES}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{hub_id} has no revision {revision!r}; choose another") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{at} was not found on the Hub. If it is private, set HF_TOKEN or run `hf auth "
            f"login`. {ALTERNATIVES}"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is not a Hub repository id: {error}") from error
    except LocalTokenNotFoundError as error:
        raise InputError("there is no Hub token; set HF_TOKEN or run `hf auth login`") from error
    except Exception as error:  # HTTP library, disk and Hub have no common error type
        raise _translate(error, at) from error
    return Path(folder), Path(folder).name


def _translate(error: Exception, at: str) -> InputError | UnavailableError:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the client's fallback to its cache hides the cause
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in DENIED:
            return InputError(
                f"the Hub denies access to {at} (HTTP {status}); check HF_TOKEN or run "
                f"`hf auth login`. {ALTERNATIVES}"
            )
        return UnavailableError(f"the Hub request for {at} failed (HTTP {status}). {ALTERNATIVES}")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return UnavailableError(
            f"the Hub cannot be reached, and {at} is not in the local cache. Check the network and "
            f"HF_HUB_OFFLINE. {ALTERNATIVES}"
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"a file of {at} no longer exists on the Hub; choose another --revision")
    return UnavailableError(
        f"the download of {at} failed ({type(error).__name__}: {str(error)[:300]}); try again. "
        f"{ALTERNATIVES}"
    )
