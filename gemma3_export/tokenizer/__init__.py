"""Tokenizers and the chat format."""

from gemma3_export.tokenizer.chat import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TURN,
    START_OF_TURN,
    ChatMessage,
    check_conversation,
)
from gemma3_export.tokenizer.chat_format import ChatFormat, ChatOptions, EncodedChat
from gemma3_export.tokenizer.function_calls import FunctionCall, parse_function_calls
from gemma3_export.tokenizer.loading import count_tokens, load_tokenizer
from gemma3_export.tokenizer.settings import TokenizerSettings
from gemma3_export.tokenizer.template import ChatTemplate, RenderedChat
from gemma3_export.tokenizer.tokenizer import StreamingDecoder, Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "CONTROL_TOKENS",
    "END_OF_TURN",
    "START_OF_TURN",
    "ChatFormat",
    "ChatMessage",
    "ChatOptions",
    "ChatTemplate",
    "EncodedChat",
    "FunctionCall",
    "RenderedChat",
    "StreamingDecoder",
    "Tokenizer",
    "TokenizerSettings",
    "check_conversation",
    "count_tokens",
    "load_tokenizer",
    "parse_function_calls",
]
