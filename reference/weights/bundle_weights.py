"""The weights inside a bundle, whichever graph holds them."""

from __future__ import annotations

from gemma3_export.bundle.bundle import Bundle
from gemma3_export.reference.weights import WeightSource

__all__ = ["open_bundle_weights"]


def open_bundle_weights(
    bundle: Bundle, runtime: str | None = None, *, trust: bool = False
) -> WeightSource:
    """Canonical weights read back from the graph for ``runtime``, or from any graph.

    Raises:
        InputError: the graph cannot be read or contradicts the config.
    """
    runtimes = [graph.runtime for graph in bundle.manifest.graphs]
    chosen = runtime if runtime in runtimes else runtimes[0]
    if chosen != "onnx":
        from gemma3_export.reference.weights.archive_weights import ArchiveWeights

        return ArchiveWeights(bundle, chosen, trust=trust)
    from gemma3_export.reference.weights.onnx_weights import BundleWeights

    return BundleWeights(bundle)
