"""Files of a bundle that were changed: what loading notices, and what only a full check does."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gemma3_export
from gemma3_export.api.exporting import export_torchscript, open_weights
from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import FORMAT_VERSION, FULLY_HASHED_BYTES, Bundle, write_manifest
from gemma3_export.errors import InputError
from tests.support.command_line import error_line, run_ok
from tests.support.exported_bundles import edit_json

LARGE = "onnx/large.bin"
LARGE_BYTES = FULLY_HASHED_BYTES + 5_000_003
BLOCK, BLOCKS = 2**14, 64
GENERATE = ("--prompt", "a", "--max-new-tokens", "2")


@pytest.fixture
def copied(ort_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ort_bundle, tmp_path / "bundle"))


@pytest.fixture
def large(copied: Path) -> Path:
    """A bundle with a file above the limit up to which loading hashes in full."""
    (copied / LARGE).write_bytes(np.random.default_rng(3).bytes(LARGE_BYTES))
    write_manifest(copied, Bundle(copied).manifest, {})
    return copied


def flip(path: Path, at: int, count: int = 1) -> None:
    """Change ``count`` bytes of a file, which keeps its size."""
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 1 for byte in old))


def manifest_of(bundle: Path) -> dict[str, object]:
    return dict(json.loads((bundle / "manifest.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "name",
    [
        "onnx/model.onnx",
        "onnx/model_windowed.onnx",
        "onnx/model.onnx_data",
        "tokenizer_config.json",
    ],
)
@pytest.mark.parametrize("is_windowed", [True, False])
def test_an_edit_of_a_small_file_that_keeps_its_size_is_noticed_at_loading(
    copied: Path, name: str, is_windowed: bool
) -> None:
    """Whichever of the graphs runs."""
    flip(copied / name, (copied / name).stat().st_size // 2)
    with pytest.raises(InputError, match=f"{name}: SHA-256 differs"):
        gemma3_export.load(copied, device="cpu", sliding_window_cache=is_windowed)
    assert name in error_line("generate", copied, *GENERATE)
    assert name in error_line("inspect", copied)


def test_other_runtimes_notice_it_too(copied: Path, tiny_folder: Path) -> None:
    with open_weights(str(tiny_folder)) as source:
        export_torchscript(source, copied, verify=False)
    flip(copied / "tokenizer_config.json", 1)
    for runtime in ("torchscript", "reference"):
        with pytest.raises(InputError, match="tokenizer_config"):
            open_runtime(copied, runtime, device="cpu")
    flip(copied / "tokenizer_config.json", 1)
    flip(copied / "torchscript" / "model.ts", 0)  # torch does not read the first byte
    with pytest.raises(InputError, match=r"model\.ts: SHA-256 differs"):
        open_runtime(copied, "torchscript", device="cpu")
    open_runtime(copied, "torchscript", device="cpu", trust=True)  # it may be another archive


def test_the_sample_is_64_blocks_from_the_start_to_the_end(large: Path) -> None:
    data = (large / LARGE).read_bytes()
    starts = [(len(data) - BLOCK) * index // (BLOCKS - 1) for index in range(BLOCKS)]
    assert (starts[0], starts[-1] + BLOCK) == (0, len(data))
    sample = b"".join(data[start : start + BLOCK] for start in starts)
    record = Bundle(large).manifest.files[LARGE]
    assert record.sample_sha256 == hashlib.sha256(sample).hexdigest()
    assert Bundle(large).manifest.files["onnx/model.onnx"].sample_sha256 is None


@pytest.mark.parametrize(
    ("at", "count"),
    [(0, 1), (LARGE_BYTES - 1, 1), (BLOCK + 1, LARGE_BYTES // 63), (LARGE_BYTES // 2, 2**20)],
)
def test_damage_to_a_large_file_is_noticed_at_loading(large: Path, at: int, count: int) -> None:
    flip(large / LARGE, at, count)
    with pytest.raises(InputError, match=rf"{LARGE}: SHA-256 of a sample differs"):
        gemma3_export.load(large, device="cpu")


def test_an_edit_between_the_blocks_is_noticed_by_a_full_check_only(large: Path) -> None:
    flip(large / LARGE, BLOCK + 5)
    run_ok("generate", large, *GENERATE)
    assert LARGE in error_line("generate", large, "--check", *GENERATE)
    assert LARGE in error_line("inspect", large, "--check")
    assert LARGE in error_line("verify", large)
    with pytest.raises(InputError, match=LARGE):
        gemma3_export.load(large, device="cpu", check=True)
    with gemma3_export.load(large, device="cpu") as model:
        model.generate("a", max_new_tokens=2)


def test_the_check_includes_the_draft_model(copied: Path, large: Path, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(large, tmp_path / "draft"))
    flip(draft / LARGE, BLOCK + 5)
    drafting = ("--draft-model", draft, *GENERATE)
    run_ok("generate", copied, *drafting)
    assert LARGE in error_line("generate", copied, "--check", *drafting)


def test_a_bundle_of_format_1_still_opens_and_gets_samples_with_its_next_graph(
    large: Path, tiny_folder: Path
) -> None:
    manifest = manifest_of(large)
    files = manifest["files"]
    assert isinstance(files, dict)
    for record in files.values():
        del record["sample_sha256"]
    edit_json(large / "manifest.json", format_version=1, files=files)
    run_ok("generate", large, *GENERATE)
    flip(large / LARGE, 0)
    run_ok("generate", large, *GENERATE)  # only its size is known without reading all of it
    flip(large / LARGE, 0)
    with open_weights(str(tiny_folder)) as source:
        export_torchscript(source, large, verify=False)
    assert manifest_of(large)["format_version"] == FORMAT_VERSION
    assert Bundle(large).manifest.files[LARGE].sample_sha256 is not None
    (large / LARGE).write_bytes(b"short")
    assert f"{LARGE}: 5 bytes instead of {LARGE_BYTES}" in error_line("generate", large, *GENERATE)
