"""Run a bundle's TorchScript archive with torch alone: nothing of the reference is imported."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from gemma3_export.errors import InputError
from gemma3_export.runtimes.torch.runtime import ArchiveRuntime, last_line, torch_device
from gemma3_export.runtimes.torch.torchscript_support import executor_for, torchscript

__all__ = ["TorchScriptRuntime", "torch_device"]


class TorchScriptRuntime(ArchiveRuntime):
    """A bundle's TorchScript archive; see :class:`ArchiveRuntime`."""

    name = "torchscript"
    can_capture = True

    def load(self, path: Path) -> Any:
        """See :class:`ArchiveRuntime`."""
        with torchscript():
            try:
                load: Any = torch.jit.load  # untyped
                module: Any = load(str(path), map_location=self.device)
            except RuntimeError as error:
                raise InputError(
                    f"torch {torch.__version__} cannot load {path}: {last_line(error)}; "
                    "export the bundle anew (with --no-prepack for torch builds without oneDNN)"
                ) from error
        return module.eval()

    def executing(self) -> AbstractContextManager[None]:
        """See :class:`ArchiveRuntime`."""
        return executor_for(self.device)
