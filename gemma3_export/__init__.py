"""Gemma 3 from weights to deployment, with proof that nothing changed on the way.

Importing this package imports neither torch nor ONNX Runtime.
"""

from gemma3_export.config import Gemma3Config
from gemma3_export.errors import Gemma3ExportError, InputError, ParityError, UnavailableError

__all__ = ["Gemma3Config", "Gemma3ExportError", "InputError", "ParityError", "UnavailableError"]

__version__ = "0.1.0"
