"""Tiny exported bundles, each made once in a test run."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from gemma3_export.config import Gemma3Config
from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.reference.weights.source import RandomSource
from tests.support.tiny_models import tiny_config

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


def source_of(variant: str = "irregular") -> RandomSource:
    """The weights that a bundle is made of."""
    return RandomSource(VARIANTS[variant], SEED)


def export_tiny(
    path: Path, target: str, variant: str = "irregular", screen: bool | None = None
) -> Path:
    """Export anew, without a tokenizer and without the parity check."""
    writer = OnnxWriter(target=target, screen=screen)
    return export_bundle(source_of(variant), path, writer).path


def exported_bundle(target: str, variant: str = "irregular") -> Path:
    """The bundle's folder; do not change what is in it."""
    return export_once(target, variant)


@functools.cache
def export_once(target: str, variant: str) -> Path:
    """A bundle in a folder that lives as long as the process."""
    screen = True if variant == "screened" else None
    return export_tiny(Path(scratch().name) / f"{target} {variant}", target, variant, screen)


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="gemma3-export-tests-")


def edit_json(path: Path, **changes: object) -> None:
    """Replace entries of a JSON object in a file, such as one of a copied bundle."""
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(data), encoding="utf-8")
