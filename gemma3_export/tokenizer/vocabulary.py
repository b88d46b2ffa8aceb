"""Reduce a tokenizer to the tokens that a corpus or a list of scripts needs.

Byte pieces, added and special tokens, printable ASCII and the words of the chat template stay, so
every text can still be encoded: characters without a token become bytes. Merges whose parts and
result stay are kept in their order. A token is kept with the tokens that lead to it, so a text that
the full tokenizer encodes with kept tokens alone is encoded in the same way.
"""

from __future__ import annotations

import heapq
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from gemma3_export.errors import InputError
from gemma3_export.files import is_file, read_text
from gemma3_export.tokenizer.chat import ChatMessage
from gemma3_export.tokenizer.tokenizer import Tokenizer
from gemma3_export.tokenizer.tokenizer_json import parse_tokenizer_json

__all__ = ["LANGUAGES", "SCRIPTS", "Reduction", "reduce_tokenizer"]

MAX_CORPUS_BYTES = 2**30
PART_CHARACTERS = 2**24  # of a corpus that are encoded at once; parts end at line breaks
SPACE = "▁"  # how Gemma's tokenizers write a space
ASCII = [chr(code) for code in range(0x21, 0x7F)]
# Scripts by the first word of the Unicode names of their characters.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "arabic": ("ARABIC",),
    "armenian": ("ARMENIAN",),
    "bengali": ("BENGALI",),
    "cyrillic": ("CYRILLIC",),
    "devanagari": ("DEVANAGARI",),
    "ethiopic": ("ETHIOPIC",),
    "georgian": ("GEORGIAN",),
    "greek": ("GREEK",),
    "gujarati": ("GUJARATI",),
    "gurmukhi": ("GURMUKHI",),
    "han": ("CJK", "IDEOGRAPHIC", "BOPOMOFO"),
    "hangul": ("HANGUL",),
    "hebrew": ("HEBREW",),
    "kana": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH"),
    "kannada": ("KANNADA",),
    "khmer": ("KHMER",),
    "lao": ("LAO",),
    "latin": ("LATIN", "FEMININE", "MASCULINE"),
    "malayalam": ("MALAYALAM",),
    "myanmar": ("MYANMAR",),
    "oriya": ("ORIYA",),
    "sinhala": ("SINHALA",),
    "tamil": ("TAMIL",),
    "telugu": ("TELUGU",),
    "thai": ("THAI",),
    "tibetan": ("TIBETAN",),
}
LANGUAGES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("am", "ti"), ("ethiopic",)),
    **dict.fromkeys(("ar", "fa", "ps", "sd", "ug", "ur"), ("arabic",)),
    **dict.fromkeys(("be", "bg", "kk", "ky", "mk", "mn", "ru", "tg", "uk"), ("cyrillic",)),
    **dict.fromkeys(("bn", "as"), ("bengali",)),
    **dict.fromkeys(("hi", "mr", "ne", "sa"), ("devanagari",)),
    **dict.fromkeys(("he", "yi"), ("hebrew",)),
    **dict.fromkeys(
        (
            *("af", "ca", "cs", "cy", "da", "de", "en", "es", "et", "eu", "fi", "fr", "ga", "gl"),
            *("hr", "hu", "id", "is", "it", "lt", "lv", "ms", "mt", "nl", "no", "pl", "pt", "ro"),
            *("sk", "sl", "sq", "sv", "sw", "tl", "tr", "uz", "vi"),
        ),
        ("latin",),
    ),
    "el": ("greek",),
    "gu": ("gujarati",),
    "hy": ("armenian",),
    "ja": ("han", "kana"),
    "ka": ("georgian",),
    "km": ("khmer",),
    "kn": ("kannada",),
    "ko": ("hangul",),
    "lo": ("lao",),
    "ml": ("malayalam",),
    "my": ("myanmar",),
    "or": ("oriya",),
    "pa": ("gurmukhi",),
    "si": ("sinhala",),
    "sr": ("cyrillic", "latin"),
    "ta": ("tamil",),
    "te": ("telugu",),
    "th": ("thai",),
    "zh": ("han",),
}
# Letters and marks that belong to no script.
COMMON_WORDS = {"COMBINING", "MICRO", "MODIFIER", "OHM", "SUPERSCRIPT", "VARIATION", "ZERO"}
Merge = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """A tokenizer with fewer tokens.

    Attributes:
        tokenizer: the reduced tokenizer; it has the settings of the full one.
        kept_ids: ids of the full tokenizer in ascending order; the index is the new id.
        about: what the tokens were chosen by, such as ``notes.txt`` or ``latin``.
    """

    tokenizer: Tokenizer
    kept_ids: tuple[int, ...]
    about: str

    def new_ids(self, ids: Iterable[int]) -> list[int]:
        """Return the new ids of kept tokens.

        Raises:
            KeyError: a token was not kept.
        """
        table = {old: new for new, old in enumerate(self.kept_ids)}
        return [table[token_id] for token_id in ids]


def reduce_tokenizer(
    tokenizer: Tokenizer, request: str, *, vocab_size: int, needed_ids: Iterable[int] = ()
) -> Reduction:
    """Reduce a tokenizer of Gemma's type.

    Args:
        tokenizer: the full tokenizer.
        request: a UTF-8 text file, or languages and scripts such as ``en,de`` or ``latin,greek``.
        vocab_size: embedding rows of the model; tokens with higher ids are dropped.
        needed_ids: further ids to keep, such as those of the model's config.

    Raises:
        InputError: ``request`` is neither, or the tokenizer is of another type.
    """
    state = json.loads(tokenizer.to_json())
    vocab = _vocabulary(state, vocab_size)
    merges = _merges(state)
    texts, scripts, about = _read_request(request)
    whole = {*_byte_pieces(), *(token["content"] for token in state["added_tokens"])}
    wanted = {*ASCII, SPACE, *_always(tokenizer, vocab, needed_ids)}
    pieces = {token_id: piece for piece, token_id in vocab.items()}
    used = {token_id for text in texts for ids in _encodings(tokenizer, text) for token_id in ids}
    wanted |= {pieces[token_id] for token_id in used}
    if scripts:
        wanted |= {piece for piece in vocab if _is_written_in(piece, scripts)}
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    kept = (whole | _with_parts(wanted - whole, ranks)) & vocab.keys()
    order = sorted(kept, key=vocab.__getitem__)
    reduced = parse_tokenizer_json(json.dumps(_rewrite(state, order, merges)))
    result = Reduction(
        tokenizer=Tokenizer(reduced, tokenizer.settings),
        kept_ids=tuple(vocab[piece] for piece in order),
        about=about,
    )
    for text in texts:
        _check_encoding(tokenizer, result, text)
    return result


def _vocabulary(state: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    """Return the pieces of the model and their ids, added tokens included."""
    model = state["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise InputError(
            "the vocabulary can be reduced for Gemma's type of tokenizer only (BPE with byte "
            "pieces); leave --reduce-vocab out"
        )
    vocab: dict[str, int] = dict(model["vocab"])
    vocab |= {token["content"]: token["id"] for token in state["added_tokens"]}
    missing = [piece for piece in _byte_pieces() if piece not in vocab]
    if missing:
        raise InputError(
            f"the tokenizer lacks {len(missing)} byte pieces, such as {missing[0]}, so its "
            "vocabulary cannot be reduced; leave --reduce-vocab out"
        )
    return {piece: token_id for piece, token_id in vocab.items() if token_id < vocab_size}


def _byte_pieces() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _merges(state: Mapping[str, Any]) -> list[Merge]:
    """Return the merges in their order; older files write a pair as one string."""
    written = state["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in written)
    return [(first, second) for first, second in pairs]


def _read_request(request: str) -> tuple[list[str], set[str], str]:
    """Return the texts of a corpus or the words of scripts, and what to call them."""
    path = Path(request)
    if is_file(path):
        text = read_text(path, limit_bytes=MAX_CORPUS_BYTES)
        if not text.strip():
            raise InputError(f"{path} is empty; give a text with the words to keep")
        if path.suffix.lower() in (".json", ".jsonl"):
            text = "\n".join(_json_strings(text, path))
        return list(_parts(text)), set(), path.name
    names = [name.strip().lower() for name in request.split(",")]
    found: set[str] = set()
    for name in names:
        for script in LANGUAGES.get(name, (name,)):
            if script not in SCRIPTS:
                raise InputError(
                    f"{request!r:.100} is neither a text file nor a list of languages and scripts: "
                    f"{script!r:.40} is unknown; languages: {', '.join(sorted(LANGUAGES))}; "
                    f"scripts: {', '.join(SCRIPTS)}"
                )
            found |= set(SCRIPTS[script])
    return [], found, ",".join(names)


def _json_strings(text: str, path: Path) -> Iterator[str]:
    """Yield the strings in JSON or in lines of JSON, without quotes and escapes."""
    is_lines = path.suffix.lower() == ".jsonl"
    for number, document in enumerate(text.split("\n") if is_lines else [text], start=1):
        if not document.strip():
            continue
        try:
            values = [msgspec.json.decode(document)]
        except (msgspec.DecodeError, RecursionError) as error:
            raise InputError(
                f"{path}:{number} is not valid JSON ({error}); correct it, or rename the file to "
                ".txt if it is plain text"
            ) from error
        while values:
            value = values.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                values += [*value, *value.values()]


def _parts(text: str) -> Iterator[str]:
    """Yield ``text`` in parts that end at line breaks."""
    start = 0
    while start < len(text):
        stop = start + PART_CHARACTERS
        if stop < len(text):
            stop = (text.find("\n", stop) + 1) or len(text)
        yield text[start:stop]
        start = stop


def _encodings(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """Yield the ids of a text as a whole, and of each line, with and without control tokens."""
    yield tokenizer.encode(text, add_bos=False)
    yield tokenizer.encode_ordinary(text)
    yield from tokenizer.encode_ordinary_batch(text.splitlines())


def _check_encoding(tokenizer: Tokenizer, reduction: Reduction, text: str) -> None:
    """Check that the reduced tokenizer encodes a text as the full one does."""
    table = {old: new for new, old in enumerate(reduction.kept_ids)}
    full, reduced = _encodings(tokenizer, text), _encodings(reduction.tokenizer, text)
    for ids, found in zip(full, reduced, strict=True):
        if [table.get(token_id) for token_id in ids] != found:
            raise InputError(
                f"the reduced tokenizer would encode {text!r:.60} differently, which its rules do "
                "not allow; leave --reduce-vocab out"
            )


def _always(
    tokenizer: Tokenizer, vocab: Mapping[str, int], needed_ids: Iterable[int]
) -> Iterator[str]:
    """Yield the special tokens, and the words of the chat template."""
    yield from tokenizer.special_tokens().values()
    pieces = {token_id: piece for piece, token_id in vocab.items()}
    named = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk"))
    ids = {*needed_ids, *(token_id for token_id in named if token_id is not None)}
    if unknown := sorted(token_id for token_id in ids if token_id not in pieces):
        raise InputError(
            f"the token id {unknown[0]} of the model's config has no token, so the vocabulary "
            "cannot be reduced; correct the config"
        )
    ids |= _chat_ids(tokenizer)
    yield from (pieces[token_id] for token_id in ids if token_id in pieces)


def _chat_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that a chat template writes around messages."""
    found: set[int] = set()
    turns: list[ChatMessage] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi"},
    ]
    system: list[ChatMessage] = [{"role": "system", "content": "Hi"}, *turns]
    for messages in (turns, system):
        try:
            found |= set(tokenizer.encode_chat(messages))
        except InputError:  # no template, or one that takes no such conversation
            continue
    if tokenizer.chat.exists:
        found |= set(tokenizer.encode(tokenizer.chat.literals, add_bos=False))
    return found


# Scripts


def _is_written_in(piece: str, scripts: set[str]) -> bool:
    return all((script := _script(character)) is None or script in scripts for character in piece)


@lru_cache(maxsize=2**16)
def _script(character: str) -> str | None:
    """Return the first word of a letter's name, None for characters of all scripts."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    word = unicodedata.name(character, "UNKNOWN").split(" ")[0].split("-")[0]
    return None if word in COMMON_WORDS else word


# Merges


def _with_parts(pieces: Iterable[str], ranks: Mapping[Merge, int]) -> set[str]:
    """Return ``pieces`` and all that the encoder merges on the way to them.

    Within the text of one token no merge depends on what surrounds it, or it would not end as one
    token. So encoding a token's own text shows how it is made.
    """
    found: set[str] = set()
    for piece in pieces:
        if piece not in found:
            found.add(piece)
            found.update(_made_on_the_way(piece, ranks))
    return found


def _made_on_the_way(piece: str, ranks: Mapping[Merge, int]) -> Iterator[str]:
    """Yield the characters of ``piece`` and the result of each merge, as the encoder makes them."""
    symbols: list[str | None] = list(piece)
    yield from piece
    following = [*range(1, len(symbols)), -1]
    preceding = list(range(-1, len(symbols) - 1))
    queue: list[tuple[int, int, str, str]] = []

    def push(at: int) -> None:
        after = following[at] if at >= 0 else -1
        if after >= 0:
            first, second = symbols[at], symbols[after]
            assert first is not None
            assert second is not None
            if (rank := ranks.get((first, second))) is not None:
                heapq.heappush(queue, (rank, at, first, second))

    for at in range(len(symbols) - 1):
        push(at)
    while queue:
        _, at, first, second = heapq.heappop(queue)
        after = following[at]
        if symbols[at] != first or after < 0 or symbols[after] != second:
            continue  # one of the two has been merged since
        symbols[at], symbols[after] = first + second, None
        following[at] = following[after]
        if following[at] >= 0:
            preceding[following[at]] = at
        yield first + second
        push(preceding[at])
        push(at)


def _rewrite(
    state: Mapping[str, Any], order: Sequence[str], merges: Sequence[Merge]
) -> dict[str, Any]:
    """Return the tokenizer with the pieces in ``order``, whose index is the new id."""
    ids = {piece: new for new, piece in enumerate(order)}
    kept = [
        [first, second]
        for first, second in merges
        if first in ids and second in ids and first + second in ids
    ]
    added = [
        token | {"id": ids[token["content"]]}
        for token in state["added_tokens"]
        if token["content"] in ids
    ]
    # Other added tokens stay out of the model: it would find them in text that spells them.
    in_model = state["model"]["vocab"]
    model = state["model"] | {
        "vocab": {piece: ids[piece] for piece in order if piece in in_model},
        "merges": kept,
    }
    return dict(state) | {
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "model": model,
        "post_processor": _renumbered(state.get("post_processor"), ids),
    }


def _renumbered(value: Any, ids: Mapping[str, int]) -> Any:
    """Return a post-processor with the new ids of its special tokens."""
    if isinstance(value, list):
        return [_renumbered(item, ids) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"id", "ids", "tokens"}:
        return value | {"ids": [ids[token] for token in value["tokens"]]}
    return {key: _renumbered(item, ids) for key, item in value.items()}
