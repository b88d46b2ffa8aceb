"""Compare the training speed of our module with the same model in transformers.

    python -m benchmarks.training_throughput --rounds 5

Both train on the same batches from the same weights, compute the same loss in float32, and update
with the same AdamW. Rounds alternate, and speeds are per second of processor time, so other load on
the machine hardly counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import click
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks.common import rounds_option
from gemma3_export.config import Gemma3Config, config_to_json, preset
from gemma3_export.reference.training.initialization import DEMO_CONFIG, model_from_config
from gemma3_export.reference.training.loss import LossModule
from gemma3_export.reference.training.optimizer import make_optimizer
from gemma3_export.reference.training.options import TrainOptions

Step = Callable[[Tensor, Tensor], float]


@click.command()
@click.option("--size", default="demo", show_default=True, help="demo or a published size.")
@click.option("--layers", type=int, help="Use only the last N layers.", metavar="N")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--context-length", default=256, show_default=True)
@rounds_option
@click.option("--threads", default=1, show_default=True)
def main(
    size: str, layers: int | None, batch_size: int, context_length: int, rounds: int, threads: int
) -> None:
    """Print tokens per second of processor time, and the ratio."""
    torch.set_num_threads(threads)
    config = DEMO_CONFIG if size == "demo" else preset(size).config
    if layers is not None:
        config = replace(config, num_hidden_layers=layers, layer_types=config.layer_types[-layers:])
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, context_length + 1)
    windows = torch.randint(4, config.vocab_size, shape, generator=generator)
    inputs, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    steps = {"ours": our_step(config), "transformers": their_step(config)}
    for name, step in steps.items():
        click.echo(f"{name}: first loss {step(inputs, labels):.5f}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.process_time()
            step(inputs, labels)
            seconds[name].append(time.process_time() - started)
    rates = {name: inputs.numel() / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        click.echo(f"{name}: {rate:,.0f} tokens per second of processor time")
    click.echo(f"ratio: {rates['ours'] / rates['transformers']:.2f}")


def our_step(config: Gemma3Config) -> Step:
    """Return an update step as the trainer runs it."""
    module = LossModule(
        model_from_config(config, 0),
        compute_dtype=torch.float32,
        loss_chunk_tokens=1024,
        gradient_checkpointing=False,
    )
    return update_step(module, module)


def their_step(config: Gemma3Config) -> Step:
    """Return the same update step for transformers' model, with the same weights."""
    hf_config = Gemma3TextConfig(**config_to_json(config))
    hf_config._attn_implementation = "sdpa"
    hf_config.use_cache = False
    model = Gemma3ForCausalLM(hf_config).train()
    model.load_state_dict(model_from_config(config, 0).state_dict(), strict=False)
    model.tie_weights()

    def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return update_step(model, loss_of)


def update_step(module: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return a step of forward, backward, gradient clipping and AdamW."""
    optimizer = make_optimizer(module, TrainOptions())

    def step(inputs: Tensor, labels: Tensor) -> float:
        loss = loss_of(inputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
