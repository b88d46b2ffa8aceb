"""Open an ONNX Runtime session on the device that was asked for, or say why not."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import MANIFEST, Axis, Signature
from gemma3_export.device import (
    BOTH_INSTALLED,
    CPU_PACKAGE,
    CUDA_EXTRA,
    GPU_PACKAGE,
    REINSTALL,
    CudaOptions,
    Device,
    gpu_count,
    is_installed,
    parse_device,
)
from gemma3_export.dtypes import ELEMENT_TYPES
from gemma3_export.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "DOCTOR",
    "ONNX_BFLOAT16",
    "as_float32",
    "check_interface",
    "choose_device",
    "cuda_provider_options",
    "drop_mapped_pages",
    "open_session",
    "run_graph",
    "widened",
    "zeros",
]

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_FAILURE = re.compile(r"\b(CUDA|CUDNN|CUBLAS) (failure|error)", re.IGNORECASE)
DOCTOR = "`gemma3-export doctor` shows what is missing and the command that gets it"
# Where the external data of a graph in memory lies.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


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
        providers.insert(0, (CUDA_PROVIDER, cuda_provider_options(cuda, device)))
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


def cuda_provider_options(cuda: CudaOptions, device: Device) -> dict[str, str]:
    """Return ``cuda`` as the options of ONNX Runtime's CUDA provider."""
    options = {
        "device_id": str(device.index),
        "enable_cuda_graph": str(int(cuda.graph)),
        "use_tf32": str(int(cuda.tf32)),
        "arena_extend_strategy": "kSameAsRequested" if cuda.grows_exactly else "kNextPowerOfTwo",
    }
    if cuda.memory_limit_bytes is not None:
        options["gpu_mem_limit"] = str(cuda.memory_limit_bytes)
    return options


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


# Whether a loaded ONNX graph has the inputs and outputs that its bundle declares.

SHOWN = 2


def check_interface(session: Any, signature: Signature, graph: Path) -> None:
    """Refuse a graph that was swapped, or whose config was edited, before its first step.

    What does not show in a shape (the window's size, a rotation's base) is parity's business.

    Args:
        session: of the graph.
        signature: what config and manifest say about it.
        graph: its file, for the message.

    Raises:
        InputError: names, element types or extents differ.
    """
    problems = list(_problems(session, signature))
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(
            f"{graph} does not have the inputs and outputs that its config.json and {MANIFEST} "
            f"declare: {'; '.join(problems[:SHOWN])}{more}; restore the files or export it anew"
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
    """Whether all axes are the same, as far as both say an extent, or both a name."""
    return len(declared) == len(found) and all(
        wanted == axis or not isinstance(axis, type(wanted))
        for wanted, axis in zip(declared, found, strict=True)
    )


def _text(axes: Any) -> str:
    return f"[{', '.join(map(str, axes))}]"


# ONNX Runtime's tensors in numpy's terms, bfloat16 included, which numpy does not have.

ONNX_BFLOAT16 = ELEMENT_TYPES["bfloat16"].onnx


def zeros(shape: Sequence[int], dtype: str) -> Any:
    """An OrtValue on the CPU."""
    ort = import_onnxruntime()
    if dtype == "bfloat16":
        bits = np.zeros(shape, np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))


def run_graph(session: Any, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
    """What ``session.run`` does, for values of every type: OrtValues on the CPU.

    Args:
        session: of any graph.
        outputs: names.
        feeds: arrays or OrtValues by the inputs' names.
    """
    ort = import_onnxruntime()
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in feeds.items()
    }
    found: list[Any] = session.run_with_ort_values(list(outputs), values)
    return found


def as_float32(value: Any) -> NDArray[np.float32]:
    """A copy of an OrtValue on the CPU."""
    if value.element_type() != ONNX_BFLOAT16:
        array: NDArray[np.float32] = value.numpy().astype(np.float32)
        return array
    count = int(np.prod(value.shape()))
    if not count:  # nothing lies at its address
        return np.zeros(value.shape(), np.float32)
    bits = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return widened(np.ctypeslib.as_array(bits).reshape(value.shape()))


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Numbers in bfloat16, which is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Give back the memory of weights that ONNX Runtime has laid out anew.
#
# It maps the file of weights, packs most matrices into copies for its kernels, and keeps the
# mapping,
# whose pages then count as the process's memory although hardly any is read again: of an embedding,
# the rows of the tokens that come up. The system may drop such pages at any time; here they are
# dropped at once, and what is needed comes back from the file.

MAPS = Path("/proc/self/smaps")  # Linux has it
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.*)$")
CHANGED = re.compile(r"^Anonymous: +(\d+) kB$")


def drop_mapped_pages(file: Path) -> int:
    """Let go of the pages of ``file`` that this process has mapped and not changed.

    Returns:
        Bytes of these mappings; 0 where the system does not tell them.
    """
    if not MAPS.exists():
        return 0
    library, dropped = ctypes.CDLL(None, use_errno=True), 0
    for start, end in unchanged_mappings(MAPS.read_text(errors="surrogateescape"), file.resolve()):
        address, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        if library.madvise(address, size, mmap.MADV_DONTNEED) == 0:
            dropped += end - start
    return dropped


def unchanged_mappings(smaps: str, file: Path) -> Iterator[tuple[int, int]]:
    """First and last address of each mapping of ``file`` that equals the file.

    Pages that were written to have no copy in the file; a mapping with one of them stays.
    """
    place: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if header := HEADER.match(line):
            place = (int(header[1], 16), int(header[2], 16)) if header[3] == str(file) else None
        elif place and (changed := CHANGED.match(line)):
            if changed[1] == "0":
                yield place
            place = None
