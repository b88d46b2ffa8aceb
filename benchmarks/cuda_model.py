"""Model the decoding speed that a GPU could reach, from bytes and kernel launches. No measurement.

    python -m benchmarks.cuda_model                     print the tables of docs/cuda.md
    python -m benchmarks.cuda_model --context 32768     at another context length
    python -m benchmarks.cuda_model --write             write them to docs/cuda.md

A decode step reads every weight once, and the part of the cache that attention looks at. Reading
reaches ``PEAK_SHARE`` of the GPU's bandwidth. A kernel takes at least ``--kernel-us`` on the GPU,
however little it reads. Without a CUDA graph, the host needs ``--host-us`` to launch each kernel,
and launches while the GPU computes:

    GPU time         bytes / bandwidth + kernels * kernel_us
    with a graph     GPU time
    without          max(GPU time, kernels * host_us)

The times were fitted to an H100, where the model is 4 to 5 % below the measured speed for the 270M
and 12 % above it for the 1B, with a context of 512 tokens. The number of kernels was counted over
the CUDA stub (``make placement`` counts again), and so were the launches that a captured step
leaves to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from gemma3_export.bundle import BlockFormat
from gemma3_export.config import Gemma3Config, preset

PAGE = Path(__file__).parent.parent / "docs" / "cuda.md"
BEGIN, END = "<!-- cuda model -->\n", "<!-- /cuda model -->\n"
SIZES = ("270m", "1b", "4b", "12b", "27b")
BF16_BYTES = 2
# Kernels of one greedy decode step of a bf16 graph, counted over the stub; the same for all sizes.
# One of a layer's 15 is a memset of attention's semaphores.
KERNELS_PER_LAYER, OTHER_KERNELS = 15, 22
# With CUDA graphs, the host launches the model and the selection of the next token.
LAUNCHES_WITH_GRAPH = 2
PEAK_SHARE = 0.85  # of the data sheet's bandwidth: 2.84 of 3.35 TB/s on an H100
FORMATS = {
    "bf16": None,
    "int8": BlockFormat(bits=8, block_size=32),
    "int4": BlockFormat(bits=4, block_size=32),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """The inputs of the model; docs/cuda.md shows the defaults."""

    context: int = 4096  # tokens
    host_us: float = 10.0  # per kernel launch
    kernel_us: float = 3.8  # per kernel


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU with the figures of its data sheet."""

    name: str
    bytes_per_s: float
    memory_bytes: float


CARDS = (
    Card(name="A100 80GB", bytes_per_s=2039e9, memory_bytes=80e9),
    Card(name="H100 SXM", bytes_per_s=3350e9, memory_bytes=80e9),
    Card(name="RTX 4090", bytes_per_s=1008e9, memory_bytes=24e9),
)


def weight_bytes(config: Gemma3Config, blocks: BlockFormat | None) -> int:
    """Return the bytes of all weights; the head is the tied embedding and reads every row."""
    return sum(
        BF16_BYTES * shape[0]
        if len(shape) == 1
        else BF16_BYTES * shape[0] * shape[1]
        if blocks is None
        else blocks.size_bytes(shape[0], shape[1])
        for _, shape in config.weight_shapes()
    )


def cache_bytes(config: Gemma3Config, context: int, *, is_read: bool) -> int:
    """Return the bytes of keys and values for ``context`` tokens.

    Args:
        config: the model.
        context: tokens in the cache.
        is_read: count only what one step reads; a sliding layer reads only its window.
    """
    tokens = sum(
        min(context, config.sliding_window) if is_read and config.is_sliding(layer) else context
        for layer in range(config.num_hidden_layers)
    )
    return 2 * BF16_BYTES * config.key_value_size * tokens


def kernels(config: Gemma3Config) -> int:
    """Return the number of kernels in one decode step."""
    return KERNELS_PER_LAYER * config.num_hidden_layers + OTHER_KERNELS


def tokens_per_s(
    config: Gemma3Config,
    blocks: BlockFormat | None,
    card: Card,
    assumed: Assumptions,
    *,
    has_graph: bool,
) -> float:
    """Return the decoding speed for one prompt; see the module's docstring."""
    size = weight_bytes(config, blocks) + cache_bytes(config, assumed.context, is_read=True)
    gpu_s = size / (PEAK_SHARE * card.bytes_per_s) + kernels(config) * assumed.kernel_us * 1e-6
    host_s = 0.0 if has_graph else kernels(config) * assumed.host_us * 1e-6
    return 1 / max(gpu_s, host_s)


def cell(config: Gemma3Config, blocks: BlockFormat | None, card: Card, assumed: Assumptions) -> str:
    """Format the speeds without and with a CUDA graph, or say that the model does not fit."""
    needed = weight_bytes(config, blocks) + cache_bytes(config, assumed.context, is_read=False)
    if needed > card.memory_bytes:
        return "does not fit"
    speeds = (tokens_per_s(config, blocks, card, assumed, has_graph=has) for has in (False, True))
    return " / ".join(f"{speed:.0f}" for speed in speeds)


def model_lines(assumed: Assumptions) -> Iterator[str]:
    """Yield both tables in Markdown."""
    yield (
        f"**A model, not a measurement**: tokens/s for one prompt with {assumed.context:,} tokens "
        f"of context, without / with a CUDA graph, at {PEAK_SHARE:.0%} of peak bandwidth. It "
        f"assumes {assumed.host_us:g} µs of host time per kernel launch and at least "
        f"{assumed.kernel_us:g} µs of GPU time per kernel, fitted to the H100 above."
    )
    yield ""
    yield (
        "| size | weights | GB | "
        + " | ".join(f"{card.name}, {card.bytes_per_s / 1e9:.0f} GB/s" for card in CARDS)
        + " |"
    )
    yield "|---|---|---|" + "---|" * len(CARDS)
    for size in SIZES:
        config = preset(size).config
        for name, blocks in FORMATS.items():
            cells = [cell(config, blocks, card, assumed) for card in CARDS]
            weights = f"{weight_bytes(config, blocks) / 1e9:.2f}"
            yield f"| {size} | {name} | {weights} | {' | '.join(cells)} |"
    yield ""
    yield (
        "| size | kernels per token | host launches per token with a CUDA graph | cache of "
        f"{assumed.context:,} tokens, MB | cache read per token, MB |"
    )
    yield "|---|---|---|---|---|"
    for size in SIZES:
        config = preset(size).config
        stored, read = (
            f"{cache_bytes(config, assumed.context, is_read=flag) / 1e6:.0f}"
            for flag in (False, True)
        )
        yield f"| {size} | {kernels(config):,} | {LAUNCHES_WITH_GRAPH} | {stored} | {read} |"


def page_with(tables: str) -> str:
    """Return ``docs/cuda.md`` with ``tables`` between its markers."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


@click.command()
@click.option("--context", default=Assumptions().context, show_default=True, metavar="TOKENS")
@click.option("--host-us", default=Assumptions().host_us, show_default=True, metavar="US")
@click.option("--kernel-us", default=Assumptions().kernel_us, show_default=True, metavar="US")
@click.option("--write", is_flag=True, help="Write the tables to docs/cuda.md.")
def main(context: int, host_us: float, kernel_us: float, write: bool) -> None:
    """Print the tables, or write them."""
    assumed = Assumptions(context=context, host_us=host_us, kernel_us=kernel_us)
    tables = "\n".join(model_lines(assumed)) + "\n"
    if write:
        PAGE.write_text(page_with(tables), encoding="utf-8")
    else:
        click.echo(tables, nl=False)


if __name__ == "__main__":
    main()
