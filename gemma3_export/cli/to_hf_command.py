"""Define the command ``gemma3-export to-hf``."""

from __future__ import annotations

from pathlib import Path

import click

from gemma3_export.cli.options import (
    PATH,
    adapter_option,
    describe_adapter,
    describe_reduction,
    force_option,
    hf_token_option,
    reduce_vocab_option,
    revision_option,
    tokenizer_option,
)
from gemma3_export.config import EMBEDDING
from gemma3_export.dtypes import FLOAT_DTYPES
from gemma3_export.progress import ProgressBars

__all__ = ["to_hf"]

EPILOG = """\b
Examples:
  gemma3-export to-hf --weights run -o my-gemma
  gemma3-export to-hf --weights model.gguf --dtype bf16 -o unpacked
  gemma3-export to-hf --adapter my-lora --dtype bf16 -o merged
"""


@click.command(name="to-hf", epilog=EPILOG)
@click.option(
    "--weights",
    metavar="SRC",
    help="Run folder, Hub id, model folder, .safetensors, .gguf or .pt file.",
)
@adapter_option
@click.option(
    "--config",
    "config_path",
    type=PATH,
    help="config.json to use instead of the one that comes with the weights.",
)
@revision_option
@hf_token_option
@tokenizer_option
@reduce_vocab_option
@click.option(
    "--dtype",
    type=click.Choice(FLOAT_DTYPES),
    help="Dtype to store.  [default: that of the weights]",
)
@click.option("-o", "--output", type=PATH, required=True, help="Folder to create.")
@force_option
def to_hf(
    weights: str | None,
    adapter: str | None,
    config_path: Path | None,
    revision: str | None,
    hf_token: str | None,
    tokenizer_path: str | None,
    reduce_vocab: str | None,
    dtype: str | None,
    output: Path,
    force: bool,
) -> None:
    """Convert weights to a folder that `transformers` loads."""
    if weights is None and adapter is None:
        raise click.UsageError("give --weights, --adapter or both")
    from gemma3_export.api.exporting import open_weights
    from gemma3_export.staging import reject_existing
    from gemma3_export.tokenizer import load_tokenizer

    reject_existing(output, force=force)
    source = open_weights(
        weights, adapter=adapter, config_path=config_path, revision=revision, token=hf_token
    )
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)

    from gemma3_export.dtypes import torch_dtype
    from gemma3_export.reference.training.model_folder import export_hf_folder
    from gemma3_export.reference.weights.reduced_vocabulary import reduce_vocabulary

    with source, ProgressBars() as progress:
        written, reduced = source, None
        if reduce_vocab is not None:
            written = reduced = reduce_vocabulary(source, reduce_vocab, tokenizer)
            tokenizer = reduced.tokenizer
        export_hf_folder(
            written,
            output,
            dtype=None if dtype is None else torch_dtype(dtype),
            tokenizer=tokenizer,
            force=force,
            progress=progress,
        )
        parameters = f"{written.config.num_parameters / 1e6:,.1f}M parameters"
        click.echo(f"{output}: {parameters}{describe_adapter(source)}")
        if reduced is not None:
            stored = torch_dtype(dtype) if dtype else source.stored_dtype(EMBEDDING)
            click.echo(describe_reduction(reduced, stored.itemsize))
    click.echo(
        f'next: python -c "from transformers import AutoModelForCausalLM as A; '
        f"A.from_pretrained('{output}')\""
    )
