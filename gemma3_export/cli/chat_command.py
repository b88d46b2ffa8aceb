"""Define the command ``gemma3-export chat``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma3_export.cli.generation_options import (
    OpeningRequest,
    chat_sampling_options,
    note_unused_seed,
    note_variant_of,
    opening_options,
)
from gemma3_export.cli.options import PATH

__all__ = ["chat"]

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
    opening: OpeningRequest,
    **sampling: Any,
) -> None:
    """Talk with a bundle, or with weights, in a terminal.

    Each turn computes only what is new. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists
    the commands. If stdin is not a terminal, each line of it is a turn, and only answers go to
    stdout.
    """
    from gemma3_export.api.options import GenerateOptions
    from gemma3_export.cli.conversation import Conversation

    options = GenerateOptions(chat_template=chat_template, **sampling)
    model = opening.open(bundle_path)
    note_unused_seed(options.seed, is_greedy=options.is_greedy)
    note_variant_of(model)
    Conversation(model.chat(system, options), system).run()
