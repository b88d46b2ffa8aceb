"""Open any runtime of a bundle by its name.

The one place that knows all backends; each is imported only when it is asked for, so the ONNX path
never imports torch.
"""

from __future__ import annotations

from pathlib import Path

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.runtimes.protocol import Runtime

__all__ = ["RUNTIMES", "open_runtime"]

RUNTIMES = ("onnx", "reference")


def open_runtime(
    bundle: Bundle | Path,
    runtime: str = "onnx",
    *,
    device: str = "auto",
    threads: int | None = None,
) -> Runtime:
    """Load one of a bundle's runtimes.

    Args:
        bundle: an opened bundle, or its folder.
        runtime: ``onnx``, or ``reference``: the PyTorch model with the bundle's weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator; None lets the backend choose.

    Raises:
        InputError: the bundle is damaged or has no such graph.
        UnavailableError: a package or the device is missing.
    """
    if isinstance(bundle, Path):
        bundle = Bundle(bundle)
    if runtime == "onnx":
        from gemma3_export.runtimes.onnx_runtime import OnnxRuntime

        return OnnxRuntime(bundle, device=device, threads=threads)
    if runtime == "reference":
        return _open_reference(bundle, device, threads)
    raise InputError(f"unknown runtime {runtime!r}; choose {', '.join(RUNTIMES)}")


def _open_reference(bundle: Bundle, device: str, threads: int | None) -> Runtime:
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(
            'the reference runtime needs torch; run: pip install "gemma3-export[export]"'
        ) from error
    from gemma3_export.exporters.onnx_weights import BundleWeights
    from gemma3_export.reference.loading import load_reference
    from gemma3_export.reference.runtime import ReferenceRuntime
    from gemma3_export.runtimes.onnx_session import parse_device

    wanted = parse_device(device)
    has_cuda = torch.cuda.is_available()
    if wanted is not None and wanted.kind == "cuda" and not has_cuda:
        raise UnavailableError(
            "CUDA was asked for, but torch finds no GPU; pass --device cpu, or install a CUDA "
            "build of torch and an NVIDIA driver"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    place = "cuda" if wanted is None and has_cuda else str(wanted or "cpu")
    bundle.check_sizes()
    return ReferenceRuntime(load_reference(BundleWeights(bundle), device=place))
