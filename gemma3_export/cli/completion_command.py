"""Define the command ``gemma3-export completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]

PROGRAM = "gemma3-export"
VARIABLE = "_GEMMA3_EXPORT_COMPLETE"  # the one that click reads for a program of this name
EPILOG = """\b
Examples:
  gemma3-export completion bash > ~/.local/share/bash-completion/completions/gemma3-export
  gemma3-export completion zsh > "${fpath[1]}/_gemma3-export"
  gemma3-export completion fish > ~/.config/fish/completions/gemma3-export.fish
"""


@click.command(epilog=EPILOG)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print a script that sets up shell completion.

    To try it in the running bash: eval "$(gemma3-export completion bash)"
    """
    from gemma3_export.cli.command_line import command_line

    made_by = get_completion_class(shell)
    assert made_by is not None
    # Not source(), which starts bash to find out its version.
    maker = made_by(command_line, {}, PROGRAM, VARIABLE)
    click.echo(maker.source_template % maker.source_vars())
