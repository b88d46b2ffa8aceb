"""The weight source for checkpoint files, which maps every stored name to a canonical name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gemma3_export.config import EMBEDDING, HEAD, PADDED_VOCAB_SIZE, TEXT_VOCAB_SIZE, Gemma3Config
from gemma3_export.dtypes import FLOAT_DTYPES, torch_dtype
from gemma3_export.errors import InputError
from gemma3_export.files import open_regular
from gemma3_export.gguf_file import GgufTensor
from gemma3_export.reference.weights.source import WeightSource
from gemma3_export.reference.weights.stores import GgufStore, TensorStore

__all__ = [
    "CheckpointSource",
    "NameMap",
    "map_names",
]

READABLE_DTYPES = tuple(map(torch_dtype, FLOAT_DTYPES))
MAX_LISTED = 10
COMPARE_BYTES = 16 * 2**20
HASH_BYTES = 2**20


class CheckpointSource(WeightSource):
    """Weights from a store of named tensors.

    Args:
        store: the open files; closing this source closes them.
        config: the model that the weights must fit.
        origin: where the weights come from, for messages.
        location: the origin without local folders, for the fingerprint.
        tokenizer: the file of the checkpoint's tokenizer, if any.
        is_tie_stated: a config file says that the head is tied, so a different head is an error;
            otherwise a different head unties it.

    Raises:
        InputError: names or shapes do not fit ``config``; the message lists all of them.
    """

    def __init__(
        self,
        store: TensorStore,
        config: Gemma3Config,
        *,
        origin: str,
        location: str,
        tokenizer: Path | None = None,
        is_tie_stated: bool = True,
    ) -> None:
        self.store = store
        self.config = config
        self.origin = origin
        self._location = location
        self._tokenizer = tokenizer
        self._fingerprint: dict[str, Any] | None = None
        names = map_names(store.tensors)
        _check_fit(store, names, config, origin)
        self._stored: Mapping[str, str] = names.stored
        self.skipped = tuple(sorted(names.skipped))
        if config.tie_word_embeddings and HEAD in names.stored:
            self._settle_head(is_tie_stated)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See :meth:`WeightSource.read`."""
        start, stop = self._row_range(name, start, stop)
        rows = self.store.read(self._stored[name], start, stop)
        if self._is_shifted(name):
            rows = rows - 1.0
        return rows.contiguous()

    def stored_dtype(self, name: str) -> torch.dtype:
        """See :meth:`WeightSource.stored_dtype`."""
        self._shape(name)
        return self.store.tensors[self._stored[name]].dtype

    def gguf_tensor(self, name: str) -> GgufTensor | None:
        """See :meth:`WeightSource.gguf_tensor`."""
        self._shape(name)
        return self.store.blocks[self._stored[name]] if isinstance(self.store, GgufStore) else None

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`WeightSource.fingerprint`; the first call hashes the files."""
        if self._fingerprint is None:
            self._fingerprint = {
                "kind": self.store.kind,
                "location": self._location,
                "files": {path.name: _sha256(path) for path in self.store.files},
            }
        return self._fingerprint

    def tokenizer_file(self) -> Path | None:
        """See :meth:`WeightSource.tokenizer_file`."""
        return self._tokenizer

    def close(self) -> None:
        """See :meth:`WeightSource.close`."""
        self.store.close()

    def _is_shifted(self, name: str) -> bool:
        """Return whether the file stores ``1 + w`` for the canonical weight ``w``."""
        return self.store.kind == "gguf" and name.endswith("norm.weight")

    def _settle_head(self, is_tie_stated: bool) -> None:
        """Skip a head that equals the embedding; untie the config for any other head."""
        if self._is_head_embedding():
            stored = dict(self._stored)
            self.skipped = tuple(sorted((*self.skipped, stored.pop(HEAD))))
            self._stored = stored
        elif is_tie_stated:
            raise InputError(
                f"{self.origin}: the config has tie_word_embeddings, but {self._stored[HEAD]} "
                "differs from the embedding; set tie_word_embeddings to false in the config, or "
                "remove the head"
            )
        else:
            self.config = replace(self.config, tie_word_embeddings=False)

    def _is_head_embedding(self) -> bool:
        head, embedding = self._stored[HEAD], self._stored[EMBEDDING]
        step = max(1, COMPARE_BYTES // (4 * self.config.hidden_size))
        for start in range(0, self.config.vocab_size, step):
            stop = min(start + step, self.config.vocab_size)
            rows = (self.store.read(name, start, stop).float() for name in (head, embedding))
            if not torch.equal(*rows):
                return False
        return True


def _check_fit(store: TensorStore, names: NameMap, config: Gemma3Config, origin: str) -> None:
    expected = dict(config.weight_shapes())
    missing = [name for name in expected if name not in names.stored]
    known = expected | {HEAD: expected[EMBEDDING]}  # tied checkpoints may store a head
    unexpected = list(names.unexpected)
    misshapen, unreadable = [], []
    for name, stored_name in names.stored.items():
        tensor = store.tensors[stored_name]
        if name not in known:
            unexpected.append(stored_name)
        elif not _fits(name, tensor.shape, known[name]):
            misshapen.append(f"{stored_name} is {tensor.shape}, the config needs {known[name]}")
        if tensor.dtype not in READABLE_DTYPES:
            unreadable.append(f"{stored_name} is {tensor.dtype}".replace("torch.", ""))
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": misshapen,
        "unsupported type": unreadable,
    }
    lines = [_summary(kind, items) for kind, items in problems.items() if items]
    if lines:
        raise InputError(
            f"{origin} does not have the weights of its config: {'; '.join(lines)}; pass the "
            "config of these weights (--config), the right --size, or other weights"
        )


def _fits(name: str, stored: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    if stored == needed:
        return True
    # Multimodal checkpoints add image placeholders to the vocabulary, after the text tokens.
    is_padded = stored[:1] == (PADDED_VOCAB_SIZE,) and needed[0] == TEXT_VOCAB_SIZE
    return name in (EMBEDDING, HEAD) and is_padded and stored[1:] == needed[1:]


def _summary(kind: str, items: list[str]) -> str:
    more = f", and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{kind} ({len(items)}): {', '.join(sorted(items)[:MAX_LISTED])}{more}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


# Names: from those that checkpoints use to the canonical names of Gemma3Config.weight_shapes

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
# Buffers: tables and masks that modules compute.
_BUFFER = re.compile(r"(.*\.)?(((\w+_)?inv_freq)|(cos|sin)(_\w+)?|(\w+_)?mask|embed_scale)")
_HEAD_OF_TEXT = re.compile(r"(model\.|language_model\.)+")


@dataclass(slots=True)
class NameMap:
    """The stored names of one checkpoint, by meaning."""

    stored: dict[str, str] = field(default_factory=dict)  # canonical name to stored name
    skipped: list[str] = field(default_factory=list)  # known, but not weights of the text model
    unexpected: list[str] = field(default_factory=list)  # unknown


def map_names(names: Iterable[str]) -> NameMap:
    """Map stored names to canonical names; collect skipped and unexpected names.

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
    """Remove the prefixes of torch.compile and DistributedDataParallel."""
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
