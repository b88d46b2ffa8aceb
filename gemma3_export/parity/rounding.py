"""The arithmetic of 8-bit kernels: inputs of quantised matrices are rounded to int8 as well.

ONNX Runtime's ``MatMulNBits`` (``accuracy_level`` 4, on the CPU) rounds each block of its input to
``round(127 x / max|x|)`` before it multiplies. That costs more accuracy than any float32 rounding.
So a quantised graph is checked twice: with float products, as sharply as a float32 graph, which
shows that graph and weights are right; and as it is shipped, against a reference that rounds the
same, which shows that the kernels are.

What is left to chance in the second is which way a number near the middle of two codes falls, and a
code that falls differently in an early layer makes later ones do so too. The error then comes near
what the rounding costs as a whole, so the floor gets a share of that: :data:`FLIP_SHARE`. With a
share of 0.05, two of six correct tiny exports exceeded their limits, by 2.3 times at most, and the
real 270M, with its many codes, used a quarter of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemma3_export.reference.model import Gemma3

__all__ = [
    "FLIP_SHARE",
    "ActivationRounding",
    "round_to_int8",
    "widen_residual",
]

FLIP_SHARE = 0.2


def round_to_int8(x: Tensor, block_size: int) -> Tensor:
    """[..., K] rounded to 255 levels in blocks of consecutive columns."""
    blocks = x.reshape(*x.shape[:-1], -1, block_size)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / scales.where(scales > 0, 1.0))
    return (codes * scales).reshape(x.shape)


class ActivationRounding:
    """Rounds the inputs of some matrices of a model, while :meth:`on` lasts.

    Args:
        model: gets hooks.
        block_sizes: canonical weight to its block size; a tied embedding means the head.
    """

    def __init__(self, model: Gemma3, block_sizes: Mapping[str, int]) -> None:
        self.is_on = False
        self._hooks = []
        head = model.config.head_name
        for name, block_size in block_sizes.items():
            module = model.head if name == head else model.get_submodule(name.rpartition(".")[0])
            if name == head or isinstance(module, nn.Linear):  # a mere lookup has no input
                self._hooks.append(module.register_forward_pre_hook(self._hook(block_size)))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Round from here to the end of the block."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    def _hook(self, block_size: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.is_on:
                return None
            return (round_to_int8(inputs[0], block_size), *inputs[1:])

        return hook


# The arithmetic of half-precision ONNX graphs: residual stream and norms stay float32.
#
# The noise floor of such a graph is the reference with the same split. In the type alone it
# would be
# too wide, and in float16 no floor at all: the residual stream of the real 270M reaches 104,000.


def widen_residual(model: Gemma3) -> None:
    """Let ``model``, whose weights are in half precision, carry its residual stream in float32."""
    model.model.embed_tokens.register_forward_hook(_widen_output)
    for layer in model.model.layers:
        assert isinstance(layer, nn.Module)
        for name, module in layer.named_modules():
            if name.startswith("post_"):  # what these give is added to the stream
                module.register_forward_pre_hook(_widen_input)
            elif isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_narrow_input(module.weight))
    model.head.register_forward_pre_hook(_narrow_input(model.head_weight))


def _widen_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    del module, inputs
    return output.float()


def _widen_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    del module
    return (inputs[0].float(),)


def _narrow_input(weight: Tensor) -> Any:
    def narrow(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (inputs[0].to(weight.dtype), *inputs[1:])

    return narrow
