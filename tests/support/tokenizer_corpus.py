"""Texts that tokenizers get wrong, and the official tokenizer to compare with."""

import os
from pathlib import Path

import pytest

# Greek and mathematical letters are intended.
# ruff: noqa: RUF001
TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces   and\ttabs\t\t\n\nand lines\n\n\n\n",
    "def f(x):\n    return {'a': [x ** 2, None]}\n",
    "Grüße, naïve café; ÐÑÒ — “quoted” … ½ ²",
    "Привет, мир! Γειά σου Κόσμε",
    "你好,世界。こんにちは世界 안녕하세요 세계",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "🙂 👍🏽 ☕\ufe0f flags \U0001f1eb\U0001f1f7\U0001f1ef\U0001f1f5",
    "family \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 ",
    "rainbow \U0001f3f3\ufe0f\u200d\U0001f308",
    "𓀀𓁐 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ 𐍈 ᚠᛇᚻ \U000e0041",
    "e\u0301 vs é, zero\u200bwidth, nbsp\u00a0, \u2028line",
    "control \x00\x01\x7f and \ufffd itself",
    "a▁b ▁▁ literal, <0x41> literal",
    "<b>bold</b> <unused5> [multimodal] <mask>",
    "'s 'T it's 12345 1.5e-10 \r\n \r x!?... \n $",
)


def official_tokenizer_json() -> Path:
    """Return the official ``tokenizer.json``, or skip the test if it is not installed."""
    cache = Path(__file__).parents[2] / ".cache" / "tokenizer-gemma3"
    named = os.environ.get("GEMMA3_TOKENIZER_JSON")
    found = [Path(named)] if named else sorted(cache.rglob("tokenizer.json"))
    if not found:
        pytest.skip("no official tokenizer; set GEMMA3_TOKENIZER_JSON or run `make tokenizer`")
    return found[0]
