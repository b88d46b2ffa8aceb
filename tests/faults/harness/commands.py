"""Commands that write an output, on tiny inputs: what the schedules interrupt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors.torch import save_file

from tests.faults.harness import children
from tests.faults.harness.cases import INPUT, OUTPUT
from tests.faults.harness.files import copy_tree
from tests.faults.harness.weights import base_weights, write_config
from tests.support.exported_bundles import made_once
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer
from tests.support.token_folders import random_tokens, small_config, write_tokens

VOLATILE = {"manifest.json", "training.json", "log.csv", "loss.png", "parity.json", ".lock"}
TRAINING = (
    *("--steps", "4", "--batch-size", "2", "--context-length", "8", "--checkpoint-interval", "1"),
    *("--eval-interval", "2", "--eval-batches", "1", "--log-interval", "1", "--warmup-steps", "1"),
    *("--device", "cpu"),
)


@dataclass(frozen=True)
class Command:
    """A command that writes ``out``.

    Args:
        arguments: of the command line, without the option for the output.
        resume: the arguments that continue an interrupted run, if there is a way to.
        keeps: what an interrupted run may leave beside the output, for the next run.
    """

    arguments: tuple[str, ...]
    resume: tuple[str, ...] | None = None
    keeps: frozenset[str] = frozenset()

    def to(self, output: str, *, force: bool = False) -> list[str]:
        """Return the arguments that write ``output``."""
        return [*self.arguments, "-o", output, *(["--force"] if force else [])]


MODEL = f"{INPUT}/model"
COMMANDS = {
    "to-hf": Command(("to-hf", "--weights", MODEL)),
    "onnx": Command(("onnx", "--weights", MODEL, "--no-verify", "--threads", "1")),
    "data": Command(
        ("data", f"{INPUT}/text", "--tokenizer", f"{INPUT}/tokenizer.json"),
        keeps=frozenset({f".{OUTPUT}.preparing"}),
    ),
    "train": Command(
        ("train", f"{INPUT}/tokens", "--config", f"{INPUT}/train.json", *TRAINING),
        resume=("train", "--resume", OUTPUT),
        keeps=frozenset({OUTPUT}),
    ),
}


def _write_inputs(folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    write_config(folder / "model")
    save_file(base_weights(), folder / "model" / "model.safetensors", {"format": "pt"})
    write_tokens(folder / "tokens", random_tokens(400), random_tokens(60, seed=1))
    config = small_config(num_hidden_layers=1, layer_types=("sliding_attention",))
    write_config(folder, config)
    (folder / "config.json").rename(folder / "train.json")
    tiny_gemma_tokenizer(400).save(folder)
    (folder / "text").mkdir()
    for number in range(12):
        text = f"Document {number} is about the sea. " * 400
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")


@contextmanager
def prepared_place() -> Iterator[Path]:
    """Yield a folder with all inputs in ``in``."""
    with children.scratch_folder() as place:
        copy_tree(made_once("faults/inputs", _write_inputs), place / INPUT)
        yield place


def digest(output: Path) -> dict[str, str]:
    """Return the hashes of the files of an output, except those that differ between equal runs."""
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in VOLATILE and "checkpoints" not in path.parts
    }


def complaint_about_output(output: Path) -> str:
    """Return what is wrong with an output that has a manifest: a file that is not as recorded."""
    manifest = output / "manifest.json"
    if not manifest.is_file():
        return ""
    files = json.loads(manifest.read_text())["files"]
    for name, record in files.items():
        data = (output / name).read_bytes() if (output / name).is_file() else b""
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            return f"{name} is not what the manifest records"
    return ""


@cache
def clean_digest(name: str) -> dict[str, str]:
    """Return the hashes of what an undisturbed run of a command writes."""
    with prepared_place() as place:
        finished = children.run(COMMANDS[name].to(OUTPUT), place)
        assert finished.code == 0, finished
        found = digest(place / OUTPUT)
        assert found
        return found


def with_old_output(name: str, place: Path) -> None:
    """Put an output of an earlier run, of other weights, in the place."""

    def make(folder: Path) -> None:
        with prepared_place() as other:
            arguments = {
                "train": [*COMMANDS["train"].to(OUTPUT), "--seed", "5"],
                "data": [*COMMANDS["data"].to(OUTPUT), "--validation-fraction", "0.5"],
            }
            default = ["to-hf", "--weights", MODEL, "--dtype", "bf16", "-o", OUTPUT]
            finished = children.run(arguments.get(name, default), other)
            assert finished.code == 0, finished
            copy_tree(other / OUTPUT, folder)

    copy_tree(made_once(f"faults/old-{name}", make), place / OUTPUT)


Place = Callable[[], object]
