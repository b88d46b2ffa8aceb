"""What is wrong with the driver and its GPUs, and with their age."""

from __future__ import annotations

from collections.abc import Iterator

from gemma3_export.cuda.facts import Driver, Facts, Gpu
from gemma3_export.cuda.problem import Problem
from gemma3_export.device import parse_device

__all__ = ["driver_problems"]

ON_CPU = "or pass --device cpu"
# NVIDIA's release notes of CUDA: the oldest driver branch of each major version, and the oldest
# compute capability that its libraries have code for.
DRIVER_OF_CUDA = {12: 525, 13: 580}
CAPABILITY_OF_CUDA = {12: (5, 0), 13: (7, 5)}
BFLOAT16_CAPABILITY = (8, 0)
NO_DEVICE = 100
# Codes of CUresult that say what to do.
ERRORS = {
    2: ("the GPU has no memory left", "nvidia-smi (shows which processes hold it)"),
    34: (
        "the library libcuda.so.1 is the stub of the CUDA toolkit",
        "take the toolkit's folder `stubs` out of LD_LIBRARY_PATH",
    ),
    802: (
        "the system's GPUs are not ready; those with NVSwitch need the fabric manager",
        "sudo systemctl start nvidia-fabricmanager",
    ),
    803: (
        "libcuda.so.1 and the kernel's NVIDIA module are of different versions",
        "sudo reboot (a driver update takes effect then)",
    ),
    804: (
        "CUDA's forward compatibility library is installed, but this GPU does not take it",
        "sudo apt remove 'cuda-compat-*', or take its folder out of LD_LIBRARY_PATH",
    ),
}


def driver_problems(facts: Facts) -> Iterator[Problem]:
    """Why the driver offers no GPU, or not the one that was asked for, or one that is too old."""
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
    """There is no libcuda.so.1: which of the reasons."""
    machine = facts.machine
    if machine.nvidia_devices == 0 and machine.kernel_driver is None:
        return Problem(
            what="this machine has no NVIDIA GPU (none on the PCI bus, and no driver)",
            fix=f"use a machine with one, {ON_CPU}",
        )
    if machine.is_container:
        return Problem(
            what="the container does not see the driver (libcuda.so.1)",
            fix="start it with `docker run --gpus all ...`; the host needs the NVIDIA driver and "
            "the package nvidia-container-toolkit",
        )
    return Problem(
        what="the NVIDIA driver (libcuda.so.1) is not installed", fix=driver_install(facts)
    )


def driver_install(facts: Facts) -> str:
    """The command that installs a driver for this ONNX Runtime's CUDA."""
    branch = DRIVER_OF_CUDA.get(wanted_major(facts), max(DRIVER_OF_CUDA.values()))
    if facts.machine.is_container:
        return f"install NVIDIA driver {branch} or newer on the host of this container"
    return (
        f"sudo apt install nvidia-driver-{branch} && sudo reboot (on Ubuntu; elsewhere NVIDIA's "
        f"driver {branch} or newer)"
    )


def wanted_major(facts: Facts) -> int:
    """The major version of CUDA that the runtime was built for."""
    packages = facts.packages
    version = packages.cuda_version if facts.runtime == "onnx" else packages.torch_cuda
    major = (version or "").partition(".")[0]
    return int(major) if major.isdigit() else max(DRIVER_OF_CUDA)


def old_driver(facts: Facts, driver: Driver) -> Iterator[Problem]:
    """Minor versions do not matter: CUDA keeps compatible within a major one."""
    wanted, found = wanted_major(facts), driver.cuda_version
    if found is not None and found[0] < wanted:
        yield Problem(
            what=f"the driver supports CUDA up to {found[0]}.{found[1]}, and the installed "
            f"packages are built for CUDA {wanted}",
            fix=driver_install(facts),
        )


def no_gpu(facts: Facts, driver: Driver) -> Problem:
    """The driver is there and offers nothing."""
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
    """A GPU for which there is no code, or that has no bfloat16."""
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
