"""Every config that the reference accepts goes through every exporter, or is rejected by name.

`make test` runs a few configs that were chosen and a few that hypothesis draws, always the same;
`make test-full` draws many new ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.exporters.bundle_writer import GraphWriter, export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.exporters.torch.pt2 import Pt2Writer
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.weights import WeightSource
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.reference.weights.source import RandomSource
from tests.support.tiny_models import tiny_config

SLIDING, FULL = "sliding_attention", "full_attention"
ROWS, TOKENS, DECODED = 2, 9, 3

FLOAT_WRITERS: dict[str, Callable[[], GraphWriter]] = {
    "torchscript": TorchScriptWriter,
    "pt2": Pt2Writer,
    "onnx portable": lambda: OnnxWriter(target="portable"),
    "onnx ort": OnnxWriter,
}
QUANTIZED_WRITERS: dict[str, Callable[[], GraphWriter]] = {
    "torchscript int8": lambda: TorchScriptWriter(dtype="int8", block_size=16),
    "onnx int8": lambda: OnnxWriter(dtype="int8", block_size=16),
    "onnx w8a8": lambda: OnnxWriter(dtype="w8a8"),
}
WRITERS = FLOAT_WRITERS | QUANTIZED_WRITERS
FEW = {"torchscript": 16, "torchscript int8": 4}  # of the others, 1: a trace takes seconds
MANY = {"torchscript": 200, "torchscript int8": 100}

# How a rejection may be justified: a part of the message, and what must then hold.
REASONS: dict[str, Callable[[Gemma3Config], bool]] = {
    "fused attention takes multiples of 8": lambda config: config.head_dim % 8 != 0,
    "block": lambda config: has_odd_columns(config),
    "not a multiple of 16": lambda config: has_odd_columns(config),
}


def has_odd_columns(config: Gemma3Config) -> bool:
    sizes = (config.hidden_size, config.intermediate_size, config.query_size)
    return any(size % 16 for size in sizes)


def is_justified(message: str, config: Gemma3Config) -> bool:
    return any(reason in message and holds(config) for reason, holds in REASONS.items())


def small(**changes: Any) -> Gemma3Config:
    """Return a one-layer config without any usual ratio between its sizes."""
    values = {
        "num_hidden_layers": 1,
        "layer_types": (SLIDING,),
        "hidden_size": 16,
        "intermediate_size": 48,
        "vocab_size": 40,
        "eos_token_id": (1,),
    }
    return tiny_config(**values | changes)


CHOSEN = {
    "as many key-value heads as heads": small(num_attention_heads=3, num_key_value_heads=3),
    "one head, a window of one, a head of its own": small(
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=24,
        sliding_window=1,
        tie_word_embeddings=False,
    ),
    "sizes of one": small(hidden_size=1, intermediate_size=1, vocab_size=3, head_dim=2),
    "only full attention, a context of two": small(
        layer_types=(FULL,), hidden_size=33, intermediate_size=7, max_position_embeddings=2
    ),
}


@st.composite
def configs(draw: st.DrawFn) -> Gemma3Config:
    """Draw a small config of any shape that :class:`Gemma3Config` accepts."""
    types = draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=1, max_size=3))
    key_value_heads = draw(st.integers(1, 3))
    vocab_size = draw(st.integers(1, 60))
    token = st.integers(0, vocab_size - 1)
    reals = st.floats(0.5, 1e6, width=32)
    return Gemma3Config(
        vocab_size=vocab_size,
        hidden_size=draw(st.integers(1, 40) | st.sampled_from([16, 32, 64])),
        intermediate_size=draw(st.integers(1, 40) | st.sampled_from([16, 32, 64])),
        num_hidden_layers=len(types),
        num_attention_heads=key_value_heads * draw(st.integers(1, 3)),
        num_key_value_heads=key_value_heads,
        head_dim=2 * draw(st.integers(1, 16) | st.sampled_from([4, 8, 16])),
        max_position_embeddings=draw(st.integers(1, 40)),
        sliding_window=draw(st.integers(1, 50)),
        query_pre_attn_scalar=draw(st.floats(0.5, 512, width=32)),
        layer_types=tuple(types),
        rope_theta=draw(reals),
        rope_local_base_freq=draw(reals),
        rope_scaling_factor=draw(st.sampled_from([1.0, 3.0, 8.0])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(token),
        bos_token_id=draw(token),
        eos_token_id=tuple(draw(st.lists(token, max_size=2, unique=True))),
    )


def computed(bundle: Bundle, runtime_name: str, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the logits of a prefill and a few single steps, [B, T, V]."""
    runtime = open_runtime(bundle, runtime_name, device="cpu", threads=1)
    total = ids.shape[1]
    first = max(1, total - DECODED)
    cache = runtime.new_cache(len(ids), total)
    found = [runtime.step(ids[:, :first], cache, num_logits=first)]
    for index in range(first, total):
        found.append(runtime.step(ids[:, index : index + 1], cache, num_logits=1))
    return np.concatenate(found, axis=1)


def check(config: Gemma3Config, make: Callable[[], GraphWriter]) -> None:
    """Export random weights of ``config``; require the reference's logits, or a reason."""
    writer = make()
    source: WeightSource = RandomSource(replace(config, initializer_range=0.2), 3)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bundle"
        try:
            export_bundle(source, output, writer)
        except InputError as error:
            if not is_justified(str(error), config):
                raise
            assert not any(Path(folder).iterdir())
            return
        bundle = Bundle(output)
        is_quantized = bundle.is_quantized(writer.runtime)
        if is_quantized:
            source = open_bundle_weights(bundle, writer.runtime)
        length = min(TOKENS, config.max_position_embeddings)
        ids = np.random.default_rng(5).integers(0, config.vocab_size, (ROWS, length))
        ours = computed(bundle, writer.runtime, ids)
        with torch.no_grad():
            model = load_reference(source).double()
            expected = model(torch.from_numpy(ids)).logits.numpy()
    assert ours.shape == expected.shape
    # int8 kernels also round the activations.
    tolerance = 0.1 if is_quantized else 1e-4
    np.testing.assert_allclose(ours, expected, atol=tolerance * abs(expected).max(), rtol=0)


def chosen_pairs() -> Iterator[Any]:
    """Yield every chosen config for every writer; `make test` traces only the first config."""
    for writer in WRITERS:
        for index, (name, config) in enumerate(CHOSEN.items()):
            is_slow = index > 0 and not writer.startswith("torchscript")
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(writer, config, marks=marks, id=f"{writer}: {name}")


@pytest.mark.parametrize(("writer", "config"), list(chosen_pairs()))
def test_chosen_configs(writer: str, config: Gemma3Config) -> None:
    check(config, WRITERS[writer])


def drawn(name: str, examples: int, *, is_same: bool) -> None:
    """Check ``examples`` configs that hypothesis draws."""

    @settings(
        max_examples=examples,
        derandomize=is_same,
        deadline=None,
        database=None,
        # Shrinking a failure exports the model again and again.
        phases=[Phase.generate] if is_same else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(configs())
    def property_holds(config: Gemma3Config) -> None:
        check(config, WRITERS[name])

    property_holds()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_few_drawn_configs(writer: str) -> None:
    drawn(writer, FEW.get(writer, 1), is_same=True)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_many_drawn_configs(writer: str) -> None:
    drawn(writer, MANY.get(writer, 25), is_same=False)
