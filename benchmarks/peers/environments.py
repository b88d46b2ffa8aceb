"""Create the peers' virtual environments, and convert our weights into their models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.environments import Echo, create_environment, run
from benchmarks.peers import PEERS, Peer
from gemma3_export.bench.peers import (
    ENGINES,
    InstalledPeer,
    installed_peers,
    model_folder,
    split_spec,
)
from gemma3_export.errors import InputError
from gemma3_export.staging import staged_directory

__all__ = ["set_up"]


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
    no_dependencies = ["--no-deps"] if peer.pins_dependencies else []
    create_environment(
        folder / peer.name,
        [*no_dependencies, "-r", str(peer.requirements)],
        pip_arguments=pip_arguments,
        variables=dict(peer.build),
        echo=echo,
    )


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
