"""Examine a device: collect the facts and diagnose them.

Each probe runs in its own process, because a damaged installation may crash it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma3_export.cuda.facts import (
    Driver,
    Facts,
    Gpu,
    Library,
    Packages,
    Trial,
    read_machine,
    read_packages,
)
from gemma3_export.cuda.libraries import wanted_libraries
from gemma3_export.cuda.problems import Problem, problems_of
from gemma3_export.device import parse_device
from gemma3_export.errors import InputError

__all__ = ["Report", "examine"]

TIMEOUT_S = 120
LOG_CHARACTERS = 1500
ONNX = "onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The facts about a device, and the problems that they show."""

    facts: Facts
    problems: tuple[Problem, ...]

    @property
    def is_usable(self) -> bool:
        """Return whether the device computes correctly."""
        return self.facts.trial.passed

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        found = {"usable": self.is_usable, "problems": [asdict(one) for one in self.problems]}
        return found | asdict(self.facts)


class ProbeFailed(Exception):  # noqa: N818  (a finding, not an error of the doctor)
    """The end of a probe that crashed, hung or failed.

    Args:
        reason: how it ended.
        answers: number of answers before that.
    """

    def __init__(self, reason: str, answers: int = 0) -> None:
        super().__init__(reason)
        self.answers = answers


def examine(device: str = "cuda", runtime: str = ONNX) -> Report:
    """Determine whether ``runtime`` can compute on ``device``, and if not, why.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        runtime: a bundle's runtime; all except ``onnx`` use torch.

    Raises:
        InputError: the device is unknown or ``auto``.
    """
    wanted = parse_device(device)
    if wanted is None:
        raise InputError("auto does not name one device; choose cpu, cuda or cuda:N")
    on_gpu = wanted.kind == "cuda"
    packages = read_packages()
    facts = Facts(
        device=str(wanted),
        runtime=runtime,
        machine=read_machine(),
        packages=packages,
        driver=read_driver() if on_gpu else None,
        libraries=read_libraries(packages) if on_gpu and runtime == ONNX else (),
        trial=try_device("onnxruntime" if runtime == ONNX else "torch", str(wanted)),
    )
    return Report(facts=facts, problems=tuple(problems_of(facts)))


def read_driver() -> Driver:
    """Describe the driver, or why it does not answer."""
    try:
        (found,), _ = ask("driver")
    except ProbeFailed as error:
        return Driver(is_found=True, problem=str(error))
    gpus = tuple(
        Gpu(**gpu | {"compute_capability": pair(gpu["compute_capability"])})
        for gpu in found.pop("gpus")
    )
    return Driver(**found | {"cuda_version": pair(found["cuda_version"]), "gpus": gpus})


def pair(numbers: list[int] | None) -> tuple[int, int] | None:
    """Return a list from JSON, which has no tuples, as a tuple."""
    return None if numbers is None else (numbers[0], numbers[1])


def read_libraries(packages: Packages) -> tuple[Library, ...]:
    """Describe the libraries of the CUDA provider, if there is one."""
    if packages.provider is None:
        return ()
    provider = Path(packages.provider)
    try:
        wanted = wanted_libraries(provider)
    except (OSError, ValueError) as error:
        return (
            Library(soname=provider.name, is_needed=True, path=str(provider), problem=str(error)),
        )
    crashed: dict[str, Library] = {}
    found: list[dict[str, Any]] | None = None
    while found is None:
        left = [name for name in wanted if name not in crashed]
        try:
            found, _ = ask("libraries", str(provider), *crashed) if left else ([], "")
        except ProbeFailed as error:
            name = left[min(error.answers, len(left) - 1)]  # the probe answers in this order
            crashed[name] = Library(
                soname=name, is_needed=wanted[name], path=name, problem=str(error)
            )
    libraries = crashed | {library["soname"]: Library(**library) for library in found}
    return tuple(libraries[name] for name in wanted)


def try_device(framework: str, device: str) -> Trial:
    """Multiply two matrices on the device, or say why that fails."""
    try:
        (found,), log = ask(framework, device)
    except ProbeFailed as error:
        return Trial(framework=framework, problem=str(error))
    return Trial(**found | {"providers": tuple(found["providers"]), "log": log or None})


def ask(*arguments: str) -> tuple[list[dict[str, Any]], str]:
    """Run :mod:`gemma3_export.cuda.probe`, and return its answers and what it wrote to stderr.

    Raises:
        ProbeFailed: the process did not complete; the message says how it ended.
    """
    # The probe must import the same package, wherever this process imported it from.
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "gemma3_export.cuda.probe", *arguments]
    try:
        done = subprocess.run(  # noqa: S603  (our own command)
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        answers = len((error.stdout or b"").splitlines())
        raise ProbeFailed(f"no answer in {TIMEOUT_S} seconds", answers) from None
    log = done.stderr.strip()[-LOG_CHARACTERS:]
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = f": {log.splitlines()[-1]}" if log else ""
        raise ProbeFailed(f"the probe {ending(done.returncode)}{last}", len(lines))
    return [json.loads(line) for line in lines], log


def ending(returncode: int) -> str:
    """Describe an exit code."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
