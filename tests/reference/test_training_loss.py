"""Test the loss, the optimizer, batch sampling, metrics and options of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from gemma3_export.errors import InputError
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.training import metrics
from gemma3_export.reference.training.initialization import model_from_config
from gemma3_export.reference.training.loss import LossModule, chunked_cross_entropy
from gemma3_export.reference.training.metrics import flops_per_token, measure_peak_flops
from gemma3_export.reference.training.optimizer import learning_rate, make_optimizer
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.token_data import (
    IGNORED_LABEL,
    TRAIN_STREAM,
    VALIDATION_STREAM,
    WindowSampler,
)
from tests.support.token_folders import quick_options, random_tokens, small_config


def plain_loss(x, weight, labels):
    return F.cross_entropy((x @ weight.T).double(), labels, ignore_index=IGNORED_LABEL)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 12, 100])
def test_chunked_loss_and_gradients_equal_the_full_ones(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 30, (12,), generator=generator)
    labels[3] = labels[11] = IGNORED_LABEL

    loss = chunked_cross_entropy(
        x, weight, labels, chunk_tokens=chunk_tokens, compute_dtype=torch.float64
    )
    gradients = torch.autograd.grad(loss * 3, (x, weight))
    expected = plain_loss(x, weight, labels)
    expected_gradients = torch.autograd.grad(expected * 3, (x, weight))

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_do_not_underflow(dtype) -> None:
    # With 4096 tokens, the gradient of the mean underflows float16, that of the sum does not.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 8, generator=generator, requires_grad=True)
    weight = torch.randn(500, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 500, (4096,), generator=generator)
    loss = chunked_cross_entropy(x, weight, labels, chunk_tokens=512, compute_dtype=dtype)
    found = torch.autograd.grad(loss, (x, weight))
    wanted = torch.autograd.grad(plain_loss(x, weight, labels), (x, weight))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_only_one_chunk_of_logits_exists_at_a_time() -> None:
    chunk_bytes = 16 * 5000 * 4
    x = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(5000, 8, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        chunked_cross_entropy(x, weight, labels, chunk_tokens=16, compute_dtype=torch.float32)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * chunk_bytes, "all logits would be 32 times a chunk"


def test_evaluation_saves_no_tensors_for_gradients() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    with torch.no_grad():
        loss = chunked_cross_entropy(
            x,
            weight,
            torch.zeros(6, dtype=torch.int64),
            chunk_tokens=4,
            compute_dtype=torch.float32,
        )
    assert not loss.requires_grad


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_loss_module_equals_the_reference_model(gradient_checkpointing: bool) -> None:
    model = model_from_config(small_config(num_hidden_layers=2), seed=1).double()
    tokens = torch.from_numpy(random_tokens(3 * 20)).view(3, 20)
    module = LossModule(
        model,
        compute_dtype=torch.float64,
        loss_chunk_tokens=7,
        gradient_checkpointing=gradient_checkpointing,
    )
    loss = module(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    expected = model(tokens[:, :-1], labels=tokens[:, 1:]).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-8)


def test_initial_sublayers_add_as_much_variance_as_the_embeddings() -> None:
    kinds = ("sliding_attention", "full_attention") * 3
    config = small_config(hidden_size=64, num_hidden_layers=6, layer_types=kinds)
    model = model_from_config(config, seed=1)
    added: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("post_attention_layernorm", "post_feedforward_layernorm")):
            module.register_forward_hook(lambda module, inputs, output: added.append(output))
    tokens = torch.from_numpy(random_tokens(3 * 20)).view(3, 20)
    with torch.no_grad():
        model(tokens)
        embedded = float(model.model.embed_tokens(tokens).var())
    assert len(added) == 12
    assert sum(float(part.var()) for part in added) == pytest.approx(
        embedded, rel=0.5
    )  # 400 times as much with a gain of one


def test_weight_decay_applies_to_matrices_only() -> None:
    model = Gemma3(small_config())
    decayed, others = make_optimizer(model, TrainOptions()).param_groups
    assert decayed["weight_decay"] == 0.1
    assert all(weight.ndim == 2 for weight in decayed["params"])
    assert others["weight_decay"] == 0
    assert all(weight.ndim == 1 for weight in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_learning_rate_warms_up_peaks_and_ends_at_its_minimum() -> None:
    options = quick_options(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    # The schedule counts optimizer steps, independent of accumulation.
    accumulating = quick_options(
        steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1, accumulation=32
    )
    assert [learning_rate(step, accumulating) for step in range(100)] == rates


def test_processes_take_rows_of_one_global_batch() -> None:
    tokens = random_tokens(1000)
    both = WindowSampler(tokens, context_length=8, batch_size=6, seed=3, stream=TRAIN_STREAM)
    half = WindowSampler(tokens, context_length=8, batch_size=3, seed=3, stream=TRAIN_STREAM)
    inputs, labels, _ = both.batch(5)
    parts = [half.batch(5, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])


def test_batches_differ_by_index_seed_and_stream() -> None:
    tokens = np.arange(10_000)

    def first(seed: int, stream: int, index: int) -> int:
        windows = WindowSampler(tokens, context_length=8, batch_size=1, seed=seed, stream=stream)
        return int(windows.batch(index)[0][0, 0])

    drawn = [first(0, TRAIN_STREAM, 0), first(0, TRAIN_STREAM, 1), first(1, TRAIN_STREAM, 0)]
    drawn.append(first(0, VALIDATION_STREAM, 0))
    assert len(set(drawn)) == 4
    assert first(0, TRAIN_STREAM, 1) == drawn[1]


def test_every_position_of_the_text_can_be_sampled() -> None:
    windows = WindowSampler(
        np.arange(5), context_length=2, batch_size=2, seed=0, stream=TRAIN_STREAM
    )
    seen = {int(label) for i in range(40) for label in windows.batch(i)[1].flatten()}
    assert seen == {1, 2, 3, 4}


def test_too_short_text_is_an_error_with_the_token_counts() -> None:
    with pytest.raises(InputError, match="has 64 tokens, but 65 are needed for 4 windows of 16"):
        WindowSampler(
            random_tokens(64), context_length=16, batch_size=4, seed=0, stream=TRAIN_STREAM
        )


def test_flops_count_only_visible_keys() -> None:
    config = small_config()
    sliding = small_config(layer_types=("sliding_attention", "sliding_attention"))
    assert flops_per_token(config, 64) > flops_per_token(sliding, 64)
    assert flops_per_token(config, 4) == flops_per_token(sliding, 4)
    matrices = sum(s[0] * s[1] for _, s in config.weight_shapes() if len(s) == 2)
    attention = 2 * 2 * config.query_size * 2.5  # keys and values, two layers, mean of 1 to 4
    assert flops_per_token(config, 4) == pytest.approx(6 * (matrices + attention))


def test_emulated_precision_does_not_lower_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 100.0, torch.float16: 7.0, torch.bfloat16: 800.0}
    monkeypatch.setattr(metrics, "_measure_flops", lambda device, dtype: speeds[dtype])
    found = [measure_peak_flops(torch.device("cpu"), dtype) for dtype in speeds]
    assert found == [100.0, 100.0, 800.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"precision": "int8"}, "precision is 'int8'; choose one of fp32, bf16, fp16"),
        ({"min_learning_rate": 1.0}, "exceeds learning_rate"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
    ],
)
def test_invalid_options_are_errors(changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quick_options(**changed)


def test_options_round_trip_through_json(tmp_path: Path) -> None:
    del tmp_path
    options = quick_options(clip_norm=0.5, compile=True)
    assert TrainOptions.from_json(options.to_json()) == options
    with pytest.raises(InputError, match="unknown or missing fields: warp"):
        TrainOptions.from_json(options.to_json() | {"warp": 9})
