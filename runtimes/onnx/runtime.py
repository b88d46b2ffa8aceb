"""Run a bundle's ONNX graph: preallocated caches, IO binding, no torch.

The same code serves CPU and CUDA. Caches stay on the device; only token ids, masks and the
requested logits cross to the host.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import Bundle, Graph, Signature
from gemma3_export.config import Gemma3Config
from gemma3_export.device import CudaOptions
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.processors import chosen_threads
from gemma3_export.runtimes.generation.candidates import (
    Candidates,
    batch_candidates_needed,
)
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.onnx.caches import (
    DynamicCache,
    InPlaceCache,
    OnnxCache,
    SlidingWindowCache,
)
from gemma3_export.runtimes.onnx.decode_steps import (
    GRAPH_ID,
    DeviceDecodeSteps,
    HelperSessions,
    ScreenedDecodeSteps,
    has_known_rounding,
)
from gemma3_export.runtimes.onnx.graph_rewrites import (
    upcast_to_float32,
    weights_folder,
    without_activation_quantization,
)
from gemma3_export.runtimes.onnx.graph_selection import (
    device_for,
    require_shareable_weights,
    require_version,
    sliding_window_problem,
    use_sliding_window_cache,
)
from gemma3_export.runtimes.onnx.huge_pages import collapse_new_memory, private_memory
from gemma3_export.runtimes.onnx.mapped_pages import drop_mapped_pages
from gemma3_export.runtimes.onnx.ort_values import as_float32, run_graph, zeros
from gemma3_export.runtimes.onnx.session import (
    WEIGHTS_FOLDER,
    check_interface,
    first_line,
    import_onnxruntime,
    open_session,
    product_entries,
)
from gemma3_export.runtimes.protocol import (
    NO_LOGITS,
    IntArray,
    KVCache,
    Logits,
    PaddingSide,
    RuntimeInfo,
    check_capacity,
    check_step,
    count_logits,
    num_logits_to_keep,
)

__all__ = ["OnnxRuntime"]

logger = logging.getLogger(__name__)

MAX_SCREENED_ROWS = 8  # larger batches share what a step reads, so screening saves nothing
NO_PACKING = "session.disable_prepacking"  # session option: kernels use matrices as stored


def settle_capture(cuda: CudaOptions, target: str) -> CudaOptions:
    """Return ``cuda`` with the decision whether decode steps of ``target`` are captured.

    Raises:
        InputError: a CUDA graph is requested, and impossible.
    """
    problem = f"target {target} has a cache that grows, so no CUDA graph can be captured"
    can_capture = target == "ort"
    if cuda.graph and not can_capture:
        raise InputError(f"{problem}; export without --target")
    if cuda.graph is None and not can_capture:
        logger.warning("%s: decoding is slower than without --target", problem)
    return replace(cuda, graph=can_capture if cuda.graph is None else cuda.graph)


class OnnxRuntime:
    """A bundle's ONNX graph behind :class:`gemma3_export.runtimes.protocol.Runtime`.

    Args:
        bundle: an opened bundle, or its folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the CPU for graphs without
            attention kernels on CUDA.
        threads: intra-op threads; None lets ONNX Runtime choose, within the processors that this
            process may use.
        cuda: options for the CUDA provider; ignored on the CPU.
        sliding_window_cache: evict old tokens from the caches of sliding layers, which saves time
            and memory in long texts, but limits how far a text can be cut back; None does so on the
            CPU if the bundle and ONNX Runtime support it.
        shares_weights: use float matrices as stored in the memory-mapped file, so that all
            processes that run the bundle share them and load at once; longer prompts and batches
            are slower.
        huge_pages: move the loaded weights into huge pages, so that decoding is faster; on the CPU,
            where the system can.
        float32_matmul: multiply quantized matrices by float32 activations, slowly, for the parity
            check.

    Raises:
        InputError: the bundle is damaged or has no ONNX graph, or its graph does not support what
            was requested on this device.
        UnavailableError: ONNX Runtime or the device is missing.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        device: str = "auto",
        threads: int | None = None,
        cuda: CudaOptions | None = None,
        sliding_window_cache: bool | None = None,
        shares_weights: bool = False,
        huge_pages: bool = False,
        float32_matmul: bool = False,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        graph = self.bundle.graph("onnx")
        self.bundle.check_quickly(only_for=graph, in_full=set(graph.paths))
        require_version(graph)
        self.config: Gemma3Config = self.bundle.config
        self.device = device_for(graph, device)
        self.is_fused = graph.is_fused
        self.cuda = None
        if self.device.kind == "cuda":
            self.cuda = settle_capture(cuda or CudaOptions(), graph.target)
        if shares_weights:
            require_shareable_weights(self.bundle, self.device)
        self.uses_sliding_window_cache = use_sliding_window_cache(
            self.bundle, self.device, sliding_window_cache
        )
        self.path, self.graph, self.signature = self._read_graph(graph, float32_matmul)
        self.weights_folder = weights_folder(self.bundle.file(f"{graph.path}_data"))
        self.product_entries = product_entries(graph)
        entries = dict(self.product_entries)
        if isinstance(self.graph, bytes):
            entries[WEIGHTS_FOLDER] = str(self.weights_folder)
        if shares_weights:
            entries[NO_PACKING] = "1"
        threads = chosen_threads(threads)
        memory = private_memory() if huge_pages and self.device.kind == "cpu" else None
        self.session = open_session(
            self.graph, self.device, threads=threads, entries=entries, cuda=self.cuda
        )
        for file in {self.bundle.file(graph.path), self.path}:
            drop_mapped_pages(file.with_name(f"{file.name}_data"))
        if memory is not None:
            collapse_new_memory(memory)
        check_interface(self.session, self.signature, self.path)
        self.info = self._info(
            graph,
            threads=threads,
            # Unpacked blocks are multiplied far more slowly, which screening would not make up for.
            has_screened_head=self.signature.num_candidates is not None
            and not shares_weights
            and has_known_rounding(),
            shares_weights=shares_weights,
            float32_matmul=float32_matmul,
        )
        # Kernels of other providers need not take products of no rows.
        self._takes_no_logits = graph.takes_no_logits and self.device.kind == "cpu"
        # Steps at fixed addresses pay off if host and logits are far apart.
        self.decodes_on_device = self.cuda is not None and self.is_fused
        self._device_steps: WeakKeyDictionary[KVCache, DeviceDecodeSteps] = WeakKeyDictionary()
        self._screened_steps: WeakKeyDictionary[KVCache, ScreenedDecodeSteps] = WeakKeyDictionary()
        self._helpers: HelperSessions | None = None
        self._graph_ids = itertools.count(1)  # 0 is ONNX Runtime's default
        self._counts: dict[int, Any] = {}
        # A session that captures CUDA graphs must not run in two threads at once.
        self._running = RLock() if self.cuda and self.cuda.graph else nullcontext()

    def _read_graph(
        self, graph: Graph, float32_matmul: bool
    ) -> tuple[Path, Path | bytes, Signature]:
        """Return the graph's file, what the session loads, and its interface."""
        is_windowed = self.uses_sliding_window_cache
        relative = graph.windowed_path if is_windowed else graph.path
        assert relative is not None
        path = self.bundle.file(relative)
        if is_emulated(graph, self.device.kind):
            signature = Signature.of(self.config, is_windowed=is_windowed)
            return path, upcast_to_float32(path), signature
        signature = self.bundle.signature(graph, is_windowed=is_windowed)
        if float32_matmul:
            return path, without_activation_quantization(path), signature
        return path, path, signature

    def _info(
        self,
        graph: Graph,
        *,
        threads: int | None,
        has_screened_head: bool,
        shares_weights: bool,
        float32_matmul: bool,
    ) -> RuntimeInfo:
        is_quantized = self.bundle.is_quantized("onnx")
        has_half_activations = is_quantized and graph.cache_dtype != "float32"
        activation_dtype = graph.cache_dtype if has_half_activations else None
        return RuntimeInfo(
            name="onnx",
            versions={"onnxruntime": import_onnxruntime().__version__},
            target=graph.target,
            cache="windowed" if self.uses_sliding_window_cache else "full",
            has_screened_head=has_screened_head,
            shares_weights=shares_weights,
            dtype=graph.dtype,
            compute_dtype=graph.cache_dtype,
            residual_dtype=graph.residual_dtype,
            activation_dtype=activation_dtype,
            is_quantized=is_quantized,
            quantizes_activations=is_quantized and not has_half_activations and not float32_matmul,
            computed_in="float32, rounded to bfloat16"
            if is_emulated(graph, self.device.kind)
            else activation_dtype or graph.dtype,
            device=self.device,
            providers=tuple(self.session.get_providers()),
            cuda=self.cuda,
            threads=threads,
        )

    @property
    def selects_candidates(self) -> bool:
        """See :class:`gemma3_export.runtimes.generation.candidates.SelectsCandidates`."""
        return self.decodes_on_device or self.info.has_screened_head

    @property
    def padding_side(self) -> PaddingSide | None:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`.

        GroupQueryAttention takes each row's length from the sum of its mask, so padding is on the
        right; with sliding-window caches it takes no empty past.
        """
        if self.uses_sliding_window_cache:
            return None
        return "right" if self.is_fused else "left"

    def run_padded(
        self, input_ids: IntArray, attention_mask: IntArray
    ) -> tuple[Logits, list[NDArray[np.float32]]]:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`."""
        signature, config = self.signature, self.config
        empty = (len(input_ids), config.num_key_value_heads, 0, config.head_dim)
        feeds: dict[str, Any] = {
            signature.input_ids.name: input_ids,
            signature.attention_mask.name: attention_mask,
            **{spec.name: zeros(empty, spec.dtype) for spec in signature.past},
        }
        if not signature.num_logits_to_keep.optional:
            feeds[signature.num_logits_to_keep.name] = np.array(0)
        names = [spec.name for spec in signature.outputs]
        logits, *present = map(as_float32, run_graph(self.session, names, feeds))
        return logits, present

    def with_float32_matmul(self) -> OnnxRuntime | None:
        """See :class:`gemma3_export.runtimes.protocol.Float32MatMul`."""
        if self.device.kind != "cpu" or not self.info.quantizes_activations:
            return None
        return OnnxRuntime(
            self.bundle,
            device="cpu",
            threads=self.info.threads,
            sliding_window_cache=self.uses_sliding_window_cache,
            float32_matmul=True,
        )

    def release(self) -> None:
        """See :class:`gemma3_export.runtimes.protocol.ReleasesWeights`."""
        self._device_steps.clear()
        self._screened_steps.clear()
        self._helpers = None
        self.session = None

    def with_other_cache(self) -> OnnxRuntime | None:
        """See :class:`gemma3_export.runtimes.protocol.CacheVariants`."""
        if sliding_window_problem(self.bundle, self.device):
            return None
        return OnnxRuntime(
            self.bundle,
            device="cpu",
            threads=self.info.threads,
            sliding_window_cache=not self.uses_sliding_window_cache,
        )

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        kind: type[InPlaceCache | DynamicCache] = DynamicCache
        if self.is_fused:
            kind = SlidingWindowCache if self.uses_sliding_window_cache else InPlaceCache
        return kind(self.config, self.signature, self.device, batch_size, capacity)

    def step(self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        assert isinstance(cache, OnnxCache)
        check_step(cache, input_ids, num_logits, row)
        count, new = input_ids.shape
        rows = range(row, row + count)
        if self.is_fused and count > 1 and new > 1:
            # GroupQueryAttention takes several tokens after a past for one row at a time only.
            parts = [
                self.step(input_ids[index : index + 1], cache, num_logits=num_logits, row=each)
                for index, each in enumerate(rows)
            ]
            return np.concatenate(parts)
        if num_logits == NO_LOGITS and not self._takes_no_logits:
            return self.step(input_ids, cache, num_logits=1, row=row)[:, :0]
        shape = (count, count_logits(num_logits, new), self.config.vocab_size)
        logits = np.empty(shape, np.float32)
        cache.begin(new, rows)
        kept = num_logits_to_keep(num_logits, new)
        binding = self._bind(input_ids, cache, kept, logits, rows)
        with self._errors_explained(new, cache):
            self.session.run_with_iobinding(binding, self._options())
        cache.advance(binding, new, rows)
        return logits

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
        if needed is None or not isinstance(cache, InPlaceCache):
            return None
        rows = range(row, row + len(input_ids))
        check_capacity(cache, 1, row, len(rows))
        if self.decodes_on_device:
            steps = self.decode_steps(cache)
            with self._errors_explained(1, cache):
                steps.run(input_ids, cache, rows)
                return steps.candidates(needed)
        if not self.info.has_screened_head or len(rows) > MAX_SCREENED_ROWS:
            return None
        screened = self._screened_steps.get(cache)
        if screened is None:
            screened = ScreenedDecodeSteps(self.session, self.signature)
            self._screened_steps[cache] = screened
        if screened.is_paused():
            return None
        with self._errors_explained(1, cache):
            return screened.run(input_ids, cache, needed, rows)

    def decode_steps(self, cache: InPlaceCache) -> DeviceDecodeSteps:
        """Return the decode steps of ``cache``, created on first use."""
        steps = self._device_steps.get(cache)
        if steps is None:
            if self._helpers is None:
                self._helpers = HelperSessions(self.device, self.cuda)
            steps = DeviceDecodeSteps(
                self.session,
                self.signature,
                cache,
                self.config.vocab_size,
                self._helpers,
                self._options(captures=True),
            )
            self._device_steps[cache] = steps
        return steps

    @contextmanager
    def _errors_explained(self, new: int, cache: KVCache) -> Iterator[None]:
        """Run alone if need be; raise errors of ONNX Runtime as ours, naming the failed step."""
        try:
            with self._running:
                yield
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise Gemma3ExportError(
                f"ONNX Runtime failed on a step of {new} tokens after {cache.lengths.tolist()}: "
                f"{first_line(error)}"
            ) from error

    def _options(self, *, captures: bool = False) -> Any:
        """Return options for steps at fixed addresses, captured if at all, or for any other."""
        options = import_onnxruntime().RunOptions()
        if self.cuda and self.cuda.graph:
            graph_id = next(self._graph_ids) if captures else -1  # never captured
            options.add_run_config_entry(GRAPH_ID, str(graph_id))
        return options

    def _bind(
        self, input_ids: IntArray, cache: OnnxCache, kept: int, logits: Logits, rows: range
    ) -> Any:
        signature = self.signature
        mask = cache.attention_mask(input_ids.shape[1], rows)
        binding = cache.binding(self.session, rows)
        binding.bind_cpu_input(signature.input_ids.name, np.ascontiguousarray(input_ids))
        binding.bind_cpu_input(signature.attention_mask.name, mask)
        binding.bind_ortvalue_input(signature.num_logits_to_keep.name, self._num_logits_value(kept))
        binding.bind_output(
            signature.logits.name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data
        )
        return binding

    def _num_logits_value(self, count: int) -> Any:
        """Return ``count`` as an OrtValue; inputs with a default accept no numpy array."""
        if count not in self._counts:
            value = np.array(count, dtype=np.int64)
            if self.signature.num_logits_to_keep.axes:
                value = value[None]
            self._counts[count] = import_onnxruntime().OrtValue.ortvalue_from_numpy(value)
        return self._counts[count]


def is_emulated(graph: Graph, device_kind: str) -> bool:
    """Return whether ``graph`` is bfloat16, which the CPU emulates in float32."""
    return device_kind == "cpu" and graph.cache_dtype == "bfloat16"
