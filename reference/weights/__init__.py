"""Sources of weights behind one lazy interface; :func:`open_weights` opens them all."""

from gemma3_export.reference.weights.opening import open_weights
from gemma3_export.reference.weights.source import WeightSource, check_finite

__all__ = ["WeightSource", "check_finite", "open_weights"]
