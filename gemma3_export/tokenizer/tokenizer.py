"""Encode text to token ids and decode them, using the ``tokenizers`` library.

Two types of tokenizers are supported: Gemma's (BPE over characters, spaces written as ``▁``,
unknown characters as byte pieces such as ``<0xE2>``) and GPT-2's (byte-level BPE). In both, every
token stands for a fixed sequence of bytes, whatever its neighbors are. Decoding relies on this, so
streaming has a constant cost per token, and its parts always add up to the full text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from gemma3_export.config import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
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
from gemma3_export.tokenizer.tokenizer_json import IMAGE_PLACEHOLDER, read_tokenizer_json

__all__ = [
    "StreamingDecoder",
    "Tokenizer",
    "character_of_byte",
    "has_byte_level_decoder",
    "piece_bytes",
]

MAX_PADDING_ROWS = 128  # of an embedding with more rows than the tokenizer has tokens

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_GEMMA_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


class Tokenizer:
    """A Gemma or GPT-2 style tokenizer, which threads can share.

    Args:
        backend: a tokenizer; :meth:`from_file` drops an image placeholder at its end.

    Raises:
        InputError: ``backend`` is of neither type.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # for training: it encodes one text in many ways
        self._backend = backend
        self._is_byte_level = has_byte_level_decoder(backend)
        added = sorted(backend.get_added_tokens_decoder().items())
        self._special_ids = frozenset(
            token_id
            for token_id, token in added
            if token.special or token.content in CONTROL_TOKENS
        )
        # The same tokenizer without special tokens, which it encodes as text. The model is shared.
        self._ordinary = tokenizers.Tokenizer(backend.model)
        self._ordinary.normalizer = backend.normalizer
        self._ordinary.pre_tokenizer = backend.pre_tokenizer
        # The library numbers tokens outside of the model's vocabulary by their order, so the
        # special ones among them keep their places.
        self._ordinary.encode_special_tokens = True
        self._ordinary.add_tokens(
            [
                _as_special(token) if token_id in self._special_ids else token
                for token_id, token in added
                if token_id not in self._special_ids
                or backend.model.token_to_id(token.content) is None
            ]
        )
        self.bos_token_id = self.token_id("<bos>")
        self.eos_token_id = self._first_id("<eos>", "<|endoftext|>")
        self.pad_token_id = self.token_id("<pad>")
        self.unk_token_id = self.token_id("<unk>")

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            InputError: the file is missing, truncated, or not a Gemma or GPT-2 style tokenizer.
        """
        return cls(read_tokenizer_json(Path(path)))

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read the ``tokenizer.json`` in ``folder``.

        Raises:
            InputError: see :meth:`from_file`.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_NAME
        if not path.is_file():
            hint = ""
            if (folder / "tokenizer.model").is_file():
                hint = "; tokenizer.model (SentencePiece) is not supported, download tokenizer.json"
            raise InputError(f"{folder} has no tokenizer.json{hint}")
        return cls.from_file(path)

    @cached_property
    def vocab_size(self) -> int:
        """Return the largest token id plus one, not counting the image placeholder."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        vocab.pop(IMAGE_PLACEHOLDER, None)
        return max(vocab.values(), default=-1) + 1

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Return the ids that decoding skips and that ordinary text never yields."""
        return self._special_ids

    @property
    def is_gemma(self) -> bool:
        """Return True if the tokenizer has Gemma's turn tokens and so can encode a conversation."""
        needed = (self.bos_token_id, self.token_id(START_OF_TURN), self.token_id(END_OF_TURN))
        return None not in needed

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Return True if both tokenizers have the same vocabulary."""
        return bool(self._backend.get_vocab() == other._backend.get_vocab())

    def token_id(self, token: str) -> int | None:
        """Return the id of the vocabulary entry ``token``, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Encode ``text``, in which special tokens are recognized.

        With ``add_bos`` the ids begin with exactly one ``<bos>``, even if the text itself begins
        with one or more. A tokenizer without ``<bos>`` adds none.

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
        """Encode ``text`` without ``<bos>``, treating special tokens as plain text.

        Raises:
            InputError: ``text`` is not a string of Unicode characters.
        """
        return _encode(self._ordinary, text)

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts as :meth:`encode_ordinary` does, on all cores.

        Raises:
            InputError: a text is not a string of Unicode characters.
        """
        try:
            encodings = self._ordinary.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(
                f"the texts cannot be encoded: {error}; they must be strings of Unicode characters"
            ) from error
        return [list(encoding.ids) for encoding in encodings]

    def encode_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encode a conversation, beginning with one ``<bos>``.

        The ids equal those of the text that the official chat template renders, except where
        content spells out special tokens: it is encoded as plain text and cannot end its turn.

        Raises:
            InputError: see :func:`chat_turns`; or this tokenizer has no turn tokens.
        """
        bos, start, end = (self.token_id(token) for token in ("<bos>", START_OF_TURN, END_OF_TURN))
        if bos is None or start is None or end is None:
            raise InputError(
                f"this tokenizer lacks <bos>, {START_OF_TURN} or {END_OF_TURN}, so it cannot "
                "encode a conversation; use plain text or the tokenizer of an instruction-tuned "
                "model"
            )
        newline = self.encode_ordinary("\n")
        ids = [bos]
        # The tokenizer first splits text at special tokens, so encoding the parts separately is
        # exact.
        for turn in chat_turns(messages):
            ids += [start, *self.encode_ordinary(f"{turn.speaker}\n{turn.text}"), end, *newline]
        if add_generation_prompt:
            ids += [start, *self.encode_ordinary(GENERATION_PROMPT.removeprefix(START_OF_TURN))]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ``ids`` to text; bytes that are not UTF-8 become U+FFFD.

        The result is that of ``tokenizers``, except that invalid bytes do not affect valid
        characters in the same run of byte pieces.

        Raises:
            InputError: an id is negative.
        """
        special = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in special)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for an id without a token, such as a padding row.

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
        """Return the text of a token, special or not; part of a character becomes U+FFFD.

        Raises:
            InputError: the id is negative.
        """
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def check_vocab_size(self, config_vocab_size: int) -> None:
        """Check that this tokenizer fits a model with ``config_vocab_size`` embedding rows.

        Raises:
            InputError: the tokenizer has more tokens than the model, or more than 128 fewer.
        """
        spare = config_vocab_size - self.vocab_size
        if 0 <= spare <= MAX_PADDING_ROWS:
            return
        problem = "has no embedding for some of them" if spare < 0 else "yields ids without a token"
        raise InputError(
            f"the tokenizer has {self.vocab_size} tokens, but the model's vocab_size is "
            f"{config_vocab_size}, so it {problem}; use the tokenizer of the model"
        )

    def save(self, folder: Path | str) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers can read.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        config = json.dumps(self._hub_config(), indent=2, ensure_ascii=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKENIZER_NAME).write_text(self._backend.to_str(), encoding="utf-8")
            (folder / TOKENIZER_CONFIG_NAME).write_text(config, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot write the tokenizer to {folder}: {error}; free some disk space or choose "
                "another folder"
            ) from error

    def _hub_config(self) -> dict[str, object]:
        # Without <mask>, transformers' GemmaTokenizer would add one, which has no embedding.
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
    """An incremental decoder whose results add up to ``tokenizer.decode`` of all ids.

    It holds back the bytes of an incomplete character, at most three, and decodes nothing twice.

    Args:
        tokenizer: the tokenizer of the ids.
        skip_special_tokens: leave out special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add an id and return the newly completed text, which may be empty.

        Raises:
            InputError: the id is negative.
        """
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return the rest of the text (U+FFFD for an incomplete character) and reset."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _as_special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(
            f"the text {text!r:.60} cannot be encoded; it must be a string of Unicode characters "
            "without lone surrogates"
        ) from error


def has_byte_level_decoder(backend: tokenizers.Tokenizer) -> bool:
    """Return True if ``backend`` represents bytes as GPT-2 does, False if as Gemma does.

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
    """Return the bytes of the vocabulary entry ``piece``."""
    if is_byte_level:
        try:
            return bytes([_BYTE_OF_CHARACTER[character] for character in piece])
        except KeyError:  # an added token, which is written as plain text
            return piece.encode()
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def character_of_byte() -> dict[int, str]:
    """Return GPT-2's characters for bytes: printable ones unchanged, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + offset) for offset, byte in enumerate(rest)}


_BYTE_OF_CHARACTER = {character: byte for byte, character in character_of_byte().items()}
