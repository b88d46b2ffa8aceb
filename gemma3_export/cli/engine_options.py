"""Options of commands that run an engine, alone or in a server: its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from gemma3_export.cli.options import cache_size, integer, memory_size
from gemma3_export.limits import CPU_PREFILL_CHUNK, PREFILL_CHUNK, QUEUE_LIMIT, SLOTS
from gemma3_export.serve.settings import MAX_TOKENS

__all__ = ["engine_options"]

OPTIONS = (
    click.option(
        "--slots",
        type=integer(),
        default=SLOTS,
        show_default=True,
        metavar="N",
        help="Requests that run at once.",
    ),
    click.option(
        "--queue-limit",
        type=integer(0),
        default=QUEUE_LIMIT,
        show_default=True,
        metavar="N",
        help="Requests that may wait; more are rejected.",
    ),
    click.option(
        "--max-request-tokens",
        type=integer(),
        metavar="N",
        help="Tokens of prompt and answer that one request can have.  [default: the model's "
        "context, at most 8192]",
    ),
    click.option(
        "--max-tokens",
        type=integer(),
        default=MAX_TOKENS,
        show_default=True,
        metavar="N",
        help="Maximum tokens per answer that a request may ask for.",
    ),
    click.option(
        "--cache-memory",
        "cache_bytes",
        type=memory_size,
        metavar="SIZE",
        help="Limit on keys and values of running requests, such as 4GB.",
    ),
    click.option(
        "--prefill-chunk",
        type=integer(),
        metavar="N",
        help="Prompt tokens to compute per step while other requests are generating.  [default: "
        f"{CPU_PREFILL_CHUNK} on the CPU, {PREFILL_CHUNK} on a GPU]",
    ),
    click.option(
        "--prefix-cache",
        "kept_prefix_bytes",
        type=cache_size,
        default="256MB",
        show_default=True,
        metavar="SIZE",
        help="Memory for prompt prefixes that are kept between requests; 0 is off.",
    ),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command receives them under the names of the engine's options."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
