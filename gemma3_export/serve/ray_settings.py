"""Settings of a server on Ray: replicas, and the arguments of an application of Ray Serve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from gemma3_export.api.checks import check_integers, check_texts
from gemma3_export.api.engine import EngineOptions
from gemma3_export.api.options import PREFIX_CACHE_BYTES
from gemma3_export.errors import InputError
from gemma3_export.limits import QUEUE_LIMIT, SLOTS
from gemma3_export.serve.settings import (
    BODY_S,
    DRAIN_S,
    MAX_BODY_BYTES,
    MAX_CHOICES,
    MAX_TOKENS,
    REQUEST_S,
    ServeOptions,
)

__all__ = ["AppArguments", "RayOptions", "ray_options", "read_arguments", "send_token"]

MAX_REPLICAS = 1000
# Where Ray looks for its token, and whether it sends one to an address. To a cluster that it finds
# itself, it always does.
AUTH_TOKEN, AUTH_PATH, AUTH_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """How many replicas run on a Ray cluster, and where that is.

    Args:
        address: of a cluster that this machine belongs to, ``auto`` or ``HOST:PORT``; None starts
            one on this machine.
        min_replicas: replicas that always run.
        max_replicas: replicas that run under load; more than ``min_replicas`` is autoscaling.
        target_requests: requests per replica that autoscaling aims for; None is the slots.

    Raises:
        InputError: a value is out of range.
    """

    address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: int | None = None

    def __post_init__(self) -> None:
        check_integers(self, 1, "min_replicas", "max_replicas", most=MAX_REPLICAS)
        check_integers(self, 1, "target_requests")
        check_texts(self, "address")
        if self.address is not None and "://" in self.address:
            raise InputError(
                f"the Ray address {self.address!r:.80} belongs to Ray's client, which is "
                "not supported; run the command on a machine of the cluster, with auto"
            )
        if self.address not in (None, "auto"):
            self.host_and_port()
        if self.max_replicas < self.min_replicas:
            raise InputError(
                f"max_replicas is {self.max_replicas}, fewer than min_replicas, which is "
                f"{self.min_replicas}; raise it"
            )

    def host_and_port(self) -> tuple[str, int]:
        """Return the parts of an address that is ``HOST:PORT``.

        Raises:
            InputError: it is not.
        """
        host, _, port = (self.address or "").rpartition(":")
        is_number = port.isascii() and port.isdigit() and len(port) <= 5
        if not host or not is_number or not 0 < int(port) < 65536:
            raise InputError(
                f"the Ray address {self.address!r:.80} is neither auto nor HOST:PORT, such as "
                "127.0.0.1:6379"
            )
        return host.strip("[]"), int(port)


@dataclass(frozen=True, kw_only=True, slots=True)
class AppArguments:
    """Arguments of :func:`.ray_serve.build_app`; those not listed are as for the command ``serve``.

    Args:
        bundle: path of the bundle on every machine of the cluster.
        model_name: the id that clients see; None is the name of the folder.
        key_file: file with the API key, on the machine of the ingress; without it, the variable
            ``GEMMA3_API_KEY`` has the key.
        replicas: replicas of the engine; excludes the next two.
        min_replicas: replicas that always run.
        max_replicas: replicas that run under load.
        target_requests: requests per replica that autoscaling aims for; None is the slots.
        threads: intra-op threads of a replica, for which it reserves as many processors.
        device: ``cpu``, or ``cuda`` for one GPU per replica.

    Raises:
        InputError: a value is out of range, or excludes another.
    """

    bundle: str
    model_name: str | None = None
    key_file: str | None = None
    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    target_requests: int | None = None
    threads: int = 1
    device: str = "cpu"
    variant: str | None = None
    slots: int = SLOTS
    queue_limit: int = QUEUE_LIMIT
    max_request_tokens: int | None = None
    cache_bytes: int | None = None
    prefill_chunk: int | None = None
    kept_prefix_bytes: int = PREFIX_CACHE_BYTES
    max_tokens: int = MAX_TOKENS
    max_choices: int = MAX_CHOICES
    max_body_bytes: int = MAX_BODY_BYTES
    request_s: float = REQUEST_S
    body_s: float = BODY_S
    drain_s: float = DRAIN_S

    def __post_init__(self) -> None:
        _ = (self.engine, self.serve, self.cluster)  # which check their fields

    @property
    def engine(self) -> EngineOptions:
        """The options of each replica's engine."""
        return EngineOptions(warm_up=True, huge_pages=True, **self._fields_of(EngineOptions))

    @property
    def serve(self) -> ServeOptions:
        """The limits, and the name that clients use, without the key."""
        own = {
            "model_name": self.model_name or Path(self.bundle).name,
            "max_choices": min(self.max_choices, self.slots + self.queue_limit),
        }
        return ServeOptions(**self._fields_of(ServeOptions) | own)

    @property
    def cluster(self) -> RayOptions:
        """How many replicas there are."""
        limits = (self.replicas, self.min_replicas, self.max_replicas)
        return ray_options(*limits, target_requests=self.target_requests)

    def _fields_of(self, kind: type) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _names(kind) & _names(AppArguments)}


def ray_options(
    replicas: int | None, least: int | None, most: int | None, **more: Any
) -> RayOptions:
    """Return the options for a fixed number of replicas, or for a minimum and a maximum.

    Args:
        replicas: the number; None lets the next two decide.
        least: the minimum; None is 1.
        most: the maximum; None is the minimum.
        more: other fields of :class:`RayOptions`.

    Raises:
        InputError: there is a number as well as a limit, or a value is out of range.
    """
    if replicas is not None:
        if least is not None or most is not None:
            raise InputError(
                "a number of replicas excludes a minimum and a maximum; leave out one or the other"
            )
        least = most = replicas
    least = 1 if least is None else least
    return RayOptions(min_replicas=least, max_replicas=least if most is None else most, **more)


def send_token() -> None:
    """Let Ray send this user's token, if there is one, to a cluster at an address, too.

    Call it before Ray is imported, which reads the mode once. A mode that is set stays.
    """
    path = Path(os.environ.get(AUTH_PATH) or Path.home() / ".ray" / "auth_token")
    if AUTH_TOKEN in os.environ or path.is_file():
        os.environ.setdefault(AUTH_MODE, "token")


def read_arguments(args: Mapping[str, Any]) -> AppArguments:
    """Return the arguments of an application; numbers may be text, as from a command line.

    Raises:
        InputError: an argument is unknown or missing, or has a wrong value.
    """
    names = _names(AppArguments)
    if unknown := sorted(set(args) - names):
        raise InputError(
            f"there is no argument {unknown[0]!r:.80}; the arguments are {', '.join(sorted(names))}"
        )
    if "bundle" not in args:
        raise InputError("the argument bundle is missing: bundle=DIR")
    try:
        return msgspec.convert(dict(args), AppArguments, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"an argument has a wrong value: {error}") from error


def _names(kind: type) -> set[str]:
    return {each.name for each in fields(kind)}
