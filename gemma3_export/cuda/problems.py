"""Diagnose facts: what is wrong, and which command fixes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gemma3_export.cuda.facts import Driver, Facts, Gpu, Library
from gemma3_export.device import (
    BOTH_INSTALLED,
    CPU_PACKAGE,
    CUDA_EXTRA,
    GPU_PACKAGE,
    REINSTALL,
    parse_device,
)

__all__ = ["Problem", "problems_of"]

ONNX = "onnx"
CPU_EXTRA = 'pip install "gemma3-export[cpu]"'
TORCH_EXTRA = 'pip install "gemma3-export[export]"'
# The wheel that contains a library. The names for CUDA 12 have a suffix; cuDNN's always has one.
WHEELS = {
    "libcublas": "nvidia-cublas",
    "libcublasLt": "nvidia-cublas",
    "libcudart": "nvidia-cuda-runtime",
    "libcurand": "nvidia-curand",
    "libcufft": "nvidia-cufft",
    "libnvrtc": "nvidia-cuda-nvrtc",
}
CUDNN = "libcudnn"
ON_CPU = "or pass --device cpu"
# From NVIDIA's release notes for CUDA: the oldest driver branch for each major version, and the
# oldest compute capability that its libraries support.
DRIVER_OF_CUDA = {12: 525, 13: 580}
CAPABILITY_OF_CUDA = {12: (5, 0), 13: (7, 5)}
BFLOAT16_CAPABILITY = (8, 0)
NO_DEVICE = 100
# Values of CUresult that have a known remedy
ERRORS = {
    2: ("the GPU has no memory left", "nvidia-smi (shows which processes use it)"),
    34: (
        "the library libcuda.so.1 is the stub of the CUDA toolkit",
        "remove the toolkit's `stubs` folder from LD_LIBRARY_PATH",
    ),
    802: (
        "the system's GPUs are not ready; GPUs with NVSwitch need the fabric manager",
        "sudo systemctl start nvidia-fabricmanager",
    ),
    803: (
        "libcuda.so.1 and the NVIDIA kernel module have different versions",
        "sudo reboot (completes a driver update)",
    ),
    804: (
        "CUDA's forward compatibility library is installed, but this GPU does not support it",
        "sudo apt remove 'cuda-compat-*', or remove its folder from LD_LIBRARY_PATH",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is wrong, and the command or action that fixes it."""

    what: str
    fix: str
    blocks: bool = True  # the device cannot be used until it is fixed


def problems_of(facts: Facts) -> Iterator[Problem]:
    """Yield what is wrong, causes before consequences.

    A problem that does not keep the device from computing does not block. If no cause explains why
    the device does not compute, the trial's own failure is the problem.
    """
    found = [*causes(facts)]
    if facts.trial.passed:
        found = [Problem(what=one.what, fix=one.fix, blocks=False) for one in found]
    elif not any(one.blocks for one in found):
        found.append(trial_problem(facts))
    yield from found


def causes(facts: Facts) -> Iterator[Problem]:
    """Yield everything that can cause a failure."""
    on_gpu = facts.driver is not None
    if facts.runtime == ONNX:
        yield from package_problems(facts, on_gpu=on_gpu)
    else:
        yield from torch_problems(facts, on_gpu=on_gpu)
    if on_gpu:
        yield from driver_problems(facts)
    yield from library_problems(facts)


def package_problems(facts: Facts, *, on_gpu: bool) -> Iterator[Problem]:
    """Find out whether ONNX Runtime is missing, the wrong build, or installed twice."""
    packages, machine = facts.packages, facts.machine
    has_cpu, has_gpu = (name in packages.versions for name in (CPU_PACKAGE, GPU_PACKAGE))
    if not on_gpu:
        if packages.build is None and not (has_cpu or has_gpu):
            yield Problem(what="ONNX Runtime is not installed", fix=CPU_EXTRA)
        return
    if (machine.system, machine.architecture) != ("Linux", "x86_64"):
        yield Problem(
            what=f"onnxruntime-gpu requires Linux on x86-64, and this is {machine.system} on "
            f"{machine.architecture}",
            fix="pass --device cpu, or use a machine with Linux on x86-64",
        )
    if has_cpu and has_gpu:
        yield Problem(what=BOTH_INSTALLED, fix=REINSTALL, blocks=packages.provider is None)
    elif has_cpu:
        yield Problem(
            what="the installed onnxruntime is the CPU build, without a CUDA provider",
            fix=f"pip uninstall -y onnxruntime && {CUDA_EXTRA}",
        )
    elif packages.build is None and not has_gpu:
        yield Problem(what="ONNX Runtime is not installed", fix=CUDA_EXTRA)
    elif packages.provider is None:
        yield Problem(
            what=f"onnxruntime-gpu {packages.versions.get(GPU_PACKAGE, '')} is damaged: its CUDA "
            "provider is missing",
            fix=REINSTALL,
        )


def torch_problems(facts: Facts, *, on_gpu: bool) -> Iterator[Problem]:
    """Find out whether torch is missing or a build without CUDA."""
    version = facts.packages.versions.get("torch")
    if version is None and facts.trial.framework == "torch":
        yield Problem(what="torch is not installed", fix=TORCH_EXTRA)
    elif on_gpu and facts.packages.torch_cuda is None:
        yield Problem(
            what=f"torch {version} is a build without CUDA",
            fix=f"pip uninstall -y torch && {TORCH_EXTRA} (PyPI's torch for Linux has CUDA; use "
            "no other index)",
        )


def library_problems(facts: Facts) -> Iterator[Problem]:
    """Yield missing libraries, which one command installs, and libraries that do not load."""
    missing = [library for library in facts.libraries if library.problem is not None]
    absent: dict[bool, list[str]] = {True: [], False: []}
    for library in missing:
        wheel = wheel_of(library.soname, (facts.packages.cuda_version or "13").partition(".")[0])
        version = facts.packages.versions.get(wheel or "")
        if wheel is not None and version is None and library.path is None:
            absent[library.is_needed].append(f"{library.soname} (from the package {wheel})")
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
    """Describe a library that is installed, or should be, and does not load."""
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
    """Return the distribution that contains ``soname``."""
    name = soname.partition(".so")[0]
    if name == CUDNN:
        return f"nvidia-cudnn-cu{cuda_major}"
    suffix = f"-cu{cuda_major}" if int(cuda_major) < 13 else ""
    return WHEELS[name] + suffix if name in WHEELS else None


def trial_problem(facts: Facts) -> Problem:
    """Describe a trial that failed although nothing else is wrong."""
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
            fix="nvidia-smi (shows which processes use it); stop them or choose another GPU",
        )
    return Problem(
        what=f"{trial.framework} does not compute on {device}: {trial.problem}",
        fix=reinstall(facts),
    )


def reinstall(facts: Facts) -> str:
    """Return the command that reinstalls the runtime's packages."""
    if facts.runtime != ONNX:
        return f"pip uninstall -y torch && {TORCH_EXTRA}"
    extra = CUDA_EXTRA if facts.driver is not None else CPU_EXTRA
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {extra}"


def driver_problems(facts: Facts) -> Iterator[Problem]:
    """Yield why the driver offers no GPU, not the requested one, or one that is too old."""
    driver = facts.driver
    assert driver is not None
    if not driver.is_found:
        yield absent_driver(facts)
        return
    if driver.problem is not None:
        yield Problem(what=f"the driver does not answer: {driver.problem}", fix="sudo reboot")
        return
    too_old = [*old_driver(facts, driver)]
    yield from too_old
    if driver.error_code or not driver.gpus:
        if not too_old:
            yield no_gpu(facts, driver)
        return
    wanted = parse_device(facts.device)
    assert wanted is not None
    if wanted.index >= len(driver.gpus):
        last = f" to cuda:{len(driver.gpus) - 1}" if len(driver.gpus) > 1 else ""
        yield Problem(
            what=f"there is no {facts.device}; the driver offers cuda:0{last}",
            fix="pass --device cuda:0",
        )
        return
    yield from old_gpu(facts, driver.gpus[wanted.index])


def absent_driver(facts: Facts) -> Problem:
    """Describe why there is no libcuda.so.1."""
    machine = facts.machine
    if machine.nvidia_devices == 0 and machine.kernel_driver is None:
        return Problem(
            what="this machine has no NVIDIA GPU (none on the PCI bus, and no driver)",
            fix=f"use a machine with an NVIDIA GPU, {ON_CPU}",
        )
    if machine.is_container:
        return Problem(
            what="the driver (libcuda.so.1) is not visible in this container",
            fix="start it with `docker run --gpus all ...`; the host needs the NVIDIA driver and "
            "the package nvidia-container-toolkit",
        )
    return Problem(
        what="the NVIDIA driver (libcuda.so.1) is not installed", fix=driver_install(facts)
    )


def driver_install(facts: Facts) -> str:
    """Return the command that installs a driver for the installed packages' CUDA version."""
    branch = DRIVER_OF_CUDA.get(wanted_major(facts), max(DRIVER_OF_CUDA.values()))
    if facts.machine.is_container:
        return f"install NVIDIA driver {branch} or newer on the host of this container"
    return (
        f"sudo apt install nvidia-driver-{branch} && sudo reboot (on Ubuntu; elsewhere NVIDIA's "
        f"driver {branch} or newer)"
    )


def wanted_major(facts: Facts) -> int:
    """Return the major version of CUDA that the runtime was built for."""
    packages = facts.packages
    version = packages.cuda_version if facts.runtime == ONNX else packages.torch_cuda
    major = (version or "").partition(".")[0]
    return int(major) if major.isdigit() else max(DRIVER_OF_CUDA)


def old_driver(facts: Facts, driver: Driver) -> Iterator[Problem]:
    """Compare major versions only: CUDA is compatible across minor versions."""
    wanted, found = wanted_major(facts), driver.cuda_version
    if found is not None and found[0] < wanted:
        yield Problem(
            what=f"the driver supports CUDA up to {found[0]}.{found[1]}, and the installed "
            f"packages are built for CUDA {wanted}",
            fix=driver_install(facts),
        )


def no_gpu(facts: Facts, driver: Driver) -> Problem:
    """Describe why an installed driver offers no GPU."""
    code, variables = driver.error_code, facts.machine.variables
    if "CUDA_VISIBLE_DEVICES" in variables and code in (None, NO_DEVICE):
        return Problem(
            what="the driver offers no GPU, and CUDA_VISIBLE_DEVICES is "
            f"{variables['CUDA_VISIBLE_DEVICES']!r}",
            fix="unset CUDA_VISIBLE_DEVICES",
        )
    if code in ERRORS:
        what, fix = ERRORS[code]
        return Problem(what=f"{what} (driver error {code})", fix=fix)
    error = f" (driver error {code})" if code else ""
    if facts.machine.is_container:
        return Problem(
            what=f"the driver offers this container no GPU{error}",
            fix="start it with `docker run --gpus all ...`",
        )
    return Problem(
        what=f"the driver offers no GPU{error}",
        fix=f"nvidia-smi (must list the GPU; if not: sudo modprobe nvidia, or reboot), {ON_CPU}",
    )


def old_gpu(facts: Facts, gpu: Gpu) -> Iterator[Problem]:
    """Find out whether the GPU is too old for CUDA or for bfloat16."""
    capability, major = gpu.compute_capability, wanted_major(facts)
    if capability is None:
        return
    name, text = gpu.name or facts.device, f"{capability[0]}.{capability[1]}"
    needed = CAPABILITY_OF_CUDA.get(major, (0, 0))
    if capability < needed:
        yield Problem(
            what=f"{name} has compute capability {text}; CUDA {major} needs "
            f"{needed[0]}.{needed[1]}",
            fix=f"use a newer GPU, {ON_CPU}",
        )
    elif capability < BFLOAT16_CAPABILITY:
        yield Problem(
            what=f"{name} has compute capability {text}, and bfloat16 needs 8.0",
            fix="export with --dtype fp16 for this GPU",
            blocks=False,
        )
