"""Which keys of a ``config.json`` mean what: read, harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from gemma3_export.errors import InputError

__all__ = [
    "BENIGN_KEYS",
    "TEXT_DEFAULTS",
    "TEXT_KEYS",
    "WRAPPER_KEYS",
    "refuse_unimplemented",
    "refuse_unknown_keys",
]

# What a file that omits a key means by that: the defaults of transformers' Gemma3TextConfig.
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
    "vision_config",  # the text half does not depend on it
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

# Keys that say something about the file, about training, or about how somebody generates text.
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
    # generation settings that older transformers wrote into the model's config
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
    # handled by refuse_unimplemented, harmless once that has passed
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
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "use_bidirectional_attention",
}

_ACTIVATION = "gelu_pytorch_tanh"
_MUST_BE_ABSENT = {
    "attn_logit_softcapping": "Gemma 3 caps no logits; is this a Gemma 2 model?",
    "final_logit_softcapping": "Gemma 3 caps no logits; is this a Gemma 2 model?",
    "attention_bias": "Gemma 3 projections have no bias",
    "mlp_bias": "Gemma 3 projections have no bias",
    "add_cross_attention": "only decoders without cross-attention are supported",
    "cross_attention_hidden_size": "only decoders without cross-attention are supported",
    "is_encoder_decoder": "only decoders are supported",
    "pruned_heads": "pruned models are not supported",
    "tie_encoder_decoder": "only decoders are supported",
    "quantization_config": "give the unquantised checkpoint, or a GGUF file",
    "auto_map": "custom model code is never run; give a checkpoint of the stock architecture",
}


def refuse_unimplemented(part: Mapping[str, Any]) -> None:
    """Stop at a key that changes the computation in a way that is not implemented.

    Raises:
        InputError: naming the key, its value and what to do.
    """
    bidirectional = part.get("use_bidirectional_attention")
    if bidirectional not in (None, False):
        raise InputError(
            f"use_bidirectional_attention is {bidirectional!r:.80}: this is an embedding model "
            "such as EmbeddingGemma, which generates no text; give a causal Gemma 3 checkpoint"
        )
    for key in ("hidden_activation", "hidden_act"):
        if part.get(key) not in (None, _ACTIVATION):
            raise InputError(f"{key} is {part[key]!r:.60}; only {_ACTIVATION} is supported")
    for key, reason in _MUST_BE_ABSENT.items():
        value = part.get(key)
        # 0 and 0.0 are no "off" for a cap, so only null, false and empty containers pass
        if value is not None and value is not False and value not in ({}, []):
            raise InputError(f"{key} is {value!r:.80}: {reason}")


def refuse_unknown_keys(part: Mapping[str, Any], known: Set[str]) -> None:
    """Stop at keys that nothing here understands, unless they are null.

    Raises:
        InputError: naming every such key with its value.
    """
    unknown = [key for key, value in part.items() if key not in known and value is not None]
    if unknown:
        shown = ", ".join(f"{key:.40} = {part[key]!r:.40}" for key in sorted(unknown)[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise InputError(
            f"unknown keys may change the computation and are not ignored: {shown}{more}; "
            "remove them if they are only metadata"
        )
