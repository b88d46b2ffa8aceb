"""Open ONNX Runtime sessions on the requested device, and check a loaded graph's interface."""

from __future__ import annotations

import functools
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.bundle import MANIFEST, Axis, Graph, Signature
from gemma3_export.device import (
    BOTH_INSTALLED,
    CPU_PACKAGE,
    CUDA_EXTRA,
    GPU_PACKAGE,
    REINSTALL,
    TELEMETRY_OFF,
    CudaOptions,
    Device,
    gpu_count,
    is_installed,
    parse_device,
)
from gemma3_export.dtypes import ELEMENT_TYPES
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.processor_kind import read_processor
from gemma3_export.processors import chosen_threads

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "DOCTOR",
    "check_interface",
    "choose_device",
    "cuda_provider_options",
    "first_line",
    "import_onnxruntime",
    "open_session",
    "product_entries",
]

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_FAILURE = re.compile(r"\b(CUDA|CUDNN|CUBLAS) (failure|error)", re.IGNORECASE)
DOCTOR = "`gemma3-export doctor` shows what is missing and how to install it"
# Session option: the folder of the external data of a graph that is loaded from memory.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# Environment variables of ONNX Runtime. It has faster kernels on CUDA for products with 8-bit
# blocks of at least 32: 0.37 instead of 0.47 ms for a step of the 270M on an H100.
KERNEL_CHOICES = {"ORT_FPA_INTB_GEMM": "1"}
SHOWN_PROBLEMS = 2
ERRORS_ONLY, NOTHING = 3, 4  # levels of ONNX Runtime's logs
X86 = ("x86_64", "AMD64")
# With one of them, products of unsigned by signed bytes are exact.
EXACT_SETS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def choose_device(name: str) -> Device:
    """Return the device called ``name``; ``auto`` is CUDA if it works, otherwise the CPU.

    Raises:
        UnavailableError: ONNX Runtime or the device is missing; the message says how to fix it.
        InputError: the device name is unknown.
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
                f"{wanted} was requested, but the NVIDIA driver sees {count} GPUs, numbered from "
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
    remedy: str = "export the bundle again",
) -> onnxruntime.InferenceSession:
    """Load a graph onto ``device``.

    Args:
        source: the ``.onnx`` file, or a serialized graph (with the folder of its external data
            among the ``entries``).
        device: from :func:`choose_device`.
        threads: intra-op threads; None lets ONNX Runtime choose, within the processors that this
            process may use.
        entries: session configuration entries.
        cuda: options for the CUDA provider; None for the defaults.
        remedy: what to do about a graph that cannot be loaded.

    Raises:
        UnavailableError: CUDA fails to initialize.
        InputError: the graph cannot be read, or an option is out of range.
    """
    ort = import_onnxruntime()
    log_errors_only()
    options = ort.SessionOptions()
    # On the CPU, every logged error is also raised; failures to initialize CUDA are only logged.
    options.log_severity_level = NOTHING if device.kind == "cpu" else ERRORS_ONLY
    if (threads := chosen_threads(threads)) is not None:
        options.intra_op_num_threads = threads
    cuda = cuda or CudaOptions()
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    providers: list[Any] = [CPU_PROVIDER]
    if device.kind == "cuda":
        providers.insert(0, (CUDA_PROVIDER, cuda_provider_options(cuda, device)))
    try:
        with kernel_choices():
            session = ort.InferenceSession(
                str(source) if isinstance(source, Path) else source, options, providers=providers
            )
    except Exception as error:  # ONNX Runtime's errors share no base class
        if device.kind == "cuda" and CUDA_FAILURE.search(str(error)):
            raise UnavailableError(
                f"CUDA failed to initialize: {first_line(error)}; {DOCTOR}, or pass --device cpu"
            ) from error
        name = source if isinstance(source, Path) else "the rewritten graph"
        raise InputError(
            f"ONNX Runtime cannot load {name}: {first_line(error)}; {remedy}"
        ) from error
    if device.kind == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
        raise UnavailableError(
            f"CUDA was requested, but ONNX Runtime fell back to {session.get_providers()}: its "
            f"CUDA libraries or the driver failed to load; {DOCTOR}, or pass --device cpu"
        )
    return session


def product_entries(graph: Graph) -> dict[str, str]:
    """Return the session configuration entries with which ``graph`` multiplies exactly."""
    return {} if has_exact_products() else graph.session_entries


def has_exact_products() -> bool:
    """Return whether products of unsigned and signed bytes are exact on this processor.

    False where the system does not say, so that results are right there, but slower.
    """
    if platform.machine() not in X86:
        return True
    return not EXACT_SETS.isdisjoint(read_processor().instruction_sets)


@contextmanager
def kernel_choices() -> Iterator[None]:
    """Set the environment variables with which ONNX Runtime chooses kernels, while it does.

    Variables that the user has set are left as they are.
    """
    chosen = {name: value for name, value in KERNEL_CHOICES.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)


def cuda_provider_options(cuda: CudaOptions, device: Device) -> dict[str, str]:
    """Return ``cuda`` as the options of ONNX Runtime's CUDA provider."""
    options = {
        "device_id": str(device.index),
        "enable_cuda_graph": str(int(bool(cuda.graph))),
        "use_tf32": str(int(cuda.tf32)),
        "arena_extend_strategy": "kSameAsRequested" if cuda.grows_exactly else "kNextPowerOfTwo",
    }
    if cuda.memory_limit_bytes is not None:
        options["gpu_mem_limit"] = str(cuda.memory_limit_bytes)
    return options


def import_onnxruntime() -> Any:
    """Import and return the ``onnxruntime`` module, whose telemetry is off by default.

    Raises:
        UnavailableError: it is not installed.
    """
    # Read during the import. With telemetry, 1.32 also warns where it cannot write to a cache.
    os.environ.setdefault(TELEMETRY_OFF, "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            'ONNX Runtime is not installed; run: pip install "gemma3-export[cpu]" '
            '(or "gemma3-export[cuda]" for NVIDIA GPUs)'
        ) from error
    return onnxruntime


@functools.cache
def log_errors_only() -> None:
    """Keep warnings of ONNX Runtime's default logger off stderr, once per process.

    A session's own level does not apply to them: since 1.26, every session on CUDA warns that
    no plugin for CUDA is registered, between the words of a text. The logger belongs to the
    process, and its level cannot be read, so it is not restored; a program that wants its warnings
    sets the level after its first session.
    """
    import_onnxruntime().set_default_logger_severity(ERRORS_ONLY)


def require_cuda(ort: Any) -> None:
    """Check that this ONNX Runtime can use CUDA, and load its CUDA libraries.

    Raises:
        UnavailableError: it cannot; the message names the likely cause and the fix.
    """
    if CUDA_PROVIDER in ort.get_available_providers():
        if not gpu_count():
            raise UnavailableError(
                "CUDA was requested, but the NVIDIA driver (libcuda.so.1) is missing or sees no "
                f"GPU; {DOCTOR}, or pass --device cpu"
            )
        ort.preload_dlls()  # of the NVIDIA packages that pip installed
        return
    if is_installed(CPU_PACKAGE) and is_installed(GPU_PACKAGE):
        raise UnavailableError(f"{BOTH_INSTALLED}; run: {REINSTALL} ({DOCTOR})")
    raise UnavailableError(
        "CUDA was requested, but the installed ONNX Runtime has no CUDA provider; run: "
        f"pip uninstall -y onnxruntime && {CUDA_EXTRA}, or pass --device cpu ({DOCTOR})"
    )


def first_line(error: Exception) -> str:
    """Return an error's message without the stack trace that may follow it."""
    return str(error).strip().split("\n", 1)[0]


def check_interface(session: Any, signature: Signature, graph: Path) -> None:
    """Reject a graph that does not match its bundle's config and manifest.

    Only what shows in the interface is checked; the size of the window or the base of RoPE are
    left to the parity check.

    Args:
        session: the session of the graph.
        signature: the interface that config and manifest declare.
        graph: the graph's file, for the message.

    Raises:
        InputError: names, element types or shapes differ.
    """
    problems = list(_problems(session, signature))
    if problems:
        more = (
            f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        )
        raise InputError(
            f"{graph} does not have the inputs and outputs that its config.json and {MANIFEST} "
            f"declare: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}; restore the files or export "
            "the bundle again"
        )


def _problems(session: Any, signature: Signature) -> Iterator[str]:
    found = {
        value.name: value
        for value in (
            *session.get_inputs(),
            *session.get_overridable_initializers(),
            *session.get_outputs(),
        )
    }
    declared = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    for name, spec in declared.items():
        value = found.get(name)
        if value is None:
            yield f"{name} is missing"
        elif value.type != ELEMENT_TYPES[spec.dtype].ort_type:
            yield f"{name} is {value.type}, declared as {ELEMENT_TYPES[spec.dtype].ort_type}"
        elif not _agree(spec.axes, value.shape):
            yield f"{name} is {_text(value.shape)}, declared as {_text(spec.axes)}"
    yield from (f"{name} is not declared" for name in found if name not in declared)


def _agree(declared: tuple[Axis, ...], found: list[Any]) -> bool:
    """Return whether axes agree, comparing fixed sizes with sizes and names with names."""
    return len(declared) == len(found) and all(
        wanted == axis or not isinstance(axis, type(wanted))
        for wanted, axis in zip(declared, found, strict=True)
    )


def _text(axes: Any) -> str:
    return f"[{', '.join(map(str, axes))}]"
