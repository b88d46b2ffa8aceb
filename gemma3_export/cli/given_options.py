"""Whether an option was given, so that one that would have no effect can be refused."""

from __future__ import annotations

import click
from click.core import ParameterSource

__all__ = ["refuse_if_given"]


def refuse_if_given(parameter: str, option: str, reason: str) -> None:
    """End with a usage error where the running command was given ``option`` explicitly.

    Args:
        parameter: the option's name in Python, such as ``block_size``.
        option: the same on the command line, such as ``--block-size``.
        reason: why it would have no effect.

    Raises:
        click.UsageError: it was given.
    """
    source = click.get_current_context().get_parameter_source(parameter)
    if source not in (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP):
        raise click.UsageError(f"{option} would have no effect: {reason}; leave it out")
