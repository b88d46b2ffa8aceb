"""The arithmetic of half-precision ONNX graphs: residual stream and norms stay float32.

The noise floor of such a graph is the reference with the same split. In the type alone it would be
too wide, and in float16 no floor at all: the residual stream of the real 270M reaches 104,000.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gemma3_export.reference.model import Gemma3

__all__ = ["widen_residual"]


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
