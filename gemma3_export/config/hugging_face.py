"""Read and write ``config.json`` in every dialect of Gemma 3 checkpoints.

Hugging Face has three dialects: flat keys with a layer pattern, ``layer_types``, and nested
``rope_parameters``. Multimodal checkpoints wrap the text config in ``text_config``. The notebook
that this project descends from uses a dictionary of its own. A key that would change the
computation in a way that is not implemented raises an error; no key is dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, cast

from gemma3_export.config.gemma3_config import (
    MAX_LAYERS,
    Gemma3Config,
    LayerType,
    default_layer_types,
)
from gemma3_export.config.other_models import (
    MODEL_TYPES,
    advice_on_architecture,
    advice_on_quantization,
)
from gemma3_export.config.presets import TEXT_VOCAB_SIZE
from gemma3_export.config.rope_parameters import read_rope
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, read_text, to_path
from gemma3_export.records import MAX_JSON_BYTES

__all__ = [
    "BENIGN_KEYS",
    "CONFIG_NAME",
    "GENERATION_CONFIG_NAME",
    "PADDED_VOCAB_SIZE",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "TEXT_DEFAULTS",
    "TEXT_KEYS",
    "TOKENIZER_CONFIG_NAME",
    "TOKENIZER_NAME",
    "WEIGHTS_INDEX_NAME",
    "WRAPPER_KEYS",
    "config_from_json",
    "config_to_json",
    "load_config",
    "load_json_object",
    "text_vocab_size",
]

# Files of a folder in Hugging Face format; transformers has constants of the same names.
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SAFE_WEIGHTS_NAME = "model.safetensors"
SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_INDEX_NAME = "pytorch_model.bin.index.json"

PADDED_VOCAB_SIZE = 262_208  # embedding rows of the official multimodal checkpoints
GPT2_VOCAB_SIZE = 50_257  # the ancestors' custom model; its last id is <|endoftext|>

ANCESTOR_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "head_dim": "head_dim",
    "n_kv_groups": "num_key_value_heads",  # the number of key-value heads, despite its name
    "sliding_window": "sliding_window",
    "rope_base": "rope_theta",
    "rope_local_base": "rope_local_base_freq",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
}

# Values of omitted keys: the defaults of Gemma3TextConfig in transformers.
TEXT_DEFAULTS: Mapping[str, int | float] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}

TEXT_KEYS = {
    *TEXT_DEFAULTS,
    "model_type",
    "layer_types",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "rope_theta",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}

WRAPPER_KEYS = {
    "model_type",
    "text_config",
    "vision_config",  # does not affect the text model
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "boi_token_id",
    "eoi_token_id",
    "image_token_id",
    "mm_tokens_per_image",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}

# Keys about the file, training or generation, which do not affect the forward pass.
BENIGN_KEYS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "finetuning_task",
    "id2label",
    "label2id",
    "max_seq_length",  # of the training, written by unsloth
    "model_max_length",  # of the tokenizer
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    # generation settings that older versions of transformers wrote into config.json
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    # checked by _reject_unimplemented
    "add_cross_attention",
    "attention_bias",
    "attn_logit_softcapping",
    "cross_attention_hidden_size",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "is_decoder",
    "is_encoder_decoder",
    "mlp_bias",
    "pruned_heads",
    "quantization_config",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "use_bidirectional_attention",
}

_ACTIVATION = "gelu_pytorch_tanh"
_MUST_BE_ABSENT = {
    "attn_logit_softcapping": "Gemma 3 has no logit softcapping; is this a Gemma 2 model?",
    "final_logit_softcapping": "Gemma 3 has no logit softcapping; is this a Gemma 2 model?",
    "attention_bias": "Gemma 3 projections have no bias",
    "mlp_bias": "Gemma 3 projections have no bias",
    "add_cross_attention": "only decoders without cross-attention are supported",
    "cross_attention_hidden_size": "only decoders without cross-attention are supported",
    "is_encoder_decoder": "only decoders are supported",
    "pruned_heads": "pruned models are not supported",
    "tie_encoder_decoder": "only decoders are supported",
    "auto_map": "custom model code is never executed; use a checkpoint of the stock architecture",
}


def load_config(path: Path | str) -> Gemma3Config:
    """Read a ``config.json``, given its path or that of its folder.

    The ``eos_token_id`` of a ``generation_config.json`` in the same folder is added, because only
    that file of an instruction-tuned model lists ``<end_of_turn>``.

    Raises:
        InputError: a file is missing, is not JSON, or describes something not implemented.
    """
    path = to_path(path, "the config")
    if path.is_dir():
        path = path / CONFIG_NAME
    data = load_json_object(path)
    generation = path.with_name(GENERATION_CONFIG_NAME)
    extra: tuple[int, ...] = ()
    if generation != path and is_file(generation):
        value = load_json_object(generation).get("eos_token_id")
        extra = _token_ids(value, where=f"{generation.name}: eos_token_id")
    return _config_from_json(data, where=str(path), extra_eos=extra)


def config_from_json(data: object, *, where: str) -> Gemma3Config:
    """Convert parsed JSON of any dialect to a config.

    Args:
        data: the parsed JSON.
        where: name of the file for error messages.

    Raises:
        InputError: ``data`` is malformed, contradictory, or describes something not implemented.
    """
    return _config_from_json(data, where=where, extra_eos=())


def config_to_json(config: Gemma3Config) -> dict[str, Any]:
    """Convert ``config`` to the ``config.json`` format that transformers 4.57 and 5 both read."""
    scalar = config.query_pre_attn_scalar
    scaled = config.rope_scaling_factor != 1.0
    eos = list(config.eos_token_id)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        # transformers requires an integer here
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_base_freq,
        "rope_scaling": (
            {"rope_type": "linear", "factor": config.rope_scaling_factor} if scaled else None
        ),
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "use_cache": True,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (eos if len(eos) > 1 else eos[0]) if eos else None,
    }


def load_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file whose top level is an object.

    Raises:
        InputError: the file is missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        data = json.loads(read_text(path, limit_bytes=MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    return _object(data, where=str(path))


def _config_from_json(data: object, *, where: str, extra_eos: tuple[int, ...]) -> Gemma3Config:
    top = _object(data, where=where)
    try:
        if "emb_dim" in top or "n_layers" in top:
            return _from_ancestor(top, extra_eos)
        return _from_hugging_face(top, extra_eos)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _from_hugging_face(top: dict[str, Any], extra_eos: tuple[int, ...]) -> Gemma3Config:
    _check_model_type(top)
    is_wrapper = top.get("text_config") is not None
    text = _object(top["text_config"], where="text_config") if is_wrapper else top
    if is_wrapper:
        _reject_unimplemented(top)
        _reject_unknown_keys(top, WRAPPER_KEYS | BENIGN_KEYS)
        inner = text.get("model_type", "gemma3_text")
        if inner != "gemma3_text":
            raise InputError(
                f"text_config.model_type is {inner!r:.80}; only gemma3_text is supported"
            )
    _reject_unimplemented(text)
    _reject_unknown_keys(text, TEXT_KEYS | BENIGN_KEYS)

    fields: dict[str, Any] = {}
    for key, default in TEXT_DEFAULTS.items():
        value = text.get(key)
        fields[key] = default if value is None else value
    tokens = {
        "eos_token_id": _eos_token_ids(top, text, extra_eos),
        **_other_token_ids(top, text),
    }
    if is_wrapper:
        fields["vocab_size"] = text_vocab_size(fields["vocab_size"], tokens)
    layer_types = _layer_types(text, fields["num_hidden_layers"])
    if text.get("sliding_window", 0) is None:
        if "sliding_attention" in layer_types:
            raise InputError(
                "sliding_window is null, but layer_types has sliding-window layers; set it"
            )
        fields["sliding_window"] = fields["max_position_embeddings"]
    return _build(
        **fields,
        **read_rope(text),
        layer_types=layer_types,
        tie_word_embeddings=_is_tied(top),
        **tokens,
    )


def text_vocab_size(rows: object, tokens: Mapping[str, Any]) -> Any:
    """Return how many of the embedding's ``rows`` belong to text.

    The official multimodal checkpoints pad the vocabulary of the text model to 262,208 rows. Rows
    after those of text are kept as far as one of the special ``tokens`` needs it.
    """
    if rows != PADDED_VOCAB_SIZE:
        return rows
    ids = [tokens.get("pad_token_id", 0), tokens.get("bos_token_id", 0), *tokens["eos_token_id"]]
    return max(TEXT_VOCAB_SIZE, 1 + max(i for i in ids if i < PADDED_VOCAB_SIZE))


def _from_ancestor(top: dict[str, Any], extra_eos: tuple[int, ...]) -> Gemma3Config:
    if top.get("qk_norm", True) is not True:
        raise InputError(f"qk_norm is {top['qk_norm']!r:.80}; Gemma 3 normalizes queries and keys")
    known = {*ANCESTOR_KEYS, "qk_norm", "layer_types", "dtype"}
    known |= {"tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
    _reject_unknown_keys(top, known)
    fields = {new: top[old] for old, new in ANCESTOR_KEYS.items() if top.get(old) is not None}
    # Without a scalar, the notebook scales by the head size.
    fields.setdefault("query_pre_attn_scalar", fields.get("head_dim"))
    required = ("rope_base", "rope_local_base", "query_pre_attn_scalar")
    missing = [
        old for old, new in ANCESTOR_KEYS.items() if old not in required and new not in fields
    ]
    if missing:
        raise InputError(f"required keys are missing: {', '.join(missing)}")
    tokens = _other_token_ids(top, top)
    if fields["vocab_size"] == GPT2_VOCAB_SIZE:  # GPT-2 has one special token, with the last id
        end = GPT2_VOCAB_SIZE - 1
        tokens = {"pad_token_id": end, "bos_token_id": end} | tokens
        top = {"eos_token_id": end} | top
    return _build(
        **fields,
        layer_types=_layer_types(top, fields["num_hidden_layers"]),
        tie_word_embeddings=_is_tied(top),
        eos_token_id=_eos_token_ids(top, top, extra_eos),
        **tokens,
    )


def _build(**fields: Any) -> Gemma3Config:
    reals = ("query_pre_attn_scalar", "rope_theta", "rope_local_base_freq", "rope_scaling_factor")
    for key in (*reals, "rms_norm_eps", "initializer_range"):
        if key in fields:
            fields[key] = _real(fields[key], key)
    return Gemma3Config(**fields)


def _check_model_type(top: Mapping[str, Any]) -> None:
    model_type = top.get("model_type")
    has_text = top.get("text_config") is not None
    if model_type == "gemma3" and not has_text:
        raise InputError("model_type is 'gemma3', but there is no text_config; add it")
    if model_type == "gemma3_text" and has_text:
        raise InputError(
            "model_type is 'gemma3_text', but there is a text_config; keep one of them"
        )
    if model_type is None:
        raise InputError("model_type is missing; set it to gemma3_text or gemma3")
    if model_type not in ("gemma3", "gemma3_text"):
        advice = next((say for kind, say in MODEL_TYPES if str(model_type).startswith(kind)), None)
        raise InputError(
            f"model_type is {model_type!r:.80}; only Gemma 3 text models (gemma3_text, or gemma3 "
            "with a text_config) are supported" + (f": {advice}" if advice else "")
        )
    if advice := advice_on_architecture(top.get("architectures")):
        raise InputError(advice)


def _layer_types(text: Mapping[str, Any], num_hidden_layers: object) -> tuple[LayerType, ...]:
    layers = _whole(num_hidden_layers, "num_hidden_layers")
    if not 0 < layers <= MAX_LAYERS:
        raise InputError(f"num_hidden_layers is {layers}; it must be between 1 and {MAX_LAYERS}")
    public, private = text.get("sliding_window_pattern"), text.get("_sliding_window_pattern")
    listed = text.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise InputError("layer_types must be a list of strings, one per layer")
        listed = tuple(listed)
    # transformers 5 writes _sliding_window_pattern 6 next to any layer_types, so ignore it there.
    if public is not None and private is not None and public != private:
        raise InputError(
            f"sliding_window_pattern ({public!r:.80}) and _sliding_window_pattern "
            f"({private!r:.80}) contradict each other; keep one"
        )
    pattern = private if public is None and listed is None else public
    if pattern is not None:
        every = _whole(pattern, "sliding_window_pattern")
        if every < 1:
            raise InputError(f"sliding_window_pattern is {every}; it must be at least 1")
        if listed is not None and listed != default_layer_types(layers, every):
            raise InputError(
                f"layer_types and sliding_window_pattern ({every}) contradict each other; keep one"
            )
        return default_layer_types(layers, every)
    if listed is None:
        return default_layer_types(layers)
    return cast("tuple[LayerType, ...]", listed)


def _is_tied(top: Mapping[str, Any]) -> bool:
    """Return whether the head shares the embedding's weight.

    As in transformers 5, the top level of a multimodal config decides, whatever its text_config
    says.
    """
    value = top.get("tie_word_embeddings")
    if value is None:
        return True
    if not isinstance(value, bool):
        raise InputError(f"tie_word_embeddings is {value!r:.80}; it must be true or false")
    return value


def _eos_token_ids(
    top: Mapping[str, Any], text: Mapping[str, Any], extra: tuple[int, ...]
) -> tuple[int, ...]:
    stated = [part["eos_token_id"] for part in (text, top) if "eos_token_id" in part]
    found = [i for value in stated for i in _token_ids(value, where="eos_token_id")]
    if not stated:
        found = [1]
    return tuple(dict.fromkeys([*found, *extra]))


def _other_token_ids(top: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, int]:
    ids = {}
    for key in ("pad_token_id", "bos_token_id"):
        value = text.get(key) if text.get(key) is not None else top.get(key)
        if value is not None:
            ids[key] = _whole(value, key)
    return ids


def _token_ids(value: object, *, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(_whole(item, where) for item in values)


def _reject_unimplemented(part: Mapping[str, Any]) -> None:
    """Raise an error if a key selects a computation that is not implemented.

    Raises:
        InputError: naming the key, its value and the remedy.
    """
    bidirectional = part.get("use_bidirectional_attention")
    if bidirectional not in (None, False):
        raise InputError(
            f"use_bidirectional_attention is {bidirectional!r:.80}: this is an embedding model "
            "such as EmbeddingGemma, which does not generate text; use sentence-transformers, or "
            "Optimum to export it"
        )
    if quantization := part.get("quantization_config"):
        raise InputError(f"quantization_config: {advice_on_quantization(quantization)}")
    for key in ("hidden_activation", "hidden_act"):
        if part.get(key) not in (None, _ACTIVATION):
            raise InputError(f"{key} is {part[key]!r:.60}; only {_ACTIVATION} is supported")
    for key, reason in _MUST_BE_ABSENT.items():
        value = part.get(key)
        # a softcap of 0 does not mean "off", so only null, false and empty containers pass
        if value is not None and value is not False and value not in ({}, []):
            raise InputError(f"{key} is {value!r:.80}: {reason}")


def _reject_unknown_keys(part: Mapping[str, Any], known: Set[str]) -> None:
    """Raise an error if there are unknown keys, except those whose value is null.

    Raises:
        InputError: naming the keys and their values.
    """
    unknown = [key for key, value in part.items() if key not in known and value is not None]
    if unknown:
        shown = ", ".join(f"{key:.40} = {part[key]!r:.40}" for key in sorted(unknown)[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise InputError(
            f"unknown keys may change the computation, so they are not ignored: {shown}{more}; "
            "remove them if they are only metadata"
        )


def _whole(value: object, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{key} is {value!r:.60}; it must be an integer")
    if abs(value) >= 2**63:
        raise InputError(f"{key} is too large")
    return value


def _real(value: object, key: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(f"{key} is {value!r:.60}; it must be a number")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{key} is too large") from None


def _object(data: object, *, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InputError(f"{where} must be a JSON object, not {type(data).__name__}")
    return data
