"""torch.compile, refused before a run begins where it cannot work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma3_export.errors import UnavailableError

__all__ = ["compile_in_place"]


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Have ``module`` compiled on its first calls.

    Raises:
        UnavailableError: a trivial function cannot be compiled, for want of a C++ compiler or of
            Triton, say.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    # Inductor, Triton and the compilers that they start fail in many ways.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnavailableError(
            f"--compile does not work here ({reason[0]:.200}); on a CPU it needs a C++ compiler "
            "such as g++, on CUDA Triton as well: install them, or leave --compile away"
        ) from error
    module.compile()


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1
