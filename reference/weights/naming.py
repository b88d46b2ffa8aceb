"""Maps the names that checkpoints use to the canonical ones of ``Gemma3Config.weight_shapes``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from gemma3_export.errors import InputError

__all__ = ["NameMap", "map_names"]

_ANCESTOR_LAYER = {
    "att.W_query.weight": "self_attn.q_proj.weight",
    "att.W_key.weight": "self_attn.k_proj.weight",
    "att.W_value.weight": "self_attn.v_proj.weight",
    "att.out_proj.weight": "self_attn.o_proj.weight",
    "att.q_norm.scale": "self_attn.q_norm.weight",
    "att.k_norm.scale": "self_attn.k_norm.weight",
    "ff.fc1.weight": "mlp.gate_proj.weight",
    "ff.fc2.weight": "mlp.up_proj.weight",
    "ff.fc3.weight": "mlp.down_proj.weight",
    "input_layernorm.scale": "input_layernorm.weight",
    "post_attention_layernorm.scale": "post_attention_layernorm.weight",
    "pre_feedforward_layernorm.scale": "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.scale": "post_feedforward_layernorm.weight",
}
_ANCESTOR_TOP = {
    "tok_emb.weight": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "out_head.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(r"(?P<stack>layers|blocks|blk)\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<rest>.+)")
_VISION = re.compile(r"(model\.)*(vision_tower|multi_modal_projector)\.")
# Tables and masks that a module registers; they are computed, not trained.
_BUFFER = re.compile(r"(.*\.)?(((\w+_)?inv_freq)|(cos|sin)(_\w+)?|(\w+_)?mask|embed_scale)")
_HEAD_OF_TEXT = re.compile(r"(model\.|language_model\.)+")


@dataclass(slots=True)
class NameMap:
    """What the stored names of one checkpoint mean."""

    stored: dict[str, str] = field(default_factory=dict)  # canonical name to stored name
    skipped: list[str] = field(default_factory=list)  # known, but not of the text model
    unexpected: list[str] = field(default_factory=list)  # unknown


def map_names(names: Iterable[str]) -> NameMap:
    """Sort stored names into canonical, skipped and unexpected ones.

    Raises:
        InputError: two stored names mean the same weight.
    """
    found = NameMap()
    for name in names:
        plain = _strip_wrappers(name)
        target = _canonical(plain)
        if target is not None:
            if target in found.stored:
                raise InputError(
                    f"{found.stored[target]} and {name} both mean {target}; keep one of them"
                )
            found.stored[target] = name
        elif _VISION.match(plain) or _BUFFER.fullmatch(plain):
            found.skipped.append(name)
        else:
            found.unexpected.append(name)
    return found


def _strip_wrappers(name: str) -> str:
    """Remove what torch.compile and DistributedDataParallel put around modules."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _canonical(name: str) -> str | None:
    if name in _ANCESTOR_TOP:
        return _ANCESTOR_TOP[name]
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    text = _HEAD_OF_TEXT.sub("", name, count=1) if _HEAD_OF_TEXT.match(name) else name
    if text == "lm_head.weight":
        return text
    if text in ("embed_tokens.weight", "norm.weight"):
        return f"model.{text}"
    match = _LAYER.fullmatch(text)
    if match is None:
        return None
    stack, layer, rest = match["stack"], match["layer"], match["rest"]
    if stack == "layers" and rest in _ANCESTOR_LAYER.values():
        return f"model.layers.{layer}.{rest}"
    if stack == "blocks" and rest in _ANCESTOR_LAYER:
        return f"model.layers.{layer}.{_ANCESTOR_LAYER[rest]}"
    if stack == "blk" and rest in _GGUF_LAYER:
        return f"model.layers.{layer}.{_GGUF_LAYER[rest]}"
    return None
