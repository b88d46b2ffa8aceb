"""Open any runtime of a bundle by its name, and the bundle's tokenizer.

The one place that knows all backends; each is imported only when it is asked for, so the ONNX path
never imports torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gemma3_export.api.options import LoadOptions
from gemma3_export.bundle import RUNTIMES, Bundle
from gemma3_export.device import CudaOptions
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import is_file
from gemma3_export.runtimes.generation.loop import GenerationOptions, generate
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import Runtime
from gemma3_export.tokenizer import Tokenizer

__all__ = ["bundle_tokenizer", "open_runtime", "warm_up"]

WARM_UP_PROMPT = 16  # tokens
WARM_UP_STEPS = 4  # two warm up and capture a CUDA graph, and the next replay it


def open_runtime(
    bundle: Bundle | Path | str,
    runtime: str = "onnx",
    *,
    device: str = "auto",
    threads: int | None = None,
    trust: bool = False,
    cuda: CudaOptions | None = None,
    sliding_window_cache: bool | None = None,
    shares_weights: bool = False,
) -> Runtime:
    """Load one of a bundle's runtimes.

    Args:
        bundle: an opened bundle, or its folder.
        runtime: ``onnx``, ``torchscript``, ``pt2``, or ``reference``: the PyTorch model with the
            bundle's weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator; None lets the backend choose.
        trust: load a torch archive although it is not the one that was exported.
        cuda: what may be done on a GPU; ignored on the CPU.
        sliding_window_cache: see :class:`gemma3_export.runtimes.onnx.runtime.OnnxRuntime`; other
            runtimes keep everything.
        shares_weights: see there too.

    Raises:
        InputError: the bundle is damaged or has no such graph, or an option is invalid.
        UnavailableError: a package or the device is missing.
    """
    LoadOptions(  # checks them
        runtime=runtime,
        device=device,
        threads=threads,
        trust=trust,
        cuda=cuda,
        sliding_window_cache=sliding_window_cache,
        shares_weights=shares_weights,
    )
    if not isinstance(bundle, Bundle):
        bundle = Bundle(bundle)
    if runtime == "onnx":
        from gemma3_export.runtimes.onnx.runtime import OnnxRuntime

        return OnnxRuntime(
            bundle,
            device=device,
            threads=threads,
            cuda=cuda,
            sliding_window_cache=sliding_window_cache,
            shares_weights=shares_weights,
        )
    if shares_weights:
        raise InputError(f"weights are shared by the onnx runtime, not by {runtime}")
    if runtime == "torchscript":
        require_torch("torchscript")
        from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime

        return TorchScriptRuntime(bundle, device=device, threads=threads, trust=trust, cuda=cuda)
    if runtime == "pt2":
        require_torch("pt2")
        from gemma3_export.runtimes.torch.runtime import Pt2Runtime

        return Pt2Runtime(bundle, device=device, threads=threads, trust=trust, cuda=cuda)
    if runtime == "reference":
        return _open_reference(bundle, device, threads)
    raise InputError(f"unknown runtime {runtime!r}; choose {', '.join(RUNTIMES)}")


def warm_up(runtime: Runtime) -> None:
    """Prefill a short prompt and decode a few tokens, so that the first real prompt does not wait.

    First steps load kernels and libraries and allocate memory, which takes seconds on CUDA. There,
    decoding steps are also captured as a CUDA graph, if they may be. No result depends on it.
    """
    room = runtime.config.max_position_embeddings
    steps = min(WARM_UP_STEPS, room - 1)
    prompt = [runtime.config.bos_token_id] * min(WARM_UP_PROMPT, room - steps)
    options = GenerationOptions(max_new_tokens=1 + steps, stop_token_ids=())
    generate(runtime, [prompt], SamplingParams(), options).collect()


def bundle_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """Return the tokenizer of ``bundle``, checked against its model, or None.

    Raises:
        InputError: it is damaged, or belongs to another model.
    """
    path = bundle.file("tokenizer.json")
    if not is_file(path):
        return None
    tokenizer = Tokenizer.from_file(path)
    tokenizer.check_vocab_size(bundle.config.vocab_size)
    return tokenizer


def _open_reference(bundle: Bundle, device: str, threads: int | None) -> Runtime:
    require_torch("reference")
    import torch

    from gemma3_export.reference.loading import load_reference
    from gemma3_export.reference.runtime import ReferenceRuntime
    from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
    from gemma3_export.runtimes.torch.tensors import torch_device

    place = torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    bundle.check_quickly()
    return ReferenceRuntime(load_reference(open_bundle_weights(bundle), device=place))


def require_torch(runtime: str) -> None:
    """Complain when torch is missing.

    Raises:
        UnavailableError: with the command that installs it.
    """
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError(
            f'the {runtime} runtime needs torch; run: pip install "gemma3-export[export]"'
        )
