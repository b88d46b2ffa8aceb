"""Open a LoRA adapter of PEFT: its settings, its tensors, and which modules it changes how.

The rules by which ``peft`` chooses modules, ranks and scales are stated here once. A setting that
would change the merged weights in a way that is not implemented is rejected by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from gemma3_export.bundle import sha256_of
from gemma3_export.config import TOKENIZER_NAME, load_json_object
from gemma3_export.errors import InputError
from gemma3_export.files import is_file
from gemma3_export.records import to_record
from gemma3_export.reference.weights.stores import SafetensorsStore, TensorStore, TorchStore

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_WEIGHT_NAMES",
    "MERGE_IT",
    "Adapter",
    "AdapterConfig",
    "is_adapter",
    "open_adapter",
]

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
MAX_LISTED = 6  # names in a message
MERGE_IT = "merge it with peft's merge_and_unload and export the result"
ALL_LINEAR = "all-linear"
# How the factors were initialized; any other way also changes the weights of the base model.
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
# Settings of training and of other versions that do not affect the merged weights; peft itself
# ignores fan_in_fan_out for linear layers.
WITHOUT_EFFECT = {
    "auto_mapping",
    "corda_config",
    "enable_lora",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
}
BIASES = (None, "none", "all", "lora_only")  # Gemma 3 has none, so each selects nothing
CHECKED = {"peft_type", "task_type", "init_lora_weights", "bias"}
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The settings of a LoRA adapter that determine the merged weights.

    Modules are named as in the model that was trained, such as ``model.layers.0.mlp.up_proj``.

    Raises:
        InputError: a value is out of range.
    """

    r: int  # rank
    lora_alpha: int | float
    target_modules: list[str] | str | None = None  # a string is a regular expression
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None  # trained in full
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None  # regular expressions of modules to other ranks
    alpha_pattern: dict[str, int | float] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool | None = False  # a tied head follows the embedding
    base_model_name_or_path: str | None = None
    revision: str | None = None  # of the base

    def __post_init__(self) -> None:
        ranks = (self.r, *(self.rank_pattern or {}).values())
        if bad := [rank for rank in ranks if not 0 < rank < 2**31]:
            raise InputError(f"the rank {bad[0]} is not a positive number")
        alphas = (self.lora_alpha, *(self.alpha_pattern or {}).values())
        if not all(map(math.isfinite, alphas)):
            raise InputError(f"lora_alpha {alphas!s:.80} is not a finite number")
        for rows in self._token_lists():
            if len(set(rows)) != len(rows) or min(rows, default=0) < 0:
                raise InputError(f"trainable_token_indices {rows!s:.80} repeats or is negative")

    @property
    def kind(self) -> str:
        """Return the name of the method: lora, rslora, dora or both."""
        names = ["rs"] * bool(self.use_rslora) + ["dora" if self.use_dora else "lora"]
        return "".join(names)

    def targets(self, module: str, *, is_linear: bool, is_head: bool) -> bool:
        """Return whether the adapter adds factors to ``module``."""
        excluded, wanted = self.exclude_modules, self.target_modules
        if isinstance(excluded, str):
            if excluded and _compiled(excluded).fullmatch(module):
                return False
        elif _ends_in(module, excluded or ()):
            return False
        if any(_compiled(rf"(^|.*\.){m}($|\..*)").match(module) for m in self._saved):
            return False
        if wanted is None:
            return False
        if not isinstance(wanted, str):
            return _ends_in(module, wanted) and (module in wanted or self._is_layer_chosen(module))
        if wanted.lower() == ALL_LINEAR:
            return is_linear and not is_head
        return _compiled(wanted).fullmatch(module) is not None

    def saves(self, module: str) -> bool:
        """Return whether ``module``, or one that contains it, was trained in full."""
        parts = module.split(".")
        parents = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(parent.endswith(saved) for parent in parents for saved in self._saved)

    def rank(self, module: str) -> int:
        """Return the rank of the factors of ``module``."""
        return _chosen(self.rank_pattern or {}, module, self.r)

    def scaling(self, module: str) -> float:
        """Return what the product of the factors of ``module`` is multiplied by."""
        alpha = _chosen(self.alpha_pattern or {}, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def tokens(self, module: str, *, is_embedding: bool) -> list[int] | None:
        """Return the rows of ``module`` that were trained alone, None if there are none."""
        chosen = self.trainable_token_indices
        if not isinstance(chosen, dict):
            return chosen if is_embedding else None
        return next((rows for name, rows in chosen.items() if module.endswith(name)), None)

    @property
    def _saved(self) -> list[str]:
        return self.modules_to_save or []

    def _token_lists(self) -> Iterable[list[int]]:
        chosen = self.trainable_token_indices or []
        return chosen.values() if isinstance(chosen, dict) else [chosen]

    def _is_layer_chosen(self, module: str) -> bool:
        chosen = self.layers_to_transform
        if chosen is None or chosen == []:
            return True
        names = self.layers_pattern or []
        prefixes = [rf"(?:^|.*?\.){name}" for name in [names] * isinstance(names, str) or names]
        for prefix in prefixes or [r".*?\.[^.]*"]:
            found = _compiled(prefix + r"\.(?P<index>\d+)\.").match(module)
            if found is not None:
                return int(found["index"]) in (chosen if isinstance(chosen, list) else [chosen])
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An open adapter: its settings and tensors.

    Attributes:
        origin: where it comes from, for messages.
        location: the same without local folders, for the manifest.
        folder: the folder of its files.
    """

    config: AdapterConfig
    store: TensorStore
    origin: str
    location: str
    folder: Path

    def tokenizer_file(self) -> Path | None:
        """Return the tokenizer that was saved with the adapter, if any."""
        file = self.folder / TOKENIZER_NAME
        return file if is_file(file) else None

    def fingerprint(self) -> dict[str, Any]:
        """Return kind, location and SHA-256 of each file."""
        files = (self.folder / ADAPTER_CONFIG_NAME, *self.store.files)
        return {
            "kind": self.config.kind,
            "location": self.location,
            "files": {file.name: sha256_of(file) for file in files},
        }


def is_adapter(folder: Path) -> bool:
    """Return whether ``folder`` holds an adapter of PEFT."""
    names = (ADAPTER_CONFIG_NAME, *ADAPTER_WEIGHT_NAMES)
    return any(is_file(folder / name) for name in names)


def open_adapter(folder: Path, *, origin: str, location: str) -> Adapter:
    """Open the adapter in ``folder``, reading only its settings and headers.

    Raises:
        InputError: a file is missing or damaged, or the adapter is not one that can be merged.
    """
    if not is_file(folder / ADAPTER_CONFIG_NAME):
        inside = sorted(item.parent.name for item in folder.glob(f"*/{ADAPTER_CONFIG_NAME}"))
        hint = f"; pass one of its folders ({', '.join(inside[:MAX_LISTED])})" if inside else ""
        raise InputError(
            f"{origin} has no {ADAPTER_CONFIG_NAME}, so it is not an adapter of PEFT"
            f"{hint or '; pass the folder that save_pretrained wrote'}"
        )
    config = _load_config(folder / ADAPTER_CONFIG_NAME)
    file = next((folder / n for n in ADAPTER_WEIGHT_NAMES if is_file(folder / n)), None)
    if file is None:
        raise InputError(
            f"{origin} has no {' or '.join(ADAPTER_WEIGHT_NAMES)}; save the adapter again with "
            "save_pretrained"
        )
    store = SafetensorsStore([file]) if file.suffix == ".safetensors" else TorchStore([file])
    return Adapter(config=config, store=store, origin=origin, location=location, folder=folder)


def _load_config(path: Path) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Raises:
        InputError: the file is missing or malformed, or the adapter is not one that can be merged.
    """
    data = load_json_object(path)
    _reject_others(data, path)
    remedy = "save the adapter again with peft"
    return to_record(data, AdapterConfig, where=str(path), remedy=remedy, is_part=True)


def _reject_others(data: Mapping[str, Any], path: Path) -> None:
    """Reject methods and settings that are not implemented, and unknown ones that are set."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{path}: peft_type is {kind!r:.60}, but only LORA (with rsLoRA and DoRA) is merged "
            f"here; {MERGE_IT}"
        )
    if data.get("task_type") not in TASKS:
        raise InputError(
            f"{path}: task_type is {data['task_type']!r:.60}, which is not a language model; only "
            "CAUSAL_LM can be exported"
        )
    if data.get("bias") not in BIASES:
        raise InputError(f"{path}: bias is {data['bias']!r:.60}, which is unknown; {MERGE_IT}")
    if data.get("lora_bias"):
        raise InputError(
            f"{path}: lora_bias is {data['lora_bias']!r:.60}, but Gemma 3 has no bias to merge it "
            "into; train the adapter without lora_bias"
        )
    start = data.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_INITIALIZATIONS):
        raise InputError(
            f"{path}: init_lora_weights is {start!r:.60}, which changes the base model as well; "
            f"save the adapter with path_initial_model_for_weight_conversion, or {MERGE_IT}"
        )
    known = {item.name for item in fields(AdapterConfig)} | WITHOUT_EFFECT | CHECKED
    for key in data.keys() - known:
        if data[key] not in (None, False, [], {}, ""):
            raise InputError(
                f"{path}: {key} is {data[key]!r:.60}, which is not supported here; {MERGE_IT}"
            )


def _chosen(table: Mapping[str, Value], module: str, default: Value) -> Value:
    """Return the value of the first pattern that ``module`` ends in."""
    for name, value in table.items():
        if _compiled(rf"(.*\.)?({name})$").match(module):
            return value
    return default


@lru_cache(maxsize=1024)
def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{text!r:.120} in {ADAPTER_CONFIG_NAME} is not a regular expression ({error}); fix it"
        ) from error


def _ends_in(module: str, names: Iterable[str]) -> bool:
    """Return whether ``module`` is one of ``names`` or its last parts are."""
    return any(module == name or module.endswith(f".{name}") for name in names)
