"""The facts that the doctor collects: plain values, and readers for the machine and its packages.

A diagnosis is a function of these values, see :mod:`gemma3_export.cuda.problems`.
"""

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

from gemma3_export.processor_kind import Processor, read_processor
from gemma3_export.runtimes.onnx.huge_pages import huge_page_setting

__all__ = [
    "PROVIDER",
    "Driver",
    "Facts",
    "Gpu",
    "Library",
    "Machine",
    "Packages",
    "Trial",
    "read_machine",
    "read_packages",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine and its Python."""

    python: str
    executable: str
    system: str  # platform.system()
    architecture: str  # platform.machine()
    processor: Processor | None = None
    huge_pages: str | None = None  # who gets them: always, madvise or never; None: no such setting
    is_container: bool = False
    nvidia_devices: int | None = None  # on the PCI bus; None: the bus is not visible
    kernel_driver: str | None = None  # version of the loaded NVIDIA kernel module
    variables: dict[str, str] = field(
        default_factory=dict
    )  # environment variables that affect CUDA


@dataclass(frozen=True, kw_only=True, slots=True)
class Packages:
    """The packages that pip installed, read without importing them."""

    versions: dict[str, str] = field(default_factory=dict)  # distribution -> version
    build: str | None = None  # the distribution that the files in `onnxruntime/` came from
    build_version: str | None = None
    cuda_version: str | None = None  # that those files were built for
    provider: str | None = None  # path of the CUDA provider
    torch_cuda: str | None = None  # the CUDA version that torch was built for


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU that the driver reports."""

    index: int
    name: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """The NVIDIA driver, as ``libcuda.so.1`` reports it."""

    is_found: bool
    cuda_version: tuple[int, int] | None = None  # the newest CUDA that it supports
    error_code: int | None = None  # of cuInit or cuDeviceGetCount
    problem: str | None = None  # why it could not be queried
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A library that the CUDA provider loads."""

    soname: str
    is_needed: bool  # the provider does not load without it
    path: str | None = None  # the file that was loaded
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """The result of multiplying two matrices on the device with the runtime's framework."""

    framework: str  # onnxruntime or torch, and its version
    providers: tuple[str, ...] = ()  # that the framework offers
    is_right: bool | None = None  # the product is correct; None: nothing was computed
    problem: str | None = None
    log: str | None = None  # what the libraries wrote to stderr

    @property
    def passed(self) -> bool:
        """Return whether the device computes correctly."""
        return self.is_right is True


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that the doctor collects."""

    device: str
    runtime: str
    machine: Machine
    packages: Packages
    driver: Driver | None = None  # None: not queried, because the device is the CPU
    libraries: tuple[Library, ...] = ()
    trial: Trial


# The machine, and traces of NVIDIA hardware that need no driver

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
WSL_DEVICE = Path("/dev/dxg")  # a GPU that WSL passes on is not on the bus
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


def read_machine() -> Machine:
    """Describe the machine, as far as it can be determined."""
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=platform.system(),
        architecture=platform.machine(),
        processor=read_processor(),
        huge_pages=huge_page_setting(),
        is_container=any(Path(mark).exists() for mark in CONTAINER_MARKS),
        nvidia_devices=count_nvidia_devices(),
        kernel_driver=kernel_driver_version(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def count_nvidia_devices() -> int | None:
    """Count NVIDIA devices on the PCI bus; return None if the bus is not visible."""
    if WSL_DEVICE.exists() or not PCI_DEVICES.is_dir():
        return None
    try:
        vendors = [file.read_text(encoding="ascii") for file in PCI_DEVICES.glob("*/vendor")]
    except (OSError, UnicodeDecodeError):
        return None
    return sum(vendor.strip() == NVIDIA_VENDOR for vendor in vendors) if vendors else None


def kernel_driver_version() -> str | None:
    """Return the version of the loaded NVIDIA kernel module."""
    try:
        text = KERNEL_DRIVER.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else "unknown"


# The packages for ONNX Runtime and CUDA, read from metadata and files without importing them

PROVIDER = "libonnxruntime_providers_cuda.so"
SHOWN = re.compile(r"gemma3-export|onnxruntime.*|ort-nightly.*|torch|nvidia-.*")


def read_packages() -> Packages:
    """Describe the installed packages; a damaged package counts as absent."""
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
    """Yield name and version of each distribution that is related to CUDA."""
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # noqa: S112  (damaged, for example by a full disk: counts as absent)
            continue
        if name and version and SHOWN.fullmatch(name.lower()):
            yield name.lower().replace("_", "-"), version


def package_folder(module: str) -> Path | None:
    """Return the folder of a package without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def assignments(file: Path) -> dict[str, str]:
    """Return the strings that a module assigns to names, such as ``cuda_version = '13.0'``."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(re.findall(r"^(\w+)\s*(?::[^=\n]+)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE))
