"""Color what commands print to a terminal: the one place for styles.

Reports are plain text wherever they are made, so that their columns align and files get no escape
codes. A command colors a finished text on its way to the terminal, by the words that it contains.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import click

__all__ = ["styled", "use_color"]

Style = dict[str, Any]  # of click.style

HEADING: Style = {"bold": True}
GOOD: Style = {"fg": "green"}
BAD: Style = {"fg": "red", "bold": True}
CAUTION: Style = {"fg": "yellow"}

# In this order, so that the escape codes of one do not hide the text that another looks for.
STYLES: tuple[tuple[re.Pattern[str], Style], ...] = (
    (re.compile(r"^PASS\b|\bpass$|(?<=: )pass(?=  \()", re.MULTILINE), GOOD),
    (re.compile(r"(?<=: )(?:passed\b|usable$)|(?<= is )correct$", re.MULTILINE), GOOD),
    (re.compile(r"\b(?:FAIL|FAILED|WRONG|MISSING|NOT USABLE|DOES NOT LOAD)\b"), BAD),
    (re.compile(r"^(?:error|problem):", re.MULTILINE), BAD),
    (re.compile(r"^(?:warning|note):|\bNOT CHECKED\b|(?<=: )NONE(?=;)", re.MULTILINE), CAUTION),
    (re.compile(r"^.+(?=\n-[- ]+$)", re.MULTILINE), HEADING),  # the first row of a ruled table
    (re.compile(r"^[a-z][\w /.-]*:(?= |$)", re.MULTILINE), HEADING),
)


def styled(text: str) -> str:
    """Return ``text`` with escape codes around verdicts, headings, warnings and errors.

    :func:`click.echo` removes them again where they do not belong.
    """
    for pattern, style in STYLES:
        text = pattern.sub(partial(_style_match, style), text)
    return text


def _style_match(style: Style, match: re.Match[str]) -> str:
    return click.style(match[0], **style)


def use_color() -> bool | None:
    """Return whether to print color by the environment; None lets the kind of output decide.

    NO_COLOR (https://no-color.org) takes precedence over FORCE_COLOR. A dumb terminal shows escape
    codes as text.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return False if os.environ.get("TERM") == "dumb" else None
