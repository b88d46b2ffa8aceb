"""Trace the exporter's model into an ONNX graph without weights in memory.

torch.export runs on fake tensors, so tracing a 27B model costs no more memory than a tiny one;
:mod:`gemma3_export.exporters.onnx.external_data` attaches the weights afterwards.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # private: pyproject.toml bounds torch

from gemma3_export.bundle import MODEL_PREFIX, Signature, WeightRecipe
from gemma3_export.config import Gemma3Config
from gemma3_export.exporters.decoder_step import DecoderStep, dynamic_shapes, example_inputs
from gemma3_export.exporters.onnx.modules import FusedGemma3, PortableGemma3
from gemma3_export.exporters.onnx.stack_layers import distinct_layer_types
from gemma3_export.exporters.packed_projections import weight_recipes

__all__ = ["OPSET_VERSION", "TARGETS", "has_wide_residual", "trace_onnx"]

OPSET_VERSION = 23  # the first with Attention and RMSNormalization
TARGETS: dict[str, type[PortableGemma3]] = {
    "ort": FusedGemma3,
    "portable": PortableGemma3,
    "web": FusedGemma3,
}


def trace_onnx(
    config: Gemma3Config,
    target: str,
    dtype: torch.dtype = torch.float32,
    opset: int = OPSET_VERSION,
) -> tuple[ir.Model, dict[str, WeightRecipe]]:
    """Trace one decoder step of a model with one layer of each type of ``config``.

    The passes of :mod:`gemma3_export.exporters.onnx.passes` make the whole model of it.

    Args:
        config: the whole model.
        target: ``ort`` or ``web`` for ONNX Runtime's fused kernels, ``portable`` for standard
            operators.
        dtype: element type of matrices, attention and the activations between them.
        opset: version of the operator set to trace to.

    Returns:
        The graph, whose weights are initializers without a value, and the recipe of every stored
        tensor of the whole model.
    """
    types = distinct_layer_types(config)
    shallow = replace(config, num_hidden_layers=len(types), layer_types=types)
    signature = Signature.of(shallow)
    with quiet_exporter(), FakeTensorMode():
        recipes = weight_recipes(TARGETS[target](config))
        decoder = TARGETS[target](shallow, has_wide_residual=has_wide_residual(dtype))
        decoder.round_matrices(dtype)
        step = DecoderStep(decoder).eval().requires_grad_(False)
        exported = torch.export.export(
            step,
            example_inputs(shallow, dtype=dtype),
            dynamic_shapes=dynamic_shapes(shallow),
            strict=False,
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
        )
    assert program is not None
    model = program.model
    detach_weights(model.graph, weight_recipes(step.decoder))
    model.producer_name, model.producer_version = "gemma3-export", None
    return model, recipes


def detach_weights(graph: ir.Graph, recipes: dict[str, WeightRecipe]) -> None:
    """Give the weights their canonical names and drop their fake values."""
    prefix = f"{MODEL_PREFIX}."
    for value in list(graph.initializers.values()):
        assert value.name is not None
        name = value.name.removeprefix(prefix)
        if name in recipes:
            value.name = name
            value.const_value = None
    missing = recipes.keys() - graph.initializers.keys()
    assert not missing, f"the trace lost {sorted(missing)}"


def has_wide_residual(dtype: torch.dtype) -> bool:
    """Return whether graphs whose matrices are ``dtype`` hold the residual stream in float32."""
    return dtype != torch.bfloat16


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence torch's remarks about packages that this project does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
