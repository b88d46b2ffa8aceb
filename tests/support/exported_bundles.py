"""Tiny exported bundles that tests share: each is made once per test run, for all its processes.

A shared folder must not be changed; copy it first.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gemma3_export.bundle.manifest import read_manifest, write_manifest
from gemma3_export.config import Gemma3Config
from gemma3_export.exporters.bundle_writer import GraphWriter, export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.reference.weights.source import RandomSource
from tests.support.tiny_models import tiny_config

if sys.platform != "win32":
    import fcntl

TARGETS = ("ort", "portable")
SEED = 4
VARIANTS: dict[str, Gemma3Config] = {
    "irregular": tiny_config(),
    "one sliding layer, many tokens": tiny_config(
        num_hidden_layers=1, layer_types=("sliding_attention",), vocab_size=40_000
    ),
    "screened": tiny_config(vocab_size=2_500),
    "all full, one kv head, untied": tiny_config(
        num_hidden_layers=3,
        layer_types=("full_attention",) * 3,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    ),
}
SCRATCH_VARIABLE = "GEMMA3_TESTS_SCRATCH"


def source_of(variant: str = "irregular") -> RandomSource:
    """Return the weights of a variant's bundles."""
    return RandomSource(VARIANTS[variant], SEED)


def export_tiny(
    path: Path, target: str, variant: str = "irregular", screen: bool | None = None
) -> Path:
    """Export a bundle of the test's own, without a tokenizer and without the parity check."""
    writer = OnnxWriter(target=target, screen=screen)
    return export_bundle(source_of(variant), path, writer).path


def exported_bundle(target: str, variant: str = "irregular") -> Path:
    """Return a variant's shared ONNX bundle in float32."""
    screen = True if variant == "screened" else None
    return exported(OnnxWriter(target=target, screen=screen), VARIANTS[variant])


@functools.cache
def exported(
    writer: GraphWriter, config: Gemma3Config = VARIANTS["irregular"], seed: int = SEED
) -> Path:
    """Return the shared bundle of a writer, a config and a seed of random weights.

    It has no tokenizer and no parity report.
    """
    digest = hashlib.sha256(repr((writer, config, seed)).encode()).hexdigest()[:16]
    return made_once(
        f"{writer.runtime}-{digest}",
        lambda path: export_bundle(RandomSource(config, seed), path, writer),
    )


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the shared folder ``name``, made by the first process of the test run that asks."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        if sys.platform != "win32":  # where tests run in one process
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                make(path)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
    return path


def scratch() -> Path:
    """Return the folder of everything shared; it is removed when the test run ends.

    The first process makes it, and the workers of pytest-xdist inherit it.
    """
    if SCRATCH_VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix="gemma3-export-tests-")
        os.environ[SCRATCH_VARIABLE] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(os.environ[SCRATCH_VARIABLE])


def edit_json(path: Path, **changes: object) -> None:
    """Replace entries of a JSON object in a file, such as one of a copied bundle."""
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(data), encoding="utf-8")


def accept_changes(bundle: Path) -> None:
    """Write the hashes of changed files to the manifest, so that only parity can notice them."""
    write_manifest(bundle, read_manifest(bundle), {})
