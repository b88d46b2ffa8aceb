"""Convert tiktoken encodings such as GPT-2's to tokenizers that run without tiktoken.

tiktoken merges the neighbors that form the token of lowest rank and has no list of merges, which
``tokenizers`` needs. The merge of each token is the last pair that remains when tiktoken encodes
the bytes of that token alone. Both libraries then agree, because the bytes of a token merge in the
same order within a longer text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.tokenizer.tokenizer import Tokenizer, character_of_byte

if TYPE_CHECKING:
    import tiktoken

__all__ = ["load_tiktoken", "merge_of_token", "tokenizer_from_tiktoken"]

_Ranks = Mapping[bytes, int]


def load_tiktoken(name: str = "gpt2") -> Tokenizer:
    """Load the tiktoken encoding ``name``, such as ``gpt2`` or ``cl100k_base``.

    tiktoken downloads the encoding once and caches it in ``TIKTOKEN_CACHE_DIR``.

    Raises:
        InputError: there is no such encoding.
        UnavailableError: tiktoken is not installed, or it cannot download the encoding.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UnavailableError(
            "tiktoken is not installed; run: pip install 'gemma3-export[tiktoken]'"
        ) from error
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise InputError(f"tiktoken has no encoding {name!r}; choose one of {', '.join(names)}")
    try:
        encoding = tiktoken.get_encoding(name)
    # The download can fail with any exception of the network and cache libraries.
    except Exception as error:
        raise UnavailableError(
            f"tiktoken cannot download {name!r} ({error}); connect to the network once, or set "
            "TIKTOKEN_CACHE_DIR to a folder in which another machine has cached it"
        ) from error
    return tokenizer_from_tiktoken(encoding)


def tokenizer_from_tiktoken(encoding: tiktoken.Encoding) -> Tokenizer:
    """Convert ``encoding`` to a tokenizer that yields the same ids.

    Raises:
        InputError: the encoding has a feature that cannot be converted.
        UnavailableError: the installed version of tiktoken is not supported.
    """
    try:
        # tiktoken has no public API for these three.
        ranks: _Ranks = encoding._mergeable_ranks
        specials: Mapping[str, int] = encoding._special_tokens
        pattern: str = encoding._pat_str
    except AttributeError as error:
        raise UnavailableError(
            f"this version of tiktoken is not supported ({error}); run: pip install 'tiktoken<1'"
        ) from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(
            f"the encoding {encoding.name!r} has no token for {len(missing)} of the 256 bytes "
            f"(first: {missing[0]}), so it cannot encode every text; choose another encoding"
        )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_to_oniguruma(pattern)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for special in specials:
        # It must be in the vocabulary to keep its id, but ordinary text must not match it.
        if len(splitter.pre_tokenize_str(special)) < 2:
            raise InputError(
                f"the encoding {encoding.name!r} has the special token {special!r}, which its "
                "pattern does not split, so ordinary text could yield it; rename the token"
            )
    backend = tokenizers.Tokenizer(_byte_level_model(ranks, specials))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special, normalized=False) for special in specials])
    return Tokenizer(backend)


def merge_of_token(token: bytes, ranks: _Ranks) -> tuple[bytes, bytes] | None:
    """Return the last two parts that tiktoken merges into ``token``; None if it never does."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        candidates = [
            (rank, index)
            for index in range(len(parts) - 1)
            if (rank := ranks.get(parts[index] + parts[index + 1])) is not None
        ]
        if not candidates:
            return None
        _, index = min(candidates)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_level_model(ranks: _Ranks, specials: Mapping[str, int]) -> models.BPE:
    character = character_of_byte()

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    merges = [
        (written(merge[0]), written(merge[1]))
        for token, _ in by_rank
        if (merge := merge_of_token(token, ranks))
    ]
    vocab = {written(token): rank for token, rank in by_rank} | dict(specials)
    if len(set(vocab.values())) != len(ranks) + len(specials):
        raise InputError(
            "two tokens of the encoding have the same id or the same text; choose another encoding"
        )
    # Like tiktoken, ignore_merges looks up the whole word before it merges anything.
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=True)


def _to_oniguruma(pattern: str) -> str:
    """Convert ``pattern`` to the regular expression syntax of ``tokenizers`` (Oniguruma).

    Two constructs differ: ``$`` and ``^`` match at every line, and ``{1,3}+`` is a repetition
    instead of a possessive quantifier. At the end of an alternative nothing can cause backtracking,
    so the plus is dropped there.
    """
    result: list[str] = []
    in_class = 0
    sign = re.compile(r"\\.|\{\d+(?:,\d*)?\}\+?|.", re.DOTALL)
    for match in sign.finditer(pattern):
        text = match[0]
        if text == "[":
            in_class += 1
        elif text == "]" and in_class:
            in_class -= 1
        elif not in_class and text in "^$":
            text = r"\A" if text == "^" else r"\z"
        elif not in_class and text.endswith("}+"):
            depth = pattern[: match.start()].count("(") - pattern[: match.start()].count(")")
            if depth or pattern[match.end() : match.end() + 1] not in ("", "|"):
                raise InputError(
                    f"the encoding's pattern has {text!r} inside an alternative, which cannot be "
                    "converted; write it as an atomic group (?>...)"
                )
            text = text.removesuffix("+")
        result.append(text)
    return "".join(result)
