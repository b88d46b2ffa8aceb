"""Token folders and runs: one writer at a time, and old output until there is new output."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.reference.training import runs
from gemma3_export.reference.training.documents import LocalFiles
from gemma3_export.reference.training.preparation import BATCH_PIECES, prepare_tokens
from gemma3_export.reference.training.runs import resume_training, train
from gemma3_export.reference.training.trainer import Trainer
from gemma3_export.staging import sole_writer, staged_directory
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer
from tests.support.token_folders import (
    quick_options,
    random_tokens,
    small_config,
    write_config,
    write_tokens,
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number:02}.txt").write_text(f"Document {number}. " * 50)
    return tmp_path / "text"


def prepare(text: Path, output: Path, **options: object) -> None:
    prepare_tokens(LocalFiles((text,)), tiny_gemma_tokenizer(400), output, **options)


def raise_not_finite(self: Trainer, metrics_log: object) -> None:
    raise Gemma3ExportError("the loss is not finite")


class Stopped(Exception):  # noqa: N818  (it plays a kill)
    pass


def stop(stage: str, done: int, total: int) -> None:
    raise Stopped


class TestData:
    def test_a_second_preparation_of_the_same_folder_is_rejected(
        self, text: Path, tmp_path: Path
    ) -> None:
        with (
            sole_writer(tmp_path / "tokens", "preparing tokens"),
            pytest.raises(InputError, match=r"another process is preparing .*process \d+"),
        ):
            prepare(text, tmp_path / "tokens")
        prepare(text, tmp_path / "tokens")

    def test_tokens_that_are_not_what_was_written_are_not_continued(
        self, text: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(Stopped):
            prepare(text, tmp_path / "tokens", progress=stop)
        file = tmp_path / ".tokens.preparing" / "train.bin"
        data = bytearray(file.read_bytes())
        assert data
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(InputError, match="not what an interrupted preparation wrote"):
            prepare(text, tmp_path / "tokens")
        prepare(text, tmp_path / "tokens", force=True)

    def test_an_untouched_interruption_is_continued(self, text: Path, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            prepare(text, tmp_path / "tokens", progress=stop)
        prepare(text, tmp_path / "tokens")
        prepare(text, tmp_path / "whole")
        for name in ("train.bin", "validation.bin"):
            assert (tmp_path / "tokens" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()

    def test_rejected_text_leaves_nothing_that_its_correction_would_meet(
        self, tmp_path: Path
    ) -> None:
        rows = tmp_path / "rows.jsonl"
        good = [json.dumps({"text": f"Row {number}. " * 20}) for number in range(BATCH_PIECES)]
        rows.write_text("\n".join([*good, '{"prompt": "a question"}']))
        with pytest.raises(InputError, match=rf"rows.jsonl:{len(good) + 1} has"):
            prepare(rows, tmp_path / "tokens")
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
        rows.write_text("\n".join(good))
        prepare(rows, tmp_path / "tokens")

    def test_files_that_appear_meanwhile_are_kept(self, text: Path, tmp_path: Path) -> None:
        def appear(stage: str, done: int, total: int) -> None:
            (tmp_path / "tokens").mkdir(exist_ok=True)
            (tmp_path / "tokens" / "thesis.txt").write_text("years of work")

        with pytest.raises(InputError, match="not created by this program"):
            prepare(text, tmp_path / "tokens", progress=appear, force=True)
        assert (tmp_path / "tokens" / "thesis.txt").read_text() == "years of work"


class TestTrain:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_tokens(tmp_path / "tokens", random_tokens(800), random_tokens(300, seed=1))
        write_config(tmp_path / "config.json")
        return tmp_path

    def run(self, folder: Path, *, force: bool = False, **options: object) -> None:
        train(
            folder / "tokens",
            folder / "run",
            quick_options(steps=2, eval_interval=2, **options),
            config_path=folder / "config.json",
            force=force,
            report=lambda line: None,
        )

    def test_a_second_training_into_the_same_folder_is_rejected(self, folder: Path) -> None:
        self.run(folder)
        with sole_writer(folder / "run", "training into run"):
            with pytest.raises(InputError, match=r"another process is training into .*process"):
                self.run(folder, force=True)
            with pytest.raises(InputError, match="another process is training into"):
                resume_training(folder / "run", report=lambda line: None)
        assert (folder / "run" / "model.safetensors").is_file()

    def test_another_command_that_writes_the_same_folder_is_rejected(self, folder: Path) -> None:
        with staged_directory(folder / "run") as content:
            (content / "config.json").write_text("{}")
            with pytest.raises(InputError, match=r"another process is training into .*process \d+"):
                self.run(folder, force=True)
        assert [path.name for path in (folder / "run").iterdir()] == ["config.json"]
        assert not list(folder.glob(".run.*"))

    def test_an_output_that_appears_after_the_checks_is_kept(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Trainer.__init__

        def appear(self: Trainer, *arguments: object) -> None:
            (folder / "run").mkdir()
            (folder / "run" / "thesis.txt").write_text("years of work")
            real(self, *arguments)

        monkeypatch.setattr(Trainer, "__init__", appear)
        with pytest.raises(InputError, match="not created by this program"):
            self.run(folder, force=True)
        assert (folder / "run" / "thesis.txt").read_text() == "years of work"

    def test_checks_that_fail_leave_the_old_run(self, folder: Path, text: Path) -> None:
        prepare(text, folder / "tokens", force=True)
        write_config(folder / "config.json", small_config(vocab_size=400))
        self.run(folder)
        before = (folder / "run" / "model.safetensors").read_bytes()
        with pytest.raises(InputError, match=r"--sample-prompt has \d+ tokens"):
            self.run(folder, force=True, sample_interval=1, sample_prompt="word " * 5000)
        assert (folder / "run" / "model.safetensors").read_bytes() == before

    def test_a_run_that_ends_before_it_has_weights_brings_the_old_one_back(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(folder)
        before = json.loads((folder / "run" / "training.json").read_text())

        monkeypatch.setattr(Trainer, "run", raise_not_finite)
        with pytest.raises(Gemma3ExportError, match="not finite"):
            self.run(folder, force=True, seed=5)
        assert json.loads((folder / "run" / "training.json").read_text()) == before
        assert (folder / "run" / "model.safetensors").is_file()
        assert not list(folder.glob(".run.*"))

    def test_an_empty_mount_point_is_filled_and_left_empty_by_a_failure(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "run").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder / "run")]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted: {error}")
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Trainer, "run", raise_not_finite)
                with pytest.raises(Gemma3ExportError, match="not finite"):
                    self.run(folder)
            assert list((folder / "run").iterdir()) == []
            self.run(folder)
            assert (folder / "run" / "model.safetensors").is_file()
        finally:
            subprocess.run(["umount", str(folder / "run")], check=True)

    def test_a_config_that_was_edited_is_not_trained_on(self, folder: Path) -> None:
        self.run(folder)
        path = folder / "run" / "config.json"
        original = path.read_text()
        edited = json.loads(original)
        edited["rope_theta"] *= 2
        path.write_text(json.dumps(edited))
        with pytest.raises(InputError, match=r"config\.json was changed since the run began: rope"):
            resume_training(folder / "run", steps=4, report=lambda line: None)
        path.write_text(original)
        resume_training(folder / "run", steps=4, report=lambda line: None)

    def test_a_killed_replacement_is_settled_by_the_next_run(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(folder)
        (folder / "run").rename(folder / ".run.replaced")  # killed before it had weights
        (folder / "run").mkdir()
        said: list[str] = []
        runs._settle(folder / "run", said.append)
        assert (folder / "run" / "model.safetensors").is_file()
        assert "is back" in said[0]
