"""Hostile files of weights: safetensors, alone and sharded, and GGUF.

`to-hf` converts them. What it writes must equal what the libraries of these formats read.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from gemma3_export.config import Gemma3Config, config_to_json, load_config
from tests.faults.harness.bytes_and_json import VALUES, change_bytes, change_json, to_text
from tests.faults.harness.cases import INPUT, OUTPUT, Case
from tests.faults.harness.files import HARMLESS, replace_file
from tests.support.tiny_models import gguf_name, tiny_config, tiny_weights, write_gguf

CONFIG = tiny_config(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    layer_types=("sliding_attention", "full_attention"),
)
QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")
NAMES = ("", "\x1b[31m", "x" * 70_000, "../../escape", "model.norm.weight", "\0", "\n\n", "é\u202e")


@cache
def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the weights that all cases start from; do not change them."""
    return tiny_weights(CONFIG, seed=3, dtype=dtype)


def write_config(folder: Path, config: Gemma3Config = CONFIG) -> None:
    """Write ``config.json``."""
    (folder / "config.json").write_text(json.dumps(config_to_json(config)), encoding="utf-8")


def to_hf(weights: str, *options: str) -> list[str]:
    """Return the arguments that convert a file of the input."""
    return ["to-hf", "--weights", f"{INPUT}/{weights}".rstrip("/"), "-o", OUTPUT, *options]


def compare(
    expected: Callable[[Path], dict[str, torch.Tensor]], place: Path, printed: str
) -> str | None:
    """Compare the folder that was written with what ``expected`` reads from the input."""
    del printed
    written = load_file(place / OUTPUT / "model.safetensors")
    wanted = expected(place / INPUT)
    wanted = {
        name: tensor.float() if tensor.dtype == torch.float64 else tensor
        for name, tensor in wanted.items()
    }
    if load_config(place / OUTPUT).weight_shapes and written.keys() != wanted.keys():
        return f"the tensors {sorted(written.keys() ^ wanted.keys())[:3]} are too many or missing"
    for name, tensor in written.items():
        if tensor.dtype != wanted[name].dtype or not torch.equal(tensor, wanted[name]):
            return f"{name} differs from what the library reads"
        if not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    return None


# Safetensors


def safetensors_case(folder: Path, rng: random.Random) -> Case:
    """Make a hostile ``model.safetensors``, or shards with a hostile index."""
    write_config(folder)
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64))
    data = save(base_weights(dtype), {"format": "pt"})
    if rng.random() < 0.2:
        return _sharded_case(folder, rng, dtype)
    path = folder / "model.safetensors"
    path.write_bytes(data)
    kind = rng.choice(("bytes", "header", "header", "header", "values", "file", "json"))
    if kind == "bytes":
        name, data = change_bytes(data, rng, header=8 + struct.unpack("<Q", data[:8])[0])
        path.write_bytes(data)
    elif kind == "file":
        name = replace_file(path, rng)
    elif kind == "values":
        name, data = _with_odd_values(data, rng, dtype)
        path.write_bytes(data)
    else:
        header, body = _split(data)
        if kind == "json":
            name, text = change_json(header, rng)
        else:
            name, text = _change_header(header, rng, len(body))
        path.write_bytes(_joined(text.encode("utf-8", "surrogatepass"), body, rng))
    return Case(
        name=name,
        arguments=to_hf(rng.choice(("", "model.safetensors"))),
        check=partial(compare, _read_safetensors),
        must_succeed=name.endswith(HARMLESS) and dtype != torch.float64,
    )


def _read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: bytes, body: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def _change_header(header: dict[str, Any], rng: random.Random, size: int) -> tuple[str, str]:
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    entry = header[name]
    begin, end = entry["data_offsets"]
    kind = rng.randrange(12)
    if kind == 0:
        dtype = rng.choice(
            ("F16", "F32", "I32", "U8", "BOOL", "F8_E4M3", "C64", "Q4", "f32", "F64")
        )
        entry["dtype"] = dtype
        return f"dtype of {name} is {dtype}", json.dumps(header)
    if kind == 1:
        entry["data_offsets"] = header[other]["data_offsets"]
        return f"{name} has the bytes of {other}", json.dumps(header)
    if kind == 2:
        shift = rng.choice((1, 4, -4, 64, size, 2**62, -(2**62)))
        entry["data_offsets"] = [begin + shift, end + shift]
        return f"offsets of {name} are shifted by {shift}", json.dumps(header)
    if kind == 3:
        entry["data_offsets"] = [end, begin]
        return f"offsets of {name} are reversed", json.dumps(header)
    if kind == 4:
        entry["shape"] = [*reversed(entry["shape"])]
        return f"shape of {name} is reversed", json.dumps(header)
    if kind == 5:
        shape = rng.choice(
            ([2**32, 2**32], [-1, *entry["shape"]], [0], [], [1] * 70, [1e1], [True])
        )
        entry["shape"] = shape
        return f"shape of {name} is {str(shape)[:40]}", json.dumps(header)
    if kind == 6:
        header[rng.choice(NAMES)] = header.pop(name)
        return f"{name} has another name", json.dumps(header)
    if kind == 7:
        del header[name]
        return f"{name} is missing", json.dumps(header)
    if kind == 8:
        header[name], header[other] = header[other], header[name]
        return f"{name} and {other} change names", json.dumps(header)
    if kind == 9:
        header["__metadata__"] = rng.choice(VALUES)
        return "metadata of another type", to_text(header)
    if kind == 10:
        extra = dict(entry, data_offsets=[size, size + end - begin])
        header[rng.choice(NAMES)] = extra
        return "a tensor beyond the end", json.dumps(header)
    text = json.dumps(header)
    twice = json.dumps({name: header[other]})[1:-1]
    return f"{name} occurs twice", text[:-1] + ", " + twice + "}"


def _with_odd_values(data: bytes, rng: random.Random, dtype: torch.dtype) -> tuple[str, bytes]:
    header, body = _split(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, 1e-40, 6e4))
    raw = bytearray(body)
    item = torch.tensor([value], dtype=torch.float64).to(dtype).view(torch.uint8)
    at = begin + rng.randrange((end - begin) // len(item)) * len(item)
    raw[at : at + len(item)] = bytes(item.tolist())
    return f"{value} in {name}", data[: len(data) - len(body)] + bytes(raw)


def _sharded_case(folder: Path, rng: random.Random, dtype: torch.dtype) -> Case:
    weights = base_weights(dtype)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: shards[index % 2] for index, name in enumerate(weights)}
    for shard in shards:
        content = {name: weights[name] for name, place in weight_map.items() if place == shard}
        (folder / shard).write_bytes(save(content, {"format": "pt"}))
    index = folder / "model.safetensors.index.json"
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    index.write_text(text)
    kind = rng.choice(("index", "map", "index bytes", "shard", "index file"))
    if kind == "index":
        name, text = change_json(json.loads(text), rng)
        index.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind == "map":
        tensor = rng.choice(list(weights))
        shard = rng.choice(
            ("../escape.safetensors", "/etc/passwd", "", ".", "..", "x" * 300, "é", *shards, "a\0b")
        )
        name = f"{tensor} is in {shard!r:.40}"
        index.write_text(json.dumps({"weight_map": weight_map | {tensor: shard}}))
    elif kind == "index bytes":
        name, data = change_bytes(text.encode(), rng)
        index.write_bytes(data)
    else:
        name = replace_file(index if kind == "index file" else folder / rng.choice(shards), rng)
    return Case(
        name=name, arguments=to_hf(""), check=partial(compare, partial(_read_shards, weight_map))
    )


def _read_shards(weight_map: dict[str, str], folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        found |= load_file(folder / shard)
    return found


# GGUF


@cache
def _gguf_bytes(quantization: str) -> bytes:
    from tests.faults.harness.children import scratch_folder

    with scratch_folder() as folder:
        path = folder / "model.gguf"
        write_gguf(path, CONFIG, base_weights(), quantization)
        return path.read_bytes()


def gguf_case(folder: Path, rng: random.Random) -> Case:
    """Make a hostile GGUF file."""
    data = _gguf_bytes(rng.choice(QUANTIZATIONS))
    path = folder / "model.gguf"
    spans, header = _gguf_spans(data)
    kind = rng.choice(("bytes", "numbers", "numbers", "numbers", "names", "values", "file"))
    if kind == "bytes":
        name, data = change_bytes(data, rng, header=header)
    elif kind == "numbers":
        name, data = _change_number(data, spans, rng)
    elif kind == "names":
        name, data = _change_string(data, spans, rng)
    elif kind == "values":
        at = rng.randrange(header + 32, len(data) - 4)
        width = rng.choice((2, 4))
        pattern = rng.choice(("f" * 8, "0000c07f", "0000807f", "007c007c", "ffffff7f"))
        name = f"{pattern} in the data"
        data = data[:at] + bytes.fromhex(pattern)[:width] + data[at + width :]
    path.write_bytes(data)
    if kind == "file":
        name = replace_file(path, rng)
    return Case(
        name=name,
        arguments=to_hf(rng.choice(("", "model.gguf"))),
        check=partial(compare, _read_gguf),
        must_succeed=name.endswith(HARMLESS),
    )


def _read_gguf(folder: Path) -> dict[str, torch.Tensor]:
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(folder / "model.gguf")
    canonical = {gguf_name(name): name for name, _ in CONFIG.weight_shapes()}
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = canonical.get(tensor.name, tensor.name)
        found[name] = values.reshape(shape) - (1.0 if name.endswith("norm.weight") else 0.0)
    return found


Span = tuple[str, int, int]  # what, where, bytes


def _gguf_spans(data: bytes) -> tuple[list[Span], int]:
    """Return where the numbers and strings of the header are, and where the header ends."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    spans: list[Span] = [("version", 4, 4), ("tensor count", 8, 8), ("field count", 16, 8)]
    tensors, fields = struct.unpack_from("<QQ", data, 8)
    at = 24

    def number(what: str, width: int) -> int:
        nonlocal at
        spans.append((what, at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def string(what: str) -> None:
        nonlocal at
        length = number(f"length of {what}", 8)
        spans.append((what, at, length))
        at += length

    for _ in range(fields):
        string("key")
        kind, count = number("type of a value", 4), 1
        if kind == 9:
            kind, count = number("type of items", 4), number("item count", 8)
        for _ in range(count):
            string("text") if kind == 8 else number("value", widths[kind])
    for _ in range(tensors):
        string("tensor name")
        for _ in range(number("dimension count", 4)):
            number("dimension", 8)
        number("tensor type", 4)
        number("tensor offset", 8)
    return spans, at


def _change_number(data: bytes, spans: list[Span], rng: random.Random) -> tuple[str, bytes]:
    numbers = [span for span in spans if span[0] not in ("key", "text", "tensor name")]
    wanted = rng.choice(sorted({what for what, _, _ in numbers}))
    what, at, width = rng.choice([span for span in numbers if span[0] == wanted])
    old = int.from_bytes(data[at : at + width], "little")
    new = rng.choice(
        (
            0,
            1,
            2,
            3,
            8,
            9,
            13,
            14,
            30,
            99,
            old + 1,
            old - 1,
            old + 32,
            2 * old,
            old ^ 1,
            2**31,
            -1,
            2**62,
        )
    )
    new %= 2 ** (8 * width)
    return f"{what} at {at} is {new}, not {old}", data[:at] + new.to_bytes(width, "little") + data[
        at + width :
    ]


def _change_string(data: bytes, spans: list[Span], rng: random.Random) -> tuple[str, bytes]:
    strings = [span for span in spans if span[0] in ("key", "text", "tensor name")]
    what, at, length = rng.choice(strings)
    others = [data[b : b + n] for w, b, n in strings if w == what]
    new = rng.choice(
        (
            b"",
            b"\xff\xfe",
            b"\x1b[2J",
            b"\0" * length,
            b"x" * 70_000,
            b"../../x",
            rng.choice(others),
        )
    )
    changed = data[: at - 8] + len(new).to_bytes(8, "little") + new + data[at + length :]
    # Tensor data starts at the next multiple of 32 after the header, so keep it there.
    _, end = _gguf_spans(data)
    new_end = end + len(new) - length
    old_start, new_start = -(-end // 32) * 32, -(-new_end // 32) * 32
    changed = changed[:new_end] + bytes(new_start - new_end) + data[old_start:]
    return f"{what} {data[at : at + length]!r:.40} is {new!r:.40}", changed
