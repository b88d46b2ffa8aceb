"""The text that quantisation looks at: a file, or what the model itself writes.

Without a file the model continues tokens drawn from its whole vocabulary, so that all its languages
and kinds of text come up (as LLM-QAT does, Liu et al., arXiv:2305.17888). That needs no network and
no text of anybody else's, and it is the distribution that matters: the model's own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import InputError
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource
from gemma3_export.runtimes.generation.loop import GenerationOptions, TokenEvent, generate
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.tokenizer import Tokenizer

__all__ = ["Calibration", "CalibrationPlan", "calibration_from_file", "sampled_calibration"]

MOST_CHARACTERS = 2**22  # of a text that are tokenised, which takes 165 bytes for each
STAGE = "sampling calibration text"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPlan:
    """What text to calibrate with.

    Raises:
        InputError: a size is too small.
    """

    file: Path | None = None  # UTF-8; None lets the model write
    sequences: int = 160
    tokens: int = 96  # of a sequence, <bos> included
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 8 or self.tokens < 4:
            raise InputError(
                f"calibration with {self.sequences} sequences of {self.tokens} tokens is too "
                "little; use at least 8 of 4"
            )

    def load(
        self, source: WeightSource, tokenizer: Tokenizer | None, progress: Progress
    ) -> Calibration:
        """The text, read or sampled.

        Raises:
            InputError: the file is no text, or too short.
        """
        if self.file is None:
            return sampled_calibration(source, self, progress)
        if tokenizer is None:
            raise InputError(
                f"{self.file} needs a tokenizer, and none came with the weights; give --tokenizer, "
                "or leave --calibration out"
            )
        return calibration_from_file(self.file, tokenizer, source.config, self)

    def length(self, config: Gemma3Config) -> int:
        """Tokens of a sequence that the model has room for."""
        return min(self.tokens, config.max_position_embeddings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Token sequences of one length, and what the manifest says of them."""

    ids: Tensor  # [sequences, tokens] int64
    description: dict[str, Any]  # JSON


def described(ids: Tensor, kind: str, **more: Any) -> Calibration:
    """Name the text by its hash."""
    digest = hashlib.sha256(ids.numpy().astype("<i4").tobytes()).hexdigest()
    sequences, tokens = ids.shape
    about = {"kind": kind, "sequences": sequences, "tokens": tokens, "ids_sha256": digest}
    return Calibration(ids=ids, description=about | more)


def calibration_from_file(
    path: Path, tokenizer: Tokenizer, config: Gemma3Config, plan: CalibrationPlan
) -> Calibration:
    """Sequences spread evenly over a UTF-8 text.

    Raises:
        InputError: the file cannot be read, is no UTF-8 text, or has too few tokens.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path} cannot be read: {reason}; give a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    bos = config.bos_token_id
    found = tokenizer.encode_ordinary(thinned(text, plan.sequences))
    body = plan.length(config) - 1
    needed = plan.sequences * body
    if len(found) < needed:
        raise InputError(
            f"{path} has {len(found):,} tokens and calibration needs {needed:,}; give a longer "
            "text, or leave --calibration out to let the model write its own"
        )
    starts = np.linspace(0, len(found) - body, plan.sequences).astype(np.int64)
    rows = [[bos, *found[start : start + body]] for start in starts.tolist()]
    return described(torch.tensor(rows), "file", file_sha256=hashlib.sha256(data).hexdigest())


def thinned(text: str, pieces: int) -> str:
    """A text that can be tokenised in little memory: of a longer one, pieces spread evenly."""
    if len(text) <= MOST_CHARACTERS:
        return text
    size = MOST_CHARACTERS // pieces
    starts = np.linspace(0, len(text) - size, pieces).astype(np.int64)
    return "".join(text[start : start + size] for start in starts.tolist())


def sampled_calibration(
    source: WeightSource, plan: CalibrationPlan, progress: Progress
) -> Calibration:
    """Let the model write, from ``<bos>`` and one token each that is drawn at random."""
    config = source.config
    length = plan.length(config)
    first = np.random.default_rng(plan.seed).integers(0, config.vocab_size, plan.sequences)
    prompts = [[config.bos_token_id, token] for token in first.tolist()]
    progress(STAGE, 0, length)
    # Half the memory of float32; what is sampled only has to be likely.
    runtime = ReferenceRuntime(load_reference(source, torch.bfloat16))
    events = generate(
        runtime,
        prompts,
        SamplingParams(temperature=1.0, seed=plan.seed),
        GenerationOptions(max_new_tokens=length - 2, stop_token_ids=()),
    )
    written = [list(prompt) for prompt in prompts]
    for event in events:
        if isinstance(event, TokenEvent):
            written[event.request].append(event.token_id)
            if event.request == 0:
                progress(STAGE, len(written[0]), length)
    return described(torch.tensor(written), "sampled", seed=plan.seed)
