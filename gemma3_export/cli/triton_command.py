"""Define the command ``gemma3-export triton``."""

from __future__ import annotations

from pathlib import Path

import click

from gemma3_export.cli.engine_options import engine_options
from gemma3_export.cli.options import PATH, force_option, runtime_threads_option, variant_option
from gemma3_export.progress import ProgressBars

__all__ = ["triton"]

EPILOG = """\b
Examples:
  gemma3-export triton gemma-3-270m -o models
  gemma3-export triton gemma-3-270m -o models --name gemma --threads 4 --force
  gemma3-export triton gemma-3-270m-bf16 -o models --device cuda --bundle-at /bundles/gemma
  tritonserver --model-repository models
  curl localhost:8000/v2/models/gemma-3-270m/generate_stream \\
      -d '{"text_input": "The sea is", "stream": true, "max_tokens": 32}'
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.option(
    "-o",
    "--output",
    "repository",
    type=PATH,
    required=True,
    metavar="REPO",
    help="Model repository; created if it is missing, and may contain other models.",
)
@click.option("--name", metavar="NAME", help="Name of the model.  [default: the name of DIR]")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda (an instance on each GPU) or cuda:N.",
)
@variant_option
@runtime_threads_option
@engine_options
@click.option(
    "--bundle-at",
    type=PATH,
    metavar="PATH",
    help="Do not copy the bundle: the server finds it at this absolute path.",
)
@force_option
def triton(
    bundle_path: Path,
    repository: Path,
    name: str | None,
    device: str,
    variant: str | None,
    threads: int | None,
    slots: int,
    queue_limit: int,
    max_request_tokens: int | None,
    max_tokens: int,
    cache_bytes: int | None,
    prefill_chunk: int | None,
    kept_prefix_bytes: int,
    bundle_at: Path | None,
    force: bool,
) -> None:
    """Write a bundle into an NVIDIA Triton model repository.

    Triton's Python backend runs the model, and needs this package in its Python. Inputs and outputs
    are those of Triton's vLLM backend, and more.
    """
    from gemma3_export.bundle import Bundle
    from gemma3_export.triton.model_config import TritonOptions
    from gemma3_export.triton.repository import write_repository

    options = TritonOptions(
        variant=variant,
        threads=threads,
        slots=slots,
        queue_limit=queue_limit,
        max_request_tokens=max_request_tokens,
        max_tokens=max_tokens,
        cache_bytes=cache_bytes,
        prefill_chunk=prefill_chunk,
        kept_prefix_bytes=kept_prefix_bytes,
    )
    with ProgressBars() as progress:
        folder = write_repository(
            Bundle(bundle_path),
            repository,
            bundle_path.resolve().name if name is None else name,
            options,
            device=device,
            bundle_at=bundle_at,
            force=force,
            progress=progress,
        )
    where = "a copy of the bundle" if bundle_at is None else f"the bundle at {bundle_at}"
    click.echo(f"{folder}: {where}, settings in config.pbtxt")
    click.echo(f"next: tritonserver --model-repository {repository}")
