"""Hostile PyTorch checkpoints: zip archives and the legacy format, with code that must not run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults.harness.bytes_and_json import change_bytes
from tests.faults.harness.cases import Case
from tests.faults.harness.files import HARMLESS, replace_file
from tests.faults.harness.weights import base_weights, compare, to_hf, write_config

WRAPPERS = ("model", "state_dict", "model_state_dict")
ODD = "odd tensor"


class Code:
    """An object whose pickle runs a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def payloads() -> dict[str, Any]:
    """Return objects that make a file named ``canary`` if they are unpickled carelessly."""
    return {
        "os.system": Code(os.system, "touch canary"),
        "exec": Code(exec, "open('canary', 'w').close()"),
        "open": Code(open, "canary", "w"),
        "eval": Code(eval, "open('canary', 'w').close()"),
        "torch.load": Code(torch.load, "canary"),
        "getattr": Code(getattr, dict, "clear"),
    }


def torch_case(folder: Path, rng: random.Random) -> Case:
    """Make a hostile ``.pt`` file."""
    write_config(folder)
    path = folder / rng.choice(("model.pt", "model.pth", "pytorch_model.bin"))
    is_zip = rng.random() < 0.6
    state: Any = dict(base_weights(rng.choice((torch.float32, torch.float16, torch.bfloat16))))
    kind = rng.choice(
        ("bytes", "bytes", "code", "tensor", "tensor", "structure", "entries", "file")
    )
    name, is_harmless = kind, False
    if kind == "code":
        name, state = _with_code(state, rng)
    elif kind == "tensor":
        name, is_harmless = _change_tensor(state, rng)
    elif kind == "structure":
        name, state, is_harmless = _change_structure(state, rng)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=is_zip)
    data = buffer.getvalue()
    if kind == "entries":
        name, data = _change_entries(data, rng) if is_zip else _change_legacy(data, rng)
    elif kind == "bytes":
        header = rng.choice((200, 4000, None))
        name, data = change_bytes(data, rng, header=header)
    path.write_bytes(data)
    if kind == "file":
        name = replace_file(path, rng)
        is_harmless = name.endswith(HARMLESS)
    return Case(
        name=f"{'zip' if is_zip else 'legacy'}: {name}",
        arguments=to_hf(rng.choice(("", path.name))),
        check=partial(compare, partial(_read_torch, path.name)),
        must_succeed=is_harmless,
    )


def _read_torch(name: str, folder: Path) -> dict[str, torch.Tensor]:
    with (folder / name).open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if is_zip:
        with zipfile.ZipFile(folder / name) as archive:
            damaged = archive.testzip()
            assert damaged is None, f"the checksum of {damaged} is wrong"
    state = torch.load(folder / name, weights_only=True, map_location="cpu")
    for key in WRAPPERS:
        state = state.get(key, state)
    return {
        key: tensor.detach().resolve_neg().resolve_conj().contiguous()
        for key, tensor in state.items()
    }


def _with_code(state: dict[str, Any], rng: random.Random) -> tuple[str, Any]:
    name, payload = rng.choice(list(payloads().items()))
    place = rng.choice(("value", "key", "top", "tensor", "optimizer"))
    if place == "value":
        return f"{name} as a value", state | {"epoch": payload}
    if place == "top":
        return f"{name} at the top", payload
    if place == "tensor":
        first = next(iter(state))
        return f"{name} as a tensor", state | {first: payload}
    if place == "optimizer":
        return f"{name} in the optimizer", {"model": state, "optimizer": {"state": [payload]}}
    return f"{name} in a tuple", state | {"x": (1, [payload])}


def _change_tensor(state: dict[str, Any], rng: random.Random) -> tuple[str, bool]:
    """Replace a tensor; return the change, and whether its values are still right."""
    name = rng.choice(list(state))
    tensor = state[name]
    matrix = rng.choice([key for key, value in state.items() if value.ndim == 2])
    kind = rng.randrange(18)
    if kind == 0:
        state[matrix] = state[matrix].t().contiguous().t()
        return f"{matrix} is transposed in memory", True
    if kind == 1:
        state[name] = torch.nn.Parameter(tensor)
        return f"{name} is a parameter", True
    if kind == 2:
        state[name] = torch._neg_view(-tensor)
        return f"{name} is negated lazily", True
    if kind == 3:
        state[name] = tensor.repeat(2, *[1] * (tensor.ndim - 1))[: tensor.shape[0]]
        return f"{name} is part of a larger storage", True
    if kind == 4:
        state[name] = tensor[:1].expand(tensor.shape)
        return f"{name} repeats its first row", True
    if kind == 5:
        state[name] = torch.zeros(1, dtype=tensor.dtype).expand(2**40)
        return f"{name} claims 2**40 values", False
    if kind == 6:
        state[name] = tensor.to_sparse()
        return f"{name} is sparse", False
    if kind == 7:
        state[name] = torch.complex(tensor.float(), tensor.float())
        return f"{name} is complex", False
    if kind == 8:
        state[name] = torch.empty(tensor.shape, device="meta")
        return f"{name} is on meta", False
    if kind == 9:
        state[name] = torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
        return f"{name} is quantized", False
    if kind == 10:
        value = rng.choice((float("nan"), float("inf"), -float("inf")))
        state[name] = tensor.clone().fill_(value)
        return f"{name} is {value}", False
    if kind == 11:
        dtype = rng.choice((torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64, torch.uint16))
        state[name] = torch.zeros(tensor.shape).to(dtype)
        return f"{name} is {dtype}", False
    if kind == 12:
        state[name] = tensor.double()
        return f"{name} is float64", True
    if kind == 13:
        state[name] = rng.choice((np.zeros(3), 3, "x", None, [tensor], {"a": tensor}))
        return f"{name} is {type(state[name]).__name__}", False
    if kind == 14:
        state[name] = tensor[:0]
        return f"{name} is empty", False
    if kind == 15:
        state[rng.choice((3, None, ("a",), "\x1b[31m", "../x", "", "x" * 10_000))] = tensor
        return "a tensor with an odd name", False
    if kind == 16:
        other = rng.choice([key for key, value in state.items() if value.shape == tensor.shape])
        state[name] = state[other]
        return f"{name} shares the storage of {other}", True
    state[name] = tensor.unsqueeze(0)
    return f"{name} has an axis more", False


def _change_structure(state: dict[str, Any], rng: random.Random) -> tuple[str, Any, bool]:
    kind = rng.randrange(8)
    if kind == 0:
        return "an ordered dictionary", OrderedDict(state), True
    if kind == 1:
        wrapper = rng.choice(WRAPPERS)
        return f"inside {wrapper}", {wrapper: state, "epoch": 3}, True
    if kind == 2:
        return "a list", list(state.items()), False
    if kind == 3:
        return "nothing", {}, False
    if kind == 4:
        cyclic: dict[str, Any] = {}
        cyclic["model"] = cyclic
        return "a dictionary inside itself", cyclic, False
    if kind == 5:
        deep: Any = state
        for _ in range(300):
            deep = {"model": deep}
        return "300 wrappers", deep, False
    if kind == 6:
        name = rng.choice(list(state))
        return f"without {name}", {key: state[key] for key in state if key != name}, False
    return "with numbers", state | {"step": 3}, False


def _change_entries(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Write the zip archive again with a change of its entries."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickled = next(index for index, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    storages = [index for index, (name, _) in enumerate(entries) if "/data/" in name]
    compression, kind = zipfile.ZIP_STORED, rng.randrange(11)
    names = (
        "missing data.pkl",
        "compressed",
        "traversal",
        "big-endian",
        "twice",
        "missing storage",
    )
    change = names[kind] if kind < len(names) else ""
    if kind == 0:
        del entries[pickled]
    elif kind == 1:
        compression = zipfile.ZIP_DEFLATED
    elif kind == 2:
        entries.append(("../../canary", b"x"))
    elif kind == 3:
        entries = [(n, b"big" if n.endswith("byteorder") else content) for n, content in entries]
    elif kind == 4:
        entries.append(rng.choice(entries))
    elif kind == 5:
        del entries[rng.choice(storages)]
    elif kind == 6:
        at = rng.choice(storages)
        entries[at] = (entries[at][0], entries[at][1][: rng.randrange(8)])
        change = "a storage that is too short"
    elif kind == 7:
        change, payload = rng.choice(list(payloads().items()))
        entries[pickled] = (entries[pickled][0], pickle.dumps({"a": payload}, protocol=2))
    elif kind == 8:
        one, two = rng.sample(storages, 2)
        entries[one], entries[two] = (
            (entries[one][0], entries[two][1]),
            (
                entries[two][0],
                entries[one][1],
            ),
        )
        change = "two storages change places"
    elif kind == 9:
        change = "a pickle that never ends"
        entries[pickled] = (entries[pickled][0], b"\x80\x02" + b"]" * 200_000 + b".")
    else:
        change, content = change_bytes(entries[pickled][1], rng)
        change = f"the pickle: {change}"
        entries[pickled] = (entries[pickled][0], content)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return change, buffer.getvalue()


def _change_legacy(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change the parts of the legacy format: a magic number, a version, system facts, the data."""
    kind = rng.randrange(4)
    if kind == 0:
        name, payload = rng.choice(list(payloads().items()))
        return f"{name} before the file", pickle.dumps(payload, protocol=2) + data
    if kind == 1:
        name, payload = rng.choice(list(payloads().items()))
        return f"{name} alone", pickle.dumps(payload, protocol=rng.randrange(5))
    if kind == 2:
        tail = struct.pack("<Q", rng.choice((0, 1, 2**32, 2**63 - 1)))
        at = len(data) - rng.randrange(100, 4000)
        return f"a size in the data at {at}", data[:at] + tail + data[at + 8 :]
    return "pickles only", data[: rng.randrange(200, 1000)]
