"""Run a bundle's ONNX graph: preallocated caches, IO binding, no torch.

The same code serves CPU and CUDA; caches stay on the device, and only token ids, masks and the
logits that were asked for cross to the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.bundle import WINDOW_MARGIN, Bundle, Graph, Signature
from gemma3_export.config import Gemma3Config
from gemma3_export.device import CudaOptions, Device
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.runtimes.generation.candidates import (
    SPARE_CANDIDATES,
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
from gemma3_export.runtimes.onnx.session import (
    WEIGHTS_FOLDER,
    as_float32,
    check_interface,
    choose_device,
    drop_mapped_pages,
    first_line,
    import_onnxruntime,
    open_session,
    run_graph,
    zeros,
)
from gemma3_export.runtimes.protocol import (
    IntArray,
    KVCache,
    Logits,
    PaddingSide,
    RuntimeInfo,
    check_capacity,
    check_step,
)

__all__ = [
    "OnnxRuntime",
    "device_for",
    "require_shareable_weights",
    "sliding_window_problem",
    "use_sliding_window_cache",
]

SCREENED_ROWS = 8  # of a batch; more of them share what is read, and the copy saves nothing
NO_PACKING = "session.disable_prepacking"  # kernels take matrices as they are


class OnnxRuntime:
    """A bundle's ONNX graph behind :class:`gemma3_export.runtimes.protocol.Runtime`.

    Args:
        bundle: an opened bundle, or its folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the CPU for what has no
            attention on CUDA.
        threads: threads inside one operator; None lets ONNX Runtime choose.
        cuda: what the CUDA provider may do; ignored on the CPU.
        sliding_window_cache: evict old tokens from the caches of sliding layers, which saves time
            and memory in long texts, but limits how far a text can be cut back; None does so on the
            CPU if the bundle and ONNX Runtime support it.
        shares_weights: leave float matrices as they lie in the file, so that all processes that
            run the bundle hold them once and load at once; longer prompts and batches take longer.
        float32_matmul: multiply quantised matrices in float32, slowly, for the parity check.

    Raises:
        InputError: the bundle is damaged or has no ONNX graph, or its graph cannot do what
            ``cuda`` asks, or has no attention for CUDA.
        UnavailableError: ONNX Runtime or the device is missing.
    """

    def __init__(
        self,
        bundle: Bundle | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        cuda: CudaOptions | None = None,
        sliding_window_cache: bool | None = None,
        shares_weights: bool = False,
        float32_matmul: bool = False,
    ) -> None:
        if isinstance(bundle, Path):
            bundle = Bundle(bundle)
        self.bundle = bundle
        graph = bundle.graph("onnx")
        bundle.check_sizes()
        self.config: Gemma3Config = bundle.config
        self.device = device_for(graph, device)
        self.uses_sliding_window_cache = use_sliding_window_cache(
            bundle, self.device, sliding_window_cache
        )
        self.signature: Signature = bundle.signature(
            graph, is_windowed=self.uses_sliding_window_cache
        )
        self.target = graph.target
        path = graph.windowed_path if self.uses_sliding_window_cache else graph.path
        assert path is not None
        bundle.check_files([path, "config.json"])  # small files; verify hashes them all
        self.path = bundle.file(path)
        self.graph: Path | bytes = self.path  # what the session runs
        self.is_upcast = self.device.kind == "cpu" and graph.cache_dtype == "bfloat16"
        if self.is_upcast:
            self.graph = upcast_to_float32(self.path)
            self.signature = Signature.of(self.config, is_windowed=self.uses_sliding_window_cache)
        if float32_matmul:
            self.graph = without_activation_quantization(self.path)
        self.cuda = (cuda or CudaOptions()) if self.device.kind == "cuda" else None
        if self.cuda and self.cuda.graph and self.target != "ort":
            raise InputError(
                f"target {self.target} has a cache that grows, so no CUDA graph can be captured; "
                "export without --target"
            )
        self.weights_folder = weights_folder(bundle.file(f"{graph.path}_data"))
        entries = {}
        if isinstance(self.graph, bytes):
            entries[WEIGHTS_FOLDER] = str(self.weights_folder)
        if shares_weights:
            require_shareable_weights(bundle, self.device)
            entries[NO_PACKING] = "1"
        self.shares_weights = shares_weights
        # Blocks that are not packed are multiplied far more slowly.
        has_screen = self.signature.num_candidates is not None
        self.is_screened = has_screen and not shares_weights and has_known_rounding()
        self.session = open_session(
            self.graph, self.device, threads=threads, entries=entries, cuda=self.cuda
        )
        for file in {graph.path, path}:
            drop_mapped_pages(bundle.file(f"{file}_data"))
        # Decode steps at fixed addresses pay where the host and the logits are far apart.
        self.decodes_on_device = self.cuda is not None and self.target == "ort"
        self._helpers: HelperSessions | None = None
        self._graph_ids = itertools.count(1)  # 0 is ONNX Runtime's default
        self._counts: dict[int, Any] = {}
        self.threads = threads
        check_interface(self.session, self.signature, self.path)
        is_quantized = bundle.is_quantized("onnx")
        has_half_activations = is_quantized and graph.cache_dtype != "float32"
        activation_dtype = graph.cache_dtype if has_half_activations else None
        self.info = RuntimeInfo(
            name="onnx",
            versions={"onnxruntime": import_onnxruntime().__version__},
            target=graph.target,
            cache="windowed" if self.uses_sliding_window_cache else "full",
            has_screened_head=self.is_screened,
            shares_weights=shares_weights,
            dtype=graph.dtype,
            compute_dtype=graph.cache_dtype,
            residual_dtype="float32",
            activation_dtype=activation_dtype,
            is_quantized=is_quantized,
            quantizes_activations=is_quantized and not has_half_activations and not float32_matmul,
            computed_in="float32, rounded to bfloat16"
            if self.is_upcast
            else activation_dtype or graph.dtype,
            device=self.device,
            providers=tuple(self.session.get_providers()),
            cuda=self.cuda,
            threads=threads,
        )

    @property
    def selects_candidates(self) -> bool:
        """See :class:`gemma3_export.runtimes.generation.candidates.SelectsCandidates`."""
        return self.decodes_on_device or self.is_screened

    @property
    def padding_side(self) -> PaddingSide | None:
        """See :class:`gemma3_export.runtimes.protocol.PaddedBatches`.

        GroupQueryAttention takes each row's length from the sum of its mask, so padding is on the
        right; with sliding-window caches it takes no empty past.
        """
        if self.uses_sliding_window_cache:
            return None
        return "right" if self.target == "ort" else "left"

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
            threads=self.threads,
            sliding_window_cache=self.uses_sliding_window_cache,
            float32_matmul=True,
        )

    def with_other_cache(self) -> OnnxRuntime | None:
        """See :class:`gemma3_export.runtimes.protocol.CacheVariants`."""
        if sliding_window_problem(self.bundle, self.device):
            return None
        return OnnxRuntime(
            self.bundle,
            device="cpu",
            threads=self.threads,
            sliding_window_cache=not self.uses_sliding_window_cache,
        )

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        kind: type[InPlaceCache | DynamicCache] = DynamicCache
        if self.target == "ort":
            kind = SlidingWindowCache if self.uses_sliding_window_cache else InPlaceCache
        return kind(self.config, self.signature, self.device, batch_size, capacity)

    def step(
        self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int | None = None
    ) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        assert isinstance(cache, InPlaceCache | DynamicCache)
        check_step(cache, input_ids, num_logits, row)
        rows, new = input_ids.shape
        if self.target == "ort" and row is None and rows > 1 and new > 1:
            # GroupQueryAttention takes several tokens after a past for one row at a time only.
            parts = [
                self.step(input_ids[index : index + 1], cache, num_logits=num_logits, row=index)
                for index in range(rows)
            ]
            return np.concatenate(parts)
        logits = np.empty((rows, num_logits or new, self.config.vocab_size), np.float32)
        cache.begin(new, row)
        binding = self._bind(input_ids, cache, logits, row)
        with self._explained(new, cache):
            self.session.run_with_iobinding(binding, self._options())
        cache.advance(binding, new, row)
        return logits

    def step_candidates(
        self, input_ids: IntArray, cache: KVCache, requests: Sequence[SamplingParams]
    ) -> Sequence[Logits | Candidates] | None:
        """See :class:`gemma3_export.runtimes.generation.candidates.SelectsCandidates`."""
        needed = batch_candidates_needed(requests, self.config.vocab_size)
        if needed is None or not isinstance(cache, InPlaceCache):
            return None
        check_capacity(cache, 1)
        if self.decodes_on_device:
            fixed = self.decode_steps(cache)
            with self._explained(1, cache):
                fixed.run(input_ids, cache)
                return fixed.candidates(needed + SPARE_CANDIDATES, needed)
        if not self.is_screened or cache.batch_size > SCREENED_ROWS:
            return None
        if cache.steps is None:
            cache.steps = ScreenedDecodeSteps(self.session, self.signature, cache)
        screened: ScreenedDecodeSteps = cache.steps
        if screened.is_paused():
            return None
        with self._explained(1, cache):
            return screened.run(input_ids, cache, needed)

    def decode_steps(self, cache: InPlaceCache) -> DeviceDecodeSteps:
        """The decode steps of ``cache``, made when they are first asked for."""
        if cache.steps is None:
            if self._helpers is None:
                self._helpers = HelperSessions(self.device)
            graph_id = next(self._graph_ids) if self.cuda and self.cuda.graph else None
            cache.steps = DeviceDecodeSteps(
                self.session,
                self.signature,
                cache,
                self.config.vocab_size,
                self._helpers,
                graph_id,
            )
        steps: DeviceDecodeSteps = cache.steps
        return steps

    @contextmanager
    def _explained(self, new: int, cache: KVCache) -> Iterator[None]:
        """Say at which step ONNX Runtime failed."""
        try:
            yield
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise Gemma3ExportError(
                f"ONNX Runtime failed on a step of {new} tokens after {cache.lengths.tolist()}: "
                f"{first_line(error)}"
            ) from error

    def _options(self) -> Any:
        """How to run a step of any shape, which is not what a CUDA graph has captured."""
        options = import_onnxruntime().RunOptions()
        if self.cuda and self.cuda.graph:
            options.add_run_config_entry(GRAPH_ID, "-1")
        return options

    def _bind(self, input_ids: IntArray, cache: OnnxCache, logits: Logits, row: int | None) -> Any:
        signature = self.signature
        mask = cache.attention_mask(input_ids.shape[1], row)
        binding = cache.binding(self.session, row)
        binding.bind_cpu_input(signature.input_ids.name, np.ascontiguousarray(input_ids))
        binding.bind_cpu_input(signature.attention_mask.name, mask)
        binding.bind_ortvalue_input(signature.num_logits_to_keep.name, self._count(logits.shape[1]))
        binding.bind_output(
            signature.logits.name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data
        )
        return binding

    def _count(self, count: int) -> Any:
        """[1] how many logits to keep; inputs with a default can be bound as OrtValues only."""
        if count not in self._counts:
            self._counts[count] = import_onnxruntime().OrtValue.ortvalue_from_numpy(
                np.array([count], dtype=np.int64)
            )
        return self._counts[count]


# Which of a bundle's ONNX graphs to run, and on which device.

SLIDING_WINDOW_SINCE = (1, 31)  # ONNX Runtime's sliding_window_cache on the CPU


def device_for(graph: Graph, name: str) -> Device:
    """Where to run ``graph``; see :func:`gemma3_export.runtimes.onnx.session.choose_device`.

    ``GroupQueryAttention`` has no float32 kernel on CUDA (`make placement` tells when it gets one):
    attention would run on the CPU, and every key and value cross the bus in every step.

    Raises:
        InputError: CUDA was asked for, and the graph's attention cannot run there.
        UnavailableError: ONNX Runtime or the device is missing.
    """
    device = choose_device(name)
    if device.kind != "cuda" or graph.target != "ort" or graph.cache_dtype != "float32":
        return device
    if name == "auto":
        return choose_device("cpu")
    remedy = (
        "--dtype bf16, or with --dtype fp32 --target portable"
        if all(recipe.blocks is None for recipe in graph.weights.values())
        else f"--dtype {graph.dtype} --activations bf16"
    )
    raise InputError(
        f"this graph ({graph.dtype}, target ort) computes attention in float32, for which ONNX "
        f"Runtime has no kernel on CUDA; export with {remedy}, or pass --device cpu"
    )


def use_sliding_window_cache(bundle: Bundle, device: Device, wanted: bool | None) -> bool:
    """Whether to run the graph whose sliding layers keep their window only.

    Raises:
        InputError: it is wanted and not to be had.
    """
    problem = sliding_window_problem(bundle, device)
    if wanted and problem:
        raise InputError(f"windowed caches were asked for, but {problem}")
    if wanted is None:  # windows shorter than their margin save nothing
        return problem is None and bundle.config.sliding_window > WINDOW_MARGIN
    return wanted


def sliding_window_problem(bundle: Bundle, device: Device) -> str | None:
    """Why the graph with windowed caches cannot run; None if it can.

    On CUDA its caches must have exactly the window's size, which nobody here has seen run.
    """
    config = bundle.config
    if config.sliding_window >= config.max_position_embeddings:
        return (
            f"the window of {config.sliding_window} tokens is as long as the context of "
            f"{config.max_position_embeddings}, so there is nothing to let go of"
        )
    if bundle.graph("onnx").windowed_path is None:
        return "the bundle has no such graph; export it anew, for the target ort"
    if device.kind != "cpu":
        return "they are for the CPU; pass --device cpu"
    version = import_onnxruntime().__version__
    if tuple(int(part) for part in version.split(".")[:2]) < SLIDING_WINDOW_SINCE:
        needed = ".".join(map(str, SLIDING_WINDOW_SINCE))
        return f"they need onnxruntime {needed} and this is {version}; upgrade it"
    return None


def require_shareable_weights(bundle: Bundle, device: Device) -> None:
    """Refuse to run matrices as they lie in the file where that is no use.

    Raises:
        InputError: on a GPU, or with kernels that are far slower that way.
    """
    graph = bundle.graph("onnx")
    if device.kind == "cpu" and graph.dtype == "fp32":
        return
    reason = (
        f"bundles in {graph.dtype} have kernels that need their own layout of the weights"
        if device.kind == "cpu"
        else f"{device} has memory of its own"
    )
    raise InputError(f"weights can be shared between processes in fp32 on the CPU only: {reason}")
