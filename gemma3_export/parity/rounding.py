"""Reproduce the reduced-precision arithmetic of quantized and half-precision graphs.

8-bit kernels: ONNX Runtime's ``MatMulNBits`` (``accuracy_level`` 4, on the CPU) also rounds its
input, one block at a time, to ``round(127 x / max|x|)``; exports in ``w8a8`` and those for browsers
do so one row at a time, after a rotation. That costs more accuracy than any float32
rounding. A quantized graph is therefore checked twice: with float products, as strictly as a
float32 graph, which shows that the graph and its weights are correct; and as it is shipped, against
a reference that rounds in the same way, which shows that the kernels are correct.

The second check leaves one thing to chance: to which of two codes a value near their midpoint is
rounded. A different code in an early layer changes codes in later layers as well, and the error
approaches the cost of rounding as a whole. The noise floor therefore includes a share of that cost,
:data:`ROUNDING_SHARE`. With a share of 0.05, two of six correct tiny exports exceeded their limits,
by a factor of 2.3 at most; the real 270M, which has many codes, used a quarter of its limits. With
0.2, one of 22 cases of the bundled model in ``w8a8`` exceeded a limit by 4 %. With 0.25 and the
default factor of 8, limits are twice the cost: what two ways of rounding can differ by.

Half precision: ONNX graphs in float16 keep the residual stream and the norms in float32. A
reference that runs entirely in float16 would have no noise floor at all: the residual stream of the
real 270M reaches 104,000.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemma3_export.bundle import BlockFormat
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.weights.block_matrix import rotate

__all__ = [
    "ROUNDING_SHARE",
    "ActivationRounding",
    "round_to_int8",
    "widen_residual",
]

ROUNDING_SHARE = 0.25


def round_to_int8(x: Tensor, weights: BlockFormat, smoothing: Tensor | None = None) -> Tensor:
    """Return x [..., K] rounded to 255 levels, in blocks, smoothed and rotated as ``weights`` are.

    ``smoothing`` [K] is what a graph divides the inputs by, if anything.
    """
    if smoothing is not None:
        return round_to_int8(x / smoothing.to(x), weights) * smoothing.to(x)
    blocks = rotate(x, weights.rotation).reshape(*x.shape[:-1], -1, weights.block_size)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / scales.where(scales > 0, 1.0))
    return rotate((codes * scales).reshape(x.shape), weights.rotation)


class ActivationRounding:
    """Hooks that round the inputs of some matrices of a model while :meth:`enabled` is active.

    Args:
        model: the model that receives the hooks.
        formats: format of the weights by canonical name; a tied embedding refers to the head.
        smoothing: what the inputs of some of them are divided by first.
    """

    def __init__(
        self,
        model: Gemma3,
        formats: Mapping[str, BlockFormat],
        smoothing: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.is_enabled = False
        self._hooks = []
        head = model.config.head_name
        for name, block_format in formats.items():
            module = model.head if name == head else model.get_submodule(name.rpartition(".")[0])
            if name == head or isinstance(module, nn.Linear):  # a lookup has no input to round
                hook = self._hook(block_format, (smoothing or {}).get(name))
                self._hooks.append(module.register_forward_pre_hook(hook))

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Round inputs until the end of the ``with`` block."""
        self.is_enabled = True
        try:
            yield
        finally:
            self.is_enabled = False

    def _hook(self, block_format: BlockFormat, smoothing: Tensor | None) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.is_enabled:
                return None
            return (round_to_int8(inputs[0], block_format, smoothing), *inputs[1:])

        return hook


def widen_residual(model: Gemma3) -> None:
    """Add hooks that keep the residual stream of a half-precision ``model`` in float32."""
    model.model.embed_tokens.register_forward_hook(_widen_output)
    for layer in model.model.layers:
        assert isinstance(layer, nn.Module)
        for name, module in layer.named_modules():
            if name.startswith("post_"):  # these norms feed the residual addition
                module.register_forward_pre_hook(_widen_input)
            elif isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_narrow_input(module.weight.dtype))
    model.head.register_forward_pre_hook(_narrow_input(model.head_weight.dtype))


def _widen_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    del module, inputs
    return output.float()


def _widen_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    del module
    return (inputs[0].float(),)


def _narrow_input(dtype: torch.dtype) -> Any:
    def narrow(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (inputs[0].to(dtype), *inputs[1:])

    return narrow
