"""Open an ONNX Runtime session on the device that was asked for, or say why not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.cuda.driver import gpu_count
from gemma3_export.cuda.packages import (
    BOTH_INSTALLED,
    CPU_PACKAGE,
    CUDA_EXTRA,
    GPU_PACKAGE,
    REINSTALL,
    is_installed,
)
from gemma3_export.device import Device, parse_device
from gemma3_export.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["DOCTOR", "CudaOptions", "choose_device", "open_session"]

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_FAILURE = re.compile(r"\b(CUDA|CUDNN|CUBLAS) (failure|error)", re.IGNORECASE)
DOCTOR = "`gemma3-export doctor` shows what is missing and the command that gets it"
# Where the external data of a graph in memory lies.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaOptions:
    """What ONNX Runtime's CUDA provider may do.

    Raises:
        InputError: the memory limit is impossible.
    """

    graph: bool = False  # capture decode steps as a CUDA graph, one for each cache
    tf32: bool = False  # let float32 products round their inputs to 10 bits of mantissa
    memory_limit_bytes: int | None = None  # of the provider's arena; caches come on top
    grows_exactly: bool = True  # the arena takes what is asked for, not the next power of two

    def __post_init__(self) -> None:
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 1:
            raise InputError(
                f"the GPU memory limit is {self.memory_limit_bytes}; give at least 1 byte"
            )

    def provider_options(self, device_index: int) -> dict[str, str]:
        """In ONNX Runtime's names."""
        options = {
            "device_id": str(device_index),
            "enable_cuda_graph": str(int(self.graph)),
            "use_tf32": str(int(self.tf32)),
            "arena_extend_strategy": "kSameAsRequested"
            if self.grows_exactly
            else "kNextPowerOfTwo",
        }
        if self.memory_limit_bytes is not None:
            options["gpu_mem_limit"] = str(self.memory_limit_bytes)
        return options


def choose_device(name: str) -> Device:
    """The device that ``name`` means here; ``auto`` is CUDA where it works, else the CPU.

    Raises:
        UnavailableError: ONNX Runtime or the device is missing; the message says how to get it.
        InputError: the device's name is unknown.
    """
    wanted = parse_device(name)
    ort = import_onnxruntime()
    if wanted is None:
        has_cuda = CUDA_PROVIDER in ort.get_available_providers() and gpu_count() > 0
        wanted = Device("cuda") if has_cuda else Device("cpu")
    if wanted.kind == "cuda":
        require_cuda(ort)
        if not wanted.index < (count := gpu_count()):
            raise UnavailableError(
                f"{wanted} was asked for, but the NVIDIA driver sees {count} GPUs, counted from "
                "cuda:0; choose one of them, or pass --device cpu"
            )
    return wanted


def open_session(
    source: Path | bytes,
    device: Device,
    *,
    threads: int | None = None,
    entries: Mapping[str, str] | None = None,
    cuda: CudaOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Load a graph onto ``device``, or fail.

    Args:
        source: the ``.onnx`` file, or a graph in memory (whose external data's folder is one of
            the ``entries``).
        device: from :func:`choose_device`.
        threads: threads inside one operator; None lets ONNX Runtime choose.
        entries: session configuration.
        cuda: what the CUDA provider may do; None is the default.

    Raises:
        UnavailableError: CUDA does not come up.
        InputError: the graph cannot be read, or an option is impossible.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    # On the CPU whatever it logs is raised as well; how CUDA failed to come up is only logged.
    options.log_severity_level = 4 if device.kind == "cpu" else 3
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads is {threads}; give at least 1")
        options.intra_op_num_threads = threads
    cuda = cuda or CudaOptions()
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    providers: list[Any] = [CPU_PROVIDER]
    if device.kind == "cuda":
        providers.insert(0, (CUDA_PROVIDER, cuda.provider_options(device.index)))
    try:
        session = ort.InferenceSession(
            str(source) if isinstance(source, Path) else source, options, providers=providers
        )
    except Exception as error:  # ONNX Runtime's errors share no base class
        if device.kind == "cuda" and CUDA_FAILURE.search(str(error)):
            raise UnavailableError(
                f"CUDA does not come up: {first_line(error)}; {DOCTOR}, or pass --device cpu"
            ) from error
        name = source if isinstance(source, Path) else "the rewritten graph"
        raise InputError(
            f"ONNX Runtime cannot load {name}: {first_line(error)}; export the bundle anew"
        ) from error
    if device.kind == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
        raise UnavailableError(
            f"CUDA was asked for, but ONNX Runtime fell back to {session.get_providers()}: "
            f"its CUDA libraries or the driver did not load; {DOCTOR}, or pass --device cpu"
        )
    return session


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            'ONNX Runtime is not installed; run: pip install "gemma3-export[cpu]" '
            '(or "gemma3-export[cuda]" for NVIDIA GPUs)'
        ) from error
    return onnxruntime


def require_cuda(ort: Any) -> None:
    """Complain when this ONNX Runtime has no CUDA provider.

    Raises:
        UnavailableError: with the cause that the installed packages suggest, and the fix.
    """
    if CUDA_PROVIDER in ort.get_available_providers():
        if not gpu_count():
            raise UnavailableError(
                "CUDA was asked for, but the NVIDIA driver (libcuda.so.1) is missing or sees no "
                f"GPU; {DOCTOR}, or pass --device cpu"
            )
        ort.preload_dlls()  # finds the CUDA libraries that pip installed
        return
    if is_installed(CPU_PACKAGE) and is_installed(GPU_PACKAGE):
        raise UnavailableError(f"{BOTH_INSTALLED}; run: {REINSTALL} ({DOCTOR})")
    raise UnavailableError(
        "CUDA was asked for, but the installed ONNX Runtime has no CUDA provider; run: "
        f"pip uninstall -y onnxruntime && {CUDA_EXTRA}, or pass --device cpu ({DOCTOR})"
    )


def first_line(error: Exception) -> str:
    """An error's text without the stack of file names that may follow it."""
    return str(error).strip().split("\n", 1)[0]
