"""Settings of the server: its limits, its address and its key."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from gemma3_export.api.checks import check_integers, check_texts
from gemma3_export.errors import InputError
from gemma3_export.files import read_text
from gemma3_export.limits import MAX_SIZE_BYTES, check_number

__all__ = [
    "BODY_S",
    "DRAIN_S",
    "KEY_VARIABLE",
    "MAX_BODY_BYTES",
    "MAX_CHOICES",
    "MAX_TOKENS",
    "REQUEST_S",
    "ServeOptions",
    "is_loopback",
    "read_key_file",
    "require_key",
]

KEY_VARIABLE = "GEMMA3_API_KEY"
# Defaults of ServeOptions, of commands and of applications on Ray.
MAX_TOKENS = 4096
MAX_CHOICES = 64
MAX_CONNECTIONS = 512
MAX_BODY_BYTES = 2_000_000
REQUEST_S = 600.0
BODY_S = 30.0
DRAIN_S = 30.0
MAX_KEY_BYTES = 4096
MAX_WAIT_S = 7 * 24 * 3600.0
DURATIONS = ("request_s", "body_s", "header_s", "drain_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """Limits of a server. What exceeds one is rejected with an error that names it.

    Args:
        model_name: the id that clients see and may ask for.
        key: what clients send as ``Authorization: Bearer KEY``; None lets everybody in.
        max_tokens: maximum number of tokens per choice.
        max_choices: maximum number of choices per request, ``n`` times its prompts.
        max_stops: maximum number of stop texts per request.
        max_stop_characters: maximum length of a stop text.
        max_body_bytes: maximum size of a request body.
        max_connections: maximum number of open connections.
        request_s: seconds for a whole answer, including its wait for a slot.
        body_s: seconds in which the body of a request must arrive.
        header_s: seconds in which the headers of a request must arrive.
        drain_s: seconds that running requests have to finish once the server is told to stop.

    Raises:
        InputError: a value is out of range, or the key cannot be sent in a header.
    """

    model_name: str
    key: str | None = field(default=None, repr=False)
    max_tokens: int = MAX_TOKENS
    max_choices: int = MAX_CHOICES
    max_stops: int = 16
    max_stop_characters: int = 256
    max_body_bytes: int = MAX_BODY_BYTES
    max_connections: int = MAX_CONNECTIONS
    request_s: float = REQUEST_S
    body_s: float = BODY_S
    header_s: float = 10.0
    drain_s: float = DRAIN_S

    def __post_init__(self) -> None:
        check_texts(self, "model_name", "key")
        if not self.model_name:
            raise InputError("the model name is empty; give one that clients can ask for")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise InputError("the API key must be printable ASCII, because a header carries it")
        if self.key is not None and not self.key.strip():
            raise InputError("the API key is empty; give a key, or leave it out")
        counts = ("max_tokens", "max_choices", "max_stops", "max_stop_characters")
        check_integers(self, 1, *counts, "max_connections")
        check_integers(self, 1, "max_body_bytes", most=MAX_SIZE_BYTES)
        for name in DURATIONS:
            least = 0.0 if name == "drain_s" else 0.001
            check_number(name, getattr(self, name), least, MAX_WAIT_S)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key(host: str, key: str | None) -> None:
    """Require a key if other machines can reach ``host``.

    Raises:
        InputError: there is none.
    """
    if key is None and not is_loopback(host):
        raise InputError(
            f"other machines can reach --host {host!r:.60}, so the server needs an API key; set "
            f"{KEY_VARIABLE}, or give --api-key-file FILE"
        )


def read_key_file(path: Path) -> str:
    """Return the key in a file, without the space around it.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    key = read_text(path, limit_bytes=MAX_KEY_BYTES, or_pipe=True).strip()
    if not key:
        raise InputError(f"{path} is empty; write the API key into it")
    return key
