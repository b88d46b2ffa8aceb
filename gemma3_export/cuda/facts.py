"""What the doctor looks at: plain values, so that a diagnosis can be made of any of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "PROVIDER",
    "Driver",
    "Facts",
    "Gpu",
    "Library",
    "Machine",
    "Packages",
    "Problem",
    "Trial",
    "read_machine",
    "read_packages",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where this runs."""

    python: str
    executable: str
    system: str  # as platform.system() says
    processor: str  # as platform.machine() says
    is_container: bool = False
    nvidia_devices: int | None = None  # on the PCI bus; None where that cannot be seen
    kernel_driver: str | None = None  # version of the loaded NVIDIA kernel module
    variables: dict[str, str] = field(default_factory=dict)  # that change what CUDA finds


@dataclass(frozen=True, kw_only=True, slots=True)
class Packages:
    """What pip installed; nothing of it is imported."""

    versions: dict[str, str] = field(default_factory=dict)  # distribution -> version
    build: str | None = None  # the package whose files lie in the folder `onnxruntime`
    build_version: str | None = None
    cuda_version: str | None = None  # that those files were built for
    provider: str | None = None  # the CUDA provider's file
    torch_cuda: str | None = None  # that the installed torch was built for


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device of the driver."""

    index: int
    name: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """What ``libcuda.so.1`` says."""

    is_found: bool
    cuda_version: tuple[int, int] | None = None  # the newest that the driver supports
    error_code: int | None = None  # of cuInit or cuDeviceGetCount
    problem: str | None = None  # why nothing could be asked
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A library that the CUDA provider loads."""

    soname: str
    is_needed: bool  # without it the provider does not load at all
    path: str | None = None  # the file that the loader took
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A product of two matrices on the device, computed as the runtime would."""

    framework: str  # onnxruntime or torch, with its version
    providers: tuple[str, ...] = ()  # that it offers
    is_right: bool | None = None  # whether the values were; None: nothing was computed
    problem: str | None = None
    log: str | None = None  # what the libraries wrote meanwhile

    @property
    def passed(self) -> bool:
        """Whether the device computes."""
        return self.is_right is True


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that was found out."""

    device: str
    runtime: str
    machine: Machine
    packages: Packages
    driver: Driver | None = None  # None: not asked, the device is the CPU
    libraries: tuple[Library, ...] = ()
    trial: Trial


# One thing that is wrong.


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is wrong, and what to run or do about it."""

    what: str
    fix: str
    blocks: bool = True  # the device cannot be used before it is solved


# Python, the system, and the traces of NVIDIA hardware that need no driver.

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
)
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA_VENDOR = "0x10de"
WSL_DEVICE = Path("/dev/dxg")  # a GPU that Windows passes on, which is on no bus
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


def read_machine() -> Machine:
    """What the machine is, as far as it tells."""
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=platform.system(),
        processor=platform.machine(),
        is_container=any(Path(mark).exists() for mark in CONTAINER_MARKS),
        nvidia_devices=count_nvidia_devices(),
        kernel_driver=kernel_driver_version(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def count_nvidia_devices() -> int | None:
    """NVIDIA's devices on the PCI bus; None where the bus cannot be seen."""
    if WSL_DEVICE.exists() or not PCI_DEVICES.is_dir():
        return None
    try:
        vendors = [file.read_text(encoding="ascii") for file in PCI_DEVICES.glob("*/vendor")]
    except (OSError, UnicodeDecodeError):
        return None
    return sum(vendor.strip() == NVIDIA_VENDOR for vendor in vendors) if vendors else None


def kernel_driver_version() -> str | None:
    """Version of the NVIDIA kernel module that is loaded."""
    try:
        text = KERNEL_DRIVER.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else "unknown"


# What pip installed for ONNX Runtime and CUDA, read from metadata and files without an import.

PROVIDER = "libonnxruntime_providers_cuda.so"
SHOWN = re.compile(r"gemma3-export|onnxruntime.*|ort-nightly.*|torch|nvidia-.*")


def read_packages() -> Packages:
    """What is installed; what is damaged counts as absent."""
    folder = package_folder("onnxruntime")
    build = {} if folder is None else assignments(folder / "capi" / "build_and_package_info.py")
    provider = None if folder is None else folder / "capi" / PROVIDER
    torch = package_folder("torch")
    return Packages(
        versions=dict(sorted(shown_versions())),
        build=build.get("package_name"),
        build_version=build.get("__version__"),
        cuda_version=build.get("cuda_version"),
        provider=str(provider) if provider is not None and provider.is_file() else None,
        torch_cuda=None if torch is None else assignments(torch / "version.py").get("cuda"),
    )


def shown_versions() -> Iterator[tuple[str, str]]:
    """Distribution and version of all that has to do with CUDA."""
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # noqa: S112  (damaged by a full disk, for example: counts as absent)
            continue
        if name and version and SHOWN.fullmatch(name.lower()):
            yield name.lower().replace("_", "-"), version


def package_folder(module: str) -> Path | None:
    """Where a package lies; it is not imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def assignments(file: Path) -> dict[str, str]:
    """Texts that a small module assigns to names: ``cuda_version = '13.0'``."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(re.findall(r"^(\w+)\s*(?::[^=\n]+)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE))
