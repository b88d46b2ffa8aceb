"""Encode text to token ids and decode them, using the ``tokenizers`` library.

Two types of tokenizers are supported: Gemma's (BPE over characters, spaces written as ``▁``,
unknown characters as byte pieces such as ``<0xE2>``) and GPT-2's (byte-level BPE). In both, every
token stands for a fixed sequence of bytes, whatever its neighbors are. Decoding relies on this, so
streaming has a constant cost per token, and its parts always add up to the full text.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from gemma3_export.config import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from gemma3_export.errors import InputError, TextTooLongError
from gemma3_export.files import is_file, to_path
from gemma3_export.tokenizer.chat import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TURN,
    START_OF_TURN,
    ChatMessage,
)
from gemma3_export.tokenizer.chat_format import ChatFormat, ChatOptions, EncodedChat
from gemma3_export.tokenizer.length_bound import most_characters
from gemma3_export.tokenizer.settings import (
    DEFAULT_TEMPLATE,
    TokenizerSettings,
    settings_from_folder,
)
from gemma3_export.tokenizer.tokenizer_json import (
    IMAGE_PLACEHOLDER,
    library_errors,
    read_tokenizer_json,
)

__all__ = [
    "StreamingDecoder",
    "Tokenizer",
    "character_of_byte",
    "has_byte_level_decoder",
    "piece_bytes",
]

STANDARD_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
USUAL_PADDING_ROWS = 256  # trainers pad the embedding to a multiple of up to 256 rows

logger = logging.getLogger(__name__)

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
        settings: its special tokens, chat templates and other settings; None means that none came
            with it.

    Raises:
        InputError: ``backend`` is of neither type.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: TokenizerSettings | None = None
    ) -> None:
        with library_errors("the tokenizer cannot be used"):
            self._prepare(backend, settings)

    def _prepare(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # for training: it encodes one text in many ways
        self.settings = TokenizerSettings() if settings is None else settings
        self._backend = backend
        self._is_byte_level = has_byte_level_decoder(backend)
        added = sorted(backend.get_added_tokens_decoder().items())
        self._special_ids = frozenset(
            token_id
            for token_id, token in added
            if token.special or token.content in CONTROL_TOKENS
        )
        self.bos_token_id = self._named_id("bos_token", "<bos>")
        self._bos_text = "" if self.bos_token_id is None else self.token_text(self.bos_token_id)
        # Text is split at it, and what follows is encoded on its own.
        self._is_bos_apart = any(
            token.content == self._bos_text
            and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            for _, token in added
        )
        self.eos_token_id = self._named_id("eos_token", "<eos>", "<|endoftext|>")
        self.pad_token_id = self._named_id("pad_token", "<pad>")
        self.unk_token_id = self._named_id("unk_token", "<unk>")

    def with_settings(self, settings: TokenizerSettings) -> Tokenizer:
        """Return the same tokenizer with other settings."""
        return Tokenizer(self._backend, settings)

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Read a ``tokenizer.json``, and the settings and chat templates next to it.

        Raises:
            InputError: a file is missing, truncated, or not a Gemma or GPT-2 style tokenizer.
        """
        path = to_path(path, "the tokenizer")
        return cls(read_tokenizer_json(path), settings_from_folder(path.parent))

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read the ``tokenizer.json`` in ``folder``.

        Raises:
            InputError: see :meth:`from_file`.
        """
        folder = to_path(folder, "the folder of the tokenizer")
        path = folder / TOKENIZER_NAME
        if not is_file(path):
            hint = ""
            if is_file(folder / "tokenizer.model"):
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
        """Return the ids that decoding skips."""
        return self._special_ids

    @cached_property
    def control_token_ids(self) -> frozenset[int]:
        """Return the ids that ordinary text never yields.

        They are the special tokens, and other added tokens that a chat template writes.
        """
        literals = self.chat.literals
        return self._special_ids | {
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.content in literals and not token.content.isspace()
        }

    @property
    def is_gemma(self) -> bool:
        """Return True if the tokenizer has Gemma's turn tokens and so can use its chat format."""
        needed = (self.token_id("<bos>"), self.token_id(START_OF_TURN), self.token_id(END_OF_TURN))
        return None not in needed

    @cached_property
    def chat(self) -> ChatFormat:
        """Return the format of conversations: the tokenizer's own templates, or Gemma's format."""
        return ChatFormat(self)

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Return True if both tokenizers have the same vocabulary."""
        return bool(self._backend.get_vocab() == other._backend.get_vocab())

    def ids_of(self, other: Tokenizer) -> list[int | None]:
        """Return this tokenizer's id of each token of ``other``, None for a token that it lacks."""
        vocab = self._backend.get_vocab()
        pieces = (other._backend.id_to_token(token_id) for token_id in range(other.vocab_size))
        return [None if piece is None else vocab.get(piece) for piece in pieces]

    def token_id(self, token: str) -> int | None:
        """Return the id of the vocabulary entry ``token``, or None.

        Raises:
            InputError: ``token`` is not a string of Unicode characters.
        """
        with library_errors(f"the token {token!r:.60} cannot be looked up"):
            return self._backend.token_to_id(token)

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = True,
        allow_control_tokens: bool = True,
        most: int | None = None,
    ) -> list[int]:
        """Encode ``text``.

        Args:
            text: the text.
            add_bos: begin with exactly one ``<bos>``, even if the text itself begins with one or
                more. A tokenizer without ``<bos>`` adds none.
            allow_control_tokens: recognize control tokens that the text spells. Where False, they
                are plain text, as they should be in text from others.
            most: see :meth:`require_shorter`; None does not check.

        Raises:
            InputError: ``text`` is not a string of Unicode characters.
            TextTooLongError: its length alone shows that it has more than ``most`` tokens.
        """
        is_bos_read = allow_control_tokens or self.bos_token_id not in self._special_ids
        bos = self._bos_text if add_bos and is_bos_read and isinstance(text, str) else ""
        extra = _repeats(bos, text) if bos else 0  # of the <bos> that start a text, one remains
        if most is not None and isinstance(text, str):
            self.require_shorter(len(text) - extra, most)
        if extra and self._is_bos_apart:  # finding all of them takes long
            text = text[max(0, extra - len(bos)) :]
        ids = _encode(self._backend if allow_control_tokens else self._ordinary, text)
        if not add_bos or self.bos_token_id is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos_token_id:
            start += 1
        return [self.bos_token_id, *ids[start:]]

    def require_shorter(self, characters: int, most: int) -> None:
        """Check the length of a text before it is encoded, which takes long for a long one.

        A text that passes may still have more than ``most`` tokens.

        Args:
            characters: length of the text.
            most: number of tokens that it may have.

        Raises:
            TextTooLongError: no text of this length has so few.
        """
        longest = self._most_characters
        if longest is not None and (least := -(-characters // longest)) > most:
            raise TextTooLongError(least, most)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode ``text`` without ``<bos>``, treating control tokens as plain text.

        Raises:
            InputError: ``text`` is not a string of Unicode characters.
        """
        return _encode(self._ordinary, text)

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts as :meth:`encode_ordinary` does, on all cores.

        Raises:
            InputError: a text is not a string of Unicode characters.
        """
        with library_errors("the texts cannot be encoded"):
            encodings = self._ordinary.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions | None = None,
        *,
        add_generation_prompt: bool = True,
        most: int | None = None,
    ) -> list[int]:
        """Encode a conversation with the chat template.

        The ids are those of ``apply_chat_template`` in transformers, except where content spells
        out control tokens: it is encoded as plain text and cannot end its turn.

        Raises:
            InputError: the template does not accept the conversation; or the tokenizer has neither
                a chat template nor Gemma's turn tokens.
            TextTooLongError: see :meth:`encode`.
        """
        return self.chat.encode(
            messages, options, add_generation_prompt=add_generation_prompt, most=most
        )

    def encode_chat_answers(
        self, messages: Sequence[ChatMessage], options: ChatOptions | None = None
    ) -> EncodedChat:
        """Encode a whole conversation, and say which tokens are the assistant's.

        Raises:
            InputError: see :meth:`encode_chat`; or the answers cannot be found in what the template
                renders.
        """
        return self.chat.encode_answers(messages, options)

    def encode_with_offsets(
        self, text: str, *, allow_control_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode ``text`` without ``<bos>``; return ids and the [start, end) of each in the text.

        Raises:
            InputError: ``text`` is not a string of Unicode characters.
        """
        encoding = _encoding(self._backend if allow_control_tokens else self._ordinary, text)
        return list(encoding.ids), list(encoding.offsets)

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

        Rows without a token are padding, which many checkpoints have.

        Raises:
            InputError: the tokenizer has more tokens than the model, or less than half as many.
        """
        spare = config_vocab_size - self.vocab_size
        if 0 <= spare <= max(USUAL_PADDING_ROWS, config_vocab_size // 2):
            if spare > USUAL_PADDING_ROWS:
                logger.warning(
                    "the tokenizer has %d tokens, but the model's vocab_size is %d; the model may "
                    "generate ids without a token, which are no text",
                    self.vocab_size,
                    config_vocab_size,
                )
            return
        problem = "has no embedding for some of them" if spare < 0 else "yields ids without a token"
        raise InputError(
            f"the tokenizer has {self.vocab_size} tokens, but the model's vocab_size is "
            f"{config_vocab_size}, so it {problem}; use the tokenizer of the model"
        )

    def to_json(self) -> str:
        """Return the contents of ``tokenizer.json``."""
        return str(self._backend.to_str())

    def save(self, folder: Path | str) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers can read.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        hub_config = self._hub_config()
        config = json.dumps(hub_config, indent=2, ensure_ascii=False) + "\n"
        if not config.isascii() and _has_surrogates(config):
            config = json.dumps(hub_config, indent=2) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKENIZER_NAME).write_text(self.to_json(), encoding="utf-8", newline="")
            (folder / TOKENIZER_CONFIG_NAME).write_text(config, encoding="utf-8", newline="")
        except OSError as error:
            raise InputError(
                f"cannot write the tokenizer to {folder}: {error}; free some disk space or choose "
                "another folder"
            ) from error

    def _hub_config(self) -> dict[str, object]:
        # Without <mask>, transformers' GemmaTokenizer would add one, which has no embedding.
        is_hub_gemma = self.is_gemma and not self._is_byte_level and self.token_id("<mask>")
        config: dict[str, object] = {
            "tokenizer_class": "GemmaTokenizer" if is_hub_gemma else "PreTrainedTokenizerFast",
            "add_bos_token": self.bos_token_id is not None,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        named = {key: self._backend.id_to_token(i) for key, i in self._named_ids().items()}
        config |= {key: text for key, text in named.items() if key in STANDARD_TOKENS}
        # transformers would add tokens that it does not find, which have no embedding.
        if extra := {key: text for key, text in named.items() if key not in STANDARD_TOKENS}:
            config["extra_special_tokens"] = extra
        for key, value in self.settings.other.items():
            if key in ("extra_special_tokens", "additional_special_tokens"):
                # transformers 4 knows only the older name of the list.
                config["additional_special_tokens"] = self._known_tokens(value)
            else:
                config.setdefault(key, value)
        # By default, transformers 4.57 passes token_type_ids, which Gemma does not take.
        config["model_input_names"] = ["input_ids", "attention_mask"]
        templates = self.settings.templates
        if set(templates) == {DEFAULT_TEMPLATE}:
            config["chat_template"] = templates[DEFAULT_TEMPLATE]
        elif templates:
            config["chat_template"] = [
                {"name": name, "template": source} for name, source in templates.items()
            ]
        elif self.is_gemma:
            config["chat_template"] = CHAT_TEMPLATE
        return config

    def special_tokens(self) -> dict[str, str]:
        """Return the special tokens by name, such as ``bos_token``, as templates use them."""
        defaults = {key: str(self._backend.id_to_token(i)) for key, i in self._named_ids().items()}
        declared = {key: text for key, text in self.settings.special_tokens.items() if text}
        return defaults | declared

    def _named_ids(self) -> dict[str, int]:
        """Return the ids of the special tokens by name."""
        ids = {
            f"{name}_token": getattr(self, f"{name}_token_id")
            for name in ("bos", "eos", "pad", "unk")
        }
        if self.is_gemma:
            ids["mask_token"] = self.token_id("<mask>")
        for key, text in self.settings.special_tokens.items():
            if text is not None and (token_id := self.token_id(text)) is not None:
                ids[key] = token_id
        return {key: token_id for key, token_id in ids.items() if token_id is not None}

    def _named_id(self, key: str, *defaults: str) -> int | None:
        """Return the id of a special token that the settings declare, or else of a default."""
        if key in self.settings.special_tokens:
            declared = self.settings.special_tokens[key]
            if declared is None:
                return None
            if (token_id := self.token_id(declared)) is not None:
                return token_id
        return next((i for token in defaults if (i := self.token_id(token)) is not None), None)

    def _known_tokens(self, tokens: object) -> list[object]:
        """Return those of a list of tokens that the vocabulary has."""
        listed = tokens if isinstance(tokens, list) else []
        texts = [token.get("content") if isinstance(token, dict) else token for token in listed]
        return [
            token
            for token, text in zip(listed, texts, strict=True)
            if isinstance(text, str) and self.token_id(text) is not None
        ]

    @cached_property
    def _most_characters(self) -> int | None:
        """The most characters that a token takes; None if nothing limits it."""
        bytes_of = character_of_byte()
        pieces = (
            bytes_of[byte] if self._is_byte_level else f"<0x{byte:02X}>" for byte in range(256)
        )
        return most_characters(self._backend, frozenset(pieces))

    @cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which encodes control tokens as text. The model is shared."""
        backend, control = self._backend, self.control_token_ids
        ordinary = tokenizers.Tokenizer(backend.model)
        ordinary.normalizer = backend.normalizer
        ordinary.pre_tokenizer = backend.pre_tokenizer
        # The library numbers tokens outside of the model's vocabulary by their order, so the
        # control tokens among them keep their places.
        ordinary.encode_special_tokens = True
        ordinary.add_tokens(
            [
                _as_special(token) if token_id in control else token
                for token_id, token in sorted(backend.get_added_tokens_decoder().items())
                if token_id not in control or backend.model.token_to_id(token.content) is None
            ]
        )
        return ordinary


def _repeats(start: str, text: str) -> int:
    """Return the length of the repetitions of ``start`` at the start of a text."""
    match = re.match(f"(?:{re.escape(start)})*", text)
    return len(match[0]) if match else 0


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


def _has_surrogates(text: str) -> bool:
    """Return whether a text, such as a damaged template, has no UTF-8 form."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(_encoding(backend, text).ids)


def _encoding(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    start = text[:60] if isinstance(text, str) else text
    with library_errors(f"the text {start!r:.60} cannot be encoded"):
        return backend.encode(text, add_special_tokens=False)


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
