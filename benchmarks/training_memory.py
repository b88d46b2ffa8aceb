"""Measure the peak memory of one training update at a published size, in float32 with AdamW.

    python -m benchmarks.training_memory --batch-size 8 --loss-chunk-tokens 256
    python -m benchmarks.training_memory --batch-size 8 --plain-loss

The second command computes the loss from all logits at once, as a plain trainer does.
"""

from __future__ import annotations

import resource

import click
import torch

from gemma3_export.config import preset
from gemma3_export.reference.training.initialization import model_from_config
from gemma3_export.reference.training.loss import LossModule
from gemma3_export.reference.training.optimizer import make_optimizer
from gemma3_export.reference.training.options import TrainOptions


@click.command()
@click.option("--size", default="270m", show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--context-length", default=128, show_default=True)
@click.option("--loss-chunk-tokens", default=256, show_default=True)
@click.option("--gradient-checkpointing", is_flag=True)
@click.option("--plain-loss", is_flag=True, help="Compute the loss from all logits at once.")
def main(
    size: str,
    batch_size: int,
    context_length: int,
    loss_chunk_tokens: int,
    gradient_checkpointing: bool,
    plain_loss: bool,
) -> None:
    """Run one update and print the peak memory."""
    config = preset(size).config
    model = model_from_config(config, 0)
    module = LossModule(
        model,
        compute_dtype=torch.float32,
        loss_chunk_tokens=loss_chunk_tokens,
        gradient_checkpointing=gradient_checkpointing,
    )
    optimizer = make_optimizer(module, TrainOptions())
    ids = torch.randint(4, config.vocab_size, (batch_size, context_length + 1))
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    loss = model(inputs, labels=labels).loss if plain_loss else module(inputs, labels)
    loss.backward()
    optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    states = 16 * config.num_parameters / 2**30  # weight, gradient and two moments in float32
    click.echo(
        f"loss {float(loss.detach()):.3f}, peak {peak:.2f} GiB, of which {states:.2f} are "
        "weights, gradients and AdamW's moments"
    )


if __name__ == "__main__":
    main()
