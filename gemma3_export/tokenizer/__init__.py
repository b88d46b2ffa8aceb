"""Tokenizers and the chat format."""

from gemma3_export.tokenizer.chat import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TURN,
    GENERATION_PROMPT,
    START_OF_TURN,
    ChatMessage,
    Turn,
    chat_turns,
    render_chat,
)
from gemma3_export.tokenizer.loading import load_tokenizer
from gemma3_export.tokenizer.tokenizer import StreamingDecoder, Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "CONTROL_TOKENS",
    "END_OF_TURN",
    "GENERATION_PROMPT",
    "START_OF_TURN",
    "ChatMessage",
    "StreamingDecoder",
    "Tokenizer",
    "Turn",
    "chat_turns",
    "load_tokenizer",
    "render_chat",
]
