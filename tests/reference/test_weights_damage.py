"""Test that damaged and malicious weight files raise an InputError quickly."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma3_export.errors import InputError
from gemma3_export.reference.weights import open_weights
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder

CONFIG = tiny_config(num_hidden_layers=1, layer_types=("full_attention",))


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


def safetensors_bytes(header: object, data: bytes = b"\0" * 16) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


DAMAGED = {
    "empty": (b"", "too few"),
    "long header": (struct.pack("<Q", 2**40) + b"{}", "its header length is"),
    "huge header": (struct.pack("<Q", 2**63), "its header length is"),
    "not JSON": (safetensors_bytes(b"{]"), "not JSON"),
    "not text": (safetensors_bytes(b"\xff\xfe"), "not JSON"),
    "deep JSON": (safetensors_bytes(b"[" * 200_000), "not JSON"),
    "list": (safetensors_bytes([1]), "not a JSON object"),
    "entry": (safetensors_bytes({"a": 1}), "not an object"),
    "no dtype": (safetensors_bytes({"a": entry(dtype=None)}), "no dtype"),
    "float8": (safetensors_bytes({"a": entry(dtype="F8_E4M3")}), "a has type F8_E4M3"),
    "integers": (safetensors_bytes({"a": entry(dtype="I64")}), "a has type I64"),
    "shape": (safetensors_bytes({"a": entry(shape=[-2, -2])}), "malformed"),
    "huge shape": (safetensors_bytes({"a": entry(shape=[2**40, 2**40])}), "does not match its"),
    "boolean": (safetensors_bytes({"a": entry(shape=[True, 4])}), "malformed"),
    "offsets": (safetensors_bytes({"a": entry(data_offsets=[0])}), "malformed"),
    "backwards": (safetensors_bytes({"a": entry(data_offsets=[16, 0])}), "ends at byte"),
    "truncated": (safetensors_bytes({"a": entry()}, b"\0" * 8), "truncated"),
    "wrong size": (safetensors_bytes({"a": entry(shape=[3, 2])}), "does not match its"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_safetensors_are_errors(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    write_hf_folder(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        open_weights(str(tmp_path))
    assert "model.safetensors" in str(caught.value)


def open_and_read(path: Path) -> None:
    with open_weights(str(path)) as source:
        for name, _ in source.config.weight_shapes():
            source.read(name)


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "pt"])
def test_random_damage_raises_only_input_errors(tmp_path: Path, kind: str) -> None:
    weights = write_hf_folder(tmp_path, CONFIG)
    path = tmp_path / f"model.{kind}"
    if kind == "gguf":
        write_gguf(path, CONFIG, weights)
    elif kind == "pt":
        torch.save(weights, path)
    original = path.read_bytes()
    rng, started, refused = random.Random(kind), time.process_time(), 0
    for case in range(150):
        data = bytearray(original)
        if case % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            start = 0 if case % 3 == 1 or kind == "gguf" else len(data) - 3000
            for _ in range(rng.randint(1, 4)):
                data[start + rng.randrange(2000)] = rng.choice((0, 127, 255, rng.randrange(256)))
        path.write_bytes(data)
        try:
            open_and_read(path)
        except InputError:
            refused += 1
    assert refused >= 50, "every truncation at least"
    assert time.process_time() - started < 30, "seconds of processor time; it takes less than one"


class Malicious:
    """An object that creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, is_zip: bool) -> None:
    write_hf_folder(tmp_path, CONFIG)
    state = {**tiny_weights(CONFIG), "x": Malicious(tmp_path / "ran")}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match="contains code"):
        open_weights(str(tmp_path / "m.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [[1], {}, {"a": 1}, {1: torch.zeros(1)}, torch.zeros(1)])
def test_pickles_without_a_state_dict_are_errors(tmp_path: Path, value: Any) -> None:
    write_hf_folder(tmp_path, CONFIG)
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt"):
        open_weights(str(tmp_path / "m.pt"))


def test_changed_header_of_an_open_source_is_an_error(tmp_path: Path) -> None:
    write_hf_folder(tmp_path, CONFIG)
    source = open_weights(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot read"):
        source.read("model.norm.weight")
