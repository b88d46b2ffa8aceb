"""Find where a failing runtime first leaves the reference: step, layer and sub-block.

The failing step is repeated for one row with every sub-block exposed, first without a cache and
then as the case fed it. Going through the sub-blocks in the order of computation, the first whose
error is above its own noise floor is where the defect is; later ones only carry it on.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemma3_export.config import Gemma3Config
from gemma3_export.parity.differences import compare_tensors
from gemma3_export.parity.intermediates import BLOCKS, Tap, Taps, tap_model, tapped_step
from gemma3_export.parity.judge import Limits
from gemma3_export.parity.noise_floor import Yardstick
from gemma3_export.parity.report.model import CaseResult, Divergence
from gemma3_export.runtimes.protocol import Runtime

__all__ = ["locate"]

EXPLANATIONS = {
    "embed_tokens": "the token embedding or its scale, sqrt(hidden_size)",
    "input_layernorm": "the norm itself (1 + weight, epsilon), or the embedding before layer 0",
    "self_attn.q_proj": "the query projection",
    "self_attn.k_proj": "the key projection",
    "self_attn.v_proj": "the value projection",
    "self_attn.q_norm": "the query norm (1 + weight; it comes before the rotation)",
    "self_attn.k_norm": "the key norm (1 + weight; it comes before the rotation)",
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


def locate(
    candidate: Runtime, cases: Sequence[CaseResult], yardstick: Yardstick, limits: Limits
) -> Divergence | None:
    """The first divergence of the first failing case, or None when nothing failed."""
    failing = next((case for case in cases if not case.passed), None)
    if failing is None:
        return None
    sequence, step, position, first_new = first_bad_place(failing, yardstick)
    names = [item.name for item in yardstick.sequences]
    ids = yardstick.sequences[names.index(sequence)].ids[: position + 1]
    exact, rounded = tap_model(yardstick.exact, ids), tap_model(yardstick.rounded, ids)
    tapped = tapped_step(candidate)
    found: tuple[Tap, int] | None = None
    needs_past = False
    if tapped is not None:
        found = first_bad_tap(tapped(ids[:0], ids), exact, rounded, limits, 0)
        if found is None and 0 < first_new <= position:
            taps = tapped(ids[:first_new], ids[first_new:])
            found = first_bad_tap(taps, exact, rounded, limits, first_new)
            needs_past = found is not None
    if found is None:
        tap, explanation = from_caches(failing), "seen in the cache only; "
    else:
        (tap, at), explanation = found, ""
        position = at
    explanation += explain(tap, position, yardstick.config)
    if needs_past:
        explanation += "; without a cached past the same tokens come out right"
    return Divergence(
        case=failing.name,
        step=step,
        sequence=sequence,
        position=position,
        layer=tap.layer,
        block=tap.block,
        explanation=explanation,
        needs_past=needs_past,
    )


def first_bad_place(case: CaseResult, yardstick: Yardstick) -> tuple[str, int, int, int]:
    """Sequence, step, position, and the position of the step's first token."""
    metric = case.metric("logits_max_abs")
    assert metric is not None
    points = case.points
    bad = next(
        (index for index, point in enumerate(points) if not point.max_abs <= metric.limit), None
    )
    if bad is None:  # only caches, or a mean, are off
        bad = max(range(len(points)), key=lambda index: points[index].max_abs)
    point = points[bad]
    return point.sequence, point.step, point.position, first_new_of(case, bad)


def first_new_of(case: CaseResult, index: int) -> int:
    """Where the step of a point began: after the last position of the same row's earlier steps."""
    point = case.points[index]
    earlier = [
        other.position + 1
        for other in case.points[:index]
        if other.sequence == point.sequence and other.step < point.step
    ]
    return max((position for position in earlier if position <= point.position), default=0)


def first_bad_tap(
    found: Taps, exact: Taps, rounded: Taps, limits: Limits, first_new: int
) -> tuple[Tap, int] | None:
    """The first sub-block above its limit, and the first position where it is."""
    for tap in in_order(found):
        if tap not in exact or tap not in rounded:
            continue
        wanted, noisy = exact[tap][first_new:], rounded[tap][first_new:]
        if found[tap].shape != wanted.shape:
            return tap, first_new
        error, noise = compare_tensors(wanted, found[tap]), compare_tensors(wanted, noisy)
        whole = compare_tensors(exact[tap], rounded[tap])  # a single token's floor may be lucky
        limit = limits.error(max(noise.max_abs.max(), whole.max_abs.max()), noise.scale)
        bad = (error.max_abs > limit).nonzero()[0]
        if len(bad):
            return tap, first_new + int(bad[0])
    return None


def in_order(taps: Taps) -> list[Tap]:
    """Taps as the model computes them."""
    outer = {"embed_tokens": -1, "norm": 1_000_000, "head": 1_000_001}

    def key(tap: Tap) -> tuple[int, int]:
        if tap.layer is None:
            return outer[tap.block], 0
        return tap.layer, BLOCKS.index(tap.block)

    return sorted(taps, key=key)


def from_caches(case: CaseResult) -> Tap:
    """What the cached keys and values alone tell."""
    bad = sorted((layer.layer, layer.kind) for layer in case.layers if not layer.passed)
    if not bad:
        return Tap(None, "head")
    layer = bad[0][0]
    kinds = {kind for index, kind in bad if index == layer}
    if kinds == {"key"}:
        return Tap(layer, "self_attn.rotary")
    return Tap(layer, "input_layernorm")


def explain(tap: Tap, position: int, config: Gemma3Config) -> str:
    """A hint for the person who has to fix it."""
    text = EXPLANATIONS[tap.block]
    if tap.layer is None:
        return text
    kind = "sliding" if config.is_sliding(tap.layer) else "full"
    text += f" (a {kind}-attention layer"
    if kind == "sliding" and position >= config.sliding_window - 1:
        text += f"; it starts at the edge of the window of {config.sliding_window}"
    return text + ")"
