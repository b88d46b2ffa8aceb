"""Every place that weights come from, behind one lazy interface: :func:`open_weights`."""

from gemma3_export.reference.weights.opening import open_weights
from gemma3_export.reference.weights.source import WeightSource, check_finite

__all__ = ["WeightSource", "check_finite", "open_weights"]
