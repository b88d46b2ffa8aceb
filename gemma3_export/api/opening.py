"""Open any runtime of a bundle by its name, or weights on the reference.

The one place that knows all backends; each is imported only when it is asked for, so the ONNX path
never imports torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma3_export.api.model_files import AUTO, Weights, choose_runtime, open_files, require_torch
from gemma3_export.api.options import LoadOptions
from gemma3_export.bundle import RUNTIMES, Bundle
from gemma3_export.config import Gemma3Config
from gemma3_export.device import CudaOptions
from gemma3_export.errors import InputError
from gemma3_export.processors import chosen_threads
from gemma3_export.runtimes.generation.generate import generate
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import IntArray, Runtime

__all__ = ["open_runtime", "warm_up", "warm_up_prompt"]

WARM_UP_PROMPT = 16  # tokens
WARM_UP_STEPS = 4  # two warm up and capture a CUDA graph, and the next replay it


def open_runtime(
    bundle: Bundle | Weights | Path | str,
    runtime: str = AUTO,
    *,
    variant: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    trust: bool = False,
    cuda: CudaOptions | None = None,
    sliding_window_cache: bool | None = None,
    shares_weights: bool = False,
    huge_pages: bool = False,
) -> Runtime:
    """Load one of a bundle's runtimes, or weights on the reference.

    Args:
        bundle: an opened bundle or weights, or the path of either.
        runtime: ``onnx``, ``torchscript``, ``pt2``, or ``reference``: the PyTorch model with the
            bundle's weights. ``auto`` is ``onnx`` if the bundle has it, otherwise its only graph,
            and the reference for weights.
        variant: which graph of the runtime, such as ``int8``; None is the default, or what an
            opened bundle uses.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads; None lets the backend choose.
        trust: load a torch archive although it is not the one that was exported.
        cuda: what may be done on a GPU; ignored on the CPU.
        sliding_window_cache: see :class:`gemma3_export.runtimes.onnx.runtime.OnnxRuntime`; other
            runtimes keep everything.
        shares_weights: see there too.
        huge_pages: see there too; other runtimes ignore it.

    Raises:
        InputError: the bundle is damaged or has no such graph, or an option is invalid.
        UnavailableError: a package or the device is missing.
    """
    LoadOptions(  # checks them
        runtime=runtime,
        variant=variant,
        device=device,
        threads=threads,
        trust=trust,
        cuda=cuda,
        sliding_window_cache=sliding_window_cache,
        shares_weights=shares_weights,
        huge_pages=huge_pages,
    )
    files = open_files(bundle, variant)
    runtime = choose_runtime(files, runtime)
    if shares_weights and runtime != "onnx":
        raise InputError(f"weights are shared by the onnx runtime, not by {runtime}")
    if runtime == "reference":
        return _open_reference(files, device, threads)
    assert isinstance(files, Bundle)
    if runtime == "onnx":
        from gemma3_export.runtimes.onnx.runtime import OnnxRuntime

        return OnnxRuntime(
            files,
            device=device,
            threads=threads,
            cuda=cuda,
            sliding_window_cache=sliding_window_cache,
            shares_weights=shares_weights,
            huge_pages=huge_pages,
        )
    if runtime == "torchscript":
        require_torch("torchscript")
        from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime

        return TorchScriptRuntime(files, device=device, threads=threads, trust=trust, cuda=cuda)
    if runtime == "pt2":
        require_torch("pt2")
        from gemma3_export.runtimes.torch.runtime import Pt2Runtime

        return Pt2Runtime(files, device=device, threads=threads, trust=trust, cuda=cuda)
    raise InputError(f"unknown runtime {runtime!r}; choose {', '.join(RUNTIMES)}")


def warm_up(runtime: Runtime) -> None:
    """Prefill a short prompt and decode a few tokens, so that the first real prompt does not wait.

    First steps load kernels and libraries and allocate memory, which takes seconds on CUDA. There,
    decoding steps are also captured as a CUDA graph, if they may be. No result depends on it.
    """
    prompt, new_tokens = warm_up_prompt(runtime.config)
    options = GenerationOptions(max_new_tokens=new_tokens, stop_token_ids=())
    generate(runtime, [prompt], SamplingParams(), options).collect()


def warm_up_prompt(config: Gemma3Config) -> tuple[IntArray, int]:
    """Return a prompt [T] and a number of new tokens that suffice to warm up."""
    room = config.max_position_embeddings
    steps = min(WARM_UP_STEPS, room - 1)
    return np.full(min(WARM_UP_PROMPT, room - steps), config.bos_token_id), 1 + steps


def _open_reference(files: Bundle | Weights, device: str, threads: int | None) -> Runtime:
    require_torch("reference")
    import torch

    from gemma3_export.reference.loading import load_reference
    from gemma3_export.reference.runtime import ReferenceRuntime
    from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
    from gemma3_export.runtimes.torch.tensors import torch_device

    place = torch_device(device)
    if (threads := chosen_threads(threads)) is not None:
        torch.set_num_threads(threads)
    if isinstance(files, Weights):
        return ReferenceRuntime(load_reference(files.source, device=place))
    files.check_quickly(only_for=files.first_graph)
    return ReferenceRuntime(load_reference(open_bundle_weights(files), device=place))
