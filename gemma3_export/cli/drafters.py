"""Where ``generate`` gets its drafts from: the text so far, or a smaller model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gemma3_export.errors import InputError

if TYPE_CHECKING:
    from gemma3_export.bundle import Bundle
    from gemma3_export.runtimes.generation.speculation import Drafter
    from gemma3_export.runtimes.onnx.session import CudaOptions
    from gemma3_export.runtimes.protocol import Runtime
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["default_draft_tokens", "draft_model", "prompt_lookup"]


def prompt_lookup(max_draft_tokens: int) -> Callable[[], Drafter] | None:
    """Drafts from the text so far, if any are wanted."""
    from gemma3_export.runtimes.generation.speculation import PromptLookup

    return PromptLookup if max_draft_tokens else None


def default_draft_tokens(bundle: Bundle, runtime: str, device: object) -> int:
    """How many tokens to draft where nothing was asked for.

    Quantised products are computed otherwise for several tokens than for one: slower a token, and
    with differences far above rounding, so drafts could change the text. On CUDA
    nothing of it has been measured.
    """
    from gemma3_export.runtimes.generation.speculation import MAX_DRAFT_TOKENS

    drafts = str(device) == "cpu" and not bundle.is_quantized(runtime)
    return MAX_DRAFT_TOKENS if drafts else 0


def draft_model(
    path: Path,
    model: Runtime,
    tokenizer: Tokenizer | None,
    *,
    runtime: str,
    device: str,
    threads: int | None,
    trust: bool,
    cuda: CudaOptions | None,
    capacity: int,
) -> Callable[[], Drafter]:
    """Drafts from the bundle at ``path``, run as the model is.

    Raises:
        InputError: it is damaged, or its tokens are not the model's.
        UnavailableError: a package or the device is missing.
    """
    from gemma3_export.api.opening import open_runtime
    from gemma3_export.api.verification import bundle_tokenizer
    from gemma3_export.bundle import Bundle
    from gemma3_export.runtimes.generation.speculation import DraftModel, relative_cost

    bundle = Bundle(path)
    own = bundle_tokenizer(bundle)
    if tokenizer is not None and own is not None and not own.has_tokens_of(tokenizer):
        raise InputError(
            f"the draft model in {path} has another tokenizer than the model; give one of the "
            "same family"
        )
    backend = open_runtime(
        bundle,
        runtime,
        device=device,
        threads=threads,
        trust=trust,
        cuda=cuda,
        windowed=False,  # wrong drafts are cut off as far back as they go
    )
    token_cost = relative_cost(backend, model)
    return lambda: DraftModel(backend, capacity=capacity, token_cost=token_cost)
