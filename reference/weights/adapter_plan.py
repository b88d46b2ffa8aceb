"""Find the place of every tensor of a LoRA adapter in the weights of its base model.

Each tensor has exactly one place and each module that the settings name has all of its tensors, or
the adapter is rejected: ``peft`` itself ignores what does not fit.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from gemma3_export.config import EMBEDDING, HEAD, Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.reference.weights.adapter_folder import (
    ADAPTER_CONFIG_NAME,
    MAX_LISTED,
    MERGE_IT,
    Adapter,
)
from gemma3_export.reference.weights.checkpoint import map_names, named_rows
from gemma3_export.reference.weights.source import WeightSource

__all__ = ["AdapterPlan", "Update"]

COMPARE_BYTES = 16 * 2**20
logger = logging.getLogger(__name__)
ANOTHER_BASE = "pass the base that the adapter was trained on (--weights)"
# The roles of tensors, by how their names end. `default` is the name of the adapter, which peft
# leaves out of files.
_ROLES = (
    ("factor_a", re.compile(r"(.+)\.lora_A(?:\.default)?\.weight")),
    ("factor_b", re.compile(r"(.+)\.lora_B(?:\.default)?\.weight")),
    ("embedding_a", re.compile(r"(.+)\.lora_embedding_A(?:\.default)?")),
    ("embedding_b", re.compile(r"(.+)\.lora_embedding_B(?:\.default)?")),
    ("magnitude", re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")),
    ("tokens", re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")),
    ("trained", re.compile(r"(.+)\.modules_to_save(?:\.default)?\.weight")),
    ("base", re.compile(r"(.+?)(?:\.token_adapter)?\.(?:base_layer|original_module)\.weight")),
    ("whole", re.compile(r"(.+)\.weight")),  # trained or base: the settings say which
)
ALL_FACTORS = {"factor_a", "factor_b", "embedding_a", "embedding_b", "magnitude"}
_OUTER_WRAPPER = re.compile(r"base_model\.(?:model\.)?")
_INNER_WRAPPER = re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_TEXT_MODULE = re.compile(r"(?P<prefix>.*?)(?:layers\.\d+\..+|embed_tokens|norm)")
_LINEAR = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What an adapter does to one weight; tensors by their names in the adapter's file.

    Attributes:
        base: the tensor that takes the place of the base model's.
        factor_a: the first factor, [rank, inputs]; of an embedding [rank, rows].
        factor_b: the second factor, [outputs, rank]; of an embedding [columns, rank].
        is_embedding: the product of the factors is the transposed change.
        scaling: what the product is multiplied by.
        magnitude: DoRA's norms, one per output; of an embedding one per column.
        tokens: rows that take the place of ``rows``.
    """

    base: str | None = None
    factor_a: str | None = None
    factor_b: str | None = None
    is_embedding: bool = False
    scaling: float = 1.0
    magnitude: str | None = None
    tokens: str | None = None
    rows: tuple[int, ...] = ()


class AdapterPlan:
    """The places of an adapter's tensors, all checked.

    Attributes:
        config: the merged model.
        updates: what happens to each weight that changes, by canonical name.
        skipped: tensors of the vision tower.
        stored_rows: rows of the adapter's embedding or head, padding included; None if it has
            neither.
        lacks_tokenizer: the embedding was resized in training, and the base's tokenizer does not
            name all of its rows.

    Raises:
        InputError: the adapter does not fit the base; the message names the tensors or modules.
    """

    def __init__(self, base: WeightSource, adapter: Adapter) -> None:
        self.skipped: list[str] = []
        self._base, self._adapter = base, adapter
        self._shapes = dict(base.config.weight_shapes())
        self._shapes.setdefault(HEAD, self._shapes[EMBEDDING])
        self._parts: dict[str, dict[str, str]] = {}  # canonical name, then role, to stored name
        self._modules: dict[str, str] = {}  # canonical name to the name of the trained module
        self._sort_tensors()
        self._name_modules()
        self._check_modules()
        rows, is_stored = self._trained_rows()
        self.stored_rows = rows if is_stored else None
        self.lacks_tokenizer = False
        for name in (EMBEDDING, HEAD):
            self._shapes[name] = (rows, self._shapes[name][1])
        is_tied = base.config.tie_word_embeddings
        if is_tied:
            self._share_embedding()
        updates = {name: self._update(name, parts) for name, parts in self._parts.items()}
        if is_tied and (is_tied := self._is_still_tied(updates)):
            updates.pop(HEAD, None)
        elif base.config.tie_word_embeddings:
            logger.warning(
                "%s changes the embedding and the tied head in different ways, so the merged model "
                "stores both",
                adapter.origin,
            )
        self.updates = {name: update for name, update in updates.items() if update != Update()}
        self.config: Gemma3Config = replace(
            base.config,
            vocab_size=self._settle_vocab_size(rows, is_tied=is_tied),
            tie_word_embeddings=is_tied,
        )

    # Names

    def _sort_tensors(self) -> None:
        """Give each tensor its weight and role."""
        unknown = []
        for stored in self._adapter.store.tensors:
            module, role = _split(stored)
            found = map_names([f"{module}.weight"])
            if found.skipped:
                self.skipped.append(stored)
                continue
            name = next(iter(found.stored), "")
            if not role or name not in self._shapes:
                unknown.append(stored)
                continue
            if role == "whole":
                role = "trained" if self._adapter.config.saves(module) else "base"
            if self._modules.setdefault(name, module) != module:
                self._reject("two names mean one module", [module, self._modules[name]], MERGE_IT)
            other = self._parts.setdefault(name, {}).setdefault(role, stored)
            if other != stored and not self._are_equal(other, stored):
                self._reject("tensors with one meaning differ", [other, stored], MERGE_IT)
        self._reject("these tensors belong to no weight of the model", unknown, ANOTHER_BASE)

    def _name_modules(self) -> None:
        """Name the modules without tensors as the trained model does."""
        matches = (_TEXT_MODULE.fullmatch(module) for module in self._modules.values())
        prefix = next((match["prefix"] for match in matches if match), "model.")
        head = "language_model.lm_head" if prefix == "language_model.model." else "lm_head"
        for name in self._shapes:
            module = name.removesuffix(".weight").removeprefix("model.")
            self._modules.setdefault(name, head if name == HEAD else prefix + module)

    def _check_modules(self) -> None:
        """Check that the modules with tensors are those that the settings name."""
        config = self._adapter.config
        roles = {name: self._parts.get(name, {}).keys() for name in self._modules}
        chosen = {
            name
            for name, module in self._modules.items()
            if name in (EMBEDDING, HEAD) or _LINEAR.fullmatch(name)
            if config.targets(module, is_linear=name != EMBEDDING, is_head=name == HEAD)
        }
        changed = {name for name in roles if roles[name] & ALL_FACTORS}
        saved = {name for name, module in self._modules.items() if config.saves(module)}
        trained = {name for name in roles if "trained" in roles[name]}
        selected = {name for name in (EMBEDDING, HEAD) if self._token_rows(name) is not None}
        replaced = {name for name in roles if "tokens" in roles[name]}
        if self._base.config.tie_word_embeddings:  # the head may follow the embedding
            if config.ensure_weight_tying and EMBEDDING in chosen:
                chosen |= {HEAD} & changed
            if config.ensure_weight_tying and EMBEDDING in saved:
                saved -= {HEAD} - trained
            if EMBEDDING in selected:
                same = self._token_rows(HEAD) in (None, self._token_rows(EMBEDDING))
                selected = (selected | ({HEAD} & replaced)) - ({HEAD} - replaced if same else set())
        for setting, named, found in (
            ("target_modules", chosen, changed),
            ("modules_to_save", saved, trained),
            ("trainable_token_indices", selected, replaced),
        ):
            missing = (self._modules[name] for name in named - found)
            self._reject(f"{setting} names modules without tensors", missing, ANOTHER_BASE)
            extra = (self._modules[name] for name in found - named)
            self._reject(
                f"{setting} does not name modules that have tensors, which peft would ignore",
                extra,
                f"correct {ADAPTER_CONFIG_NAME}",
            )

    # Updates

    def _update(self, name: str, parts: Mapping[str, str]) -> Update:
        """Return what ``parts`` do to the weight ``name``, with all shapes checked."""
        module, (rows, *columns) = self._modules[name], self._shapes[name]
        is_embedding = name == EMBEDDING
        a, b = ("embedding_a", "embedding_b") if is_embedding else ("factor_a", "factor_b")
        self._check_parts(name, parts, {a, b})
        for role in ("base", "trained"):
            self._check_shape(parts.get(role), (rows, *columns))
        if a in parts:
            rank, width = self._adapter.config.rank(module), columns[0]
            self._check_shape(parts[a], (rank, rows if is_embedding else width))
            self._check_shape(parts[b], (width if is_embedding else rows, rank))
            self._check_shape(parts.get("magnitude"), (width if is_embedding else rows,))
        tokens: tuple[int, ...] = ()
        if "tokens" in parts:
            tokens = tuple(self._token_rows(name) or self._token_rows(EMBEDDING) or ())
            self._check_shape(parts["tokens"], (len(tokens), *columns))
        return Update(
            base=parts.get("trained", parts.get("base")),
            factor_a=parts.get(a),
            factor_b=parts.get(b),
            is_embedding=is_embedding and a in parts,
            scaling=self._adapter.config.scaling(module) if a in parts else 1.0,
            magnitude=parts.get("magnitude"),
            tokens=parts.get("tokens"),
            rows=tokens,
        )

    def _check_parts(self, name: str, parts: Mapping[str, str], factors: set[str]) -> None:
        """Check that the tensors of one weight make one complete change."""
        module = self._modules[name]
        if self._adapter.config.use_dora:
            factors = factors | {"magnitude"}
        given = parts.keys() & ALL_FACTORS
        if given:
            lacking = (f"{module} ({role})" for role in factors - given)
            self._reject("parts of these modules are missing", lacking, "save the adapter again")
            extra = (parts[role] for role in given - factors)
            self._reject("these tensors do not suit the settings", extra, "save the adapter again")
        ways = [bool(given), "trained" in parts, "tokens" in parts]
        if sum(ways) > 1:
            self._reject("a module is changed in several ways", [module], MERGE_IT)

    def _check_shape(self, stored: str | None, needed: tuple[int, ...]) -> None:
        if stored is None:
            return
        shape = self._adapter.store.tensors[stored].shape
        if shape != needed:
            self._reject(
                f"a tensor is {list(shape)}, but the model and {ADAPTER_CONFIG_NAME} need "
                f"{list(needed)}",
                [stored],
                ANOTHER_BASE,
            )

    # Embedding and head

    def _token_rows(self, name: str) -> list[int] | None:
        """Return the rows of the embedding or head that were trained alone."""
        is_embedding = name == EMBEDDING
        return self._adapter.config.tokens(self._modules[name], is_embedding=is_embedding)

    def _trained_rows(self) -> tuple[int, bool]:
        """Return the rows of embedding and head in training, and whether tensors tell them."""
        found: dict[int, str] = {}
        for name in (EMBEDDING, HEAD):
            parts = self._parts.get(name, {})
            for role, axis in {"base": 0, "trained": 0, "embedding_a": 1, "factor_b": 0}.items():
                shape = self._adapter.store.tensors[parts[role]].shape if role in parts else ()
                if len(shape) == 2:
                    found.setdefault(shape[axis], parts[role])
        if len(found) > 1:
            names = (f"{stored} ({rows})" for rows, stored in found.items())
            self._reject("embedding and head differ in their rows", names, "save it again")
        tokens = (self._token_rows(name) or [] for name in (EMBEDDING, HEAD))
        last = max((row for rows in tokens for row in rows), default=-1)
        rows = next(iter(found), max(self._base.config.vocab_size, last + 1))
        if last >= rows or rows >= 2**31:
            self._reject(
                f"the model has {rows} tokens", [f"trainable_token_indices {last}"], ANOTHER_BASE
            )
        return rows, bool(found)

    def _share_embedding(self) -> None:
        """Let embedding and head of a tied base have the same tensors, as they do in peft."""
        embedding = self._parts.setdefault(EMBEDDING, {})
        head = self._parts.setdefault(HEAD, {})
        for parts, other in ((embedding, head), (head, embedding)):
            if "base" in other:
                parts.setdefault("base", other["base"])
        if "tokens" in embedding:
            head.setdefault("tokens", embedding["tokens"])

    def _is_still_tied(self, updates: Mapping[str, Update]) -> bool:
        """Return whether embedding and head remain the same matrix."""
        embedding, head = updates[EMBEDDING], updates[HEAD]
        if self._adapter.config.ensure_weight_tying and not (
            self._parts[HEAD].keys() & (ALL_FACTORS | {"trained", "tokens"})
        ):
            return True
        if embedding.magnitude or head.magnitude or embedding.rows != head.rows:
            return False
        if embedding.factor_a is None or head.factor_a is None:
            if embedding.factor_a != head.factor_a:
                return False
        elif embedding.scaling != head.scaling or not (
            self._are_equal(embedding.factor_a, head.factor_b, is_transposed=True)
            and self._are_equal(embedding.factor_b, head.factor_a, is_transposed=True)
        ):
            return False
        pairs = ((embedding.base, head.base), (embedding.tokens, head.tokens))
        return all(self._are_equal(*pair) for pair in pairs)

    def _settle_vocab_size(self, rows: int, *, is_tied: bool) -> int:
        """Return the rows to keep, after checking that each of them is known.

        Padding is left out, as it is of the base.
        """
        updates = [self.updates.get(EMBEDDING, Update())]
        if not is_tied:
            updates.append(self.updates.get(HEAD, Update()))
        kept = rows
        if not any(update.is_embedding and update.magnitude for update in updates):
            # DoRA's norms of an embedding are those of all its rows.
            tokenizer = self._adapter.tokenizer_file() or self._base.tokenizer_file()
            config = replace(self._base.config, vocab_size=rows)
            kept = named_rows(rows, config, tokenizer, self._adapter.origin)
            self.lacks_tokenizer = (
                kept < rows > self._base.stored_rows and self._adapter.tokenizer_file() is None
            )
        known = self._base.config.vocab_size
        for update in updates:
            if update.base is None and not set(range(known, kept)) <= set(update.rows):
                raise InputError(
                    f"{self._adapter.origin} was trained with {kept} tokens, but "
                    f"{self._base.origin} has {known}, and the adapter does not have the others; "
                    "save the adapter with save_embedding_layers=True, or pass the resized base "
                    "(--weights)"
                )
        last = max((row for update in updates for row in update.rows), default=0)
        if last >= kept:
            self._reject("trained tokens are padding", [str(last)], "save the tokenizer as well")
        return kept

    def _are_equal(
        self, first: str | None, second: str | None, *, is_transposed: bool = False
    ) -> bool:
        """Return whether two stored tensors have the same values."""
        if first is None or second is None or first == second:
            return first == second
        shapes = [self._adapter.store.tensors[name].shape for name in (first, second)]
        if shapes[0] != (shapes[1][::-1] if is_transposed else shapes[1]):
            return False
        if is_transposed:  # factors, which are small
            whole = [
                self._adapter.store.read(name, 0, shape[0]).float()
                for name, shape in zip((first, second), shapes, strict=True)
            ]
            return torch.equal(whole[0], whole[1].T)
        step = max(1, COMPARE_BYTES // (4 * math.prod(shapes[0][1:]) or 1))
        return all(
            torch.equal(
                *(
                    self._adapter.store.read(name, start, min(start + step, shapes[0][0])).float()
                    for name in (first, second)
                )
            )
            for start in range(0, shapes[0][0], step)
        )

    def _reject(self, what: str, names: Iterable[str], remedy: str) -> None:
        """Raise an error that lists ``names``, if there are any."""
        found = sorted(names)
        if found:
            more = f", and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
            raise InputError(
                f"{self._adapter.origin} does not fit {self._base.origin}: {what}: "
                f"{', '.join(found[:MAX_LISTED])}{more}; {remedy}"
            )


def _split(stored: str) -> tuple[str, str]:
    """Return the module of a stored tensor and its role, an empty one if it is unknown."""
    plain = _OUTER_WRAPPER.sub("", _INNER_WRAPPER.sub("", stored), count=1)
    for role, pattern in _ROLES:
        if match := pattern.fullmatch(plain):
            return match[1], role
    return plain.rpartition(".")[0], ""
