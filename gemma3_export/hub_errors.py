"""Explain in one message why a request to the Hugging Face Hub failed, with the remedy."""

from __future__ import annotations

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

__all__ = ["LOG_IN", "explain_hub_error"]

LOG_IN = "set HF_TOKEN or run `hf auth login`"
DENIED = (401, 403)


def explain_hub_error(
    error: Exception, action: str, hub_id: str, *, revision: str | None = None, hint: str = ""
) -> InputError | UnavailableError:
    """Return the error to raise instead of one of the Hub's client.

    Args:
        error: what the client raised; HTTP library, disk and Hub have no common type.
        action: what failed, such as ``download``.
        hub_id: the repository.
        revision: the branch, tag or commit, None for the default branch.
        hint: what else one can do; it ends the message.
    """
    at = f"{hub_id} (revision {revision})" if revision else hub_id
    more = f" {hint}" if hint else ""
    error = _cause_of(error)
    if isinstance(error, GatedRepoError):
        return InputError(
            f"access to {at} is gated: accept its license at https://huggingface.co/{hub_id}, "
            f"then {LOG_IN}.{more}"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{hub_id} has no revision {revision!r}; choose another")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{at} was not found on the Hub. If it is private, {LOG_IN}.{more}")
    if isinstance(error, HFValidationError):
        return InputError(f"{hub_id!r} is not a Hub repository id: {error}")
    if isinstance(error, LocalTokenNotFoundError):
        return InputError(f"there is no Hub token; {LOG_IN}")
    if isinstance(error, OfflineModeIsEnabled):
        return UnavailableError(
            f"the {action} of {at} needs the Hub, and HF_HUB_OFFLINE is set; unset it.{more}"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return UnavailableError(
            f"the Hub cannot be reached, and {at} is not in the local cache. Check the network and "
            f"HF_HUB_OFFLINE.{more}"
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"a file of {at} no longer exists on the Hub; choose another --revision")
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in DENIED:
            return InputError(
                f"the Hub denies the {action} of {at} (HTTP {status}); check the permissions of "
                f"your token, {LOG_IN}.{more}"
            )
        return UnavailableError(
            f"the Hub request for the {action} of {at} failed (HTTP {status}).{more}"
        )
    return UnavailableError(
        f"the {action} of {at} failed ({type(error).__name__}: {str(error)[:300]}); try again."
        f"{more}"
    )


def _cause_of(error: Exception) -> Exception:
    """Return the error that the client hid behind its own: a missing cache, or a failed thread."""
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        return cause
    if type(error) is RuntimeError and isinstance(cause, Exception):
        return _cause_of(cause)
    return error
