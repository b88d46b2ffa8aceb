"""Which of a bundle's ONNX graphs to run, and on which device."""

from __future__ import annotations

from gemma3_export.bundle.bundle import Bundle, Graph
from gemma3_export.bundle.signature import WINDOW_MARGIN
from gemma3_export.device import Device
from gemma3_export.errors import InputError
from gemma3_export.runtimes.onnx.session import choose_device, import_onnxruntime

__all__ = ["chooses_windows", "device_for", "require_shareable", "window_problem"]

WINDOWS_SINCE = (1, 31)  # ONNX Runtime's sliding_window_cache on the CPU


def device_for(graph: Graph, name: str) -> Device:
    """Where to run ``graph``; see :func:`gemma3_export.runtimes.onnx.session.choose_device`.

    ``GroupQueryAttention`` has no float32 kernel on CUDA (`make placement` tells when it gets one):
    attention would run on the CPU, and every key and value cross the bus in every step.

    Raises:
        InputError: CUDA was asked for, and the graph's attention cannot run there.
        UnavailableError: ONNX Runtime or the device is missing.
    """
    device = choose_device(name)
    if device.kind != "cuda" or graph.target != "ort" or graph.cache_dtype != "float32":
        return device
    if name == "auto":
        return choose_device("cpu")
    remedy = (
        "--dtype bf16, or with --dtype fp32 --target portable"
        if all(recipe.blocks is None for recipe in graph.weights.values())
        else f"--dtype {graph.dtype} --activations bf16"
    )
    raise InputError(
        f"this graph ({graph.dtype}, target ort) computes attention in float32, for which ONNX "
        f"Runtime has no kernel on CUDA; export with {remedy}, or pass --device cpu"
    )


def chooses_windows(bundle: Bundle, device: Device, wanted: bool | None) -> bool:
    """Whether to run the graph whose sliding layers keep their window only.

    Raises:
        InputError: it is wanted and not to be had.
    """
    problem = window_problem(bundle, device)
    if wanted and problem:
        raise InputError(f"windowed caches were asked for, but {problem}")
    if wanted is None:  # windows shorter than their margin save nothing
        return problem is None and bundle.config.sliding_window > WINDOW_MARGIN
    return wanted


def window_problem(bundle: Bundle, device: Device) -> str | None:
    """Why the graph with windowed caches cannot run; None if it can.

    On CUDA its caches must have exactly the window's size, which nobody here has seen run.
    """
    config = bundle.config
    if config.sliding_window >= config.max_position_embeddings:
        return (
            f"the window of {config.sliding_window} tokens is as long as the context of "
            f"{config.max_position_embeddings}, so there is nothing to let go of"
        )
    if bundle.graph("onnx").windowed_path is None:
        return "the bundle has no such graph; export it anew, for the target ort"
    if device.kind != "cpu":
        return "they are for the CPU; pass --device cpu"
    version = import_onnxruntime().__version__
    if tuple(int(part) for part in version.split(".")[:2]) < WINDOWS_SINCE:
        needed = ".".join(map(str, WINDOWS_SINCE))
        return f"they need onnxruntime {needed} and this is {version}; upgrade it"
    return None


def require_shareable(bundle: Bundle, device: Device) -> None:
    """Refuse to run matrices as they lie in the file where that is no use.

    Raises:
        InputError: on a GPU, or with kernels that are far slower that way.
    """
    graph = bundle.graph("onnx")
    if device.kind == "cpu" and graph.dtype == "fp32":
        return
    reason = (
        f"bundles in {graph.dtype} have kernels that need their own layout of the weights"
        if device.kind == "cpu"
        else f"{device} has memory of its own"
    )
    raise InputError(f"weights can be shared between processes in fp32 on the CPU only: {reason}")
