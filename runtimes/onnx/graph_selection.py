"""Choose which of a bundle's ONNX graphs to run, and on which device."""

from __future__ import annotations

from gemma3_export.bundle import WINDOW_MARGIN, Bundle, Graph
from gemma3_export.device import Device
from gemma3_export.dtypes import EXPORT_DTYPES
from gemma3_export.errors import InputError
from gemma3_export.runtimes.onnx.session import choose_device, import_onnxruntime

__all__ = [
    "device_for",
    "require_shareable_weights",
    "require_version",
    "sliding_window_problem",
    "use_sliding_window_cache",
]

SLIDING_WINDOW_SINCE = (1, 31)  # ONNX Runtime's sliding_window_cache on the CPU


def device_for(graph: Graph, name: str) -> Device:
    """Return the device to run ``graph`` on, for a device called ``name``.

    ``GroupQueryAttention`` has no float32 kernel on CUDA (`make placement` reports when it gets
    one): attention would run on the CPU, and every key and value would cross the bus in every step.

    Raises:
        InputError: CUDA was requested, and the graph's attention cannot run there.
        UnavailableError: ONNX Runtime or the device is missing.
    """
    device = choose_device(name)
    if device.kind != "cuda" or not graph.is_fused or graph.cache_dtype != "float32":
        return device
    if name == "auto":
        return choose_device("cpu")
    remedy = (
        "--dtype bf16, or with --dtype fp32 --target portable"
        if all(recipe.blocks is None for recipe in graph.weights.values())
        else f"--dtype {graph.dtype} --activations bf16"
        if EXPORT_DTYPES[graph.dtype].has_half_activations
        else "--dtype int8 --activations bf16"
    )
    raise InputError(
        f"this graph ({graph.dtype}, target {graph.target}) computes attention in float32, for "
        f"which ONNX Runtime has no kernel on CUDA; export with {remedy}, or pass --device cpu"
    )


def require_version(graph: Graph) -> None:
    """Reject an ONNX Runtime that cannot run ``graph``, or would run it wrongly.

    Raises:
        InputError: it is older than the manifest demands.
    """
    needed, version = graph.min_onnxruntime, import_onnxruntime().__version__
    if needed is not None and release(version) < release(needed):
        raise InputError(
            f"{graph.path} needs onnxruntime {needed} or newer, and this is {version}; run: pip "
            f'install "onnxruntime>={needed}"'
        )


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version such as ``1.24.1``.

    Raises:
        InputError: it is not a version.
    """
    try:
        return tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        raise InputError(f"{version!r:.40} is not a version; export the bundle again") from None


def use_sliding_window_cache(bundle: Bundle, device: Device, wanted: bool | None) -> bool:
    """Return whether to run the graph whose sliding layers cache their window only.

    Args:
        bundle: the bundle to run.
        device: from :func:`device_for`.
        wanted: None uses it if it can run and saves anything.

    Raises:
        InputError: it is wanted but cannot run.
    """
    problem = sliding_window_problem(bundle, device)
    if wanted and problem:
        raise InputError(f"sliding-window caches were requested, but {problem}")
    if wanted is None:  # windows shorter than their margin save nothing
        return problem is None and bundle.config.sliding_window > WINDOW_MARGIN
    return wanted


def sliding_window_problem(bundle: Bundle, device: Device) -> str | None:
    """Return why the graph with sliding-window caches cannot run; None if it can.

    On CUDA its caches must have exactly the window's size, which is not yet tested.
    """
    config = bundle.config
    if config.sliding_window >= config.max_position_embeddings:
        return (
            f"the window of {config.sliding_window} tokens is as long as the context of "
            f"{config.max_position_embeddings}, so no token would ever be evicted"
        )
    if bundle.graph("onnx").windowed_path is None:
        return "the bundle has no graph for them; export it again, for the target ort"
    if device.kind != "cpu":
        return "they run on the CPU only; pass --device cpu"
    version = import_onnxruntime().__version__
    if release(version) < SLIDING_WINDOW_SINCE:
        needed = ".".join(map(str, SLIDING_WINDOW_SINCE))
        return f"they need onnxruntime {needed} and this is {version}; upgrade it"
    return None


def require_shareable_weights(bundle: Bundle, device: Device) -> None:
    """Reject sharing weights between processes if it cannot work or would be far slower.

    Raises:
        InputError: the device is a GPU, or the kernels need their own layout of the weights.
    """
    graph = bundle.graph("onnx")
    if device.kind == "cpu" and graph.dtype == "fp32":
        return
    reason = (
        f"kernels for {graph.dtype} need their own layout of the weights"
        if device.kind == "cpu"
        else f"{device} has its own memory"
    )
    raise InputError(f"weights can be shared between processes in fp32 on the CPU only: {reason}")
