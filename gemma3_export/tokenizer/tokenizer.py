"""Text to token ids and back, over the ``tokenizers`` library.

Two kinds of tokenizer occur: Gemma's (BPE over characters, spaces written as ``▁``, unknown
characters as byte pieces ``<0xE2>``) and GPT-2's (BPE over bytes). In both, every token stands for
a fixed row of bytes, whatever surrounds it; decoding is done on that fact here, so that streaming
costs the same for every token and its parts always add up to the whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from gemma3_export.errors import InputError
from gemma3_export.tokenizer.chat import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TURN,
    GENERATION_PROMPT,
    START_OF_TURN,
    ChatMessage,
    chat_turns,
)

__all__ = [
    "IMAGE_PLACEHOLDER",
    "StreamingDecoder",
    "Tokenizer",
    "character_of_byte",
    "has_byte_level_decoder",
    "parse_tokenizer_json",
    "piece_bytes",
    "read_tokenizer_json",
]

MAX_PADDING_ROWS = 128


class Tokenizer:
    """A Gemma or GPT-2 style tokenizer; safe to share between threads.

    ``backend`` must not have the image placeholder as an added token: use ``from_file``, which
    drops it.

    Raises:
        InputError: ``backend`` is neither of the two kinds.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._is_byte_level = has_byte_level_decoder(backend)
        added = sorted(backend.get_added_tokens_decoder().items())
        self._special_ids = frozenset(
            token_id
            for token_id, token in added
            if token.special or token.content in CONTROL_TOKENS
        )
        # The same tokenizer (the model is shared, not copied) that knows no special tokens: to it
        # they are text like any other.
        self._ordinary = tokenizers.Tokenizer(backend.model)
        self._ordinary.normalizer = backend.normalizer
        self._ordinary.pre_tokenizer = backend.pre_tokenizer
        self._ordinary.add_tokens(
            [token for token_id, token in added if token_id not in self._special_ids]
        )
        self.bos_token_id = self.token_id("<bos>")
        self.eos_token_id = self._first_id("<eos>", "<|endoftext|>")
        self.pad_token_id = self.token_id("<pad>")
        self.unk_token_id = self.token_id("<unk>")

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            InputError: the file is missing, truncated or no Gemma or GPT-2 style tokenizer.
        """
        return cls(read_tokenizer_json(Path(path)))

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read ``tokenizer.json`` out of ``folder``.

        Raises:
            InputError: as ``from_file``.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            hint = ""
            if (folder / "tokenizer.model").is_file():
                hint = "; its tokenizer.model (SentencePiece) is not read, fetch tokenizer.json too"
            raise InputError(f"{folder} has no tokenizer.json{hint}")
        return cls.from_file(path)

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id + 1, not counting the image placeholder."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        vocab.pop(IMAGE_PLACEHOLDER, None)
        return max(vocab.values(), default=-1) + 1

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that decoding skips and that text handled as ordinary never yields."""
        return self._special_ids

    @property
    def is_gemma(self) -> bool:
        """Whether this tokenizer has Gemma's turn tokens, and so can encode a conversation."""
        needed = (self.bos_token_id, self.token_id(START_OF_TURN), self.token_id(END_OF_TURN))
        return None not in needed

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether all token ids mean the same to both."""
        return bool(self._backend.get_vocab() == other._backend.get_vocab())

    def token_id(self, token: str) -> int | None:
        """Id of the vocabulary entry ``token``, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of ``text``, in which special tokens are recognised.

        With ``add_bos`` the ids begin with exactly one ``<bos>``, also when the text itself begins
        with some; a tokenizer without ``<bos>`` adds none.

        Raises:
            InputError: ``text`` is not a string of Unicode characters.
        """
        ids = _encode(self._backend, text)
        if not add_bos or self.bos_token_id is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos_token_id:
            start += 1
        return [self.bos_token_id, *ids[start:]]

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of ``text``, in which special tokens are plain characters; no ``<bos>``.

        Raises:
            InputError: ``text`` is not a string of Unicode characters.
        """
        return _encode(self._ordinary, text)

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode_ordinary`` of many texts, on all processors.

        Raises:
            InputError: a text is not a string of Unicode characters.
        """
        try:
            encodings = self._ordinary.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"the texts cannot be encoded: {error}") from error
        return [list(encoding.ids) for encoding in encodings]

    def encode_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, beginning with one ``<bos>``.

        The same ids as encoding what the official template renders, but for content that spells
        special tokens: here it stays plain characters and cannot end its turn.

        Raises:
            InputError: as ``chat_turns``; or this tokenizer has no turn tokens.
        """
        bos, start, end = (self.token_id(token) for token in ("<bos>", START_OF_TURN, END_OF_TURN))
        if bos is None or start is None or end is None:
            raise InputError(
                f"this tokenizer lacks <bos>, {START_OF_TURN} or {END_OF_TURN} and so cannot "
                "encode a conversation; use plain text, or an instruction model's tokenizer"
            )
        newline = self.encode_ordinary("\n")
        ids = [bos]
        # Special tokens split the text before anything else happens to it, so that encoding the
        # stretches between them one by one is exact.
        for turn in chat_turns(messages):
            ids += [start, *self.encode_ordinary(f"{turn.speaker}\n{turn.text}"), end, *newline]
        if add_generation_prompt:
            ids += [start, *self.encode_ordinary(GENERATION_PROMPT.removeprefix(START_OF_TURN))]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        Broken bytes do not spoil the characters next to them, unlike in ``tokenizers``, which
        gives up on a whole run of byte pieces; otherwise the result is the same.

        Raises:
            InputError: an id is negative.
        """
        special = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in special)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for; empty for an id without a token, such as a padding row.

        Raises:
            InputError: the id is negative.
        """
        if token_id < 0:
            raise InputError(f"token id {token_id} is negative")
        piece = self._backend.id_to_token(int(token_id)) if token_id < 2**32 else None
        if piece is None:
            return b""
        return piece_bytes(piece, is_byte_level=self._is_byte_level)

    def token_text(self, token_id: int) -> str:
        """The text of one token, special or not; part of a character shows as U+FFFD.

        Raises:
            InputError: the id is negative.
        """
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def check_vocab_size(self, config_vocab_size: int) -> None:
        """Check that a model with ``config_vocab_size`` rows of embeddings fits this tokenizer.

        Raises:
            InputError: the tokenizer has more tokens than the model, or over 128 fewer.
        """
        spare = config_vocab_size - self.vocab_size
        if 0 <= spare <= MAX_PADDING_ROWS:
            return
        problem = "cannot look up all of them" if spare < 0 else "would yield ids without a token"
        raise InputError(
            f"the tokenizer has {self.vocab_size} tokens and the model's vocab_size is "
            f"{config_vocab_size}, which {problem}; use the tokenizer the model was trained with"
        )

    def save(self, folder: Path | str) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` for us and for transformers.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        config = json.dumps(self._hub_config(), indent=2, ensure_ascii=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write the tokenizer into {folder}: {error}") from error

    def _hub_config(self) -> dict[str, object]:
        # transformers' Gemma class would add a <mask>, out of the model's range, where none is.
        is_hub_gemma = self.is_gemma and self.token_id("<mask>") is not None
        config: dict[str, object] = {
            "tokenizer_class": "GemmaTokenizer" if is_hub_gemma else "PreTrainedTokenizerFast",
            "add_bos_token": self.bos_token_id is not None,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        for name in ("bos", "eos", "pad", "unk"):
            token_id = getattr(self, f"{name}_token_id")
            if token_id is not None:
                config[f"{name}_token"] = self._backend.id_to_token(token_id)
        if self.is_gemma:
            config["chat_template"] = CHAT_TEMPLATE
        return config

    def _first_id(self, *tokens: str) -> int | None:
        return next((i for token in tokens if (i := self.token_id(token)) is not None), None)


class StreamingDecoder:
    """Decodes ids as they come; what it returns adds up to ``tokenizer.decode`` of them all.

    Bytes of an unfinished character are held back, at most three; nothing is decoded twice.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is now certain, which may be empty.

        Raises:
            InputError: the id is negative.
        """
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return what is left (U+FFFD for an unfinished character) and start anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(
            f"the text {text!r:.60} cannot be encoded; it must be a string of Unicode characters "
            "(half a surrogate pair is none)"
        ) from error


# Reading ``tokenizer.json`` into the ``tokenizers`` library, for text models.

# Its id lies outside the text models' vocabulary; only the multimodal processor may use it.
IMAGE_PLACEHOLDER = "<image_soft_token>"


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Read the file at ``path``, leaving out the image placeholder.

    Raises:
        InputError: the file is missing, truncated or no tokenizer.
    """
    try:
        return parse_tokenizer_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the tokenizer {path}: {error}") from error
    except InputError as error:
        raise InputError(f"{path} {error}") from error


def parse_tokenizer_json(text: str) -> tokenizers.Tokenizer:
    """Read the contents of a ``tokenizer.json``, leaving out the image placeholder.

    Raises:
        InputError: ``text`` is no tokenizer.
    """
    try:
        if IMAGE_PLACEHOLDER in text:
            text = _without_image_placeholder(text)
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The library reports broken files with bare Exception, and odd ones with a Rust panic, which
    # is not even an Exception.
    except BaseException as error:
        raise InputError(f"is not a readable tokenizer.json ({error}); fetch it again") from error


def _without_image_placeholder(text: str) -> str:
    """``text`` without the added token that text models have no embedding for."""
    # Only the list is parsed, which comes early: all of Gemma's 33 MB would take a second more.
    _, found, rest = text.partition('"added_tokens"')
    if found and (tail := rest.lstrip()).startswith(":"):
        start = len(text) - len(tail[1:].lstrip())
        added, end = json.JSONDecoder().raw_decode(text, start)
        if isinstance(added, list):
            return f"{text[:start]}{json.dumps(_without_placeholder(added))}{text[end:]}"
    whole = json.loads(text)
    whole["added_tokens"] = _without_placeholder(whole.get("added_tokens") or [])
    return json.dumps(whole)


def _without_placeholder(added: list[dict[str, object]]) -> list[dict[str, object]]:
    return [token for token in added if token["content"] != IMAGE_PLACEHOLDER]


# The bytes that a vocabulary entry stands for, in the two kinds of tokenizer that occur.

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_GEMMA_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def has_byte_level_decoder(backend: tokenizers.Tokenizer) -> bool:
    """Whether ``backend`` writes bytes as GPT-2 does (True) or as Gemma does (False).

    Raises:
        InputError: it does neither.
    """
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    if state.get("type") == "ByteLevel":
        return True
    if state.get("type") == "Sequence" and state.get("decoders") == _GEMMA_DECODERS:
        return False
    raise InputError(
        f"the tokenizer's decoder is {json.dumps(state):.200}; only Gemma's (Replace, "
        "ByteFallback, Fuse) and GPT-2's (ByteLevel) are supported"
    )


def piece_bytes(piece: str, *, is_byte_level: bool) -> bytes:
    """The bytes of the vocabulary entry ``piece``."""
    if is_byte_level:
        try:
            return bytes([_BYTE_OF_CHARACTER[character] for character in piece])
        except KeyError:  # an added token, which is kept as it is written
            return piece.encode()
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def character_of_byte() -> dict[int, str]:
    """GPT-2's way to write bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + offset) for offset, byte in enumerate(rest)}


_BYTE_OF_CHARACTER = {character: byte for byte, character in character_of_byte().items()}
