"""Gemma 3 from weights to deployment, with proof that nothing changed on the way.

    import gemma3_export

    model = gemma3_export.load("gemma-3-270m")
    print(model.generate("The sea is", max_new_tokens=64).text)

Importing this package imports neither torch nor ONNX Runtime.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gemma3_export.errors import (
    EngineClosedError,
    Gemma3ExportError,
    InputError,
    ParityError,
    QueueFullError,
    TextTooLongError,
    UnavailableError,
)

if TYPE_CHECKING:
    from gemma3_export.api.batch import BatchOptions, BatchSummary, run_batch
    from gemma3_export.api.engine import Engine, EngineOptions, EngineStats
    from gemma3_export.api.engine_stream import EngineStream
    from gemma3_export.api.exporting import (
        OnnxOptions,
        Pt2Options,
        TorchScriptOptions,
        export_onnx,
        export_pt2,
        export_torchscript,
        open_weights,
    )
    from gemma3_export.api.model import Chat, Model, load
    from gemma3_export.api.opening import open_runtime
    from gemma3_export.api.options import GenerateOptions, LoadOptions
    from gemma3_export.api.publishing import PushOptions, PushResult, push_to_hub
    from gemma3_export.api.stream import TextStream
    from gemma3_export.api.verification import VerifyRequest, verify
    from gemma3_export.bundle import Bundle
    from gemma3_export.config import Gemma3Config
    from gemma3_export.runtimes.generation.request import Completion
    from gemma3_export.tokenizer import Tokenizer

__all__ = [
    "BatchOptions",
    "BatchSummary",
    "Bundle",
    "Chat",
    "Completion",
    "Engine",
    "EngineClosedError",
    "EngineOptions",
    "EngineStats",
    "EngineStream",
    "Gemma3Config",
    "Gemma3ExportError",
    "GenerateOptions",
    "InputError",
    "LoadOptions",
    "Model",
    "OnnxOptions",
    "ParityError",
    "Pt2Options",
    "PushOptions",
    "PushResult",
    "QueueFullError",
    "TextStream",
    "TextTooLongError",
    "Tokenizer",
    "TorchScriptOptions",
    "UnavailableError",
    "VerifyRequest",
    "export_onnx",
    "export_pt2",
    "export_torchscript",
    "load",
    "open_runtime",
    "open_weights",
    "push_to_hub",
    "run_batch",
    "verify",
]

__version__ = "0.1.0"

# Imported on first use, so that `import gemma3_export` stays fast and light.
_HOMES = {
    "BatchOptions": "api.batch",
    "BatchSummary": "api.batch",
    "Bundle": "bundle",
    "Chat": "api.model",
    "Completion": "runtimes.generation.request",
    "Engine": "api.engine",
    "EngineOptions": "api.engine",
    "EngineStats": "api.engine",
    "EngineStream": "api.engine_stream",
    "Gemma3Config": "config",
    "GenerateOptions": "api.options",
    "LoadOptions": "api.options",
    "Model": "api.model",
    "OnnxOptions": "api.exporting",
    "Pt2Options": "api.exporting",
    "PushOptions": "api.publishing",
    "PushResult": "api.publishing",
    "TextStream": "api.stream",
    "Tokenizer": "tokenizer",
    "TorchScriptOptions": "api.exporting",
    "VerifyRequest": "api.verification",
    "export_onnx": "api.exporting",
    "export_pt2": "api.exporting",
    "export_torchscript": "api.exporting",
    "load": "api.model",
    "open_runtime": "api.opening",
    "open_weights": "api.exporting",
    "push_to_hub": "api.publishing",
    "run_batch": "api.batch",
    "verify": "api.verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
