"""Test that damaged and malicious weight files raise an InputError quickly."""

from __future__ import annotations

import json
import os
import random
import struct
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemma3_export.errors import InputError
from gemma3_export.reference.training.model_folder import export_hf_folder
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


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.pt"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_not_a_regular_file_is_rejected_without_waiting(
    tmp_path: Path, name: str, kind: str
) -> None:
    write_hf_folder(tmp_path, tiny_config())
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{kind}|no model.safetensors"):
        open_weights(str(path))


class TestArchives:
    """Zip archives, which torch maps without looking at their checksums."""

    @pytest.fixture
    def archive(self, tmp_path: Path) -> Path:
        config = tiny_config()
        write_hf_folder(tmp_path, config)
        (tmp_path / "model.safetensors").unlink()
        torch.save(tiny_weights(config), tmp_path / "model.pt")
        return tmp_path / "model.pt"

    def test_a_changed_weight_is_noticed(self, archive: Path) -> None:
        data = bytearray(archive.read_bytes())
        data[len(data) // 2] ^= 1
        archive.write_bytes(data)
        with pytest.raises(InputError, match="damaged: Bad CRC-32"):
            open_weights(str(archive))

    def test_compressed_records_and_records_of_one_name_are_rejected(self, archive: Path) -> None:
        with zipfile.ZipFile(archive) as original:
            entries = [(info.filename, original.read(info)) for info in original.infolist()]
        for compression, extra, match in (
            (zipfile.ZIP_DEFLATED, [], "is compressed"),
            (zipfile.ZIP_STORED, entries[:1], "two records of one name"),
        ):
            with warnings.catch_warnings(), zipfile.ZipFile(archive, "w", compression) as changed:
                warnings.simplefilter("ignore")
                for name, content in entries + extra:
                    changed.writestr(name, content)
            with pytest.raises(InputError, match=match):
                open_weights(str(archive))

    def test_a_record_that_is_shorter_than_its_tensor_is_noticed(self, archive: Path) -> None:
        with zipfile.ZipFile(archive) as original:
            entries = [(info.filename, original.read(info)) for info in original.infolist()]
        with zipfile.ZipFile(archive, "w") as changed:
            for name, content in entries:
                changed.writestr(name, content[:7] if name.endswith("/data/3") else content)
        with pytest.raises(InputError, match=r"record size \(7 bytes\)"):
            open_weights(str(archive))

    def test_a_whole_archive_is_mapped(self, archive: Path) -> None:
        with open_weights(str(archive)) as source:
            maps = Path("/proc/self/maps").read_text()
            assert str(archive) in maps
            assert source.read("model.norm.weight").numel()

    def test_an_archive_without_checksums_is_read(self, archive: Path) -> None:
        state = torch.load(archive, weights_only=True)
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(state, archive)
        finally:
            torch.serialization.set_crc32_options(True)
        with open_weights(str(archive)) as source:
            name = "model.norm.weight"
            torch.testing.assert_close(source.read(name), state[name], rtol=0, atol=0)


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    config = tiny_config()
    weights = tiny_weights(config)
    one, other = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "kv")
    write_hf_folder(tmp_path, config)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights | {one: weights[other]}, tmp_path / "model.pt")
    with open_weights(str(tmp_path / "model.pt")) as source:
        export_hf_folder(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(written[one], weights[other], rtol=0, atol=0)
    torch.testing.assert_close(written[other], weights[other], rtol=0, atol=0)
