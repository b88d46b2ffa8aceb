"""Run a bundle's TorchScript archive or torch.export program with torch alone.

Nothing of the reference model is imported. Archives contain code, so one is loaded only if its hash
is the manifest's, or if the caller trusts it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export.passes import move_to_device_pass

from gemma3_export.bundle import Bundle
from gemma3_export.config import CONFIG_NAME, Gemma3Config
from gemma3_export.device import CudaOptions
from gemma3_export.dtypes import torch_dtype
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.processors import chosen_threads
from gemma3_export.runtimes.generation.candidates import (
    SPARE_CANDIDATES,
    Candidates,
    batch_candidates_needed,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import (
    NO_LOGITS,
    IntArray,
    KVCache,
    Logits,
    PaddingSide,
    RuntimeInfo,
    RuntimeName,
    check_capacity,
    check_step,
    num_logits_to_keep,
)
from gemma3_export.runtimes.torch.cache import TorchCache
from gemma3_export.runtimes.torch.decode_steps import TorchDecodeSteps
from gemma3_export.runtimes.torch.tensors import as_numpy, device_of, to_device, torch_device
from gemma3_export.runtimes.torch.torchscript import last_line, torchscript, unspecialized

__all__ = ["ArchiveRuntime", "Pt2Runtime", "TorchScriptRuntime"]

logger = logging.getLogger(__name__)


class ArchiveRuntime:
    """A bundle's archive behind :class:`gemma3_export.runtimes.protocol.Runtime`.

    Args:
        bundle: an opened bundle, or its folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads; None lets torch choose, within the processors that this process
            may use.
        trust: load the archive even if its hash is not the manifest's.
        cuda: whether to capture decode steps as a CUDA graph; the other options are ignored.

    Raises:
        InputError: the bundle is damaged, has no archive, or the archive was changed; or its steps
            cannot be captured as a CUDA graph.
        UnavailableError: the device, or what the format needs, is missing.
    """

    name: ClassVar[RuntimeName]
    can_capture: ClassVar[bool]  # whether a CUDA graph can capture a step

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        device: str = "auto",
        threads: int | None = None,
        trust: bool = False,
        cuda: CudaOptions | None = None,
    ) -> None:
        if not isinstance(bundle, Bundle):
            bundle = Bundle(bundle)
        graph = bundle.graph(self.name)
        if not trust:
            require_untouched(bundle, graph.path)
        bundle.check_quickly(only_for=graph, except_for=[graph.path])
        self.config: Gemma3Config = bundle.config
        self.dtype = torch_dtype(graph.cache_dtype)
        self.compute_dtype = graph.cache_dtype
        self.target = graph.target
        self.is_quantized = bundle.is_quantized(self.name)
        self.device = torch_device(device)
        if (threads := chosen_threads(threads)) is not None:
            torch.set_num_threads(threads)
        # Steps at fixed addresses pay off if host and logits are far apart.
        self.decodes_on_device = self.device.type == "cuda"
        self.captures = self.decodes_on_device and self.can_capture
        if self.decodes_on_device and not self.can_capture:
            problem = (
                f"steps of the {self.name} runtime read a size on the host, so no CUDA graph can "
                "capture them"
            )
            if cuda is not None and cuda.graph:
                raise InputError(
                    f"{problem}; use the torchscript or onnx runtime, or no CUDA graph"
                )
            logger.warning("%s: decoding is slower than with torchscript or onnx", problem)
        if cuda is not None and cuda.graph is False:
            self.captures = False
        self._takes_no_logits = graph.takes_no_logits
        self.module = self.load(bundle.file(graph.path))
        self._steps: WeakKeyDictionary[KVCache, TorchDecodeSteps] = WeakKeyDictionary()

    def load(self, path: Path) -> Any:
        """Return the archive's step function, on the runtime's device.

        Raises:
            InputError: the archive cannot be read.
        """
        raise NotImplementedError

    def num_logits_tensor(self, num_logits: int) -> torch.Tensor:
        """Return ``num_logits`` as the tensor [1] that the archive takes, on the host."""
        return torch.tensor([num_logits])

    def execution_context(self) -> AbstractContextManager[None]:
        """Return the context in which every step runs."""
        return nullcontext()

    @property
    def info(self) -> RuntimeInfo:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        return RuntimeInfo(
            name=self.name,
            versions={"torch": torch.__version__},
            target=self.target,
            dtype=self.compute_dtype,
            compute_dtype=self.compute_dtype,
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
        with self.execution_context():
            logits, *present = self.module(ids, mask, past, self.num_logits_tensor(0))
        return as_numpy(logits), [as_numpy(tensor) for tensor in present]

    def new_cache(self, batch_size: int, capacity: int) -> TorchCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        return TorchCache(self.config, batch_size, capacity, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        assert isinstance(cache, TorchCache)
        check_step(cache, input_ids, num_logits, row)
        if num_logits == NO_LOGITS and not self._takes_no_logits:
            return self.step(input_ids, cache, num_logits=1, row=row)[:, :0]
        count, new = input_ids.shape
        rows = slice(row, row + count)
        mask, past = cache.prepare(new, rows)
        ids = to_device(input_ids, self.device)
        kept = self.num_logits_tensor(num_logits_to_keep(num_logits, new))
        with self._errors_explained(new, cache):
            logits, *present = self.module(ids, mask, past, kept)
        cache.accept(present, new, rows)
        return as_numpy(logits)

    @property
    def selects_candidates(self) -> bool:
        """See :class:`gemma3_export.runtimes.generation.candidates.SelectsCandidates`."""
        return self.decodes_on_device

    @torch.inference_mode()
    def step_candidates(
        self,
        input_ids: IntArray,
        cache: KVCache,
        requests: Sequence[SamplingParams],
        *,
        row: int = 0,
    ) -> Sequence[Logits | Candidates] | None:
        """See :class:`gemma3_export.runtimes.generation.candidates.SelectsCandidates`."""
        needed = batch_candidates_needed(requests, self.config.vocab_size)
        if needed is None or not self.decodes_on_device:
            return None
        assert isinstance(cache, TorchCache)
        rows = range(row, row + len(input_ids))
        check_capacity(cache, 1, row, len(rows))
        steps = self.decode_steps(cache)
        with self._errors_explained(1, cache):
            steps.run(input_ids, cache, rows)
        return steps.candidates(needed + SPARE_CANDIDATES, needed)

    def decode_steps(self, cache: TorchCache) -> TorchDecodeSteps:
        """Return the decode steps of ``cache``, created on first use."""
        steps = self._steps.get(cache)
        if steps is None:
            steps = TorchDecodeSteps(
                self.module, cache, self.num_logits_tensor(1), captures=self.captures
            )
            self._steps[cache] = steps
        return steps

    @contextmanager
    def _errors_explained(self, new: int, cache: KVCache) -> Iterator[None]:
        """Run the archive, and raise its errors as ours, naming the step that failed."""
        with self.execution_context():
            try:
                yield
            except RuntimeError as error:
                raise Gemma3ExportError(
                    f"the {self.name} archive failed on a step of {new} tokens after "
                    f"{cache.lengths.tolist()}: {last_line(error)}"
                ) from error


def require_untouched(bundle: Bundle, path: str) -> None:
    """Reject an archive that is not the one that was exported.

    Raises:
        InputError: its hash is not the manifest's.
    """
    try:
        bundle.check_files([path, CONFIG_NAME])
    except InputError as error:
        raise InputError(
            f"{error}. Archives contain code, so a changed one is not loaded; pass "
            "--trust if you know where it comes from"
        ) from error


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
                    f"torch {torch.__version__} cannot load {path}: {last_line(error)}; export the "
                    "bundle again (with --no-prepack for torch builds without oneDNN)"
                ) from error
        return module.eval()

    def execution_context(self) -> AbstractContextManager[None]:
        """See :class:`ArchiveRuntime`."""
        return unspecialized()


class Pt2Runtime(ArchiveRuntime):
    """A bundle's ``torch.export`` program; see :class:`ArchiveRuntime`."""

    name: ClassVar[RuntimeName] = "pt2"
    can_capture = False  # the host reads from a mask how many logits to keep

    def num_logits_tensor(self, num_logits: int) -> torch.Tensor:
        """See :class:`ArchiveRuntime`; the program compares it with positions on its device."""
        return torch.tensor([num_logits], device=self.device)

    def load(self, path: Path) -> Any:
        """See :class:`ArchiveRuntime`; the program is moved to the runtime's device."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from torch's own calls
            try:
                program = torch.export.load(path)
            except Exception as error:  # the reader's errors share no base class
                raise InputError(
                    f"torch {torch.__version__} cannot load {path}: {last_line(error)}; "
                    "export the bundle again"
                ) from error
            if self.device.type != "cpu":  # where it was traced
                program = move_to_device_pass(program, str(self.device))
            # The guards repeat properties of the example inputs (such as a past that is not empty);
            # the graph itself computes every shape, as the tests prove.
            return program.module(check_guards=False)
