"""Downloads a checkpoint from the Hugging Face Hub and says plainly why it could not."""

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

from gemma3_export.errors import InputError, UnavailableError

__all__ = ["download"]

PATTERNS = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]
ALTERNATIVES = (
    "Instead, give weights that you have (--weights FOLDER, FILE.safetensors or FILE.gguf), or try "
    "the pipeline with --random-weights SEED."
)
DENIED = (401, 403)


def download(hub_id: str, *, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Fetch config, tokenizer and safetensors of ``hub_id``; return the folder and the commit.

    Raises:
        InputError: the repository or revision does not exist, or access is not granted.
        UnavailableError: the Hub cannot be reached.
    """
    at = f"{hub_id} (revision {revision})" if revision else hub_id
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            token=token,
            allow_patterns=PATTERNS,
            ignore_patterns=["*/*"],  # other formats live in folders of their own
        )
    except GatedRepoError as error:
        raise InputError(
            f"access to {at} is gated: accept its license at https://huggingface.co/{hub_id}, "
            f"then set HF_TOKEN or run `hf auth login`. {ALTERNATIVES}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{hub_id} has no revision {revision!r}; name another") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{at} was not found on the Hub (no such repository, or it is private: set HF_TOKEN or "
            f"run `hf auth login`). {ALTERNATIVES}"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{hub_id!r} is not a Hub repository id: {error}") from error
    except LocalTokenNotFoundError as error:
        raise InputError("no token was found; set HF_TOKEN or run `hf auth login`") from error
    except (
        Exception
    ) as error:  # the HTTP library, the disk and the Hub each have errors of their own
        raise _translate(error, at) from error
    return Path(folder), Path(folder).name


def _translate(error: Exception, at: str) -> InputError | UnavailableError:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the client fell back to its cache, which hides why
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in DENIED:
            return InputError(
                f"the Hub denies access to {at} (HTTP {status}); check HF_TOKEN or run "
                f"`hf auth login`. {ALTERNATIVES}"
            )
        return UnavailableError(f"the Hub failed for {at} (HTTP {status}). {ALTERNATIVES}")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return UnavailableError(
            f"the Hub cannot be reached, and {at} is not in the local cache. Check the network and "
            f"HF_HUB_OFFLINE. {ALTERNATIVES}"
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"a file of {at} has gone from the Hub; name another --revision")
    return UnavailableError(
        f"the download of {at} failed ({type(error).__name__}: {str(error)[:300]}); run it again. "
        f"{ALTERNATIVES}"
    )
