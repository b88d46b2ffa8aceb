"""Hostile folders of tokens, and runs in which something was changed before they are resumed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.faults.harness import children
from tests.faults.harness.bytes_and_json import change_bytes, change_json
from tests.faults.harness.cases import INPUT, OUTPUT, Case
from tests.faults.harness.commands import COMMANDS, digest, prepared_place
from tests.faults.harness.files import copy_tree, replace_file
from tests.support.exported_bundles import made_once
from tests.support.token_folders import VOCAB_SIZE

ODD_CHECKPOINTS = ("step-abc.pt", "step-.pt", "step-00000099.pt", "step--1.pt", "step-9e9.pt")


def token_folder_case(folder: Path, rng: random.Random) -> Case:
    """Make a hostile folder of tokens and train on it."""
    with prepared_place() as place:
        copy_tree(place / INPUT, folder)
    name = _change_a_file(folder / "tokens", rng)
    arguments = COMMANDS["train"].to(OUTPUT)
    return Case(name=name, arguments=arguments, check=_check_run)


def interrupted_run() -> Path:
    """Return a shared place with a run that ended after 3 of its 4 steps, and its inputs."""

    def make(folder: Path) -> None:
        with prepared_place() as place:
            finished = children.run(COMMANDS["train"].to(OUTPUT), place)
            assert finished.code == 0, finished
            for path in (place / OUTPUT / "checkpoints").glob("step-00000004.*"):
                path.unlink()
            copy_tree(place, folder)

    return made_once("faults/interrupted", make)


def run_case(folder: Path, rng: random.Random) -> Case:
    """Change a file of an interrupted run, and resume it."""
    place = folder.parent
    copy_tree(interrupted_run() / INPUT, folder)
    copy_tree(interrupted_run() / OUTPUT, place / OUTPUT)
    record = place / OUTPUT / "training.json"
    data = json.loads(record.read_text())
    record.write_text(json.dumps(data | {"data_path": str(place / INPUT / "tokens")}))
    if rng.random() < 0.1:
        name = rng.choice(ODD_CHECKPOINTS)
        (place / OUTPUT / "checkpoints" / name).write_bytes(b"junk")
        name = f"there is {name}"
    else:
        name = _change_a_file(place / OUTPUT, rng)
    check: Callable[[Path, str], str | None] = _check_run
    if not name.startswith(("training.json", "log.csv")):
        check = partial(_check_same_run, _uninterrupted())
    return Case(
        name=name,
        arguments=["train", "--resume", OUTPUT],
        check=check,
        had_output=True,
    )


def _uninterrupted() -> dict[str, str]:
    """Return the hashes of the files of a run that was resumed undisturbed."""

    def make(folder: Path) -> None:
        copy_tree(interrupted_run(), folder)
        record = folder / OUTPUT / "training.json"
        data = json.loads(record.read_text())
        record.write_text(json.dumps(data | {"data_path": str(folder / INPUT / "tokens")}))
        finished = children.run(["train", "--resume", OUTPUT], folder)
        assert finished.code == 0, finished

    return digest(made_once("faults/resumed", make) / OUTPUT)


def _change_a_file(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    where = path.relative_to(folder).as_posix()
    kind = rng.choice(("json", "json", "bytes", "file"))
    if path.suffix == ".json" and kind == "json":
        name, text = change_json(json.loads(path.read_text()), rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind == "file":
        name = replace_file(path, rng)
    else:
        name, data = change_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
    return f"{where}: {name}"


def _check_run(place: Path, printed: str) -> str | None:
    """Check that a run that succeeded has finite weights of the right shapes."""
    del printed
    weights = load_file(place / OUTPUT / "model.safetensors")
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        return "a weight is not finite"
    rows = weights["model.embed_tokens.weight"].shape[0]
    record = json.loads((place / OUTPUT / "training.json").read_text())
    loss = record["result"]["validation_loss"]
    if loss is not None and not 0 < loss < 5 * math.log(max(rows, VOCAB_SIZE)):
        return f"the loss is {loss}"
    return None


def _check_same_run(expected: dict[str, str], place: Path, printed: str) -> str | None:
    found = digest(place / OUTPUT)
    names = ("model.safetensors", "config.json")
    if any(found.get(name) != expected[name] for name in names):
        return "the resumed run is not what it would have been without the damage"
    return _check_run(place, printed)
