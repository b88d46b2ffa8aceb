"""Exports and parity checks use the requested threads, and one thread for small models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from gemma3_export.api import verification as verifying
from gemma3_export.api.exporting import export_onnx
from gemma3_export.api.verification import verify as verify_bundle
from gemma3_export.cli import command_line
from gemma3_export.config import preset
from gemma3_export.errors import InputError
from gemma3_export.parity import check
from gemma3_export.parity.options import threads_for, torch_threads
from tests.support.exported_bundles import exported_bundle, source_of
from tests.support.tiny_models import tiny_config

BEFORE = 3


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, int | None]]]:
    """The threads of PyTorch and of the runtime, for every runtime that is checked."""
    found: set[tuple[int, int | None]] = set()
    open_runtime, judge_cases = verifying.open_runtime, check.judge_cases

    def spy(*arguments: Any, **options: Any) -> Any:
        runtime = open_runtime(*arguments, **options)
        requested[0] = options["threads"]
        return runtime

    def spied_cases(*arguments: Any, **options: Any) -> Any:
        found.add((torch.get_num_threads(), requested[0]))
        return judge_cases(*arguments, **options)

    requested: list[int | None] = [None]
    monkeypatch.setattr(verifying, "open_runtime", spy)
    monkeypatch.setattr(check, "judge_cases", spied_cases)
    threads = torch.get_num_threads()
    torch.set_num_threads(BEFORE)
    yield found
    assert torch.get_num_threads() == BEFORE, "the previous number must be restored"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("command", ["onnx", "torchscript", "pt2"])
@pytest.mark.parametrize(("options", "expected"), [((), 1), (("--threads", 2), 2)])
def test_exports_are_checked_with_the_requested_threads(
    one_layer: Path,
    tmp_path: Path,
    seen: set[tuple[int, int | None]],
    command: str,
    options: tuple[object, ...],
    expected: int,
) -> None:
    arguments = ("--random-weights", 0, "--config", one_layer, "-o", tmp_path / "out", *options)
    result = CliRunner().invoke(command_line, [command, *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert seen == {(expected, expected)}


def test_tracing_and_writing_use_the_same_threads(
    tmp_path: Path, seen: set[tuple[int, int | None]]
) -> None:
    used = set()
    export_onnx(
        source_of(),
        tmp_path / "out",
        verify=False,
        threads=2,
        progress=lambda *_: used.add(torch.get_num_threads()),
    )
    assert used == {2}
    assert not seen


@pytest.mark.parametrize(("threads", "expected"), [(None, 1), (2, 2)])
def test_verify_uses_one_thread_for_a_small_model(
    seen: set[tuple[int, int | None]], threads: int | None, expected: int
) -> None:
    assert verify_bundle(exported_bundle("ort"), threads=threads).passed
    assert seen == {(expected, expected)}


def test_large_models_get_all_cores() -> None:
    assert threads_for(preset("270m").config, None) is None
    assert threads_for(preset("270m").config, 4) == 4
    wide = tiny_config(vocab_size=262_144)  # few parameters, but a head that is worth two threads
    assert wide.num_parameters < 20_000_000
    assert threads_for(wide, None) is None
    before = torch.get_num_threads()
    with torch_threads(None):
        assert torch.get_num_threads() == before


def test_zero_threads_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        threads_for(tiny_config(), 0)
    with pytest.raises(InputError, match="threads is -1"):
        verify_bundle(exported_bundle("ort"), threads=-1)
    with pytest.raises(InputError, match="threads is 0"):
        export_onnx(source_of(), tmp_path / "out", threads=0)
    assert not (tmp_path / "out").exists()
