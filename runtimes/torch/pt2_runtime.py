"""Run a bundle's ``torch.export`` program with torch alone; no model definition is imported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from gemma3_export.errors import InputError
from gemma3_export.runtimes.torch.runtime import ArchiveRuntime, last_line

__all__ = ["Pt2Runtime"]


class Pt2Runtime(ArchiveRuntime):
    """A bundle's exported program; see :class:`ArchiveRuntime`."""

    name = "pt2"
    can_capture = False  # the chosen tokens' number is read from a mask

    def count(self, num_logits: int) -> torch.Tensor:
        """See :class:`ArchiveRuntime`; the program compares it with places on its device."""
        return torch.tensor([num_logits], device=self.device)

    def load(self, path: Path) -> Any:
        """See :class:`ArchiveRuntime`; devices in the program become the runtime's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own calls among themselves
            try:
                program = torch.export.load(path)
            except Exception as error:  # the reader raises what its parts raise
                raise InputError(
                    f"torch {torch.__version__} cannot load {path}: {last_line(error)}; "
                    "export the bundle anew"
                ) from error
            if self.device.type != "cpu":  # where it was traced
                program = move_to_device_pass(program, str(self.device))
            # The guards repeat what the example inputs happened to be (a past that is not empty);
            # the graph itself computes every shape, which the tests prove.
            return program.module(check_guards=False)
