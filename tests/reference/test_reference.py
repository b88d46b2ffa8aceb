"""Compare the reference model with transformers, and with itself in float64.

Ground truth is the reference in float64. If transformers deviates from it by more than float32
noise, the two implementations compute different things. The float32 error of the reference must be
at most 1.5 times that of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gemma3_export.config import Gemma3Config
from gemma3_export.reference.loading import LayerwiseForward, load_reference
from gemma3_export.reference.model import MLP, Gemma3, KeyValue, RMSNorm, ScaledEmbedding
from gemma3_export.reference.weights.opening import open_weights
from tests.support.tiny_models import TINY, tiny_config, tiny_weights, write_hf_folder
from tests.support.transformers_peer import transformers_peer

pytest.importorskip("transformers")
from transformers import DynamicCache

NOISE_FACTOR = 1.5
FLOAT32_NOISE = 1e-5  # of the largest value; two correct implementations differ by a tenth of it
BFLOAT16_NOISE = 0.1
W = TINY.sliding_window
LENGTHS = (W - 1, W, W + 1, 2 * W + 3)
CONFIGS = {
    "irregular layers, two kv heads": tiny_config(),
    "all full": tiny_config(layer_types=("full_attention",) * 5),
    "all sliding": tiny_config(layer_types=("sliding_attention",) * 5),
    "as many kv heads as heads": tiny_config(
        num_key_value_heads=6, query_pre_attn_scalar=7, rope_scaling_factor=1.0
    ),
    "one layer, one kv head": tiny_config(
        num_hidden_layers=1, layer_types=("sliding_attention",), num_key_value_heads=1
    ),
    "untied head, odd window": tiny_config(
        tie_word_embeddings=False, sliding_window=3, rope_scaling_factor=2.5, head_dim=10
    ),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Use one thread, because multithreading slows tiny models down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def reference(config: Gemma3Config, dtype: torch.dtype = torch.float32) -> Gemma3:
    model = Gemma3(config)
    model.load_state_dict(tiny_weights(config))
    return model.to(dtype).eval()


def peer(config: Gemma3Config, dtype: torch.dtype = torch.float32) -> Any:
    return transformers_peer(config, tiny_weights(config), dtype)


def random_ids(rows: int, length: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY.vocab_size, (rows, length), generator=generator)


def run_peer(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, list[KeyValue]]:
    """Return logits and the full cache, which a sliding-window cache would truncate."""
    cache = DynamicCache()
    logits = model(ids, past_key_values=cache, use_cache=True, **inputs).logits
    return logits, [(layer.keys, layer.values) for layer in cache.layers]


def assert_no_worse(ours: Tensor, theirs: Tensor, expected: Tensor, noise: float) -> None:
    """Require both errors below ``noise``, and ours at most NOISE_FACTOR times theirs."""
    assert expected.isfinite().all()
    our_error, their_error = (
        ((tensor.double() - expected).square().mean().sqrt().item()) for tensor in (ours, theirs)
    )
    limit = noise * expected.abs().max().item()
    assert their_error < limit, f"the peer computes something else: {their_error} > {limit}"
    assert our_error <= NOISE_FACTOR * their_error + 1e-12, (our_error, their_error)


def assert_like_transformers(model: Gemma3, their_model: Any, ids: Tensor) -> None:
    expected = copy.deepcopy(model).double()(ids)
    ours = model(ids)
    their_logits, their_cache = run_peer(their_model, ids)
    assert ours.logits.dtype == torch.float32
    assert_no_worse(ours.logits, their_logits, expected.logits, FLOAT32_NOISE)
    assert len(ours.past_key_values) == len(their_cache)
    for our_pair, their_pair, true_pair in zip(
        ours.past_key_values, their_cache, expected.past_key_values, strict=True
    ):
        for our, their, true in zip(our_pair, their_pair, true_pair, strict=True):
            assert our.shape == their.shape
            assert_no_worse(our, their, true, FLOAT32_NOISE)


def run_in_chunks(
    model: Gemma3, ids: Tensor, chunks: list[int], mask: Tensor | None = None
) -> tuple[Tensor, list[KeyValue]]:
    cache, logits, start = None, [], 0
    for size in chunks:
        stop = start + size
        output = model(ids[:, start:stop], None if mask is None else mask[:, :stop], cache)
        cache = output.past_key_values
        logits.append(output.logits)
        start = stop
    assert cache is not None
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_cache_equal_those_of_transformers(config: Gemma3Config, length: int) -> None:
    assert_like_transformers(reference(config), peer(config), random_ids(2, length))


@pytest.mark.parametrize("chunks", [[1] * 15, [4, 11], [1, 7, 6, 1], [6, 1, 1, 7]], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_steps_equal_one_uncached_pass(config: Gemma3Config, chunks: list[int]) -> None:
    model, ids = reference(config, torch.float64), random_ids(2, sum(chunks))
    whole = model(ids)
    logits, cache = run_in_chunks(model, ids, chunks)
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-12)
    for cached, uncached in zip(cache, whole.past_key_values, strict=True):
        torch.testing.assert_close(cached, uncached, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [[1] * 15, [4, 11], [6, 1, 1, 7]], ids=str)
def test_cached_steps_equal_those_of_transformers(chunks: list[int]) -> None:
    config, ids = tiny_config(), random_ids(2, sum(chunks))
    expected = reference(config, torch.float64)(ids).logits
    ours, _ = run_in_chunks(reference(config), ids, chunks)
    their_model, parts = peer(config), []
    cache = DynamicCache(
        config=their_model.config
    )  # by default with a sliding window in sliding layers
    for part in ids.split(chunks, dim=1):
        parts.append(their_model(part, past_key_values=cache, use_cache=True).logits)
    assert_no_worse(ours, torch.cat(parts, dim=1), expected, FLOAT32_NOISE)


@pytest.mark.parametrize("length", LENGTHS)
def test_left_padded_batches_equal_those_of_transformers(length: int) -> None:
    config, ids = tiny_config(), random_ids(3, length)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, : length - 1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = reference(config, torch.float64)(ids, mask).logits
    ours = reference(config)(ids, mask).logits
    theirs, _ = run_peer(peer(config), ids, attention_mask=mask, position_ids=positions)
    kept = mask.bool()
    assert ours.isfinite().all()
    assert_no_worse(ours[kept], theirs[kept], expected[kept], FLOAT32_NOISE)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("is_left", [True, False], ids=["left", "right"])
def test_padding_does_not_change_results(length: int, is_left: bool) -> None:
    model, ids = reference(tiny_config(), torch.float64), random_ids(1, length)
    alone = model(ids).logits
    pads = torch.full((1, 4), 50)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    padded = torch.cat((pads, ids) if is_left else (ids, pads), dim=1)
    mask = torch.cat((zeros, ones) if is_left else (ones, zeros), dim=1)
    chunks = [1, padded.shape[1] - 2, 1]
    for logits in (model(padded, mask).logits, run_in_chunks(model, padded, chunks, mask)[0]):
        kept = logits[:, 4:] if is_left else logits[:, :length]
        torch.testing.assert_close(kept, alone, rtol=0, atol=1e-12)


def test_bfloat16_is_finite_and_no_worse_than_transformers() -> None:
    config, ids = tiny_config(), random_ids(2, 2 * W + 3)
    weights = {name: w.bfloat16().double() for name, w in tiny_weights(config).items()}
    expected_model = Gemma3(config).double().eval()
    expected_model.load_state_dict(weights)
    ours = reference(config, torch.bfloat16)(ids)
    theirs, _ = run_peer(peer(config, torch.bfloat16), ids)
    assert ours.logits.dtype == torch.float32
    assert ours.past_key_values[0][0].dtype == torch.bfloat16
    assert_no_worse(ours.logits, theirs, expected_model(ids).logits, BFLOAT16_NOISE)


@pytest.mark.parametrize("hidden_size", [48, 640, 1152, 2560])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_embedding_equals_that_of_transformers_bit_for_bit(
    hidden_size: int, dtype: torch.dtype
) -> None:
    config = tiny_config(hidden_size=hidden_size, num_attention_heads=2)
    weights = {"model.embed_tokens.weight": torch.randn(config.vocab_size, hidden_size)}
    their_embedding = transformers_peer(
        config, {**tiny_weights(config), **weights}, dtype
    ).model.embed_tokens
    our_embedding = ScaledEmbedding(config.vocab_size, hidden_size).to(dtype)
    our_embedding.weight.copy_(weights["model.embed_tokens.weight"].to(dtype))
    ids = torch.arange(config.vocab_size)[None]
    assert torch.equal(our_embedding(ids), their_embedding(ids))


@pytest.mark.parametrize("name", ["irregular layers, two kv heads", "untied head, odd window"])
@torch.enable_grad()
def test_loss_and_gradients_equal_those_of_transformers(name: str) -> None:
    config = CONFIGS[name]
    ours, theirs = reference(config).train(), peer(config).train()
    ids = random_ids(2, 2 * W + 3)
    ignored = torch.full((2, 1), -100)
    labels = torch.cat((ids[:, 1:], ignored), dim=1)
    labels[0, :3] = -100
    their_labels = ids.clone()
    their_labels[0, 1:4] = -100  # transformers shifts labels itself
    output = ours(ids, labels=labels)
    assert output.loss is not None
    their_loss = theirs(ids, labels=their_labels).loss
    torch.testing.assert_close(output.loss, their_loss, rtol=1e-6, atol=0)
    output.loss.backward()
    their_loss.backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        expected = their_gradients[parameter_name]
        assert parameter.grad is not None, f"no gradient reaches {parameter_name}"
        assert parameter.grad.abs().max() > 0
        scale = expected.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_num_logits_to_keep_gives_the_last_logits(count: int) -> None:
    model, ids = reference(tiny_config()), random_ids(2, 9)
    everything, kept = model(ids), model(ids, num_logits_to_keep=count)
    assert kept.logits.shape[1] == count
    torch.testing.assert_close(kept.logits, everything.logits[:, -count:], rtol=0, atol=1e-6)
    for ours, expected in zip(kept.past_key_values, everything.past_key_values, strict=True):
        assert torch.equal(ours[0], expected[0])


def test_hidden_states_are_the_input_of_the_head() -> None:
    model, ids = reference(tiny_config()), random_ids(2, 9)
    output = model(ids, num_logits_to_keep=2)
    states, cache = model.hidden_states(ids, num_tokens_to_keep=2)
    assert torch.equal(model.head(states, model.head_weight), output.logits)
    for ours, expected in zip(cache, output.past_key_values, strict=True):
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])


def test_run_layer_replaces_the_call_of_every_layer() -> None:
    model, ids = reference(tiny_config()), random_ids(2, 9)
    called: list[torch.nn.Module] = []

    def run_layer(layer: Any, x: Tensor, context: Any, past: Any) -> tuple[Tensor, KeyValue]:
        called.append(layer)
        return layer(x, context, past)  # type: ignore[no-any-return]

    states, cache = model.hidden_states(ids, use_cache=False, run_layer=run_layer)
    assert called == list(model.model.layers)
    assert cache == []
    assert torch.equal(states, model.hidden_states(ids)[0])


def test_layers_can_run_in_two_parts() -> None:
    model, ids = reference(tiny_config()), random_ids(2, 9)
    contexts = model.layer_contexts(ids, None, None)
    x = model.model.embed_tokens(ids)
    for layers in (range(2), range(2, model.config.num_hidden_layers)):
        x, _ = model.run_layers(x, contexts, layers=layers)
    assert torch.equal(model.model.norm(x), model.hidden_states(ids)[0])


def test_layerwise_forward_equals_the_whole_model(tmp_path: Path) -> None:
    config = tiny_config()
    write_hf_folder(tmp_path, config)
    batches = [random_ids(1, 9), random_ids(2, 5)]
    with open_weights(str(tmp_path)) as source:
        model = load_reference(source)
        forward = LayerwiseForward(source, batches)
        for index, layer in forward.layers():
            parameters = (next(part.parameters()) for part in forward.model.model.layers)
            assert [parameter.is_meta for parameter in parameters].count(False) == 1
            assert layer is forward.model.model.layers[index]
            for batch in range(len(batches)):
                forward.step(batch)
        norm = forward.final_norm()
    for ids, states in zip(batches, forward.states, strict=True):
        assert torch.equal(norm(states), model.hidden_states(ids)[0])


def test_initial_weights_depend_on_the_seed_and_norms_scale_by_one() -> None:
    config = tiny_config()
    models = [Gemma3(config) for _ in range(2)]
    for model in models:
        model.initialize(torch.Generator().manual_seed(3))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["model.norm.weight"].any()
    std = first["model.embed_tokens.weight"].std().item()
    assert std == pytest.approx(config.initializer_range, rel=0.05)


def break_config(**changes: Any) -> Any:
    """Return a mutation that builds the model with other constants."""
    return lambda monkeypatch: tiny_config(**changes)


def break_method(owner: type, name: str, broken: Any) -> Any:
    """Return a mutation that replaces a method."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> Gemma3Config:
        monkeypatch.setattr(owner, name, broken)
        return tiny_config()

    return apply


def norm_without_one(self: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def exact_gelu(self: MLP, x: Tensor) -> Tensor:
    gate, up = self.project(x)
    return self.down_proj(F.gelu(gate) * up)


MUTATIONS = {
    "nothing": break_config(),
    "RoPE base of full layers": break_config(rope_theta=490_000.0),
    "RoPE base of sliding layers": break_config(rope_local_base_freq=20_500.0),
    "RoPE scaling": break_config(rope_scaling_factor=7.5),
    "window one longer": break_config(sliding_window=W + 1),
    "window one shorter": break_config(sliding_window=W - 1),
    "kinds of layer": break_config(layer_types=TINY.layer_types[::-1]),
    "epsilon": break_config(rms_norm_eps=1e-6),
    "attention scale": break_config(query_pre_attn_scalar=TINY.head_dim),
    "norm without 1 +": break_method(RMSNorm, "forward", norm_without_one),
    "exact GELU": break_method(MLP, "forward", exact_gelu),
    "unscaled embedding": break_method(ScaledEmbedding, "forward", ScaledEmbedding.lookup),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_comparison_detects_a_broken_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    their_model, ids = peer(tiny_config()), random_ids(2, 2 * W + 3)
    broken = MUTATIONS[name](monkeypatch)
    model = Gemma3(broken).eval()
    model.load_state_dict(tiny_weights(tiny_config()))
    if name == "nothing":
        assert_like_transformers(model, their_model, ids)
        return
    with pytest.raises(AssertionError, match="the peer computes something else"):
        assert_like_transformers(model, their_model, ids)
