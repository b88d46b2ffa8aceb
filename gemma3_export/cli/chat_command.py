"""Define the command ``gemma3-export chat``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma3_export.cli.generation_options import (
    chat_sampling_options,
    note_unused_seed,
    open_model,
    opening_options,
    stop_tokens_of,
)
from gemma3_export.cli.options import PATH

__all__ = ["chat"]

OPENING_NAMES = ("device", "cuda", "runtime", "threads", "share_weights", "trust", "check")
EPILOG = """\b
Examples:
  gemma3-export chat gemma-3-270m-it
  gemma3-export chat gemma-3-270m-it --system "Be brief." --temperature 0.7
  gemma3-export chat gemma-3-270m-it < questions.txt
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--chat-template", metavar="NAME", help="Which of the bundle's chat templates to use."
)
@chat_sampling_options
@opening_options
def chat(
    bundle_path: Path,
    system: str | None,
    chat_template: str | None,
    stop_texts: tuple[str, ...],
    stop_tokens: tuple[str, ...],
    show_special: bool,
    **options: Any,
) -> None:
    """Talk with a bundle, or with weights, in a terminal.

    Each turn computes only what is new. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists
    the commands. If stdin is not a terminal, each line of it is a turn, and only answers go to
    stdout.
    """
    from gemma3_export.api.options import GenerateOptions
    from gemma3_export.cli.conversation import Conversation

    model = open_model(bundle_path, **{name: options.pop(name) for name in OPENING_NAMES})
    generate_options = GenerateOptions(
        stop=stop_texts,
        stop_tokens=stop_tokens_of(stop_tokens),
        show_special_tokens=show_special,
        chat_template=chat_template,
        **options,
    )
    note_unused_seed(generate_options.seed, is_greedy=generate_options.is_greedy)
    Conversation(model.chat(system, generate_options), system).run()
