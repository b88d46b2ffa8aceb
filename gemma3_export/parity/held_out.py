"""Gate B on text: what a quantised export predicts, beside the full-precision model.

The text was written for this project, so no calibration and no training has seen it: prose, code,
tables, a letter, questions, and nine languages.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch

from gemma3_export.parity.differences import LogitDifference, compare_logits
from gemma3_export.parity.expected import Truth
from gemma3_export.parity.noise_floor import next_ids
from gemma3_export.parity.observations import TeacherForcing
from gemma3_export.parity.options import Progress
from gemma3_export.parity.sequences import TokenSequence
from gemma3_export.runtimes.protocol import Runtime
from gemma3_export.tokenizer.tokenizer import Tokenizer

__all__ = ["held_out_passages", "held_out_sequences", "measure_quality"]

CHUNK = 32  # tokens a step; all their logits are compared
SEPARATOR = "\n---\n"


def held_out_passages() -> list[str]:
    """The passages, each 100 to 250 tokens of Gemma's tokenizer."""
    text = resources.files(__package__).joinpath("held_out.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n").split(SEPARATOR)


def held_out_sequences(tokenizer: Tokenizer, limit: int) -> list[TokenSequence]:
    """The passages as tokens, each cut at ``limit``."""
    return [
        TokenSequence(f"held out {index}", np.array(tokenizer.encode(text)[:limit], np.int64), True)
        for index, text in enumerate(held_out_passages())
    ]


def measure_quality(
    candidate: Runtime, full: Truth, sequences: list[TokenSequence], progress: Progress
) -> LogitDifference:
    """Every position of ``sequences`` on the candidate, against full precision."""
    parts = []
    for index, sequence in enumerate(sequences):
        progress("comparing with full precision", index, len(sequences))
        walk = TeacherForcing(candidate, sequences, [index])
        while left := len(sequence.ids) - walk.fed[0]:
            for seen in walk.step(min(left, CHUNK)):
                expected = full.logits(index, seen.positions)
                following = next_ids(sequence, seen.positions)
                parts.append(compare_logits(expected, torch.from_numpy(seen.logits), following))
    progress("comparing with full precision", len(sequences), len(sequences))
    return LogitDifference.join(parts)
