"""Signals during short blocks and cleanups, and renames that fail."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from gemma3_export import staging
from gemma3_export.errors import Gemma3ExportError
from gemma3_export.signals import install_signal_handlers, uninterrupted
from gemma3_export.staging import staged_directory

MANIFEST = '{"format_version": 1, "files": {}}'


@pytest.fixture
def signals() -> object:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    install_signal_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_a_short_block(number: int, signals: object) -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("the rest of the block")
        done.append("what follows it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest of the block"]


def test_a_signal_during_the_cleanup_leaves_nothing(
    tmp_path: Path, signals: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = staging.shutil.rmtree

    def interrupted(path: Path, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        remove(path, **options)

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "out") as folder:
        (folder / "manifest.json").write_text(MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_output_comes_back_if_the_new_one_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "manifest.json").write_text(MANIFEST)
    rename = Path.rename

    def fail_for_content(self: Path, other: Path) -> Path:
        if self.name == "content":
            raise OSError(5, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_for_content)
    with (
        pytest.raises(Gemma3ExportError, match="Input/output error"),
        staged_directory(target, force=True) as folder,
    ):
        (folder / "manifest.json").write_text("new")
    assert (target / "manifest.json").read_text() == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
