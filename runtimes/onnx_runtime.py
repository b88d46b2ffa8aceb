"""Run a bundle's ONNX graph: preallocated caches, IO binding, no torch.

The same code serves CPU and CUDA; caches stay on the device, and only token ids, masks and the
logits that were asked for cross to the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemma3_export.bundle import MANIFEST, Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.runtimes.onnx_cache import GrowingCache, OnnxCache, SharedCache
from gemma3_export.runtimes.onnx_session import (
    WEIGHTS_FOLDER,
    choose_device,
    first_line,
    import_onnxruntime,
    open_session,
)
from gemma3_export.runtimes.onnx_upcast import upcast_to_float32
from gemma3_export.runtimes.protocol import IntArray, KVCache, Logits, check_capacity
from gemma3_export.signature import Signature

__all__ = ["OnnxRuntime"]


class OnnxRuntime:
    """A bundle's ONNX graph behind :class:`gemma3_export.runtimes.protocol.Runtime`.

    Args:
        bundle: an opened bundle, or its folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator; None lets ONNX Runtime choose.

    Raises:
        InputError: the bundle is damaged or has no ONNX graph.
        UnavailableError: ONNX Runtime or the device is missing.
    """

    name = "onnx"

    def __init__(
        self, bundle: Bundle | Path, *, device: str = "auto", threads: int | None = None
    ) -> None:
        if isinstance(bundle, Path):
            bundle = Bundle(bundle)
        graph = bundle.graph("onnx")
        bundle.check_sizes()
        bundle.check_files([graph.path, "config.json"])  # small files; verify hashes them all
        self.config: Gemma3Config = bundle.config
        self.device = choose_device(device)
        self.signature: Signature = bundle.signature(graph)
        self.target = graph.target
        self.dtype = graph.dtype
        self.path = bundle.file(graph.path)
        self.graph: Path | bytes = self.path  # what the session runs
        self.is_upcast = self.device.kind == "cpu" and graph.cache_dtype == "bfloat16"
        if self.is_upcast:
            self.graph = upcast_to_float32(self.path)
            self.signature = Signature.of(self.config)
        weights = {WEIGHTS_FOLDER: str(self.path.parent)} if self.is_upcast else {}
        self.session = open_session(self.graph, self.device, threads=threads, entries=weights)
        self.threads = threads
        self._check_interface(bundle.path)

    def _check_interface(self, path: Path) -> None:
        """A graph whose inputs and outputs are not the config's was swapped or edited."""
        declared = [spec.name for spec in (*self.signature.inputs, *self.signature.outputs)]
        session = self.session
        found = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
        found += [value.name for value in session.get_overridable_initializers()]
        if set(declared) != set(found):
            different = sorted(set(declared) ^ set(found))
            raise Gemma3ExportError(
                f"the graph in {path} does not have the inputs and outputs that its config and "
                f"{MANIFEST} declare; they differ in {', '.join(different[:6])}; export it anew"
            )

    def describe(self) -> dict[str, object]:
        """Versions, device and providers really used."""
        return {
            "runtime": self.name,
            "onnxruntime": import_onnxruntime().__version__,
            "target": self.target,
            "dtype": self.dtype,
            "computed_in": "float32, rounded to bfloat16" if self.is_upcast else self.dtype,
            "device": str(self.device),
            "providers": self.session.get_providers(),
            "threads": self.threads,
        }

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        kind = SharedCache if self.target == "ort" else GrowingCache
        return kind(self.config, self.signature, self.device, batch_size, capacity)

    def step(
        self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int | None = None
    ) -> Logits:
        """See :class:`gemma3_export.runtimes.protocol.Runtime`."""
        assert isinstance(cache, SharedCache | GrowingCache)
        rows, new = input_ids.shape
        check_capacity(cache, new, row)
        if self.target == "ort" and row is None and rows > 1 and new > 1:
            # GroupQueryAttention takes several tokens after a past for one row at a time only.
            parts = [
                self.step(input_ids[index : index + 1], cache, num_logits=num_logits, row=index)
                for index in range(rows)
            ]
            return np.concatenate(parts)
        logits = np.empty((rows, num_logits or new, self.config.vocab_size), np.float32)
        binding = self._bind(input_ids, cache, logits, row)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise Gemma3ExportError(
                f"ONNX Runtime failed on a step of {new} tokens after {cache.lengths.tolist()}: "
                f"{first_line(error)}"
            ) from error
        cache.advance(binding, new, row)
        return logits

    def _bind(self, input_ids: IntArray, cache: OnnxCache, logits: Logits, row: int | None) -> Any:
        signature = self.signature
        binding = self.session.io_binding()
        mask = cache.attention_mask(input_ids.shape[1], row)
        binding.bind_cpu_input(signature.input_ids.name, np.ascontiguousarray(input_ids))
        binding.bind_cpu_input(signature.attention_mask.name, mask)
        # Inputs with a default can be bound as OrtValues only.
        count = np.array([logits.shape[1]], dtype=np.int64)
        binding.bind_ortvalue_input(
            signature.num_logits_to_keep.name,
            import_onnxruntime().OrtValue.ortvalue_from_numpy(count),
        )
        binding.bind_output(
            signature.logits.name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data
        )
        cache.bind(binding, row)
        return binding
