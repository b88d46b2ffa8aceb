"""Name the models and weight formats that look like Gemma 3 but are not, and what to do instead.

Each table maps what a file states to one sentence for the error message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "GGUF_ARCHITECTURES",
    "MODEL_TYPES",
    "advice_on_architecture",
    "advice_on_quantization",
]

_EMBEDDING = (
    "an embedding model such as EmbeddingGemma, which attends in both directions and does not "
    "generate text; use sentence-transformers, or Optimum to export it"
)
_GEMMA_3N = (
    "Gemma 3n is another architecture than Gemma 3 (per-layer embeddings, AltUp); use transformers "
    "or llama.cpp"
)
_T5GEMMA = "T5Gemma is an encoder-decoder, not Gemma 3; use transformers"
_GEMMA_4 = "Gemma 4 is another architecture than Gemma 3; use transformers or llama.cpp"
_GEMMA_2 = "Gemma 2 is another architecture than Gemma 3 (logit softcapping); use transformers"
_GEMMA_1 = "Gemma 1 is another architecture than Gemma 3; use transformers"

# Prefixes of model_type, the longest first.
MODEL_TYPES: tuple[tuple[str, str], ...] = (
    ("embedding_gemma", _EMBEDDING),
    ("gemma3n", _GEMMA_3N),
    ("gemma4", _GEMMA_4),
    ("t5gemma", _T5GEMMA),
    ("t5_gemma", _T5GEMMA),
    ("gemma2", _GEMMA_2),
    ("vaultgemma", "VaultGemma is derived from Gemma 2, not from Gemma 3; use transformers"),
    ("recurrent_gemma", "RecurrentGemma is another architecture than Gemma 3; use transformers"),
    ("diffusion_gemma", "a diffusion model does not generate token by token; use transformers"),
    ("paligemma", "PaliGemma wraps Gemma 1 or 2, not Gemma 3; use transformers"),
    ("shieldgemma2", "ShieldGemma 2 classifies images and generates no text; use transformers"),
    ("gemma3", "only the text model of Gemma 3 is supported; use transformers"),
    ("gemma", _GEMMA_1),
)

GGUF_ARCHITECTURES: Mapping[str, str] = {
    "gemma-embedding": _EMBEDDING,
    "gemma3n": _GEMMA_3N,
    "gemma4": _GEMMA_4,
    "t5gemma": _T5GEMMA,
    "gemma2": _GEMMA_2,
    "gemma": _GEMMA_1,
    "clip": "this is the vision tower (mmproj) of a model; pass the GGUF file of its text model",
}

_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

_QUANTIZERS = {
    "bitsandbytes": "bitsandbytes; load it in transformers, call model.dequantize(), save it",
    "compressed-tensors": "compressed-tensors (llm-compressor, vLLM); decompress it with that "
    "package, save it",
    "gptq": "GPTQ; take the checkpoint that it was made from, or dequantize and save it",
    "awq": "AWQ; take the checkpoint that it was made from, or dequantize and save it",
    "fp8": "8-bit floats with scales; take the bfloat16 checkpoint that it was made from, or "
    "dequantize and save it",
}


def advice_on_architecture(architectures: object) -> str | None:
    """Return what to do with a model whose ``architectures`` are no language model, else None."""
    names = architectures if isinstance(architectures, list) else [architectures]
    for name in names:
        if isinstance(name, str) and name.endswith(_HEADS):
            return (
                f"architectures is {name!r:.80}: a classification head, which cannot generate "
                "text; export it with Optimum, or take the language model that it was made from"
            )
    return None


def advice_on_quantization(value: Any) -> str:
    """Return what to do with weights that have a ``quantization_config``."""
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    if method is None and isinstance(value, Mapping):
        method = "bitsandbytes" if value.keys() & {"load_in_4bit", "load_in_8bit"} else None
    kind = "fp8" if "fp8" in str(method) else str(method).replace("_", "-")
    known = _QUANTIZERS.get(kind, f"{method!r:.40}; take the unquantized checkpoint, save it")
    return (
        f"the weights are quantized by {known} in bfloat16, and export that with --dtype int8 or "
        "int4; or pass a quantized GGUF file"
    )
