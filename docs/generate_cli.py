"""Write docs/cli.md from --help: ``python docs/generate_cli.py`` (or ``make docs``)."""

from __future__ import annotations

from pathlib import Path

import click

from gemma3_export.cli import command_line

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
HEADER = """\
# Command line

Generated from `--help` by `make docs`; a test checks that it is current.
`python -m gemma3_export` is the same as `gemma3-export`.
"""


def cli_page() -> str:
    """The whole page."""
    settings = command_line.context_settings | {"terminal_width": WIDTH, "max_content_width": WIDTH}
    top = click.Context(command_line, info_name="gemma3-export", **settings)
    parts = [HEADER, section("gemma3-export", command_line.get_help(top))]
    for name in command_line.list_commands(top):
        command = command_line.get_command(top, name)
        assert command is not None
        context = click.Context(command, parent=top, info_name=name, terminal_width=WIDTH)
        parts.append(section(f"gemma3-export {name}", command.get_help(context)))
    return "\n".join(parts)


def section(title: str, text: str) -> str:
    """One command's help as it looks in a terminal."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"## {title}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(cli_page(), encoding="utf-8")
