"""What the process that all children are forked from imports, and the environment it sets."""

from __future__ import annotations

import gc
import importlib
import os

# A process with threads must not fork, so every library is told to use one before its import.
for _name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"
os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "COLUMNS": "200",
    "NO_COLOR": "1",
}
MODULES = (
    "gguf.quants",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "safetensors.torch",
    "tokenizers",
    "transformers.models.gemma3.configuration_gemma3",
    "torch.export",
    "torch.jit",
    "torch.onnx",
    "torch.onnx.ops",
    "torch.onnx._internal.exporter._core",
    "torch.testing",
    "gemma3_export.api.exporting",
    "gemma3_export.api.model",
    "gemma3_export.api.model_runtimes",
    "gemma3_export.api.verification",
    "gemma3_export.cli",
    "gemma3_export.cli.data_command",
    "gemma3_export.cli.generate_command",
    "gemma3_export.cli.inspect_command",
    "gemma3_export.cli.onnx_command",
    "gemma3_export.cli.pt2_command",
    "gemma3_export.cli.to_hf_command",
    "gemma3_export.cli.torchscript_command",
    "gemma3_export.cli.train_command",
    "gemma3_export.cli.verify_command",
    "gemma3_export.exporters.onnx.writer",
    "gemma3_export.exporters.torch.torchscript",
    "gemma3_export.reference.training.model_folder",
    "gemma3_export.reference.training.preparation",
    "gemma3_export.reference.training.runs",
    "gemma3_export.runtimes.onnx.runtime",
    "gemma3_export.runtimes.torch.runtime",
    "gemma3_export.tokenizer.gguf_tokenizer",
)

for _module in MODULES:
    try:
        importlib.import_module(_module)
    except ImportError:
        continue  # a child imports it, or its command reports that it is missing

import torch  # noqa: E402

from tests.support.exported_bundles import SCRATCH_VARIABLE  # noqa: E402
from tests.support.shared_traces import share_traces  # noqa: E402

torch.set_num_threads(1)
torch.set_num_interop_threads(1)
if SCRATCH_VARIABLE in os.environ:  # it can only be removed by the process that made it
    share_traces()
gc.collect()
gc.freeze()  # the pages of these objects stay shared
