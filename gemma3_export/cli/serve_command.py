"""Define the command ``gemma3-export serve``."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_export.cli.engine_options import engine_options
from gemma3_export.cli.generation_options import OpeningRequest, note_variant_of, opening_options
from gemma3_export.cli.options import PATH, REAL, TEXT_PATH, integer, memory_size
from gemma3_export.errors import UnavailableError
from gemma3_export.processors import available_processors
from gemma3_export.serve.settings import BODY_S, DRAIN_S, KEY_VARIABLE, MAX_CHOICES, REQUEST_S

if TYPE_CHECKING:
    import socket

    from gemma3_export.api.engine import EngineOptions
    from gemma3_export.api.model_files import Weights
    from gemma3_export.bundle import Bundle
    from gemma3_export.serve.settings import ServeOptions

__all__ = ["serve"]

MAX_PORT = 65535
MAX_WORKERS = 64
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
RAY = "ray"
EPILOG = """\b
Examples:
  gemma3-export serve gemma-3-270m-it
  gemma3-export serve gemma-3-270m-it --ray --replicas 4 --threads 2
  gemma3-export serve gemma-3-270m-it --port 8080 --slots 16 --cache-memory 4GB
  GEMMA3_API_KEY=secret gemma3-export serve DIR --host 0.0.0.0
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "The sea is", "max_tokens": 32}'
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Any that other machines can reach needs an API key.",
)
@click.option(
    "--port",
    type=integer(0, MAX_PORT),
    default=8000,
    show_default=True,
    metavar="N",
    help="Port; 0 is any that is free.",
)
@click.option(
    "--api-key",
    envvar=KEY_VARIABLE,
    show_envvar=True,
    metavar="KEY",
    help="Key that clients must send. Other users of this machine can see arguments, so prefer "
    "the variable or the file.",
)
@click.option(
    "--api-key-file", "key_path", type=TEXT_PATH, metavar="FILE", help="File that holds the key."
)
@click.option(
    "--model-name", metavar="NAME", help="Id that clients see.  [default: the name of DIR]"
)
@click.option(
    "--workers",
    type=integer(1, MAX_WORKERS),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of server processes, each with its own copy of the model, slots and caches. With "
    "2 or more, those that die are restarted.",
)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Run the model in replicas on Ray Serve, which restarts those that die. Limits on slots, "
    "queue and memory apply to each replica.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Ray cluster that this machine belongs to: auto or HOST:PORT.  [default: start one]",
)
@click.option(
    "--replicas", type=integer(), metavar="N", help="Number of replicas with --ray.  [default: 1]"
)
@click.option(
    "--min-replicas",
    type=integer(),
    metavar="N",
    help="Minimum number of replicas when scaling with --max-replicas.  [default: 1]",
)
@click.option(
    "--max-replicas",
    type=integer(),
    metavar="N",
    help="Add replicas under load, up to this number.  [default: --min-replicas]",
)
@engine_options
@click.option(
    "--max-choices",
    type=integer(),
    default=MAX_CHOICES,
    show_default=True,
    metavar="N",
    help="Maximum answers per request: n times its prompts.",
)
@click.option(
    "--max-body",
    "max_body_bytes",
    type=memory_size,
    default="2MB",
    show_default=True,
    metavar="SIZE",
    help="Maximum size of a request body.",
)
@click.option(
    "--timeout",
    "request_s",
    type=REAL,
    default=REQUEST_S,
    show_default=True,
    metavar="SECONDS",
    help="Maximum time for an answer, including its wait for a slot.",
)
@click.option(
    "--body-timeout",
    "body_s",
    type=REAL,
    default=BODY_S,
    show_default=True,
    metavar="SECONDS",
    help="Maximum time for the body of a request to arrive.",
)
@click.option(
    "--drain-timeout",
    "drain_s",
    type=REAL,
    default=DRAIN_S,
    show_default=True,
    metavar="SECONDS",
    help="Maximum time for running requests to finish after SIGINT or SIGTERM.",
)
@opening_options
@click.option(
    "--warm-up/--no-warm-up",
    default=True,
    show_default=True,
    help="Run a few steps before listening, so that the first request starts without delay.",
)
def serve(
    bundle_path: Path,
    host: str,
    port: int,
    api_key: str | None,
    key_path: Path | None,
    model_name: str | None,
    workers: int,
    on_ray: bool,
    ray_address: str | None,
    replicas: int | None,
    min_replicas: int | None,
    max_replicas: int | None,
    slots: int,
    queue_limit: int,
    max_request_tokens: int | None,
    max_tokens: int,
    max_choices: int,
    cache_bytes: int | None,
    prefill_chunk: int | None,
    kept_prefix_bytes: int,
    max_body_bytes: int,
    request_s: float,
    body_s: float,
    drain_s: float,
    opening: OpeningRequest,
    warm_up: bool,
) -> None:
    """Serve a bundle over HTTP with the OpenAI API, metrics, and a playground at /.

    Only this machine can connect unless --host says otherwise, which needs an API key. The log goes
    to stderr as JSON lines, without prompts and answers.

    SIGINT or SIGTERM lets running requests finish; a second one ends them.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UnavailableError(
            f'the server needs {", ".join(missing)}; run: pip install "gemma3-export[serve]"'
        )

    ray_values = {
        "--ray-address": ray_address,
        "--replicas": replicas,
        "--min-replicas": min_replicas,
        "--max-replicas": max_replicas,
    }
    if on_ray:
        if workers > 1:
            raise click.UsageError(
                "--workers and --ray exclude each other; with --ray, use --replicas"
            )
        if importlib.util.find_spec(RAY) is None:
            raise UnavailableError('--ray needs ray; run: pip install "gemma3-export[ray]"')
    elif given := [name for name, value in ray_values.items() if value is not None]:
        raise click.UsageError(f"{given[0]} needs --ray; add it, or leave {given[0]} out")

    from gemma3_export.api.engine import EngineOptions
    from gemma3_export.serve.ray_settings import ray_options, send_token
    from gemma3_export.serve.server import bind
    from gemma3_export.serve.settings import ServeOptions, read_key_file, require_key

    if key_path is not None:
        if api_key is not None:
            raise click.UsageError(
                f"--api-key-file, and --api-key or {KEY_VARIABLE}, exclude each other"
            )
        api_key = read_key_file(key_path)
    options = ServeOptions(
        model_name=bundle_path.resolve().name if model_name is None else model_name,
        key=api_key,
        max_tokens=max_tokens,
        max_choices=min(max_choices, slots + queue_limit),
        max_body_bytes=max_body_bytes,
        request_s=request_s,
        body_s=body_s,
        drain_s=drain_s,
    )
    require_key(host, options.key)
    cluster = ray_options(replicas, min_replicas, max_replicas, address=ray_address)
    files = opening.files(bundle_path)
    engine = EngineOptions(
        slots=slots,
        queue_limit=queue_limit,
        max_request_tokens=max_request_tokens,
        cache_bytes=cache_bytes,
        prefill_chunk=prefill_chunk,
        kept_prefix_bytes=kept_prefix_bytes,
        warm_up=warm_up,
        variant=opening.variant,
        # A server decodes for long enough to make up for the time that this takes.
        **opening.loading(files) | {"huge_pages": opening.huge_pages is not False},
    )
    with bind(host, port) as listener:
        if on_ray:
            send_token()
            from gemma3_export.serve.ray_serve import serve_on_ray

            code = serve_on_ray(files.path, engine, options, cluster, listener)
        elif workers > 1:
            code = _run_workers(workers, files, engine, options, listener)
        else:
            code = _run_here(files, engine, options, listener)
    click.get_current_context().exit(code)


def _run_here(
    files: Bundle | Weights, engine: EngineOptions, options: ServeOptions, listener: socket.socket
) -> int:
    """Serve in this process; return the exit code."""
    from gemma3_export.api.engine import Engine
    from gemma3_export.serve.server import serve as run

    opened = Engine(files, engine)
    note_variant_of(opened.model)
    try:
        return run(opened, options, listener)
    finally:
        opened.close(drain=False)


def _run_workers(
    count: int,
    files: Bundle | Weights,
    engine: EngineOptions,
    options: ServeOptions,
    listener: socket.socket,
) -> int:
    """Serve in ``count`` other processes, which share the processors; return the exit code.

    Raises:
        UnavailableError: the system cannot share a socket between processes in this way.
    """
    if sys.platform == "win32":
        raise UnavailableError("--workers needs Linux or macOS; leave it out")

    from gemma3_export.serve.supervisor import supervise
    from gemma3_export.serve.worker import WorkerJob

    if engine.threads is None:
        engine = replace(engine, threads=max(1, available_processors() // count))
    job = WorkerJob(path=files.path, engine=engine, serve=options, count=count)
    return supervise(job, listener)
