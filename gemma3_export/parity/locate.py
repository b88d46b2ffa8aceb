"""Find where a failing runtime first departs from the reference: step, layer and block.

The failing step is repeated for one row with the output of every block exposed, first without a
cached past and then as the case fed it. In the order of computation, the first block whose error
exceeds its own noise floor holds the defect; later blocks only pass the error on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gemma3_export.config import Gemma3Config
from gemma3_export.parity.differences import compare_tensors
from gemma3_export.parity.ground_truth import GroundTruth
from gemma3_export.parity.intermediates import (
    ATTEND,
    BLOCKS,
    ROTARY_KEY,
    Intermediates,
    Place,
    open_intermediates,
    pair_intermediates,
)
from gemma3_export.parity.judge import Limits
from gemma3_export.parity.report.model import CaseResult, Divergence
from gemma3_export.runtimes.protocol import Runtime

__all__ = ["locate"]

EXPLANATIONS = {
    "embed_tokens": "the token embedding or its scale, sqrt(hidden_size)",
    "input_layernorm": "the norm itself (1 + weight, epsilon), or the embedding before layer 0",
    "self_attn.q_proj": "the query projection",
    "self_attn.k_proj": "the key projection",
    "self_attn.v_proj": "the value projection",
    "self_attn.q_norm": "the query norm (1 + weight; it precedes the rotation)",
    "self_attn.k_norm": "the key norm (1 + weight; it precedes the rotation)",
    "self_attn.rotary": "the rotary embedding: base, scaling factor or position",
    "self_attn.attend": "the attention itself: scale, mask, window, grouping of heads or cache",
    "self_attn.o_proj": "the output projection",
    "post_attention_layernorm": "the norm after attention",
    "pre_feedforward_layernorm": "the norm before the feed-forward, or the residual addition",
    "mlp": "the feed-forward: GELU (tanh form), or one of its three matrices",
    "post_feedforward_layernorm": "the norm after the feed-forward",
    "norm": "the final norm, or the last residual addition",
    "head": "the output head: its matrix, or which rows it takes",
}

BETWEEN_LAYERS = (
    "what layer {} returns, which is wrong at every position: its output projection, norms or "
    "feed-forward; or the input norm of this layer, or its key and value projections"
)
HIDDEN_SCALE = "; or the scale of the embedding, which the norm of layer 0 hides"
WINDOW_JUMP = 10.0  # growth of the error at the window's edge that says that the window is wrong


def locate(
    candidate: Runtime, cases: Sequence[CaseResult], ground_truth: GroundTruth, limits: Limits
) -> Divergence | None:
    """Return the first divergence of the first failing case, or None if no case failed."""
    failing = next((case for case in cases if not case.passed), None)
    if failing is None:
        return None
    bad = first_bad_point(failing)
    point = failing.points[bad]
    position, first_new = point.position, first_new_position(failing, bad)
    names = [item.name for item in ground_truth.sequences]
    sequence = ground_truth.sequences[names.index(point.sequence)]
    prefix = replace(sequence, ids=sequence.ids[: position + 1])
    exact, rounded = pair_intermediates(ground_truth.pair([prefix]))
    ids = prefix.ids
    run = open_intermediates(candidate)
    found: tuple[Place, int] | None = None
    needs_past = False
    if run is not None:
        found = first_bad_place(run(ids[:0], ids), exact, rounded, limits, 0)
        if found is None and 0 < first_new <= position:
            actual = run(ids[:first_new], ids[first_new:])
            found = first_bad_place(actual, exact, rounded, limits, first_new)
            needs_past = found is not None
    text = None
    if found is not None:
        place, position = found
    else:
        place, position = place_from_caches(failing, bad)
        if place.block == "input_layernorm" and place.layer:
            text = BETWEEN_LAYERS.format(place.layer - 1) + HIDDEN_SCALE * (place.layer == 1)
    explanation = explain(place, position, ground_truth.config, text)
    if found is None:
        explanation += "; inferred from the caches, as this graph exposes no values in between"
    if needs_past:
        explanation += "; without a cached past, the same tokens give correct results"
    growth = growth_past_window(cases, ground_truth.config.sliding_window)
    if position < ground_truth.config.sliding_window - 1 and growth > WINDOW_JUMP:
        explanation += (
            f"; from position {ground_truth.config.sliding_window} on, errors are {growth:.0f} "
            "times larger, so check the sliding window too"
        )
    return Divergence(
        case=failing.name,
        step=point.step,
        sequence=point.sequence,
        position=position,
        layer=place.layer,
        block=place.block,
        explanation=explanation,
        needs_past=needs_past,
    )


def growth_past_window(cases: Sequence[CaseResult], window: int) -> float:
    """Return how much larger the error of the logits is past the window's edge than before it.

    The first token that must not see the whole text is at position ``window``. Only cases that
    compare both sides in one step are considered.
    """
    growth = 0.0
    for case in cases:
        if case.steps == 1 and not case.is_text:
            before = [point.max_abs for point in case.points if point.position < window]
            after = [point.max_abs for point in case.points if point.position >= window]
            if before and after and max(before) > 0:
                growth = max(growth, max(after) / max(before))
    return growth


def first_bad_point(case: CaseResult) -> int:
    """Return the index of the first point beyond the limit, or else of the largest error."""
    metric = case.metric("logits_max_abs")
    assert metric is not None
    points = case.points
    bad = (index for index, point in enumerate(points) if not point.max_abs <= metric.limit)
    # Only the caches or a mean may have failed; then no single point is beyond the limit.
    return next(bad, max(range(len(points)), key=lambda index: points[index].max_abs))


def first_new_position(case: CaseResult, index: int) -> int:
    """Return the position of the first token of a point's step."""
    point = case.points[index]
    earlier = [
        other.position + 1
        for other in case.points[:index]
        if other.sequence == point.sequence and other.step < point.step
    ]
    return max((position for position in earlier if position <= point.position), default=0)


def first_bad_place(
    actual: Intermediates,
    exact: Intermediates,
    rounded: Intermediates,
    limits: Limits,
    first_new: int,
) -> tuple[Place, int] | None:
    """Return the first block above its limit and the first position where it is, or None."""
    for place in in_order(actual):
        if place not in exact or place not in rounded:
            continue
        value = actual[place]
        total = len(exact[Place(None, "embed_tokens")])
        # The head's output holds the last tokens only.
        start = max(first_new, total - len(exact[place]))
        expected, noisy = exact[place][start - total :], rounded[place][start - total :]
        if value.shape != expected.shape:
            return place, start
        error = compare_tensors(expected, value)
        noise = compare_tensors(expected, noisy)
        # A single token can have an unusually low noise floor, so the whole sequence counts too.
        whole = compare_tensors(exact[place], rounded[place])
        limit = limits.error(max(noise.max_abs.max(), whole.max_abs.max()), noise.scale)
        bad = (error.max_abs > limit).nonzero()[0]
        if len(bad):
            return place, start + int(bad[0])
    return None


def in_order(intermediates: Intermediates) -> list[Place]:
    """Return the places in the order in which the model computes them."""
    outer = {"embed_tokens": -1, "norm": 1_000_000, "head": 1_000_001}

    def key(place: Place) -> tuple[int, int]:
        if place.layer is None:
            return outer[place.block], 0
        return place.layer, BLOCKS.index(place.block)

    return sorted(intermediates, key=key)


def place_from_caches(case: CaseResult, index: int) -> tuple[Place, int]:
    """Infer a place and a position from the cached keys and values and the logits alone.

    The keys and values of a layer show what the layer before it returned. The first token attends
    to itself only, so its results do not depend on positions, masks or scales: if it is right and a
    later one is wrong, so is the attention, or, with the keys alone, their rotation.

    Args:
        case: a case that failed.
        index: of its first bad logits among the compared ones.
    """
    point = case.points[index]
    bad = [layer for layer in case.layers if not layer.passed]
    last = max((layer.layer for layer in case.layers), default=None)
    if not bad:
        is_attention = last is not None and index > 0
        return Place(last, ATTEND) if is_attention else Place(None, "head"), point.position
    layer = min(item.layer for item in bad)
    kinds = {item.kind for item in bad if item.layer == layer}
    found = [item.first_bad_position for item in bad if item.layer == layer]
    position = min((first for first in found if first is not None), default=point.position)
    if kinds == {"key"}:
        return Place(layer, ROTARY_KEY if position else "self_attn.k_norm"), position
    if kinds == {"value"}:
        return Place(layer, "self_attn.v_proj"), position
    if layer and position:
        return Place(layer - 1, ATTEND), position
    return Place(layer, "input_layernorm"), position


def explain(place: Place, position: int, config: Gemma3Config, text: str | None = None) -> str:
    """Return a hint for whoever fixes the defect; ``text`` replaces that of the block."""
    text = text or EXPLANATIONS[place.block]
    if place.layer is None:
        return text
    kind = "sliding" if config.is_sliding(place.layer) else "full"
    text += f" (a {kind}-attention layer"
    if kind == "sliding" and position >= config.sliding_window - 1:
        text += f"; the error starts at the edge of the window of {config.sliding_window}"
    return text + ")"
