"""Make the peers' virtual environments, and their models from our weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import MADE_FROM, WORKERS, Peer, model_of, parse, python_of
from gemma3_export.errors import UnavailableError
from gemma3_export.staging import staged_directory

__all__ = ["set_up"]

STDERR = 2  # what others print is not our output
Tell = Callable[[str], None]


def set_up(
    specs: Sequence[str],
    weights: str,
    place: Path,
    *,
    pip_arguments: Sequence[str] = (),
    force: bool = False,
    tell: Tell,
) -> None:
    """Make what is not there yet, one after the other.

    Args:
        specs: ``NAME`` or ``NAME:FORMAT``.
        weights: what :func:`gemma3_export.api.exporting.open_weights` takes.
        place: the folder of all peers.
        pip_arguments: more arguments for pip.
        force: make models again.
        tell: told what is done.

    Raises:
        InputError: no such peer, format or weights.
        UnavailableError: an installation or a conversion failed; its output says why.
    """
    wanted = [parse(spec) for spec in specs]
    for peer in dict.fromkeys(peer for peer, _ in wanted):
        install(peer, place, pip_arguments, tell)
    missing = [
        (peer, form)
        for peer, form in wanted
        if force or not (model_of(peer, form, place) / MADE_FROM).exists()
    ]
    if not missing:
        return
    with hugging_face_folder(weights, place, tell) as (folder, fingerprint):
        for peer, form in missing:
            convert(peer, form, place, folder, fingerprint, tell)


def install(peer: Peer, place: Path, pip_arguments: Sequence[str], tell: Tell) -> None:
    """Create a peer's environment; half of one is never left under its name."""
    target = place / peer.name
    if python_of(peer, place).exists():
        return
    tell(f"{target}: installing {peer.name}")
    place.mkdir(parents=True, exist_ok=True)
    try:
        run([sys.executable, "-m", "venv", str(target)], f"python -m venv {target}")
        pip = [str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", *pip_arguments]
        command = [*pip, *(["--no-deps"] if peer.lists_all else []), "-r", str(peer.requirements)]
        run(command, f"installing {peer.requirements.name}", dict(peer.build))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


@contextmanager
def hugging_face_folder(
    weights: str, place: Path, tell: Tell
) -> Iterator[tuple[Path, dict[str, object]]]:
    """The weights in float32 as every peer's converter reads them, and their fingerprint."""
    import torch

    from gemma3_export.api.exporting import open_weights
    from gemma3_export.reference.training.model_folder import export_hf_folder

    tell(f"reading {weights}")
    with (
        tempfile.TemporaryDirectory(dir=place, prefix=".weights-") as temporary,
        open_weights(weights) as source,
    ):
        folder = Path(temporary) / "model"
        export_hf_folder(source, folder, dtype=torch.float32)
        yield folder, source.fingerprint()


def convert(
    peer: Peer, form: str, place: Path, folder: Path, fingerprint: dict[str, object], tell: Tell
) -> None:
    """Let the peer's own tools make its model."""
    target = model_of(peer, form, place)
    tell(f"{target}: converting to {form}")
    with staged_directory(target, force=True) as staging:
        command = [str(python_of(peer, place).absolute()), str(WORKERS / "serving.py")]
        run(
            [*command, peer.module, "convert", str(folder), str(staging), form],
            f"converting to {peer.name}:{form}",
            {"HF_HUB_OFFLINE": "1"},
        )
        (staging / MADE_FROM).write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")


def run(command: Sequence[str], what: str, variables: dict[str, str] | None = None) -> None:
    """Run a program whose output the person sees.

    Raises:
        UnavailableError: it failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(command), env=environment | (variables or {}), stdout=STDERR, check=False
    )
    if done.returncode:
        raise UnavailableError(
            f"{what} failed with exit code {done.returncode}; its output above says why"
        )
