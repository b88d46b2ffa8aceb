"""What the runtimes of torch's archives share: TorchScript's and torch.export's.

An archive holds code, so it is loaded only when its hash is the manifest's, or when the caller says
that it is trusted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export.passes import move_to_device_pass

from gemma3_export.bundle import Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.device import CudaOptions, parse_device
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.runtimes.generation.candidates import (
    SPARE_CANDIDATES,
    Candidates,
    batch_candidates_needed,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVCache,
    Logits,
    PaddingSide,
    RuntimeInfo,
    RuntimeName,
    check_capacity,
    check_step,
)
from gemma3_export.runtimes.torch.cache import (
    TorchCache,
    as_numpy,
    device_of,
    dtype_of,
    to_device,
)
from gemma3_export.runtimes.torch.decode_steps import TorchDecodeSteps

__all__ = [
    "ArchiveRuntime",
    "Pt2Runtime",
    "TorchScriptRuntime",
    "executor_for",
    "last_line",
    "torch_device",
    "torchscript",
]


class ArchiveRuntime:
    """A bundle's archive behind :class:`gemma3_export.runtimes.protocol.Runtime`.

    Args:
        bundle: an opened bundle, or its folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator; None lets torch choose.
        trust: load the archive although its hash is not the manifest's.
        cuda: whether decode steps become a CUDA graph; the other options are ONNX Runtime's.

    Raises:
        InputError: the bundle is damaged, has no archive, or the archive was changed; or its steps
            cannot become a CUDA graph.
        UnavailableError: the device, or what the format needs, is missing.
    """

    name: ClassVar[RuntimeName]
    can_capture: ClassVar[bool]  # whether a step can become a CUDA graph

    def __init__(
        self,
        bundle: Bundle | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        trust: bool = False,
        cuda: CudaOptions | None = None,
    ) -> None:
        if isinstance(bundle, Path):
            bundle = Bundle(bundle)
        graph = bundle.graph(self.name)
        if not trust:
            require_untouched(bundle, graph.path)
        self.config: Gemma3Config = bundle.config
        self.dtype = getattr(torch, graph.cache_dtype)
        self.target = graph.target
        self.is_quantized = bundle.is_quantized(self.name)
        self.device = torch_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        # Steps of equal shapes pay where the host is far away.
        self.decodes_on_device = self.device.type == "cuda"
        self.captures = self.decodes_on_device and cuda is not None and cuda.graph
        if self.captures and not self.can_capture:
            raise InputError(
                f"steps of the {self.name} runtime ask the host for a size, so they cannot become "
                "a CUDA graph; take the torchscript or onnx runtime, or no CUDA graph"
            )
        self.module = self.load(bundle.file(graph.path))

    def load(self, path: Path) -> Any:
        """The archive's step, on the runtime's device.

        Raises:
            InputError: the archive cannot be read.
        """
        raise NotImplementedError

    def count(self, num_logits: int) -> torch.Tensor:
        """[1] how many logits to keep, where the archive wants it: slicing reads it on the host."""
        return torch.tensor([num_logits])

    def executing(self) -> AbstractContextManager[None]:
        """What surrounds every step."""
        return nullcontext()

    @property
    def info(self) -> RuntimeInfo:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        dtype = dtype_of(self.dtype)
        return RuntimeInfo(
            name=self.name,
            versions={"torch": torch.__version__},
            target=self.target,
            dtype=dtype,
            compute_dtype=dtype,
            is_quantized=self.is_quantized,
            device=device_of(self.device),
            threads=torch.get_num_threads(),
        )

    @property
    def padding_side(self) -> PaddingSide:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`."""
        return "left"

    @torch.inference_mode()
    def run_padded(
        self, input_ids: IntArray, attention_mask: IntArray
    ) -> tuple[Logits, list[NDArray[np.float32]]]:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`."""
        config = self.config
        shape = (len(input_ids), config.num_key_value_heads, 0, config.head_dim)
        past = [
            torch.zeros(shape, dtype=self.dtype, device=self.device)
            for _ in range(2 * config.num_hidden_layers)
        ]
        ids, mask = (to_device(array, self.device) for array in (input_ids, attention_mask))
        with self.executing():
            logits, *present = self.module(ids, mask, past, self.count(0))
        return as_numpy(logits), [as_numpy(tensor) for tensor in present]

    def new_cache(self, batch_size: int, capacity: int) -> TorchCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        return TorchCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def step(
        self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int | None = None
    ) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        assert isinstance(cache, TorchCache)
        check_step(cache, input_ids, num_logits, row)
        new = input_ids.shape[1]
        mask, past = cache.prepare(new, row)
        ids = to_device(input_ids, self.device)
        with self._explained(new, cache):
            logits, *present = self.module(ids, mask, past, self.count(num_logits))
        cache.accept(present, new, row)
        return as_numpy(logits)

    @property
    def selects_candidates(self) -> bool:
        """See :class:`gemma3_export.runtimes.generation.candidates.SelectsCandidates`."""
        return self.decodes_on_device

    @torch.inference_mode()
    def step_candidates(
        self, input_ids: IntArray, cache: KVCache, requests: Sequence[SamplingParams]
    ) -> Sequence[Logits | Candidates] | None:
        """See :class:`gemma3_export.runtimes.generation.candidates.SelectsCandidates`."""
        needed = batch_candidates_needed(requests, self.config.vocab_size)
        if needed is None or not self.decodes_on_device:
            return None
        check_capacity(cache, 1)
        assert isinstance(cache, TorchCache)
        if cache.steps is None:
            cache.steps = TorchDecodeSteps(
                self.module, cache, self.count(1), captures=self.captures
            )
        steps: TorchDecodeSteps = cache.steps
        with self._explained(1, cache):
            steps.run(input_ids, cache)
        return steps.candidates(needed + SPARE_CANDIDATES, needed)

    @contextmanager
    def _explained(self, new: int, cache: KVCache) -> Iterator[None]:
        """Run the archive, or say at which step it failed."""
        with self.executing():
            try:
                yield
            except RuntimeError as error:
                raise Gemma3ExportError(
                    f"the {self.name} archive failed on a step of {new} tokens after "
                    f"{cache.lengths.tolist()}: {last_line(error)}"
                ) from error


def require_untouched(bundle: Bundle, path: str) -> None:
    """Refuse an archive that is not the one that was exported.

    Raises:
        InputError: its hash is not the manifest's.
    """
    try:
        bundle.check_files([path, "config.json"])
    except InputError as error:
        raise InputError(
            f"{error}. Archives contain code, so a changed one is not loaded; pass "
            "--trust if you know where it comes from"
        ) from error


def torch_device(name: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: unknown name.
        UnavailableError: CUDA was asked for and torch finds no GPU.
    """
    wanted = parse_device(name)
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.kind == "cuda" and not wanted.index < torch.cuda.device_count():
        raise UnavailableError(
            f"{wanted} was asked for, but torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} GPUs; `gemma3-export doctor --runtime torchscript` shows "
            "what is missing and the command that gets it, or pass --device cpu"
        )
    return torch.device(str(wanted))


def last_line(error: Exception) -> str:
    """TorchScript puts the cause last, after the stack of its own code."""
    return str(error).strip().rsplit("\n", 1)[-1]


# The one place that deals with TorchScript's deprecation.
#
# PyTorch deprecated TorchScript in 2.9 in favour of torch.export: it gets no new features,
# warns when
# it is used, and is not supported on Python 3.14. Archives still load in current PyTorch and
# libtorch; docs/torchscript.md says what that means and what comes next.

FIRST_UNSUPPORTED_PYTHON = (3, 14)


@contextmanager
def torchscript() -> Iterator[None]:
    """Run a block that uses ``torch.jit``, without the deprecation's warnings.

    Raises:
        UnavailableError: this Python has no TorchScript, or torch is not installed.
    """
    if sys.version_info >= FIRST_UNSUPPORTED_PYTHON:
        raise UnavailableError(
            "TorchScript does not support Python 3.14 and newer; use Python 3.11 to 3.13, or the "
            "ONNX runtime"
        )
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(
            'TorchScript needs torch; run: pip install "gemma3-export[export]"'
        ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def executor_for(device: torch.device) -> AbstractContextManager[None]:
    """The graph executor as it suits ``device``, for the steps that run inside the context.

    On a CPU its specialisation makes the first steps several times as slow and no later step
    faster: nearly all time is spent inside a few large operators. On a GPU it fuses small kernels,
    so there it stays as torch sets it.
    """
    import torch

    if device.type != "cpu":
        return nullcontext()
    optimized_execution: Callable[[bool], AbstractContextManager[None]]
    optimized_execution = torch.jit.optimized_execution  # type: ignore[attr-defined]
    return optimized_execution(False)


# Run a bundle's TorchScript archive with torch alone: nothing of the reference is imported.


class TorchScriptRuntime(ArchiveRuntime):
    """A bundle's TorchScript archive; see :class:`ArchiveRuntime`."""

    name: ClassVar[RuntimeName] = "torchscript"
    can_capture = True

    def load(self, path: Path) -> Any:
        """See :class:`ArchiveRuntime`."""
        with torchscript():
            try:
                load: Any = torch.jit.load  # untyped
                module: Any = load(str(path), map_location=self.device)
            except RuntimeError as error:
                raise InputError(
                    f"torch {torch.__version__} cannot load {path}: {last_line(error)}; "
                    "export the bundle anew (with --no-prepack for torch builds without oneDNN)"
                ) from error
        return module.eval()

    def executing(self) -> AbstractContextManager[None]:
        """See :class:`ArchiveRuntime`."""
        return executor_for(self.device)


# Run a bundle's ``torch.export`` program with torch alone; no model definition is imported.


class Pt2Runtime(ArchiveRuntime):
    """A bundle's exported program; see :class:`ArchiveRuntime`."""

    name: ClassVar[RuntimeName] = "pt2"
    can_capture = False  # the chosen tokens' number is read from a mask

    def count(self, num_logits: int) -> torch.Tensor:
        """See :class:`ArchiveRuntime`; the program compares it with places on its device."""
        return torch.tensor([num_logits], device=self.device)

    def load(self, path: Path) -> Any:
        """See :class:`ArchiveRuntime`; devices in the program become the runtime's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own calls among themselves
            try:
                program = torch.export.load(path)
            except Exception as error:  # the reader raises what its parts raise
                raise InputError(
                    f"torch {torch.__version__} cannot load {path}: {last_line(error)}; "
                    "export the bundle anew"
                ) from error
            if self.device.type != "cpu":  # where it was traced
                program = move_to_device_pass(program, str(self.device))
            # The guards repeat what the example inputs happened to be (a past that is not empty);
            # the graph itself computes every shape, which the tests prove.
            return program.module(check_guards=False)
