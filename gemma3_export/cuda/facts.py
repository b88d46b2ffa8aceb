"""What the doctor looks at: plain values, so that a diagnosis can be made of any of them."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Driver", "Facts", "Gpu", "Library", "Machine", "Packages", "Trial"]


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
