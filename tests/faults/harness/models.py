"""Hostile configs and tokenizers, and a bundle in which something was changed."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import save_file

from gemma3_export.config import config_to_json
from tests.faults.harness.bytes_and_json import change_bytes, change_json, to_text
from tests.faults.harness.cases import INPUT, OUTPUT, Case
from tests.faults.harness.files import HARMLESS, replace_file
from tests.faults.harness.weights import CONFIG, base_weights, compare, to_hf
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

COMPARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "hidden_activation",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "tie_word_embeddings",
)

# config.json


def config_case(folder: Path, rng: random.Random) -> Case:
    """Make a hostile ``config.json`` in one of the dialects, or a ``generation_config.json``."""
    save_file(base_weights(), folder / "model.safetensors", {"format": "pt"})
    data: Any = rng.choice((config_to_json, nested_rope, in_wrapper, with_pattern))(CONFIG)
    path = folder / "config.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    kind = rng.choice(("json", "json", "json", "json", "two", "bytes", "file", "generation"))
    name = kind
    if kind == "json":
        name, text = change_json(data, rng)
    elif kind == "two":
        one, text = change_json(data, rng)
        try:
            other, text = change_json(json.loads(text), rng)
            name = f"{one}; {other}"
        except (ValueError, RecursionError):
            name = one
    elif kind == "generation":
        name, text = change_json({"eos_token_id": [1, 7], "top_k": 64, "pad_token_id": 0}, rng)
        (folder / "generation_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    if kind in ("json", "two"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind == "bytes":
        name, raw = change_bytes(json.dumps(data).encode(), rng)
        path.write_bytes(raw)
    elif kind == "file":
        name = replace_file(path, rng)
    return Case(
        name=name,
        arguments=to_hf(""),
        check=_check_config,
        must_succeed=name.endswith(HARMLESS),
    )


def nested_rope(config: Any) -> dict[str, Any]:
    """Return the dialect of transformers 5."""
    data = config_to_json(config)
    factor = (data.pop("rope_scaling") or {"factor": 1.0})["factor"]
    data["rope_parameters"] = {
        "full_attention": {
            **({"rope_type": "linear", "factor": factor} if factor != 1.0 else {}),
            "rope_theta": data.pop("rope_theta"),
        },
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": data.pop("rope_local_base_freq"),
        },
    }
    return data


def in_wrapper(config: Any) -> dict[str, Any]:
    """Return the dialect of multimodal checkpoints."""
    return {
        "model_type": "gemma3",
        "text_config": config_to_json(config),
        "vision_config": {},
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def with_pattern(config: Any) -> dict[str, Any]:
    """Return the dialect of transformers 4.50."""
    data = config_to_json(config)
    del data["layer_types"]
    return data | {"sliding_window_pattern": 2}


def _check_config(place: Path, printed: str) -> str | None:
    """Compare the config that was written with what transformers reads from the input."""
    from transformers import Gemma3TextConfig

    complaint = compare(lambda folder: base_weights(), place, printed)
    if complaint is not None:
        return complaint
    data = json.loads((place / INPUT / "config.json").read_text(encoding="utf-8"))
    text = data.get("text_config") or data
    if text is not data:  # the top level decides, as in transformers
        text |= {"tie_word_embeddings": data.get("tie_word_embeddings") is not False}
    written = json.loads((place / OUTPUT / "config.json").read_text())
    try:
        expected = Gemma3TextConfig.from_dict(dict(text)).to_dict()
    except Exception:  # it is stricter about keys that do not matter here
        return None
    found = Gemma3TextConfig.from_dict(written).to_dict()
    for key in COMPARED:
        one, other = (_plain(data.get(key) or None) for data in (expected, found))
        if one != other:
            return f"{key} is {other!r:.100}, and transformers reads {one!r:.100}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


# tokenizer.json

VOCAB_SIZE = 400
TEXT = (
    "The sea is the sea.\n\n\nAnd then?  <eos> <start_of_turn>user\ttab \u00e9\u00fc\u4e2d "
    "<mask> \x00 \x1b end, at the end of the <unused12>. " * 5
)


@cache
def _tokenizer_json() -> str:
    return str(tiny_gemma_tokenizer(VOCAB_SIZE)._backend.to_str())


def tokenizer_case(folder: Path, rng: random.Random) -> Case:
    """Make a hostile ``tokenizer.json`` and tokenize a text with it."""
    path = folder / "tokenizer.json"
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    data = json.loads(_tokenizer_json())
    kind = rng.choice(("part", "part", "part", "vocabulary", "added", "bytes", "file"))
    if kind == "part":
        part = rng.choice([key for key in data if key != "added_tokens"])
        small = {key: value for key, value in data.items() if key not in ("model", "added_tokens")}
        model = {
            key: value for key, value in data["model"].items() if key not in ("vocab", "merges")
        }
        name, text = change_json(small | {"model": model}, rng)
        name = name if name else f"{name} ({part})"
        text = _with_vocabulary(text, data)
    elif kind == "vocabulary":
        name, text = _change_vocabulary(data, rng)
    elif kind == "added":
        name, changed = change_json(data["added_tokens"], rng)
        marker = "@added"
        text = json.dumps(data | {"added_tokens": marker}).replace(json.dumps(marker), changed)
    else:
        name, text = "", json.dumps(data)
    raw = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        name, raw = change_bytes(raw, rng)
    path.write_bytes(raw)
    if kind == "file":
        name = replace_file(path, rng)
    return Case(
        name=name,
        arguments=[
            *("data", f"{INPUT}/text.txt", "--tokenizer", f"{INPUT}/tokenizer.json", "-o", OUTPUT),
            *("--validation-fraction", "0"),
        ],
        check=_check_tokens,
        must_succeed=name.endswith(HARMLESS),
    )


def _with_vocabulary(text: str, data: dict[str, Any]) -> str:
    """Put the vocabulary, which is too large to be changed at random, back into the model."""
    try:
        changed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
        vocabulary = {key: data["model"][key] for key in ("vocab", "merges")}
        changed["model"] = vocabulary | changed["model"]
        changed.setdefault("added_tokens", data["added_tokens"])
        return json.dumps(changed)
    return text


def _change_vocabulary(data: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    token = rng.choice(list(vocab))
    kind = rng.randrange(10)
    if kind == 0:
        value = rng.choice((-1, 2**31, 2**32, 2**64, 1.5, None, "1", [1]))
        vocab[token] = value
        return f"id of {token!r} is {value}", json.dumps(data)
    if kind == 1:
        del vocab[token]
        return f"without {token!r}", json.dumps(data)
    if kind == 2:
        other = rng.choice(list(vocab))
        vocab[token] = vocab[other]
        return f"{token!r} has the id of {other!r}", json.dumps(data)
    if kind == 3:
        vocab[rng.choice(("\x1b[31m", "x" * 100_000, "", "\0", "\u202e"))] = len(vocab)
        return "an odd token more", json.dumps(data)
    if kind == 4:
        merges[rng.randrange(len(merges))] = rng.choice(
            (["q"], ["a", "b", "c"], "ab", 3, None, ["Q", "Z"])
        )
        return "an odd merge", json.dumps(data)
    if kind == 5:
        rng.shuffle(merges)
        return "merges in another order", json.dumps(data)
    if kind == 6:
        merges += merges
        return "merges twice", json.dumps(data)
    if kind == 7:
        data["model"]["vocab"] = rng.choice(([], {}, None, [["a", -1.0]]))
        return "another kind of vocabulary", json.dumps(data)
    if kind == 8:
        data["added_tokens"] = rng.choice(([], None, {}, data["added_tokens"] * 2))
        return "other added tokens", json.dumps(data)
    changed = to_text(data)
    return "two ids of one token", changed.replace('"vocab": {', '"vocab": {"<pad>": 7, ', 1)


def _check_tokens(place: Path, printed: str) -> str | None:
    """Compare the tokens that were written with those of the tokenizers library."""
    import numpy as np

    del printed
    meta = json.loads((place / OUTPUT / "meta.json").read_text())
    found = np.fromfile(place / OUTPUT / "train.bin", dtype=meta["dtype"]).tolist()
    backend = tokenizers.Tokenizer.from_file(str(place / INPUT / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    if any(not 0 <= token < meta["vocab_size"] for token in found):
        return "tokens are beyond the vocabulary"
    backend.encode_special_tokens = True
    expected = backend.encode(TEXT, add_special_tokens=False).ids
    inner = [token for token in found if token not in (meta["bos_token_id"], meta["eos_token_id"])]
    wanted = [
        token for token in expected if token not in (meta["bos_token_id"], meta["eos_token_id"])
    ]
    if inner != wanted:
        return f"tokens {inner[:10]}..., and the library reads {wanted[:10]}..."
    return None
