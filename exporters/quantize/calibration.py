"""Calibration text for quantization: a file, or text that the model itself generates.

Without a file the model continues tokens drawn from its whole vocabulary, so that all its languages
and kinds of text occur (as in LLM-QAT, Liu et al., arXiv:2305.17888). This needs neither a network
nor third-party text, and it samples the distribution that matters: the model's own.
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
from gemma3_export.files import read_text
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource
from gemma3_export.runtimes.generation.generate import generate
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.generation.request import TokenEvent
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.tokenizer import Tokenizer

__all__ = ["CalibrationData", "CalibrationOptions", "calibration_from_file", "sampled_calibration"]

MAX_CHARACTERS = 2**22  # to tokenize, at 165 bytes of memory per character
MAX_TEXT_BYTES = 2**30
STAGE = "sampling calibration text"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """Source and amount of calibration text.

    Raises:
        InputError: the text would be too short.
    """

    file: Path | None = None  # UTF-8; None lets the model generate the text
    sequences: int = 160
    tokens: int = 96  # per sequence, including <bos>
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 8 or self.tokens < 4:
            raise InputError(
                f"{self.sequences} calibration sequences of {self.tokens} tokens are too few; "
                "use at least 8 sequences of 4 tokens"
            )

    def load(
        self, source: WeightSource, tokenizer: Tokenizer | None, progress: Progress
    ) -> CalibrationData:
        """Read or generate the text.

        Raises:
            InputError: the file is not a text file, or is too short.
        """
        if self.file is None:
            return sampled_calibration(source, self, progress)
        if tokenizer is None:
            raise InputError(
                f"{self.file} needs a tokenizer, but the weights come without one; pass "
                "--tokenizer, or omit --calibration"
            )
        return calibration_from_file(self.file, tokenizer, source.config, self)

    def length(self, config: Gemma3Config) -> int:
        """Return the tokens per sequence, limited by the model's context length."""
        return min(self.tokens, config.max_position_embeddings)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationData:
    """Token sequences of equal length, and their description in the manifest."""

    ids: Tensor  # [sequences, tokens] int64
    description: dict[str, Any]  # JSON


def with_description(ids: Tensor, kind: str, **more: Any) -> CalibrationData:
    """Describe ``ids`` by size and hash."""
    digest = hashlib.sha256(ids.numpy().astype("<i4").tobytes()).hexdigest()
    sequences, tokens = ids.shape
    about = {"kind": kind, "sequences": sequences, "tokens": tokens, "ids_sha256": digest}
    return CalibrationData(ids=ids, description=about | more)


def calibration_from_file(
    path: Path, tokenizer: Tokenizer, config: Gemma3Config, options: CalibrationOptions
) -> CalibrationData:
    """Read sequences spread evenly over a UTF-8 text.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text, or has too few tokens.
    """
    text = read_text(path, limit_bytes=MAX_TEXT_BYTES, or_pipe=True)
    bos = config.bos_token_id
    found = tokenizer.encode_ordinary(sample_evenly(text, options.sequences))
    body = options.length(config) - 1
    needed = options.sequences * body
    if len(found) < needed:
        raise InputError(
            f"{path} has {len(found):,} tokens, but calibration needs {needed:,}; pass a longer "
            "text, or omit --calibration to let the model generate it"
        )
    starts = np.linspace(0, len(found) - body, options.sequences).astype(np.int64)
    rows = [[bos, *found[start : start + body]] for start in starts.tolist()]
    return with_description(
        torch.tensor(rows), "file", file_sha256=hashlib.sha256(text.encode()).hexdigest()
    )


def sample_evenly(text: str, pieces: int) -> str:
    """Return evenly spread pieces of a text that is too long to tokenize as a whole."""
    if len(text) <= MAX_CHARACTERS:
        return text
    size = MAX_CHARACTERS // pieces
    starts = np.linspace(0, len(text) - size, pieces).astype(np.int64)
    return "".join(text[start : start + size] for start in starts.tolist())


def sampled_calibration(
    source: WeightSource, options: CalibrationOptions, progress: Progress
) -> CalibrationData:
    """Generate sequences, each from ``<bos>`` and one random token."""
    config = source.config
    length = options.length(config)
    first = np.random.default_rng(options.seed).integers(0, config.vocab_size, options.sequences)
    prompts = [[config.bos_token_id, token] for token in first.tolist()]
    progress(STAGE, 0, length)
    # Half the memory of float32; samples need not be exact.
    runtime = ReferenceRuntime(load_reference(source, torch.bfloat16))
    events = generate(
        runtime,
        prompts,
        SamplingParams(temperature=1.0, seed=options.seed),
        GenerationOptions(max_new_tokens=length - 2, stop_token_ids=()),
    )
    written = [list(prompt) for prompt in prompts]
    for event in events:
        if isinstance(event, TokenEvent):
            written[event.request].append(event.token_id)
            if event.request == 0:
                progress(STAGE, len(written[0]), length)
    return with_description(torch.tensor(written), "sampled", seed=options.seed)
