"""The weight source for checkpoint files, which maps every stored name to a canonical name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gemma3_export.bundle import sha256_of
from gemma3_export.config import (
    EMBEDDING,
    GENERATION_CONFIG_NAME,
    HEAD,
    PADDED_VOCAB_SIZE,
    TEXT_VOCAB_SIZE,
    Gemma3Config,
    load_json_object,
)
from gemma3_export.dtypes import FLOAT_DTYPES, torch_dtype
from gemma3_export.errors import InputError
from gemma3_export.gguf_file import GgufTensor
from gemma3_export.reference.weights.source import WeightSource
from gemma3_export.reference.weights.stores import GgufStore, TensorStore
from gemma3_export.tokenizer import count_tokens

__all__ = [
    "CheckpointSource",
    "NameMap",
    "map_names",
    "named_rows",
]

READABLE_DTYPES = tuple(map(torch_dtype, FLOAT_DTYPES))
MAX_LISTED = 10
COMPARE_BYTES = 16 * 2**20
USUAL_PADDING_ROWS = 256  # trainers pad the embedding to a multiple of up to 256 rows
OTHER_WEIGHTS = "pass the config of these weights (--config), the right --size, or other weights"
logger = logging.getLogger(__name__)


class CheckpointSource(WeightSource):
    """Weights from a store of named tensors.

    Embedding rows that the tokenizer does not name are padding and are left out. A head that
    differs from the embedding unties the config, as in transformers 5.

    Args:
        store: the open files; closing this source closes them.
        config: the model that the weights must fit.
        origin: where the weights come from, for messages.
        location: the origin without local folders, for the fingerprint.
        tokenizer: the file of the checkpoint's tokenizer, if any.

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
    ) -> None:
        self.store = store
        self.origin = origin
        self._location = location
        self._tokenizer = tokenizer
        self._fingerprint: dict[str, Any] | None = None
        names = map_names(store.tensors)
        self._stored_rows = rows = _embedding_rows(store, names, config)
        _check_fit(store, names, replace(config, vocab_size=rows), origin)
        self.config = replace(config, vocab_size=named_rows(rows, config, tokenizer, origin))
        self._stored: Mapping[str, str] = names.stored
        self.skipped = tuple(sorted(names.skipped))
        self._tied_head = names.stored.get(HEAD) if config.tie_word_embeddings else None
        if self._tied_head is not None:
            self._settle_head(self._tied_head)

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

    def generation_config(self) -> Mapping[str, Any] | None:
        """See :meth:`WeightSource.generation_config`."""
        path = self.store.files[0].with_name(GENERATION_CONFIG_NAME)
        return load_json_object(path) if path.is_file() else None

    def keep_rows(self, rows: int) -> None:
        """See :meth:`WeightSource.keep_rows`."""
        if self.config.vocab_size < rows <= self._stored_rows:
            self.config = replace(self.config, vocab_size=rows)
            if self._tied_head is not None and self.config.tie_word_embeddings:
                self._settle_head(self._tied_head)  # it may differ in these rows alone
            self.__dict__.pop("_shapes", None)  # follow from the config

    def close(self) -> None:
        """See :meth:`WeightSource.close`."""
        self.store.close()

    @property
    def stored_rows(self) -> int:
        """See :attr:`WeightSource.stored_rows`."""
        return self._stored_rows

    def _is_shifted(self, name: str) -> bool:
        """Return whether the file stores ``1 + w`` for the canonical weight ``w``."""
        return self.store.kind == "gguf" and name.endswith("norm.weight")

    def _settle_head(self, head: str) -> None:
        """Skip a head that equals the embedding; untie the config for any other head."""
        if self._is_embedding(head):
            self._stored = {name: self._stored[name] for name in self._stored if name != HEAD}
            self.skipped = tuple(sorted({*self.skipped, head}))
            return
        logger.warning(
            "%s: %s differs from the embedding, although the config ties the two; both are used, "
            "as in transformers 5. Set tie_word_embeddings to false in the config",
            self.origin,
            head,
        )
        self._stored = {**self._stored, HEAD: head}
        self.skipped = tuple(name for name in self.skipped if name != head)
        self.config = replace(self.config, tie_word_embeddings=False)

    def _is_embedding(self, head: str) -> bool:
        embedding = self._stored[EMBEDDING]
        step = max(1, COMPARE_BYTES // (4 * self.config.hidden_size))
        for start in range(0, self.config.vocab_size, step):
            stop = min(start + step, self.config.vocab_size)
            rows = (self.store.read(name, start, stop).float() for name in (head, embedding))
            if not torch.equal(*rows):
                return False
        return True


def _embedding_rows(store: TensorStore, names: NameMap, config: Gemma3Config) -> int:
    """Return the rows of the stored embedding, or of the config if the two contradict each other.

    Multimodal checkpoints add image placeholders to the vocabulary, after the text tokens.
    """
    name = names.stored.get(EMBEDDING)
    rows = store.tensors[name].shape[:1] if name is not None else ()
    is_padded = rows == (PADDED_VOCAB_SIZE,) and config.vocab_size >= TEXT_VOCAB_SIZE
    return PADDED_VOCAB_SIZE if is_padded else config.vocab_size


def named_rows(rows: int, config: Gemma3Config, tokenizer: Path | None, origin: str) -> int:
    """Return how many of the embedding's rows have a token; those behind them are padding."""
    tokens = None if tokenizer is None else count_tokens(tokenizer)
    if tokens is None:
        return config.vocab_size
    needed = 1 + max(config.pad_token_id, config.bos_token_id, *config.eos_token_id, tokens - 1)
    spare = rows - needed
    if spare < 0 or 2 * spare > rows:  # another model's tokenizer, which its reader rejects
        return config.vocab_size
    if spare > USUAL_PADDING_ROWS:
        logger.warning(
            "%s: the last %d of %d embedding rows have no token, so they are left out; check that "
            "the tokenizer is the model's",
            origin,
            spare,
            rows,
        )
    return needed


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
        elif tensor.shape != known[name]:
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
        advice = _advice(names.unexpected, missing)
        raise InputError(
            f"{origin} does not have the weights of its config: {'; '.join(lines)}; "
            f"{advice or OTHER_WEIGHTS}"
        )


def _advice(unexpected: list[str], missing: list[str]) -> str | None:
    """Return what to do about weights that are known not to be a plain Gemma 3 text model."""
    for pattern, advice in _FOREIGN.items():
        if any(re.search(pattern, name) for name in unexpected):
            return advice
    if missing == [HEAD]:
        return (
            "the config has a head of its own (tie_word_embeddings is false), but none is stored; "
            "set tie_word_embeddings to true if it shares the embedding, or save the model again"
        )
    return None


def _summary(kind: str, items: list[str]) -> str:
    more = f", and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{kind} ({len(items)}): {', '.join(sorted(items)[:MAX_LISTED])}{more}"


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


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
# The last two are those of Ollama's GGUF files.
_VISION = re.compile(r"(model\.)*(vision_tower|multi_modal_projector|v|mm)\.")
# Buffers: tables and masks that modules compute.
_BUFFER = re.compile(r"(.*\.)?(((\w+_)?inv_freq)|(cos|sin)(_\w+)?|(\w+_)?mask|embed_scale)")
_WRAPPERS = ("module.", "base_model.model.")
_HEAD_OF_TEXT = re.compile(r"(model\.|language_model\.)+")


# What to do about weights with such names, which are no plain Gemma 3 text model.
_FOREIGN = {
    r"lora_|\.base_layer\.|modules_to_save|original_module|trainable_tokens": (
        "these are weights with an adapter of PEFT that is not merged; merge it with "
        "merge_and_unload() and save the result, or pass base and adapter separately"
    ),
    r"(^|\.)(score|classifier)\.(weight|bias)$": (
        "this is a classifier, which generates no text; export it with Optimum, or pass the "
        "language model that it was made from"
    ),
    r"\.(absmax|quant_map|quant_state\..+|SCB|weight_format)$": (
        "these weights are quantized by bitsandbytes; load them in transformers, call "
        "model.dequantize(), and save the result in bfloat16"
    ),
    r"\.(qweight|qzeros|scales|g_idx)$": (
        "these weights are quantized by GPTQ or AWQ; pass the checkpoint that they were made from, "
        "or a quantized GGUF file"
    ),
    r"\.(weight_packed|weight_scale|weight_scale_inv|weight_shape|input_scale)$": (
        "these weights are quantized (compressed-tensors or fp8); pass the checkpoint that they "
        "were made from, or a quantized GGUF file"
    ),
    r"per_layer_|altup|laurel": (
        "these are weights of Gemma 3n or Gemma 4, which are other architectures than Gemma 3; use "
        "transformers or llama.cpp"
    ),
    r"(^|\.)(encoder|dense)\.": (
        "this is not a decoder that generates text (EmbeddingGemma and T5Gemma have such weights); "
        "use transformers or sentence-transformers"
    ),
}


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
    """Remove the prefixes of torch.compile, DistributedDataParallel and PEFT."""
    name = name.replace("_orig_mod.", "")
    while name.startswith(_WRAPPERS):
        for prefix in _WRAPPERS:
            name = name.removeprefix(prefix)
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
