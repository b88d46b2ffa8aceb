"""Run a bundle's ``torch.export`` program with torch alone; no model definition is imported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from gemma3_export.bundle import Bundle
from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.runtimes.archive_runtime import ArchiveRuntime, last_line

__all__ = ["Pt2Runtime"]


class Pt2Runtime(ArchiveRuntime):
    """A bundle's exported program; see :class:`ArchiveRuntime`. It runs on the CPU only."""

    name = "pt2"

    def __init__(
        self,
        bundle: Bundle | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        trust: bool = False,
    ) -> None:
        device = "cpu" if device == "auto" else device
        super().__init__(bundle, device=device, threads=threads, trust=trust)

    def load(self, path: Path) -> Any:
        """See :class:`ArchiveRuntime`."""
        if self.device.type != "cpu":  # a program is bound to the device that it was traced on
            raise UnavailableError(
                f"the pt2 runtime runs on the CPU only, not on {self.device}; pass --device cpu, "
                "or use the torchscript or onnx runtime"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own calls among themselves
            try:
                program = torch.export.load(path)
            except Exception as error:  # the reader raises what its parts raise
                raise InputError(
                    f"torch {torch.__version__} cannot load {path}: {last_line(error)}; "
                    "export the bundle anew"
                ) from error
            # The guards repeat what the example inputs happened to be (a past that is not empty);
            # the graph itself computes every shape, which the tests prove.
            return program.module(check_guards=False)
