"""Compare our training recipe with the documented recipe of the ancestor trainer, on the same text.

    python -m benchmarks.training_recipes TOKENS -o recipes.png

Each recipe runs with several learning rates. All runs train on the same windows, and evaluate on
the same held-out windows, where predictions of separators do not count. The ancestor's recipe:

- has no separators in its training text
- keeps weights and optimizer states in bfloat16 (here they are rounded to bfloat16 after every
  update, which needs no bfloat16 hardware)
- initializes embeddings from N(0, 1), with an untied head
- applies weight decay to everything
- sizes warm-up and cosine decay in micro-batches, but counts updates
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gemma3_export.config import Gemma3Config
from gemma3_export.reference.model import Gemma3
from gemma3_export.reference.training.initialization import DEMO_CONFIG, model_from_config
from gemma3_export.reference.training.loss import LossModule
from gemma3_export.reference.training.optimizer import learning_rate, make_optimizer
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.token_data import (
    IGNORED_LABEL,
    TRAIN_STREAM,
    VALIDATION_STREAM,
    TokenData,
    WindowSampler,
    open_token_data,
)

# The ancestor's warm-up as a share of its 150,000 micro-batches, and its micro-batches per update
WARMUP_SHARE, ANCESTOR_ACCUMULATION = 1000 / 150_000, 32
RATES = (1e-4, 3e-3, 1e-2)  # the first is the ancestor's


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, its optimizer and its schedule."""

    label: str
    model: Gemma3
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    is_ancestor: bool = False  # bfloat16 weights, no separators


@click.command()
@click.argument("tokens", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--updates", default=400, show_default=True)
@click.option("--accumulation", default=2, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--context-length", default=128, show_default=True)
def main(
    tokens: Path,
    output: Path,
    updates: int,
    accumulation: int,
    batch_size: int,
    context_length: int,
) -> None:
    """Train six times, and print and plot the validation losses."""
    options = TrainOptions(
        steps=updates,
        accumulation=accumulation,
        batch_size=batch_size,
        context_length=context_length,
        warmup_steps=max(1, updates // 15),
    )
    data = open_token_data(tokens)
    config = replace(
        DEMO_CONFIG,
        vocab_size=data.meta.vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        layer_types=DEMO_CONFIG.layer_types[:4],
    )
    curves = {}
    for rate in RATES:
        rated = replace(options, learning_rate=rate, min_learning_rate=rate / 30)
        for recipe in (ours(config, rated), ancestor(config, rated)):
            curves[recipe.label] = run(recipe, data, options)
            click.echo(f"{recipe.label}: validation loss {curves[recipe.label][-1][1]:.4f}")
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("recipe", "updates", "validation_loss"))
        writer.writerows((label, *point) for label, curve in curves.items() for point in curve)
    plot(curves, output)


def ours(config: Gemma3Config, options: TrainOptions) -> Recipe:
    """Return our recipe: float32 weights from N(0, 0.02), a tied head, decay of matrices only."""
    model = model_from_config(config, options.seed)
    return Recipe(
        label=f"this trainer, rate {options.learning_rate:g}",
        model=model,
        optimizer=make_optimizer(model, options),
        rate=lambda step: learning_rate(step, options),
    )


def ancestor(config: Gemma3Config, options: TrainOptions) -> Recipe:
    """Return the ancestor's recipe; see the module's docstring."""
    rate = options.learning_rate
    torch.manual_seed(options.seed)
    model = model_from_config(replace(config, tie_word_embeddings=False), options.seed)
    for weight in model.parameters():
        weight.data.zero_()  # norms
    model.model.embed_tokens.weight.data.normal_(0.0, 1.0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # torch's default, which the ancestor uses
    micro_batches = options.steps * ANCESTOR_ACCUMULATION
    warmup = max(1, round(WARMUP_SHARE * micro_batches))  # sized in one unit, counted in another

    def scheduled(step: int) -> float:
        if step < warmup:
            return rate * (step + 1) / warmup
        progress = (step - warmup) / (micro_batches - warmup)
        return rate / 2 + rate / 4 * (1 + math.cos(math.pi * progress))

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.1
    )
    return Recipe(
        label=f"the ancestor's recipe, rate {rate:g}",
        model=model,
        optimizer=optimizer,
        rate=scheduled,
        is_ancestor=True,
    )


def run(recipe: Recipe, data: TokenData, options: TrainOptions) -> list[tuple[int, float]]:
    """Train, and return (updates, validation loss) after every tenth of the updates."""
    module = LossModule(
        recipe.model,
        compute_dtype=torch.float32,
        loss_chunk_tokens=1024,
        gradient_checkpointing=False,
    )
    assert data.validation is not None
    text = without_separators(data) if recipe.is_ancestor else data.train
    train, held = (
        WindowSampler(
            ids,
            context_length=options.context_length,
            batch_size=options.batch_size,
            seed=0,
            stream=stream,
        )
        for ids, stream in ((text, TRAIN_STREAM), (data.validation, VALIDATION_STREAM))
    )
    curve = []
    for step in range(options.steps):
        for micro in range(options.accumulation):
            loss = module(*train.batch(step * options.accumulation + micro))
            (loss / options.accumulation).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in recipe.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        recipe.optimizer.step()
        recipe.optimizer.zero_grad(set_to_none=True)
        if recipe.is_ancestor:
            round_to_bf16(recipe)
        if (step + 1) % max(1, options.steps // 10) == 0:
            curve.append((step + 1, evaluate(module, held, data)))
    return curve


def without_separators(data: TokenData) -> NDArray[np.unsignedinteger[Any]]:
    """Return the training tokens without separators."""
    separators = [data.meta.bos_token_id, data.meta.eos_token_id]
    return data.train[~np.isin(data.train, [one for one in separators if one is not None])]


@torch.no_grad()
def evaluate(module: LossModule, held: WindowSampler, data: TokenData) -> float:
    """Return the mean loss of everything except separators, which only one recipe trains on."""
    losses = []
    for index in range(16):
        inputs, labels, _ = held.batch(index)
        for separator in (data.meta.bos_token_id, data.meta.eos_token_id):
            if separator is not None:
                labels[labels == separator] = IGNORED_LABEL
        losses.append(float(module(inputs, labels)))
    return sum(losses) / len(losses)


@torch.no_grad()
def round_to_bf16(recipe: Recipe) -> None:
    """Round weights and optimizer states to bfloat16, as storing them would."""
    for weight in recipe.model.parameters():
        weight.copy_(weight.bfloat16())
        for value in recipe.optimizer.state[weight].values():
            if value.ndim:
                value.copy_(value.bfloat16())


def plot(curves: dict[str, list[tuple[int, float]]], output: Path) -> None:
    """Plot one line per run; colors are learning rates, and the ancestor's lines are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, (label, curve) in enumerate(curves.items()):
        style = {"ls": "-" if index % 2 == 0 else "--", "color": f"C{index // 2}"}
        axes.plot(*zip(*curve, strict=True), marker="o", ms=3, label=label, **style)
    axes.set_xlabel("updates")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output)


if __name__ == "__main__":
    main()
