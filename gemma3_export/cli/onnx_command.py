"""``gemma3-export onnx``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from gemma3_export.bundle import ONNX_TARGETS
from gemma3_export.cli.options import ExportOptions, export_options, refuse_if_given, run_export
from gemma3_export.dtypes import EXPORT_DTYPES, FLOAT_DTYPES, dtype_choices

__all__ = ["onnx"]

CALIBRATED = tuple(name for name, item in EXPORT_DTYPES.items() if item.is_calibrated)
BLOCKED = tuple(name for name, item in EXPORT_DTYPES.items() if item.has_block_size)
EPILOG = """\b
Examples:
  gemma3-export onnx --size 270m -o gemma-3-270m
  gemma3-export onnx --weights model.gguf --target portable -o out
  gemma3-export onnx --weights checkpoint.pt --config config.json --tokenizer tokenizer.json -o out
  gemma3-export onnx --size 270m --dtype int8 -o gemma-3-270m-int8
  gemma3-export onnx --size 270m --dtype mixed --max-kld 0.05 -o gemma-3-270m-mixed
  gemma3-export onnx --size 270m --dtype int8 --activations bf16 -o gemma-3-270m-cuda-int8
  gemma3-export onnx --weights model-Q4_K_M.gguf --dtype keep -o kept
  gemma3-export onnx --size 1b --random-weights 0 -o random-1b
"""


@click.command(epilog=EPILOG)
@export_options
@click.option(
    "--target",
    type=click.Choice(ONNX_TARGETS),
    default="ort",
    show_default=True,
    help="ort: ONNX Runtime's fused kernels; on CUDA in bf16 or fp16 only. portable: standard "
    "operators only, which CUDA runs in fp32.",
)
@click.option(
    "--dtype",
    type=click.Choice(dtype_choices("onnx")),
    default="fp32",
    show_default=True,
    help="bf16: the half precision to choose. fp16: refused where activations come near its end. "
    "int8: matrices in 8-bit blocks. int4: in 4-bit blocks, made with calibration text. "
    "mixed: each matrix in the smallest format that the budget allows. "
    "keep: the blocks of a quantised GGUF, bit by bit.",
)
@click.option(
    "--activations",
    type=click.Choice(FLOAT_DTYPES),
    default="fp32",
    show_default=True,
    help="int8, int4, mixed, keep: what lies between the matrices, and the cache. fp32 is for the "
    "CPU, bf16 or fp16 for CUDA.",
)
@click.option(
    "--block-size",
    type=click.Choice(("16", "32", "64", "128", "256")),
    default="32",
    show_default=True,
    help="int8, int4: inputs of a matrix that share a scale. mixed: the fewest.",
)
@click.option(
    "--screen/--no-screen",
    default=None,
    help="fp32 for ort: store the head a second time, in 8 bits, so that greedy and top-k decoding "
    "on the CPU reads a quarter of it and computes exactly the logits that matter "
    "[default: where the head is large].",
)
@click.option(
    "--max-kld",
    type=click.FloatRange(min=0, min_open=True),
    help="Divergence from full precision at which the export fails, nats a token; the limits of "
    "greedy agreement and perplexity follow from it [default: 0.01; mixed: 0.05, int4: 0.1].",
)
@click.option(
    "--calibration",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="int4, mixed: UTF-8 text to calibrate with (default: the model writes it).",
)
def onnx(
    options: ExportOptions,
    target: str,
    dtype: str,
    activations: str,
    block_size: str,
    max_kld: float | None,
    calibration: Path | None,
    screen: bool | None,
) -> None:
    """Export Gemma 3 to ONNX and prove that the result computes what the model computes.

    The output is one folder that stands alone: graph, weights, config, tokenizer, a manifest with
    the hash of every file, and the parity report. It appears when all of it is there; an export
    that fails or is interrupted leaves nothing behind. --size alone takes the official weights from
    the Hub.
    """
    if calibration is not None and dtype not in CALIBRATED:
        raise click.UsageError(
            f"--calibration is for --dtype {' and '.join(CALIBRATED)}; leave it out for {dtype}"
        )
    if dtype not in BLOCKED:
        refuse_if_given(
            "block_size", "--block-size", f"it is for --dtype {', '.join(BLOCKED)}, not for {dtype}"
        )
    from gemma3_export.api.exporting import export_onnx

    export = partial(
        export_onnx,
        target=target,
        dtype=dtype,
        activations=activations,
        block_size=int(block_size),
        max_kld=max_kld,
        calibration=calibration,
        screen=screen,
    )
    half = "" if activations == "fp32" else f" with {activations} activations"
    run_export(options, "onnx", f"{dtype}{half}, target {target}", export)
