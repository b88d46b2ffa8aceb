"""Outputs that appear, are shared, are killed: nothing is lost and nothing is left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma3_export import staging
from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.locks import exclusive
from gemma3_export.staging import staged_directory

MANIFEST = '{"format_version": 1, "files": {"model.onnx": {}}}'
KILLED = """
import os, sys
from pathlib import Path
from gemma3_export import staging
target = Path(sys.argv[1])
if sys.argv[2] == "between":  # as on a system without renameat2, between its two renames
    staging.exchange = lambda one, other: False
    rename, done = Path.rename, []
    def rename_once(self, other):
        if done:
            os.kill(os.getpid(), 9)
        done.append(other)
        return rename(self, other)
    Path.rename = rename_once
with staging.staged_directory(target, force=True) as folder:
    (folder / "manifest.json").write_text("new")
    (folder / "weights").write_bytes(bytes(10**6))
    if sys.argv[2] == "while writing":
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def make_bundle(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "manifest.json").write_text(MANIFEST)
    (target / "model.onnx").write_text("old")


def add_thesis(target: Path) -> None:
    target.mkdir(exist_ok=True)
    (target / "thesis.txt").write_text("years of work")


def kill(target: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert done.returncode == -signal.SIGKILL


def write(target: Path, *, force: bool = False) -> None:
    with staged_directory(target, force=force) as folder:
        (folder / "manifest.json").write_text(MANIFEST)
        (folder / "model.onnx").write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestWhatAppearsMeanwhile:
    @pytest.mark.parametrize("force", [False, True])
    def test_foreign_files_are_kept(self, target: Path, force: bool) -> None:
        with (
            pytest.raises(InputError, match=r"not created by this program.*thesis"),
            staged_directory(target, force=force),
        ):
            add_thesis(target)
        assert (target / "thesis.txt").read_text() == "years of work"
        assert names(target.parent) == ["out"]

    def test_a_bundle_is_kept_without_force(self, target: Path) -> None:
        with pytest.raises(InputError, match="pass --force"), staged_directory(target):
            make_bundle(target)
        assert (target / "model.onnx").read_text() == "old"

    def test_files_of_the_last_moment_are_kept(
        self, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Path.rename

        def rename(self: Path, other: Path) -> Path:
            add_thesis(target)
            return real(self, other)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(InputError, match=r"files appeared in .*out"):
            write(target)
        assert (target / "thesis.txt").read_text() == "years of work"

    def test_an_empty_folder_is_filled(self, target: Path) -> None:
        target.mkdir(parents=True)
        write(target)
        assert names(target) == ["manifest.json", "model.onnx"]


class TestWhatForceReplaces:
    @pytest.mark.parametrize("can_exchange", [True, False])
    def test_a_bundle(
        self, target: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_bundle(target)
        if not can_exchange:
            monkeypatch.setattr(staging, "exchange", lambda one, other: False)
        write(target, force=True)
        assert (target / "model.onnx").read_text() == "new"
        assert names(target.parent) == ["out"]

    @pytest.mark.parametrize(
        "files",
        [
            {"config.json": "{}", "thesis.txt": "years of work"},
            {"manifest.json": MANIFEST, "model.onnx": "", "thesis.txt": "years of work"},
            {"manifest.json": '{"name": "a web app"}', "icons/big.png": ""},
            {"manifest.json": "[1]"},
            {"meta.json": "{}", "notes/thesis.txt": "years of work"},
            {"sub/thesis.txt": "years of work"},
        ],
    )
    def test_no_folder_with_a_file_that_it_did_not_make(
        self, target: Path, files: dict[str, str]
    ) -> None:
        for name, text in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text)
        with pytest.raises(InputError, match="not created by this program"):
            write(target, force=True)
        assert all((target / name).read_text() == text for name, text in files.items())

    @pytest.mark.parametrize(
        "files",
        [
            ("config.json", "generation_config.json", "model-00001-of-00002.safetensors"),
            ("meta.json", "train.bin", "validation.bin", "tokenizer.json"),
            ("training.json", "config.json", "log.csv", "checkpoints/step-00000002.pt"),
        ],
    )
    def test_the_folders_of_other_commands(self, target: Path, files: tuple[str, ...]) -> None:
        for name in files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text("")
        write(target, force=True)
        assert names(target) == ["manifest.json", "model.onnx"]


class TestTwoAtOnce:
    def test_the_second_is_told_which_process_is_first(self, target: Path) -> None:
        with staged_directory(target) as folder:
            (folder / "one").write_text("one")
            with pytest.raises(InputError, match=f"writing .*out.*process {os.getpid()}"):
                write(target)
        assert names(target) == ["one"]
        assert names(target.parent) == ["out"]

    def test_exactly_one_of_many_writes(self, target: Path) -> None:
        barrier, outcomes = threading.Barrier(12), []

        def attempt(number: int) -> None:
            barrier.wait()
            try:
                with staged_directory(target) as folder:
                    (folder / "config.json").write_text(str(number))
            except InputError as error:
                outcomes.append(str(error))
            else:
                outcomes.append(number)

        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert len(outcomes) == 12
        assert len(winners) == 1, outcomes
        assert (target / "config.json").read_text() == str(winners[0])
        assert names(target.parent) == ["out"]

    def test_a_lock_admits_one_at_a_time_however_often_it_is_removed(self, tmp_path: Path) -> None:
        inside, most, lock = 0, 0, threading.Lock()

        def work() -> None:
            nonlocal inside, most
            for _ in range(200):
                try:
                    with exclusive(tmp_path / "a" / "lock", "working"):
                        with lock:
                            inside += 1
                            most = max(most, inside)
                        with lock:
                            inside -= 1
                except InputError:
                    continue

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1


class TestKills:
    def test_partial_output_is_removed_by_the_next_run_which_says_so(
        self, target: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        kill(target, "while writing")
        assert names(target.parent) == [".out.partial"]
        with caplog.at_level(logging.WARNING):
            write(target)
        assert "removed 1.0 MB of partial output" in caplog.text
        assert names(target.parent) == ["out"]

    def test_a_kill_between_two_renames_loses_nothing(
        self, target: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        make_bundle(target)
        kill(target, "between")
        assert not target.exists()
        with caplog.at_level(logging.WARNING), pytest.raises(InputError, match="pass --force"):
            write(target)
        assert "restored" in caplog.text
        assert (target / "model.onnx").read_text() == "old"
        write(target, force=True)
        assert (target / "model.onnx").read_text() == "new"
        assert names(target.parent) == ["out"]


class TestMountPoints:
    @pytest.fixture
    def mounted(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "mounted"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted: {error}")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    def test_an_empty_one_is_filled(self, mounted: Path) -> None:
        write(mounted)
        assert names(mounted) == ["manifest.json", "model.onnx"]

    def test_a_failure_leaves_it_empty(self, mounted: Path) -> None:
        with (
            pytest.raises(Gemma3ExportError, match="No space"),
            staged_directory(mounted) as folder,
        ):
            (folder / "big").write_bytes(bytes(2 * 10**6))
        assert names(mounted) == []

    @pytest.mark.parametrize("force", [False, True])
    def test_one_that_is_not_empty_is_rejected_before_the_work(
        self, mounted: Path, force: bool
    ) -> None:
        write(mounted)
        match = "mount point and is not empty" if force else "pass --force"
        with pytest.raises(InputError, match=match):
            write(mounted, force=force)


def test_a_deleted_current_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(InputError, match="current folder has been deleted"):
        write(tmp_path / "out")
