"""The graph writer for ``torch.export`` programs: ``pt2/model.pt2``."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from gemma3_export.bundle import Graph, WeightRecipe, graph_stem, sha256_of, variant_name
from gemma3_export.config import CONFIG_NAME, Gemma3Config, config_to_json
from gemma3_export.dtypes import ELEMENT_TYPES, DType, element_type, export_dtype, torch_dtype
from gemma3_export.exporters.bundle_writer import half_precision
from gemma3_export.exporters.decoder_step import DecoderStep, dynamic_shapes, example_inputs
from gemma3_export.parity.options import HalfPrecision
from gemma3_export.progress import Progress
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.model import Gemma3, LastTokens, LMHead
from gemma3_export.reference.weights import WeightSource
from gemma3_export.staging import check_disk_space

__all__ = ["Pt2Writer"]


class MaskedLastTokens(LastTokens):
    """Last tokens chosen by a mask, because torch.export cannot slice by a tensor's value."""

    def forward(self, x_BTD: Tensor, count: Tensor | int) -> Tensor:
        """Select [B, count, D] from [B, T, D]."""
        new = x_BTD.shape[1]
        places = torch.arange(new, device=x_BTD.device)
        is_kept = (places >= new - count) | torch.eq(torch.as_tensor(count), 0)
        return x_BTD[:, is_kept]


class FlatLMHead(LMHead):
    """Head with one product over all tokens, because Inductor cannot lower a batched one."""

    def product(self, x: Tensor, weight_VD: Tensor) -> Tensor:
        """Multiply [B, T, D] to [B, T, V]."""
        flat = F.linear(x.reshape(-1, x.shape[-1]), weight_VD)
        return flat.view(x.shape[0], x.shape[1], weight_VD.shape[0])


@dataclass(frozen=True, kw_only=True)
class Pt2Writer:
    """A :class:`gemma3_export.exporters.bundle_writer.GraphWriter` for ``torch.export``.

    Args:
        dtype: one of :func:`gemma3_export.dtypes.dtype_choices` for ``pt2``.

    Raises:
        InputError: unknown dtype.
    """

    runtime: ClassVar[str] = "pt2"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        export_dtype(self.dtype, self.runtime)

    @property
    def element(self) -> DType:
        """Element type of weights and cache."""
        return element_type(self.dtype).name

    @property
    def path(self) -> str:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return f"pt2/{graph_stem(self.dtype)}.pt2"

    @property
    def variant(self) -> str:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return variant_name(self.dtype)

    @property
    def half(self) -> HalfPrecision | None:
        """See :class:`gemma3_export.exporters.bundle_writer.GraphWriter`."""
        return half_precision(torch_dtype(self.element), holds_residual=True)

    def size_bytes(self, config: Gemma3Config) -> int:
        """Return about how much space the file needs."""
        return config.num_parameters * ELEMENT_TYPES[self.element].size_bytes + 2**24

    def write(
        self, source: WeightSource, folder: Path, progress: Progress
    ) -> tuple[Graph, dict[str, str]]:
        """Load the weights, trace, and save the program."""
        dtype = torch_dtype(self.element)
        path = folder / self.path
        path.parent.mkdir(exist_ok=True)
        progress("reading weights", 0, 1)
        model = load_reference(source, dtype)
        progress("reading weights", 1, 1)
        recipes = {name: WeightRecipe(names=(name,)) for name, _ in model.named_parameters()}
        progress("tracing", 0, 1)
        program = export_program(model, dtype)
        progress("tracing", 1, 1)
        progress("writing weights", 0, 1)
        config = json.dumps(config_to_json(source.config), indent=2)
        check_disk_space(path, self.size_bytes(source.config))
        torch.export.save(program, path, extra_files={CONFIG_NAME: config})
        progress("writing weights", 1, 1)
        graph = Graph(
            takes_no_logits=True,
            runtime=self.runtime,
            path=self.path,
            dtype=self.dtype,
            target="export",
            cache_dtype=self.element,
            weights=recipes,
        )
        return graph, {graph.path: sha256_of(path)}


def export_program(model: Gemma3, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """Export one decoder step with dynamic batch size and lengths; replace ``model``'s head."""
    model.last_tokens, model.head = MaskedLastTokens(), FlatLMHead()
    *others, _ = example_inputs(model.config, dtype=dtype)
    keep = torch.ones(1, dtype=torch.int64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # from torch itself
        program = torch.export.export(
            DecoderStep(model).eval(),
            (*others, keep),
            dynamic_shapes=dynamic_shapes(model.config),
            strict=False,
        )
    strip_stack_traces(program.graph_module)
    return program


def strip_stack_traces(module: nn.Module) -> None:
    """Remove stack traces, which name files of the exporting machine."""
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
