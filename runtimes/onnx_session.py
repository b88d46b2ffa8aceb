"""Open an ONNX Runtime session on the device that was asked for, or say why not."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.runtimes.device import Device, parse_device

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["open_session"]

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"


def open_session(
    path: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    optimize: bool = True,
    options: Mapping[str, str] | None = None,
) -> tuple[onnxruntime.InferenceSession, Device]:
    """Load a graph; ``auto`` takes CUDA when ONNX Runtime offers it.

    Args:
        path: the ``.onnx`` file; its external data lies beside it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator; None lets ONNX Runtime choose.
        optimize: let ONNX Runtime rewrite the graph.
        options: further session configuration entries.

    Raises:
        UnavailableError: ONNX Runtime or the device is missing; the message says how to get it.
        InputError: the device's name is unknown, or the graph cannot be read.
    """
    wanted = parse_device(device)
    ort = import_onnxruntime()
    if wanted is None:
        has_cuda = CUDA_PROVIDER in ort.get_available_providers()
        wanted = Device("cuda") if has_cuda else Device("cpu")
    if wanted.kind == "cuda":
        require_cuda(ort)
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads is {threads}; give at least 1")
        session_options.intra_op_num_threads = threads
    if not optimize:
        session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (options or {}).items():
        session_options.add_session_config_entry(key, value)
    providers: list[Any] = [CPU_PROVIDER]
    if wanted.kind == "cuda":
        providers.insert(0, (CUDA_PROVIDER, {"device_id": wanted.index}))
    try:
        session = ort.InferenceSession(str(path), session_options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise InputError(
            f"ONNX Runtime cannot load {path}: {first_line(error)}; export the bundle anew"
        ) from error
    if wanted.kind == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
        if device == "auto":
            return session, Device("cpu")
        raise UnavailableError(
            f"CUDA was asked for, but ONNX Runtime fell back to {session.get_providers()}: "
            "its CUDA libraries or the driver did not load. Install "
            '"gemma3-export[cuda]" and an NVIDIA driver, or pass --device cpu'
        )
    return session, wanted


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
        ort.preload_dlls()  # finds the CUDA libraries that pip installed
        return
    if is_installed("onnxruntime") and is_installed("onnxruntime-gpu"):
        raise UnavailableError(
            "onnxruntime and onnxruntime-gpu are both installed and the former hides CUDA; run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && "
            'pip install "gemma3-export[cuda]"'
        )
    raise UnavailableError(
        "CUDA was asked for, but the installed ONNX Runtime has no CUDA provider; run: "
        'pip uninstall -y onnxruntime && pip install "gemma3-export[cuda]", or pass --device cpu'
    )


def is_installed(distribution: str) -> bool:
    """Whether pip knows ``distribution``."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def first_line(error: Exception) -> str:
    """An error's text without the stack of file names that may follow it."""
    return str(error).strip().split("\n", 1)[0]
