"""From facts to what is wrong and the command that changes it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemma3_export.cuda.driver_problems import driver_problems
from gemma3_export.cuda.facts import Facts, Library
from gemma3_export.cuda.packages import (
    BOTH_INSTALLED,
    CPU_PACKAGE,
    CUDA_EXTRA,
    GPU_PACKAGE,
    REINSTALL,
)
from gemma3_export.cuda.problem import Problem

__all__ = ["Problem", "problems_of"]

ONNX = "onnx"
CPU_EXTRA = 'pip install "gemma3-export[cpu]"'
TORCH_EXTRA = 'pip install "gemma3-export[export]"'
# The wheel that brings a library; CUDA 12's carry a suffix, cuDNN's always does.
WHEELS = {
    "libcublas": "nvidia-cublas",
    "libcublasLt": "nvidia-cublas",
    "libcudart": "nvidia-cuda-runtime",
    "libcurand": "nvidia-curand",
    "libcufft": "nvidia-cufft",
    "libnvrtc": "nvidia-cuda-nvrtc",
}
CUDNN = "libcudnn"


def problems_of(facts: Facts) -> Iterator[Problem]:
    """What is wrong, causes before consequences.

    What does not keep the device from computing is told too, but blocks nothing. When nothing
    else explains why it does not compute, the trial's own failure is the problem.
    """
    found = [*causes(facts)]
    if facts.trial.passed:
        found = [Problem(what=one.what, fix=one.fix, blocks=False) for one in found]
    elif not any(one.blocks for one in found):
        found.append(trial_problem(facts))
    yield from found


def causes(facts: Facts) -> Iterator[Problem]:
    """What explains a failure."""
    on_gpu = facts.driver is not None
    if facts.runtime == ONNX:
        yield from package_problems(facts, on_gpu=on_gpu)
    else:
        yield from torch_problems(facts, on_gpu=on_gpu)
    if on_gpu:
        yield from driver_problems(facts)
    yield from library_problems(facts)


def package_problems(facts: Facts, *, on_gpu: bool) -> Iterator[Problem]:
    """ONNX Runtime is absent, the wrong one, or there twice."""
    packages, machine = facts.packages, facts.machine
    has_cpu, has_gpu = (name in packages.versions for name in (CPU_PACKAGE, GPU_PACKAGE))
    if not on_gpu:
        if packages.build is None and not (has_cpu or has_gpu):
            yield Problem(what="ONNX Runtime is not installed", fix=CPU_EXTRA)
        return
    if (machine.system, machine.processor) != ("Linux", "x86_64"):
        yield Problem(
            what=f"onnxruntime-gpu is made for Linux on x86-64, and this is {machine.system} on "
            f"{machine.processor}",
            fix="pass --device cpu, or use such a machine",
        )
    if has_cpu and has_gpu:
        yield Problem(what=BOTH_INSTALLED, fix=REINSTALL, blocks=packages.provider is None)
    elif has_cpu:
        yield Problem(
            what="the installed onnxruntime is the one for CPUs, without a CUDA provider",
            fix=f"pip uninstall -y onnxruntime && {CUDA_EXTRA}",
        )
    elif packages.build is None and not has_gpu:
        yield Problem(what="ONNX Runtime is not installed", fix=CUDA_EXTRA)
    elif packages.provider is None:
        yield Problem(
            what=f"the files of onnxruntime-gpu {packages.versions.get(GPU_PACKAGE, '')} are "
            "damaged: its CUDA provider is missing",
            fix=REINSTALL,
        )


def torch_problems(facts: Facts, *, on_gpu: bool) -> Iterator[Problem]:
    """Torch is absent, or one without CUDA."""
    version = facts.packages.versions.get("torch")
    if version is None and facts.trial.framework == "torch":
        yield Problem(what="torch is not installed", fix=TORCH_EXTRA)
    elif on_gpu and facts.packages.torch_cuda is None:
        yield Problem(
            what=f"torch {version} is a build without CUDA",
            fix=f"pip uninstall -y torch && {TORCH_EXTRA} (PyPI's torch for Linux has CUDA; name "
            "no other index)",
        )


def library_problems(facts: Facts) -> Iterator[Problem]:
    """Libraries that are missing, which one command gets together, and those that do not load."""
    missing = [library for library in facts.libraries if library.problem is not None]
    absent: dict[bool, list[str]] = {True: [], False: []}
    for library in missing:
        wheel = wheel_of(library.soname, (facts.packages.cuda_version or "13").partition(".")[0])
        version = facts.packages.versions.get(wheel or "")
        if wheel is not None and version is None and library.path is None:
            absent[library.is_needed].append(f"{library.soname} (of the package {wheel})")
        else:
            yield damaged_library(library, wheel, version)
    for is_needed, names in absent.items():
        if names:
            yield Problem(
                what=f"CUDA libraries are not installed: {', '.join(names)}",
                fix=CUDA_EXTRA,
                blocks=is_needed,
            )


def damaged_library(library: Library, wheel: str | None, version: str | None) -> Problem:
    """A library does not load although it is, or should be, there."""
    what = f"{library.soname} does not load: {library.problem}"
    if wheel is not None and version is not None:
        what += f", although {wheel} {version} is installed"
        fix = f"pip install --force-reinstall --no-deps {wheel}=={version}"
    elif library.path is not None:
        fix = REINSTALL
    else:
        fix = f"install the system's package with {library.soname}"
    return Problem(what=what, fix=fix, blocks=library.is_needed)


def wheel_of(soname: str, cuda_major: str) -> str | None:
    """The distribution that has ``soname``."""
    name = soname.partition(".so")[0]
    if name == CUDNN:
        return f"nvidia-cudnn-cu{cuda_major}"
    suffix = f"-cu{cuda_major}" if int(cuda_major) < 13 else ""
    return WHEELS[name] + suffix if name in WHEELS else None


def trial_problem(facts: Facts) -> Problem:
    """Everything is there, and yet nothing, or something wrong, is computed."""
    trial, device = facts.trial, facts.device
    if trial.is_right is False:
        return Problem(
            what=f"{trial.framework} computes wrong values on {device}",
            fix="nvidia-smi -q -d ECC,PAGE_RETIREMENT (a defective GPU?), and compare with "
            "--device cpu"
            if facts.driver is not None
            else reinstall(facts),
        )
    text = f"{trial.problem}; {trial.log}" if trial.log else f"{trial.problem}"
    if re.search(r"out of memory", text, re.IGNORECASE):
        return Problem(
            what=f"{device} has no memory left",
            fix="nvidia-smi (shows which processes hold it); end them or choose another GPU",
        )
    return Problem(
        what=f"{trial.framework} does not compute on {device}: {trial.problem}",
        fix=reinstall(facts),
    )


def reinstall(facts: Facts) -> str:
    """The command that puts the runtime's packages there anew."""
    if facts.runtime != ONNX:
        return f"pip uninstall -y torch && {TORCH_EXTRA}"
    extra = CUDA_EXTRA if facts.driver is not None else CPU_EXTRA
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {extra}"
