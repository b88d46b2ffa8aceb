"""Gather the facts, each in a process that may crash, and diagnose them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma3_export.cuda.driver import wanted_libraries
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
from gemma3_export.cuda.problems import Problem, problems_of
from gemma3_export.device import parse_device
from gemma3_export.errors import InputError

__all__ = ["Report", "examine"]

TIMEOUT_S = 120
LOG_CHARACTERS = 1500
ONNX = "onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found, and what to do about it."""

    facts: Facts
    problems: tuple[Problem, ...]

    @property
    def is_usable(self) -> bool:
        """Whether the device computes."""
        return self.facts.trial.passed

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        found = {"usable": self.is_usable, "problems": [asdict(one) for one in self.problems]}
        return found | asdict(self.facts)


class Unanswered(Exception):  # noqa: N818  (a finding, no error of the doctor)
    """A probe crashed, hung, or said something else.

    Args:
        why: how it ended.
        answers: how many answers came before that.
    """

    def __init__(self, why: str, answers: int = 0) -> None:
        super().__init__(why)
        self.answers = answers


def examine(device: str = "cuda", runtime: str = ONNX) -> Report:
    """Find out whether ``runtime`` can compute on ``device``, and why not.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        runtime: a bundle's runtime; all but ``onnx`` are torch's.

    Raises:
        InputError: the device is unknown, or ``auto``, which is none.
    """
    wanted = parse_device(device)
    if wanted is None:
        raise InputError("auto is no device that could be examined; choose cpu, cuda or cuda:N")
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
    """What the driver says, or that it does not answer."""
    try:
        (found,), _ = ask("driver")
    except Unanswered as error:
        return Driver(is_found=True, problem=str(error))
    gpus = tuple(
        Gpu(**gpu | {"compute_capability": pair(gpu["compute_capability"])})
        for gpu in found.pop("gpus")
    )
    return Driver(**found | {"cuda_version": pair(found["cuda_version"]), "gpus": gpus})


def pair(numbers: list[int] | None) -> tuple[int, int] | None:
    """JSON knows no tuples."""
    return None if numbers is None else (numbers[0], numbers[1])


def read_libraries(packages: Packages) -> tuple[Library, ...]:
    """What the provider loads, if there is a provider."""
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
        except Unanswered as error:
            name = left[min(error.answers, len(left) - 1)]  # it answers in this order
            crashed[name] = Library(
                soname=name, is_needed=wanted[name], path=name, problem=str(error)
            )
    libraries = crashed | {library["soname"]: Library(**library) for library in found}
    return tuple(libraries[name] for name in wanted)


def try_device(framework: str, device: str) -> Trial:
    """The product of two matrices, or why there is none."""
    try:
        (found,), log = ask(framework, device)
    except Unanswered as error:
        return Trial(framework=framework, problem=str(error))
    return Trial(**found | {"providers": tuple(found["providers"]), "log": log or None})


def ask(*arguments: str) -> tuple[list[dict[str, Any]], str]:
    """Run :mod:`gemma3_export.cuda.probe`; its answers, and what it wrote to stderr.

    Raises:
        Unanswered: there is no answer; the message says how the process ended.
    """
    # The same package, wherever it was imported from.
    paths = (str(Path(__file__).parent.parent.parent), os.environ.get("PYTHONPATH"))
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
        raise Unanswered(f"no answer in {TIMEOUT_S} seconds", answers) from None
    log = done.stderr.strip()[-LOG_CHARACTERS:]
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = f": {log.splitlines()[-1]}" if log else ""
        raise Unanswered(f"the process that looked {ending(done.returncode)}{last}", len(lines))
    return [json.loads(line) for line in lines], log


def ending(returncode: int) -> str:
    """An exit code in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
