"""Serve with engines on Ray Serve: replicas on one machine or many, restarted when they die.

``gemma3-export serve --ray`` listens in its own process (:func:`serve_on_ray`). For ``serve run``
and Kubernetes, :func:`build_app` returns an application with an ingress deployment instead, which
Ray's HTTP proxies call. Both forward to the same replicas (:mod:`.ray_front`, :mod:`.ray_replica`).
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from gemma3_export import errors
from gemma3_export.api.engine import EngineOptions
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.processors import available_processors
from gemma3_export.serve.gate import log_to_stderr
from gemma3_export.serve.ray_front import create_front
from gemma3_export.serve.ray_replica import EngineReplica
from gemma3_export.serve.ray_settings import RayOptions, read_arguments
from gemma3_export.serve.server import DrainingServer, log_listening
from gemma3_export.serve.settings import KEY_VARIABLE, ServeOptions, read_key_file, require_key

__all__ = ["build_app", "serve_on_ray"]

logger = logging.getLogger(__name__)

ENGINES = "engines"  # name of the deployment
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0
CONNECT_S = 10.0
POLL_S = 0.2  # how often a replica that ends looks whether its requests have
STOP_S = 5.0  # for a replica's engine to end after them
OUR_ERROR = re.compile(r"\bgemma3_export\.errors\.(\w+): (.+)")  # in a traceback
QUIET = {"log_level": "WARNING", "enable_access_log": False}


def serve_on_ray(
    path: Path,
    engine: EngineOptions,
    options: ServeOptions,
    cluster: RayOptions,
    listener: socket.socket,
) -> int:
    """Start replicas, answer requests until SIGINT or SIGTERM, and end the replicas.

    New requests get 503 while running ones finish, as in :func:`.server.serve`.

    Args:
        path: the bundle or weights; every machine of the cluster must have it there.
        engine: options of each replica's engine, with those of loading.
        options: limits, and the names that clients use.
        cluster: how many replicas, and where.
        listener: a bound socket.

    Returns:
        0 if every request was answered, otherwise 128 plus the number of the signal.

    Raises:
        InputError: other machines can reach the address, and there is no key; or a replica
            cannot run with these options.
        Gemma3ExportError: the cluster cannot be reached, or the replicas do not start.
    """
    require_key(listener.getsockname()[0], options.key)
    log_to_stderr()
    engine = _settled(engine, cluster)
    with _connected(cluster, engine):
        name = f"gemma3-export-{secrets.token_hex(4)}"
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        try:
            handle = _run(_engines(path.resolve(), engine, options, cluster), name)
            app, front = create_front(handle, options)
            server = DrainingServer(app, options, front.aclose)
            log_listening(listener, options)
            server.run(sockets=[listener])
            return server.exit_code
        finally:
            serve.delete(name)


def _run(engines: Any, name: str) -> Any:
    """Deploy an application that only this process can reach, and return its handle.

    Raises:
        Gemma3ExportError: its replicas do not start; the error is of the type that they raised.
    """
    try:
        return serve.run(engines, name=name, route_prefix=None, logging_config=QUIET)
    except RuntimeError as error:
        message = serve.status().applications[name].deployments[ENGINES].message or str(error)
        if found := OUR_ERROR.search(message):
            kind = getattr(errors, found[1], Gemma3ExportError)
            raise kind(f"the replicas do not start: {found[2]}") from error
        raise Gemma3ExportError(f"the replicas do not start: {message[-2000:]!r}") from error


def _engines(path: Path, engine: EngineOptions, options: ServeOptions, cluster: RayOptions) -> Any:
    """Return the deployment of the engines, bound to its arguments."""
    places = engine.slots + engine.queue_limit
    scaling: dict[str, Any] = {"num_replicas": cluster.min_replicas}
    if cluster.max_replicas > cluster.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": cluster.min_replicas,
                "max_replicas": cluster.max_replicas,
                "target_ongoing_requests": cluster.target_requests or engine.slots,
            }
        }
    return serve.deployment(
        EngineReplica,
        name=ENGINES,
        # Requests queue in the engines, which start the next one with their next step.
        max_ongoing_requests=places,
        # Ray counts those that it is about to hand over, too, so a burst needs room here.
        max_queued_requests=places,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=POLL_S,
        graceful_shutdown_timeout_s=options.drain_s + STOP_S,
        ray_actor_options={
            "num_cpus": engine.threads,
            "num_gpus": int(engine.device == "cuda"),
        },
        **scaling,
    ).bind(path, engine, replace(options, key=None))


def _settled(engine: EngineOptions, cluster: RayOptions) -> EngineOptions:
    """Choose what depends on the machine: a replica gets the processors and GPUs it reserves.

    Raises:
        InputError: the options name a GPU, which Ray chooses.
    """
    if engine.device.startswith("cuda:"):
        raise InputError(f"Ray chooses the GPU of a replica; use cuda instead of {engine.device!r}")
    device = "cpu" if engine.device == "auto" else engine.device
    threads = engine.threads or max(1, available_processors() // cluster.max_replicas)
    return replace(engine, device=device, threads=threads)


@contextmanager
def _connected(cluster: RayOptions, engine: EngineOptions) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine that ends with the block.

    Raises:
        Gemma3ExportError: there is no cluster at the address, or it does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other program go first
    wanted = cluster.max_replicas * (engine.threads or 1)
    local: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "num_cpus": max(wanted, available_processors()),
    }
    if cluster.address not in (None, "auto"):
        _check_reachable(cluster)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            ray.init(
                **(local if cluster.address is None else {"address": cluster.address}),
                namespace="gemma3-export",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray's errors share no base class
            if cluster.address is None:
                raise Gemma3ExportError(f"cannot start a Ray cluster: {error}") from error
            remedy = "if it requires a token, copy it from ~/.ray/auth_token on its first machine"
            if cluster.address == "auto":
                remedy = "`ray start --head` starts one on this machine"
            raise Gemma3ExportError(
                f"cannot connect to a Ray cluster at {cluster.address!r:.80}: {error}; {remedy}"
            ) from error
        for number, handler in handlers.items():  # Ray replaces them
            signal.signal(number, handler)
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if (cpus := ray.cluster_resources().get("CPU", 0)) < wanted:
            facts = {"cluster_cpus": cpus, "wanted_cpus": wanted}
            logger.warning("replicas wait for machines", extra={"facts": facts})
        yield
    finally:
        ray.shutdown()  # which ends a cluster that it has started


def _check_reachable(cluster: RayOptions) -> None:
    """Find out at once what Ray would try for minutes.

    Raises:
        Gemma3ExportError: nothing listens at the address.
    """
    try:
        with socket.create_connection(cluster.host_and_port(), timeout=CONNECT_S):
            pass
    except OSError as error:
        raise Gemma3ExportError(
            f"cannot connect to a Ray cluster at {cluster.address!r:.80}: {error}; `ray status` on "
            "a machine of the cluster prints whether it runs, and `ray start --head` starts one"
        ) from error


def build_app(args: dict[str, Any]) -> Any:
    """Return an application for ``serve run`` and RayService: an ingress, and the engines.

    Ray's HTTP proxies call the ingress, which needs the route prefix ``/``. See docs/ray.md for
    what they do not protect from.

    Args:
        args: fields of :class:`.ray_settings.AppArguments`; numbers may be text.

    Raises:
        InputError: an argument is unknown, or has a wrong value.
    """
    arguments = read_arguments(args)
    key_file, options = arguments.key_file, arguments.serve
    cluster = arguments.cluster
    engine = _settled(arguments.engine, cluster)
    engines = _engines(Path(arguments.bundle), engine, options, cluster)

    def build_front() -> Any:
        """Build the ingress' ASGI app, in the process of the ingress."""
        key = os.environ.get(KEY_VARIABLE) if key_file is None else read_key_file(Path(key_file))
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(ENGINES, app_name=context.app_name)
        gate, _ = create_front(handle, replace(options, key=key))
        return gate

    ingress = serve.deployment(
        serve.ingress(build_front)(),
        name="front",
        max_ongoing_requests=options.max_connections,
        graceful_shutdown_wait_loop_s=POLL_S,
        graceful_shutdown_timeout_s=options.drain_s + STOP_S,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    return ingress.bind(engines)
