"""Hugging Face's Gemma 3 as a peer: with its defaults, and in its fastest configuration.

Nothing else in the package imports transformers.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from gemma3_export.bundle import Bundle
from gemma3_export.config import EMBEDDING, HEAD, Gemma3Config, config_to_json
from gemma3_export.dtypes import torch_dtype
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.runtimes.protocol import IntArray, Logits
from gemma3_export.runtimes.torch.tensors import torch_device

__all__ = [
    "StaticCandidate",
    "TransformersCandidate",
    "build_transformers_model",
]

CAPACITY_STEP = 64  # a static cache's size is a multiple of it
WARM_UPS = 2  # torch compiles again for a cache that has been filled before


class TransformersCandidate:
    """The model with its default cache and attention.

    It runs in float32 on the CPU, and in the precision of the bundle's cache on a GPU.
    """

    def __init__(self, bundle: Bundle, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        found = torch_device(device)
        self.device = str(found)
        cache = bundle.first_graph.cache_dtype
        self.dtype = torch.float32 if found.type == "cpu" else torch_dtype(cache)
        with open_bundle_weights(bundle) as weights:
            self.model = build_transformers_model(
                bundle.config, weights.read, device=self.device, dtype=self.dtype
            )

    def describe(self) -> dict[str, object]:
        """See :class:`gemma3_export.bench.serving.Candidate`."""
        return {
            "runtime": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "bytes_per_token": sum(p.nbytes for p in self.model.parameters()),
        }

    @torch.no_grad()
    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See :class:`gemma3_export.bench.serving.Candidate`."""
        started = time.perf_counter()
        ids = torch.from_numpy(prompt).to(self.device)
        output = self.model(ids, use_cache=True, logits_to_keep=1)
        tokens = [output.logits[:, -1:].argmax(-1).cpu()]
        first = time.perf_counter()
        for _ in range(new_tokens):
            output = self.model(
                tokens[-1].to(self.device),
                past_key_values=output.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens.append(output.logits[:, -1:].argmax(-1).cpu())
        ended = time.perf_counter()
        return first - started, ended - first, torch.cat(tokens, dim=1).numpy()

    @torch.no_grad()
    def logits(self, ids: IntArray) -> Logits:
        """See :class:`gemma3_export.bench.serving.Candidate`."""
        output = self.model(torch.from_numpy(ids)[None].to(self.device))
        found: Logits = output.logits[0].float().cpu().numpy()
        return found


class StaticCandidate(TransformersCandidate):
    """The model with a static cache and compiled decode steps, which are CUDA graphs on a GPU.

    Tokens stay on the device until the last one is decoded. A warm-up that is not measured compiles
    each shape.
    """

    def __init__(self, bundle: Bundle, device: str, threads: int) -> None:
        super().__init__(bundle, device, threads)
        # "reduce-overhead" means CUDA graphs
        self.compiled: Any = torch.compile(self.model, mode="reduce-overhead", dynamic=False)
        self.caches: dict[tuple[int, int], Any] = {}

    def describe(self) -> dict[str, object]:
        """See :class:`gemma3_export.bench.serving.Candidate`."""
        return super().describe() | {"cache": "static", "decoding": "torch.compile"}

    @torch.no_grad()
    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """See :class:`gemma3_export.bench.serving.Candidate`."""
        rows, length = prompt.shape
        capacity = -(-(length + new_tokens + 1) // CAPACITY_STEP) * CAPACITY_STEP
        if (rows, capacity) not in self.caches:
            self.caches[rows, capacity] = transformers.StaticCache(
                config=self.model.config, max_cache_len=capacity
            )
            for _ in range(WARM_UPS):
                self._continue(prompt, 3, self.caches[rows, capacity])
        return self._continue(prompt, new_tokens, self.caches[rows, capacity])

    def _continue(
        self, prompt: IntArray, new_tokens: int, cache: Any
    ) -> tuple[float, float, IntArray]:
        cache.reset()
        started = time.perf_counter()
        ids = torch.from_numpy(prompt).to(self.device)
        tokens = [self._next(self.model, ids, cache)]
        tokens[0].cpu()  # waits for the device
        first = time.perf_counter()
        for _ in range(new_tokens):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            tokens.append(self._next(self.compiled, tokens[-1], cache))
        found = torch.cat(tokens, dim=1).cpu().numpy()
        return first - started, time.perf_counter() - first, found

    def _next(self, model: Any, ids: Tensor, cache: Any) -> Tensor:
        """Return the most likely tokens [B, 1] after ``ids`` [B, T]."""
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token: Tensor = output.logits[:, -1:].argmax(-1)
        return token.clone()  # the next replay of the CUDA graph overwrites its output


def build_transformers_model(
    config: Gemma3Config,
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """Build ``Gemma3ForCausalLM`` from the config.json that we write, in evaluation mode.

    Args:
        config: the model.
        read: returns a weight by its canonical name.
        dtype: of weights and computation.
        device: a torch device.
    """
    hf_config = transformers.Gemma3TextConfig(**config_to_json(config))
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(hf_config)
    weights = {name: read(name).to(dtype) for name, _ in config.weight_shapes()}
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    # RoPE tables and the embedding's scale are not weights, and the meta device left them empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    embedding = model.model.embed_tokens
    embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    return model.to(device).eval().requires_grad_(False)
