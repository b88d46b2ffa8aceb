"""Break the model in every way in which ports are known to break; every defect is caught.

The tiny model's layers are full, sliding, sliding, full, sliding; its window is 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from gemma3_export.parity import GroundTruth, ParityReport, VerifyOptions, verify
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import MLP, Attention, Gemma3, RMSNorm, rotate
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource, open_weights
from tests.support.tiny_models import tiny_config, write_hf_folder

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 6
OPTIONS = VerifyOptions(decode_steps=12, greedy_steps=6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    folder = tmp_path_factory.mktemp("parity") / "tiny"
    write_hf_folder(folder, tiny_config())
    return open_weights(str(folder))


@pytest.fixture(scope="module")
def ground_truth(source: WeightSource) -> GroundTruth:
    return GroundTruth.for_runtime(
        ReferenceRuntime(load_reference(source)), source, options=OPTIONS
    )


def norms(model: nn.Module) -> list[RMSNorm]:
    return [module for module in model.modules() if isinstance(module, RMSNorm)]


def swap_rope_bases(model: Any) -> None:
    full, sliding = model.rotary["full_attention"], model.rotary["sliding_attention"]
    full.base, sliding.base = sliding.base, full.base


def use_local_base_everywhere(model: Any) -> None:
    model.rotary["full_attention"].base = model.rotary["sliding_attention"].base


def scale_the_wrong_layers(model: Any) -> None:
    full, sliding = model.rotary["full_attention"], model.rotary["sliding_attention"]
    full.scaling_factor, sliding.scaling_factor = sliding.scaling_factor, full.scaling_factor


def scale_all_layers(model: Any) -> None:
    model.rotary["sliding_attention"].scaling_factor = model.config.rope_scaling_factor


def change_window(by: int) -> Callable[[Any], None]:
    def mutate(model: Any) -> None:
        model.config = replace(model.config, sliding_window=model.config.sliding_window + by)

    return mutate


def ignore_window(model: Any) -> None:
    model.config = replace(model.config, sliding_window=model.config.max_position_embeddings)


def multiply_by_w(model: Any) -> None:
    for norm in norms(model):
        norm.weight = nn.Parameter(norm.weight - 1.0, requires_grad=False)


def multiply_key_norm_by_w(model: Any) -> None:
    norm = model.model.layers[2].self_attn.k_norm
    norm.weight = nn.Parameter(norm.weight - 1.0, requires_grad=False)


def use_default_epsilon(model: Any) -> None:
    for norm in norms(model):
        norm.eps = 1e-6


def scale_by_head_dim(model: Any) -> None:
    for layer in model.model.layers:
        config = layer.self_attn.config
        layer.self_attn.config = replace(config, query_pre_attn_scalar=config.head_dim)


def round_embedding_scale(model: Any) -> None:
    embedding = model.model.embed_tokens
    scale = torch.tensor(math.sqrt(embedding.weight.shape[1])).bfloat16().float()
    embedding.forward = lambda ids: F.embedding(ids, embedding.weight) * scale


def normalize_after_rotation(model: Any) -> None:
    def forward(self: Attention, x: Any, context: Any, past: Any) -> Any:
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.project(x))
        q = self.q_norm(rotate(q, context.cos, context.sin).transpose(1, 2)).transpose(1, 2)
        k = self.k_norm(rotate(k, context.cos, context.sin).transpose(1, 2)).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        scale = self.config.attention_scale
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.mask, scale=scale, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)

    for layer in model.model.layers:
        layer.self_attn.forward = forward.__get__(layer.self_attn)


def use_exact_gelu(model: Any) -> None:
    def forward(self: MLP, x: Any) -> Any:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp.forward = forward.__get__(layer.mlp)


def drop(name: str) -> Callable[[Any], None]:
    def mutate(model: Any) -> None:
        for layer in model.model.layers:
            setattr(layer, name, nn.Identity())

    return mutate


def swap_value_heads(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    first, second = attention.v_proj.weight.chunk(2)
    attention.v_proj.weight = nn.Parameter(torch.cat((second, first)), requires_grad=False)


def group_heads_the_other_way(model: Any) -> None:
    """Query head n reads key-value head n mod K instead of n div (N / K)."""

    for layer in model.model.layers:
        attention, config = layer.self_attn, layer.self_attn.config
        original = attention.q_norm.forward

        def forward(x: Any, original: Any = original, kv: int = config.num_key_value_heads) -> Any:
            normed = original(x)  # [B, T, N, H]
            return normed.unflatten(2, (-1, kv)).transpose(2, 3).flatten(2, 3)

        attention.q_norm.forward = forward


def count_cache_of_a_sliding_layer(model: Any) -> None:
    """Restart positions at the window, as if a sliding layer's cache determined the length."""
    original = model.layer_contexts

    def layer_contexts(ids: Any, mask: Any, past: Any) -> Any:
        contexts = original(ids, mask, past)
        new = ids.shape[1]
        cached = 0 if mask is None else mask.shape[1] - new
        shift = max(0, cached - WINDOW)
        if shift:
            positions = torch.arange(cached - shift, cached - shift + new)[None]
            positions = positions.expand(ids.shape[0], -1)
            for kind, rotary in model.rotary.items():
                contexts[kind].cos, contexts[kind].sin = rotary(positions)
        return contexts

    def layer_contexts_any(ids: Any, mask: Any, past: Any) -> Any:
        if mask is None:
            cached = 0 if past is None else past[0][0].shape[2]
            mask = ids.new_ones(ids.shape[0], cached + ids.shape[1])
        return layer_contexts(ids, mask, past)

    model.layer_contexts = layer_contexts_any


def forget_final_norm(model: Any) -> None:
    model.model.norm.forward = lambda x: x


def shift_head_by_a_row(model: Any) -> None:
    original = model.head.forward
    model.head.forward = lambda x, weight: original(x, weight.roll(1, 0))


def swap_gate_and_up(model: Any) -> None:
    mlp = model.model.layers[3].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def poison_a_layer(model: Any) -> None:
    model.model.layers[2].self_attn.o_proj.weight[3, 5] = float("nan")


@dataclass(frozen=True)
class Mutation:
    name: str
    mutate: Callable[[Any], None]
    layer: int | None
    block: str
    needs_past: bool = False


MUTATIONS = [
    Mutation("rope bases swapped", swap_rope_bases, 0, "self_attn.rotary"),
    Mutation("local base on full layers", use_local_base_everywhere, 0, "self_attn.rotary"),
    Mutation("scaling on the wrong layers", scale_the_wrong_layers, 0, "self_attn.rotary"),
    Mutation("scaling on all layers", scale_all_layers, 1, "self_attn.rotary"),
    Mutation("window one less", change_window(-1), 1, "self_attn.attend"),
    Mutation("window one more", change_window(1), 1, "self_attn.attend"),
    Mutation("no window", ignore_window, 1, "self_attn.attend"),
    Mutation("w for 1 + w", multiply_by_w, 0, "input_layernorm"),
    Mutation("w for 1 + w in one key norm", multiply_key_norm_by_w, 2, "self_attn.k_norm"),
    Mutation("epsilon 1e-6", use_default_epsilon, 0, "input_layernorm"),
    Mutation("attention scale from head_dim", scale_by_head_dim, 0, "self_attn.attend"),
    Mutation("embedding scale in bf16", round_embedding_scale, None, "embed_tokens"),
    Mutation("q/k norm after rope", normalize_after_rotation, 0, "self_attn.q_norm"),
    Mutation("exact gelu", use_exact_gelu, 0, "mlp"),
    Mutation(
        "no post-attention norm", drop("post_attention_layernorm"), 0, "post_attention_layernorm"
    ),
    Mutation(
        "no post-feedforward norm",
        drop("post_feedforward_layernorm"),
        0,
        "post_feedforward_layernorm",
    ),
    Mutation("value heads swapped", swap_value_heads, 1, "self_attn.v_proj"),
    Mutation("heads grouped the other way", group_heads_the_other_way, 0, "self_attn.q_norm"),
    Mutation(
        "cache length of a sliding layer",
        count_cache_of_a_sliding_layer,
        0,
        "self_attn.rotary",
        needs_past=True,
    ),
    Mutation("no final norm", forget_final_norm, None, "norm"),
    Mutation("head off by a row", shift_head_by_a_row, None, "head"),
    Mutation("gate and up swapped", swap_gate_and_up, 3, "mlp"),
    Mutation("NaN in a layer", poison_a_layer, 2, "self_attn.o_proj"),
]


def mutated(source: WeightSource, mutate: Callable[[Any], None]) -> ReferenceRuntime:
    model: Gemma3 = load_reference(source)
    with torch.no_grad():
        mutate(model)
    return ReferenceRuntime(model)


def check(
    source: WeightSource, ground_truth: GroundTruth, mutate: Callable[[Any], None]
) -> ParityReport:
    return verify(mutated(source, mutate), source, ground_truth=ground_truth)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_is_caught_and_located(
    mutation: Mutation, source: WeightSource, ground_truth: GroundTruth
) -> None:
    report = check(source, ground_truth, mutation.mutate)
    assert not report.passed
    first = report.divergence
    assert first is not None
    assert (first.layer, first.block) == (mutation.layer, mutation.block)
    assert first.needs_past == mutation.needs_past


@pytest.mark.parametrize(("by", "position"), [(-1, WINDOW - 1), (1, WINDOW)])
def test_a_window_off_by_one_is_located_at_its_edge(
    by: int, position: int, source: WeightSource, ground_truth: GroundTruth
) -> None:
    first = check(source, ground_truth, change_window(by)).divergence
    assert first is not None
    assert first.position == position
    assert "edge of the window" in first.explanation


def test_only_the_batch_cases_catch_padding_that_shifts_positions(
    source: WeightSource, ground_truth: GroundTruth
) -> None:
    def count_padding(model: Any) -> None:
        original = model.layer_contexts

        def layer_contexts(ids: Any, mask: Any, past: Any) -> Any:
            contexts = original(ids, mask, past)
            if mask is not None:
                total, new = mask.shape[1], ids.shape[1]
                positions = torch.arange(total - new, total)[None].expand(ids.shape[0], -1)
                for kind, rotary in model.rotary.items():
                    contexts[kind].cos, contexts[kind].sin = rotary(positions)
            return contexts

        model.layer_contexts = layer_contexts

    report = check(source, ground_truth, count_padding)
    failed = {case.name for case in report.cases if not case.passed}
    assert failed == {"ragged-batch", "padded"}
    assert report.divergence is not None


def test_defects_are_far_above_the_limit(source: WeightSource, ground_truth: GroundTruth) -> None:
    """The subtlest of these defects is a hundred times the noise floor, far above the factor."""
    for mutation in MUTATIONS[:5]:
        report = check(source, ground_truth, mutation.mutate)
        worst = max(
            metric.value / metric.limit
            for case in report.cases
            if (metric := case.metric("logits_max_abs")) is not None
        )
        assert worst > 100 / OPTIONS.factor, mutation.name
