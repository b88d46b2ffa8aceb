"""Compare what surrounds the weights of a bundle with a folder: tokens, templates, stops.

Logits say nothing about the ids that a text becomes, or where generation ends. Both sides are read
by the ``tokenizers`` library itself, so that this package's own reading of the folder is checked
too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from gemma3_export.config import TOKENIZER_NAME, load_config
from gemma3_export.files import is_file
from gemma3_export.parity.report.model import GateResult, MetricResult
from gemma3_export.parity.sequences import held_out_texts
from gemma3_export.tokenizer import Tokenizer
from gemma3_export.tokenizer.tokenizer_json import IMAGE_PLACEHOLDER

__all__ = ["tokenizer_gate"]

NAME = "tokenizer"
QUESTION = "Does the bundle turn text into tokens, and end and frame it, as the folder does?"
# Greek letters and other scripts are intended.
# ruff: noqa: RUF001
PROBES = (
    "  two  spaces   and\ttabs\t\t\n\nand lines\n\n\n\n",
    "def f(x):\n    return {'a': [x ** 2, None]}\n",
    "Grüße, naïve café; “quoted” … ½ ² e\u0301",
    "Привет, мир! Γειά σου Κόσμε 你好,世界。こんにちは 안녕하세요 مرحبا नमस्ते สวัสดี",
    "🙂 👍🏽 \U0001f469\u200d\U0001f467 𓀀 control \x00\x7f \ufffd a▁b <0x41>",
)


def tokenizer_gate(bundle: Path, folder: Path) -> GateResult | None:
    """Compare the tokenizer and the special tokens of two folders.

    Args:
        bundle: the folder of a bundle.
        folder: another bundle, or a folder in Hugging Face format.

    Returns:
        The gate; None if ``folder`` has no tokenizer.

    Raises:
        InputError: a tokenizer cannot be read.
    """
    if not is_file(folder / TOKENIZER_NAME):
        return None
    if not is_file(bundle / TOKENIZER_NAME):
        return _gate({"missing tokenizer": [str(folder)]})
    ours, theirs = (Tokenizer.from_folder(path) for path in (bundle, folder))
    our_backend, their_backend = (_backend(path) for path in (bundle, folder))
    vocabularies = [backend.get_vocab() for backend in (our_backend, their_backend)]
    if IMAGE_PLACEHOLDER not in vocabularies[0]:  # left out on purpose, for lack of an embedding
        vocabularies[1].pop(IMAGE_PLACEHOLDER, None)
    our_vocabulary, their_vocabulary = vocabularies
    templates = theirs.settings.templates
    found = {
        "tokens with another id": _differing(our_vocabulary, their_vocabulary),
        "added tokens with other rules": _differing(
            _rules(our_backend, our_vocabulary), _rules(their_backend, our_vocabulary)
        ),
        "texts with other tokens": [
            text
            for text in _probes(their_backend, their_vocabulary)
            if our_backend.encode(text).ids != their_backend.encode(text).ids
        ],
        "special tokens": _differing(
            _special_tokens(ours), _special_tokens(theirs), among=_special_tokens(theirs)
        ),
        # A folder without templates gets Gemma's, if its tokens are Gemma's.
        "chat templates": _differing(ours.settings.templates if templates else {}, templates),
        "token ids of the config": _differing(_config_ids(bundle), _config_ids(folder)),
    }
    return _gate(found)


def _gate(found: Mapping[str, list[str]]) -> GateResult:
    metrics = tuple(
        MetricResult(
            name=name,
            value=len(items),
            limit=0,
            passed=not items,
            where=f"{items[0]!r:.60}" if items else "",
        )
        for name, items in found.items()
    )
    return GateResult(
        name=NAME,
        question=QUESTION,
        passed=all(metric.passed for metric in metrics),
        metrics=metrics,
    )


def _backend(folder: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_NAME))
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    return backend


def _differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, among: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the keys whose values differ, in their order."""
    keys = dict.fromkeys((*theirs, *ours)) if among is None else among
    absent = object()
    return [key for key in keys if ours.get(key, absent) != theirs.get(key, absent)]


def _rules(backend: tokenizers.Tokenizer, among: Mapping[str, int]) -> dict[str, tuple[bool, ...]]:
    """Return how each added token is matched, and whether it is special."""
    return {
        token.content: (
            token.special,
            token.lstrip,
            token.rstrip,
            token.normalized,
            token.single_word,
        )
        for token in backend.get_added_tokens_decoder().values()
        if token.content in among
    }


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens that the vocabulary has, by name."""
    named = tokenizer.special_tokens()
    return {key: text for key, text in named.items() if tokenizer.token_id(text) is not None}


def _probes(backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> Iterator[str]:
    """Yield texts in many scripts, and each added token within text."""
    yield from PROBES
    yield from held_out_texts()
    for token in backend.get_added_tokens_decoder().values():
        if token.content in vocabulary:
            yield f"the {token.content} sea{token.content}"


def _config_ids(folder: Path) -> dict[str, Any]:
    config = load_config(folder)
    return {
        "eos_token_id": sorted(config.eos_token_id),
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
    }
