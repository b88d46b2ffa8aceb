"""Create the peers' virtual environments, and convert our weights into their models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import PEERS, Peer
from gemma3_export.bench.peers import (
    ENGINES,
    InstalledPeer,
    installed_peers,
    model_folder,
    split_spec,
)
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.staging import staged_directory

__all__ = ["set_up"]

STDERR = 2  # the output of pip and of converters is not ours
Echo = Callable[[str], None]


def set_up(
    specs: Sequence[str],
    weights: str,
    folder: Path,
    *,
    pip_arguments: Sequence[str] = (),
    force: bool = False,
    echo: Echo,
) -> None:
    """Create the environments and models that do not exist yet, one at a time.

    Args:
        specs: ``NAME`` or ``NAME:FORMAT``.
        weights: what :func:`gemma3_export.api.exporting.open_weights` takes.
        folder: contains all peers.
        pip_arguments: more arguments for pip.
        force: convert again models that already exist.
        echo: prints a line about each step.

    Raises:
        InputError: an engine, a format or the weights do not exist.
        UnavailableError: an installation or a conversion failed; its output says why.
    """
    wanted = [parse(spec) for spec in specs]
    for peer in dict.fromkeys(peer for peer, _ in wanted):
        install(peer, folder, pip_arguments, echo)
    existing = set() if force else {peer.spec for peer in installed_peers(folder)}
    missing = [
        (peer, weight_format)
        for peer, weight_format in wanted
        if f"{peer.name}:{weight_format}" not in existing
    ]
    if not missing:
        return
    with hugging_face_folder(weights, folder, echo) as (source, fingerprint):
        for peer, weight_format in missing:
            convert(peer, weight_format, folder, source, fingerprint, echo)


def parse(spec: str) -> tuple[Peer, str]:
    """Split ``NAME`` or ``NAME:FORMAT`` into an engine and a format.

    Raises:
        InputError: the engine or the format does not exist.
    """
    name, weight_format = split_spec(spec)
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose {', '.join(ENGINES)}")
    return PEERS[name], weight_format


def install(peer: Peer, folder: Path, pip_arguments: Sequence[str], echo: Echo) -> None:
    """Create an environment; a failed or interrupted installation leaves nothing."""
    target = folder / peer.name
    if peer.python(folder).exists():
        return
    echo(f"{target}: installing {peer.name}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run([sys.executable, "-m", "venv", str(target)], f"python -m venv {target}")
        pip = [str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", *pip_arguments]
        no_dependencies = ["--no-deps"] if peer.pins_dependencies else []
        command = [*pip, *no_dependencies, "-r", str(peer.requirements)]
        run(command, f"installing {peer.requirements.name}", dict(peer.build))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


@contextmanager
def hugging_face_folder(
    weights: str, folder: Path, echo: Echo
) -> Iterator[tuple[Path, dict[str, object]]]:
    """Yield a folder with the weights in float32, which every converter reads, and a fingerprint.

    The folder is removed afterwards.
    """
    import torch

    from gemma3_export.api.exporting import open_weights
    from gemma3_export.reference.training.model_folder import export_hf_folder

    echo(f"reading {weights}")
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".weights-") as temporary,
        open_weights(weights) as source,
    ):
        target = Path(temporary) / "model"
        export_hf_folder(source, target, dtype=torch.float32)
        yield target, source.fingerprint()


def convert(
    peer: Peer,
    weight_format: str,
    folder: Path,
    source: Path,
    fingerprint: dict[str, object],
    echo: Echo,
) -> None:
    """Convert the weights in ``source`` with the engine's own tools, and describe the result."""
    target = model_folder(peer.name, weight_format, folder)
    echo(f"{target}: converting to {weight_format}")
    with staged_directory(target, force=True) as staging:
        command = peer.command(folder)
        run(
            [*command, "convert", str(source), str(staging), weight_format],
            f"converting to {peer.name}:{weight_format}",
            {"HF_HUB_OFFLINE": "1"},
        )
        InstalledPeer(
            name=peer.name,
            weight_format=weight_format,
            command=command,
            made_from=fingerprint,
            model=staging,
        ).write()


def run(command: Sequence[str], purpose: str, variables: dict[str, str] | None = None) -> None:
    """Run a program whose output the user sees.

    Raises:
        UnavailableError: it failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(command), env=environment | (variables or {}), stdout=STDERR, check=False
    )
    if done.returncode:
        raise UnavailableError(
            f"{purpose} failed with exit code {done.returncode}; its output above says why"
        )
