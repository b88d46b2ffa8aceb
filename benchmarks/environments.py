"""Create virtual environments for engines and consumers that cannot share ours."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gemma3_export.errors import UnavailableError

__all__ = ["Echo", "create_environment", "free_port", "python_of", "run"]

STDERR = 2  # the output of pip and of converters is not ours
Echo = Callable[[str], None]


def python_of(environment: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return environment.absolute() / "bin" / "python"


def create_environment(
    target: Path,
    requirements: Sequence[str],
    *,
    pip_arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    echo: Echo,
) -> None:
    """Create an environment if it does not exist; a failed installation leaves nothing.

    Args:
        target: its folder.
        requirements: what pip installs: packages with versions, or options such as ``-r FILE``.
        pip_arguments: more arguments for pip.
        variables: environment variables for pip.
        echo: prints a line about it.

    Raises:
        UnavailableError: the installation failed; its output says why.
    """
    if python_of(target).exists():
        return
    echo(f"{target}: installing {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        run([sys.executable, "-m", "venv", str(target)], f"python -m venv {target}")
        pip = [str(python_of(target)), "-m", "pip", "install", "--quiet", *pip_arguments]
        run([*pip, *requirements], f"installing {target.name}", variables)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def run(command: Sequence[str], purpose: str, variables: Mapping[str, str] | None = None) -> None:
    """Run a program whose output the user sees.

    Raises:
        UnavailableError: it failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(command), env=environment | dict(variables or {}), stdout=STDERR, check=False
    )
    if done.returncode:
        raise UnavailableError(
            f"{purpose} failed with exit code {done.returncode}; its output above says why"
        )


def free_port() -> int:
    """Return a port of this machine on which nothing listens yet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
