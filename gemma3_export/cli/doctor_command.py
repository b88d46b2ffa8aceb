"""``gemma3-export doctor``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from gemma3_export.bundle import RUNTIMES

if TYPE_CHECKING:
    from gemma3_export.cuda.doctor import Report
    from gemma3_export.cuda.facts import Driver, Facts, Gpu, Library

__all__ = [
    "doctor",
    "doctor_lines",
]

NOT_USABLE = 3
EPILOG = """\b
Examples:
  gemma3-export doctor
  gemma3-export doctor --device cuda:1 --json
  gemma3-export doctor --runtime torchscript
  gemma3-export doctor --device cpu

\b
Exit codes: 0 the device computes, 2 bad usage, 3 it could not be used.
"""


@click.command(epilog=EPILOG)
@click.option("--device", default="cuda", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="onnx",
    show_default=True,
    help="All but onnx are torch's.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def doctor(device: str, runtime: str, as_json: bool) -> None:
    """Say whether CUDA can be used here, and if not, why and which command changes that.

    Shows Python, packages, the NVIDIA driver and its GPUs, and the CUDA libraries that ONNX Runtime
    loads; then two matrices are multiplied on the device. Everything is tried in processes of its
    own, so that what crashes there is reported too.
    """
    from gemma3_export.cli.doctor_command import doctor_lines
    from gemma3_export.cuda.doctor import examine

    report = examine(device, runtime)
    click.echo(
        json.dumps(report.to_json(), indent=1) if as_json else "\n".join(doctor_lines(report))
    )
    if not report.is_usable:
        click.get_current_context().exit(NOT_USABLE)


# A doctor's report as lines for people.

SYSTEM_LIBRARIES = ("libc.", "libdl.", "libgcc_s.", "libm.", "libpthread.", "librt.", "ld-linux")


def doctor_lines(report: Report) -> Iterator[str]:
    """What was found, what is wrong, the verdict."""
    facts = report.facts
    yield from machine_lines(facts)
    if facts.driver is not None:
        yield from driver_lines(facts.driver, facts.machine.kernel_driver)
    shown = [one for one in facts.libraries if not one.soname.startswith(SYSTEM_LIBRARIES)]
    if shown:
        yield "libraries of ONNX Runtime's CUDA provider:"
        yield from map(library_line, shown)
    yield from trial_lines(facts)
    for problem in report.problems:
        yield ""
        yield f"{'problem' if problem.blocks else 'note'}: {problem.what}"
        yield f"  fix: {problem.fix}"
    yield ""
    yield f"{facts.device}: {'usable' if report.is_usable else 'NOT USABLE'}"


def machine_lines(facts: Facts) -> Iterator[str]:
    """Python, system and packages."""
    machine, packages = facts.machine, facts.packages
    inside = ", in a container" if machine.is_container else ""
    yield f"python: {machine.python} on {machine.system} {machine.processor}{inside}"
    yield f"  {machine.executable}"
    for name, value in machine.variables.items():
        yield f"  {name}={value}"
    yield "packages:" if packages.versions else "packages: none that has to do with CUDA"
    built_for = {packages.build: packages.cuda_version, "torch": packages.torch_cuda}
    for name, version in packages.versions.items():
        cuda = f", built for CUDA {built_for[name]}" if built_for.get(name) else ""
        yield f"  {name} {version}{cuda}"


def driver_lines(driver: Driver, kernel_driver: str | None) -> Iterator[str]:
    """The NVIDIA driver and its GPUs."""
    if not driver.is_found:
        yield f"driver: none ({driver.problem})"
    elif driver.problem is not None:
        yield f"driver: does not answer ({driver.problem})"
    else:
        known = "unknown" if driver.cuda_version is None else "{}.{}".format(*driver.cuda_version)
        module = f"{kernel_driver}, " if kernel_driver else ""
        error = f", error {driver.error_code}" if driver.error_code else ""
        yield f"driver: {module}supports CUDA up to {known}, {len(driver.gpus)} GPUs{error}"
    yield from map(gpu_line, driver.gpus)


def gpu_line(gpu: Gpu) -> str:
    """One GPU."""
    line = f"  cuda:{gpu.index}: {gpu.name or 'unnamed'}"
    if gpu.compute_capability is not None:
        line += ", compute capability {}.{}".format(*gpu.compute_capability)
    return line if gpu.memory_bytes is None else f"{line}, {gpu.memory_bytes / 1e9:.1f} GB"


def library_line(library: Library) -> str:
    """Where one library was found."""
    optional = "" if library.is_needed else " (not needed by this project's exports)"
    if library.problem is not None:
        return f"  {library.soname}: {'DOES NOT LOAD' if library.path else 'MISSING'}{optional}"
    return f"  {library.soname}: {library.path}{optional}"


def trial_lines(facts: Facts) -> Iterator[str]:
    """What came of the trial."""
    trial = facts.trial
    yield f"trial: {trial.framework} offers {', '.join(trial.providers) or 'nothing'}"
    if trial.is_right is None:
        yield f"  nothing was computed on {facts.device}: {trial.problem}"
    else:
        verdict = "right" if trial.is_right else "WRONG"
        yield f"  a product of two matrices on {facts.device} is {verdict}"
    if trial.log is not None and not trial.passed:
        yield from (f"  | {line}" for line in trial.log.splitlines())
