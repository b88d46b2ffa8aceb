"""Recognize the inputs and outputs of a decoder graph that another tool made.

Every tool has names of its own for the same tensors:

    input_ids  attention_mask  position_ids  cache_position
    num_logits_to_keep  logits_to_keep
    past_key_values.N.key  past_key_values_N_key  past_key_N  input.cache.layers.N.keys  ...
    present.N.key  present_key_values.N.key  present_key_N  output.cache.layers.N.keys  ...
    input.cache.layers.N._sliding_window_tensor

They are recognized by name, element type and shape. An input that is not recognized is an error, as
it could not be fed rightly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma3_export.config import Gemma3Config
from gemma3_export.dtypes import ELEMENT_TYPES, DType
from gemma3_export.errors import InputError

__all__ = ["CacheTensor", "GraphInput", "GraphInterface", "Role"]

Role = Literal[
    "input_ids", "attention_mask", "position_ids", "cache_position", "num_logits", "window"
]
NAMES: dict[str, Role] = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "cache_position": "cache_position",
    "num_logits_to_keep": "num_logits",
    "logits_to_keep": "num_logits",
}
RANKS: dict[Role, tuple[int, ...]] = {
    "input_ids": (2,),
    "attention_mask": (2,),
    "position_ids": (2,),
    "cache_position": (1,),
    "num_logits": (0, 1),
    "window": (0,),
}
WINDOW = re.compile(r"\.layers\.\d+\._sliding_window_tensor$")  # of a cache in transformers
ORT_TYPES: dict[str, DType] = {item.ort_type: item.name for item in ELEMENT_TYPES.values()}
# The types of token ids, masks and positions, and what numpy calls them.
INDEX_TYPES = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}
CACHE_TYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16", "float64")
FAMILY = re.compile(r"^(past|present)_key_values?(?=_)")  # says nothing about key or value
KINDS = {"key": 0, "keys": 0, "k": 0, "value": 1, "values": 1, "v": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphInput:
    """An input other than the cache."""

    name: str
    role: Role
    dtype: str  # numpy's name
    shape: tuple[Any, ...]  # int: a fixed size


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTensor:
    """The past and the present of one layer's keys or values."""

    past: str
    present: str
    dtype: DType
    capacity: int | None  # tokens of a past of fixed length; None: as many as are cached


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphInterface:
    """The inputs and outputs of a decoder graph, by what they mean."""

    inputs: Sequence[GraphInput]  # all but the cache
    logits: str
    vocab_size: int | None  # None: not declared
    cache: tuple[CacheTensor, ...]  # key, then value, layer by layer

    @classmethod
    def of_session(cls, session: Any, config: Gemma3Config) -> GraphInterface:
        """Recognize the interface of a loaded graph.

        Args:
            session: an ``InferenceSession``.
            config: the model that the graph should be.

        Raises:
            InputError: an input is unknown, or the graph does not have the shapes of ``config``.
        """
        inputs: list[GraphInput] = []
        past: dict[tuple[int, int], Any] = {}
        for value in session.get_inputs():
            place = cache_place(value.name)
            if place is not None and value.name not in NAMES:
                if place in past:
                    raise unknown(value, f"it is the same as {past[place].name}")
                past[place] = value
                continue
            inputs.append(recognized(value))
        for value in session.get_overridable_initializers():
            if value.name in NAMES:  # any other keeps its default
                inputs.append(recognized(value))
        if "input_ids" not in [item.role for item in inputs]:
            names = ", ".join(value.name for value in session.get_inputs()[:6])
            raise InputError(
                f"the graph has no input input_ids (it has: {names}); only graphs that embed the "
                "tokens themselves can be checked"
            )
        places = [(layer, kind) for layer in range(config.num_hidden_layers) for kind in (0, 1)]
        if set(past) != set(places):
            raise InputError(
                f"the graph has caches for {len(past) / 2:g} layers, and the weights have "
                f"{config.num_hidden_layers}; give the weights that it was made from, and export "
                "it with its cache (optimum: --task text-generation-with-past)"
            )
        outputs = session.get_outputs()
        logits = logits_of(outputs)
        present = present_of(outputs, logits, [past[place].name for place in places])
        cache = [
            cache_tensor(past[place], found, config)
            for place, found in zip(places, present, strict=True)
        ]
        sizes = {tensor.capacity for tensor in cache}
        if len(sizes) > 1:
            raise InputError(
                f"the graph's caches have different fixed lengths ({sorted(map(str, sizes))}); "
                "only caches of one length can be fed"
            )
        vocab_size = logits.shape[-1]
        return cls(
            inputs=tuple(inputs),
            logits=logits.name,
            vocab_size=vocab_size if isinstance(vocab_size, int) else None,
            cache=tuple(cache),
        )

    def input(self, role: Role) -> GraphInput | None:
        """Return the input with a role, None if the graph has none."""
        return next((item for item in self.inputs if item.role == role), None)

    @property
    def capacity(self) -> int | None:
        """Return the fixed length of the cache; None if it grows."""
        return self.cache[0].capacity

    @property
    def outputs(self) -> list[str]:
        """Return the logits and the present keys and values, in the order of the cache."""
        return [self.logits, *(tensor.present for tensor in self.cache)]


def recognized(value: Any) -> GraphInput:
    """Return what an input that is not a cache means.

    Raises:
        InputError: its name, element type or shape is unknown.
    """
    role = "window" if WINDOW.search(value.name) else NAMES.get(value.name)
    if role is None:
        raise unknown(value, "its name is not one that a decoder of Gemma 3 needs")
    if value.type not in INDEX_TYPES or (value.type == "tensor(bool)" and role != "attention_mask"):
        raise unknown(value, f"its type is {value.type}")
    if len(value.shape) not in RANKS[role]:
        raise unknown(value, f"its shape is {value.shape}")
    return GraphInput(
        name=value.name,
        role=role,
        dtype=INDEX_TYPES[value.type],
        shape=tuple(value.shape),
    )


def unknown(value: Any, reason: str) -> InputError:
    """Return the error about an input that cannot be fed."""
    return InputError(
        f"the graph's input {value.name!r:.80} cannot be fed: {reason}; export the model for text "
        f"generation, with the inputs {', '.join(NAMES)} and past keys and values of 4 axes"
    )


def cache_place(name: str) -> tuple[int, int] | None:
    """Return the layer of a cache tensor, and 0 for keys or 1 for values; None if it is neither."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    words = re.findall(r"[a-z]+|\d+", FAMILY.sub("", plain))
    numbers = [int(word) for word in words if word.isdigit()]
    kinds = {KINDS[word] for word in words if word in KINDS}
    if len(numbers) == 1 and len(kinds) == 1:
        return numbers[0], kinds.pop()
    if len(numbers) == 2 and not kinds and numbers[1] in (0, 1) and FAMILY.match(plain):
        return numbers[0], numbers[1]  # past_key_values_3_0, a tuple in a tuple
    return None


def logits_of(outputs: Sequence[Any]) -> Any:
    """Return the output with the logits.

    Raises:
        InputError: there is none.
    """
    for value in outputs:
        if value.name == "logits" and len(value.shape) == 3:
            return value
    names = ", ".join(value.name for value in outputs[:6])
    raise InputError(
        f"the graph has no output logits with 3 axes (it has: {names}); export the model with its "
        "language model head"
    )


def present_of(outputs: Sequence[Any], logits: Any, past: Sequence[str]) -> list[Any]:
    """Return the outputs with the present keys and values, in the order of ``past``.

    Raises:
        InputError: they cannot be told from others.
    """
    others = [value for value in outputs if value is not logits]
    by_place = {cache_place(value.name): value for value in others}
    places = [cache_place(name) for name in past]
    if all(place in by_place for place in places):
        return [by_place[place] for place in places]
    cached = [value for value in others if len(value.shape) == 4]
    if len(cached) == len(past) and None in by_place:  # unnamed: in the order of the inputs
        return cached
    missing = next(name for name, place in zip(past, places, strict=True) if place not in by_place)
    raise InputError(
        f"the graph has no output with the present tensor of {missing}; export it with its cache"
    )


def cache_tensor(past: Any, present: Any, config: Gemma3Config) -> CacheTensor:
    """Return a tensor of the cache, checked against the model.

    Raises:
        InputError: it has another layout, type or size than a cache [B, K, L, H] of the model.
    """
    dtype = ORT_TYPES.get(past.type)
    if dtype not in CACHE_TYPES:
        raise unknown(past, f"its type is {past.type}")
    assert dtype is not None
    heads, size = config.num_key_value_heads, config.head_dim
    shape = tuple(past.shape)
    if len(shape) != 4 or not (_fits(shape[1], heads) and _fits(shape[3], size)):
        raise unknown(
            past,
            f"its shape is {list(shape)}, and the model has {heads} key-value heads of {size}: "
            "[batch_size, heads, length, size]",
        )
    length = shape[2] if isinstance(shape[2], int) and shape[2] > 0 else None
    return CacheTensor(past=past.name, present=present.name, dtype=dtype, capacity=length)


def _fits(axis: Any, size: int) -> bool:
    """Return whether an axis is declared as ``size``, or left open."""
    return str(axis) == str(size) or not str(axis).isdigit()
