"""Print the reports of the doctor and of the placement check to a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from gemma3_export.cuda.doctor import Report
from gemma3_export.cuda.facts import Driver, Facts, Gpu, Library
from gemma3_export.cuda.placement import PlacementReport

__all__ = ["doctor_lines", "placement_lines"]

SYSTEM_LIBRARIES = ("libc.", "libdl.", "libgcc_s.", "libm.", "libpthread.", "librt.", "ld-linux")


def doctor_lines(report: Report) -> Iterator[str]:
    """Yield the facts, the problems and the verdict."""
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
    """Describe Python, the system and the packages."""
    machine, packages = facts.machine, facts.packages
    inside = ", in a container" if machine.is_container else ""
    yield f"python: {machine.python} on {machine.system} {machine.architecture}{inside}"
    yield f"  {machine.executable}"
    if machine.processor is not None:
        yield f"processor: {machine.processor}"
    if machine.huge_pages is not None:
        yield f"huge pages: {machine.huge_pages}"
    for name, value in machine.variables.items():
        yield f"  {name}={value}"
    yield "packages:" if packages.versions else "packages: none related to CUDA"
    built_for = {packages.build: packages.cuda_version, "torch": packages.torch_cuda}
    for name, version in packages.versions.items():
        cuda = f", built for CUDA {built_for[name]}" if built_for.get(name) else ""
        yield f"  {name} {version}{cuda}"


def driver_lines(driver: Driver, kernel_driver: str | None) -> Iterator[str]:
    """Describe the NVIDIA driver and its GPUs."""
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
    """Describe one GPU."""
    line = f"  cuda:{gpu.index}: {gpu.name or 'unnamed'}"
    if gpu.compute_capability is not None:
        line += ", compute capability {}.{}".format(*gpu.compute_capability)
    return line if gpu.memory_bytes is None else f"{line}, {gpu.memory_bytes / 1e9:.1f} GB"


def library_line(library: Library) -> str:
    """Describe where one library was found."""
    optional = "" if library.is_needed else " (not needed by the exports of this project)"
    if library.problem is not None:
        return f"  {library.soname}: {'DOES NOT LOAD' if library.path else 'MISSING'}{optional}"
    return f"  {library.soname}: {library.path}{optional}"


def trial_lines(facts: Facts) -> Iterator[str]:
    """Describe the result of the trial."""
    trial = facts.trial
    yield f"trial: {trial.framework} offers {', '.join(trial.providers) or 'no device'}"
    if trial.is_right is None:
        yield f"  nothing was computed on {facts.device}: {trial.problem}"
    else:
        verdict = "correct" if trial.is_right else "WRONG"
        yield f"  the product of two matrices on {facts.device} is {verdict}"
    if trial.log is not None and not trial.passed:
        yield from (f"  | {line}" for line in trial.log.splitlines())


def placement_lines(report: PlacementReport) -> Iterator[str]:
    """Yield the placement of nodes, the copies and the verdict."""
    yield f"{report.graph}: onnxruntime-gpu {report.onnxruntime} over a CUDA stub (H100)"
    for provider, counts in report.operators.items():
        listed = ", ".join(f"{operator} {count}" for operator, count in counts.items())
        yield f"  {provider}: {sum(counts.values())} nodes: {listed}"
    yield f"  copies between CPU and GPU in each step: {len(report.memory_copies)}"
    yield f"  CUDA graph: {'can be captured' if report.is_capturable else 'cannot be captured'}"
    for problem in report.problems:
        yield f"  problem: {problem}"
    yield f"placement: {'passed' if report.passed else 'FAILED'}"
