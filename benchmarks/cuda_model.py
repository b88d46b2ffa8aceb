"""What decoding on a GPU could reach, computed and not measured: a model of bytes and launches.

    python benchmarks/cuda_model.py                     the tables of docs/cuda.md
    python benchmarks/cuda_model.py --context 32768     at another length
    python benchmarks/cuda_model.py --write             put them into docs/cuda.md

A token reads every weight once and, of the cache, what attention looks at. Reading takes the GPU's
peak bandwidth; a kernel takes at least ``--kernel-us`` on the GPU, whatever it reads; without a
CUDA graph the host needs ``--host-us`` to send each kernel, and sends while the GPU computes:

    on the GPU      bytes / bandwidth + kernels * kernel_us
    with a graph    the same
    without         the greater of that and kernels * host_us

The two times a kernel are assumptions. The number of kernels is not: it was counted over the CUDA
stub (``make placement`` counts again), and so is what a captured step leaves to the host.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma3_export.bundle import BlockFormat
from gemma3_export.config import Gemma3Config, preset

PAGE = Path(__file__).parent.parent / "docs" / "cuda.md"
BEGIN, END = "<!-- cuda model -->\n", "<!-- /cuda model -->\n"
SIZES = ("270m", "1b", "4b", "12b", "27b")
CONTEXT = 4096
HOST_US, KERNEL_US = 5.0, 1.5  # assumed
HALF_BYTES = 2  # of a weight or a cached value in bf16
# Kernels of one decoding step of a bf16 graph: counted over the stub, the same for all sizes.
KERNELS_A_LAYER, KERNELS_BESIDE = 28, 18
# With a CUDA graph the host sends the graph, and the kernels of the two small graphs beside it.
SENT_WITH_GRAPH = 9
FORMATS = {
    "bf16": None,
    "int8": BlockFormat(bits=8, block_size=32),
    "int4": BlockFormat(bits=4, block_size=32),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU as its maker's data sheet describes it."""

    name: str
    bytes_per_s: float
    memory_bytes: float


CARDS = (
    Card(name="A100 80GB", bytes_per_s=2039e9, memory_bytes=80e9),
    Card(name="H100 SXM", bytes_per_s=3350e9, memory_bytes=80e9),
    Card(name="RTX 4090", bytes_per_s=1008e9, memory_bytes=24e9),
)


def weight_bytes(config: Gemma3Config, form: BlockFormat | None) -> int:
    """All weights: the tied embedding is the head, which reads every row."""
    return sum(
        HALF_BYTES * shape[0]
        if len(shape) == 1
        else HALF_BYTES * shape[0] * shape[1]
        if form is None
        else form.size_bytes(shape[0], shape[1])
        for _, shape in config.weight_shapes()
    )


def cache_bytes(config: Gemma3Config, context: int, *, is_read: bool) -> int:
    """Keys and values of ``context`` tokens; a sliding layer reads no more than its window."""
    tokens = sum(
        min(context, config.sliding_window) if is_read and config.is_sliding(layer) else context
        for layer in range(config.num_hidden_layers)
    )
    return 2 * HALF_BYTES * config.key_value_size * tokens


def kernels(config: Gemma3Config) -> int:
    """Kernels of one decoding step."""
    return KERNELS_A_LAYER * config.num_hidden_layers + KERNELS_BESIDE


def tokens_per_s(
    config: Gemma3Config,
    form: BlockFormat | None,
    card: Card,
    asked: argparse.Namespace,
    *,
    has_graph: bool,
) -> float:
    """One prompt's decoding speed; see the module's docstring."""
    size = weight_bytes(config, form) + cache_bytes(config, asked.context, is_read=True)
    gpu_s = size / card.bytes_per_s + kernels(config) * asked.kernel_us * 1e-6
    host_s = 0.0 if has_graph else kernels(config) * asked.host_us * 1e-6
    return 1 / max(gpu_s, host_s)


def cell(
    config: Gemma3Config, form: BlockFormat | None, card: Card, asked: argparse.Namespace
) -> str:
    """Without a CUDA graph / with one, or that it does not fit."""
    needed = weight_bytes(config, form) + cache_bytes(config, asked.context, is_read=False)
    if needed > card.memory_bytes:
        return "does not fit"
    speeds = (tokens_per_s(config, form, card, asked, has_graph=has) for has in (False, True))
    return " / ".join(f"{speed:.0f}" for speed in speeds)


def model_lines(asked: argparse.Namespace) -> Iterator[str]:
    """Both tables, in Markdown."""
    yield (
        f"**A model, not a measurement**: one prompt, {asked.context:,} tokens of context, tokens "
        f"a second without / with a CUDA graph, at peak bandwidth, {asked.host_us:g} µs of the host"
        f" and at least {asked.kernel_us:g} µs of the GPU a kernel (both assumed)."
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
        for name, form in FORMATS.items():
            cells = [cell(config, form, card, asked) for card in CARDS]
            weights = f"{weight_bytes(config, form) / 1e9:.2f}"
            yield f"| {size} | {name} | {weights} | {' | '.join(cells)} |"
    yield ""
    yield (
        "| size | kernels a token | of them sent by the host with a CUDA graph | cache of "
        f"{asked.context:,} tokens, MB | of it read a token, MB |"
    )
    yield "|---|---|---|---|---|"
    for size in SIZES:
        config = preset(size).config
        held, read = (cache_bytes(config, asked.context, is_read=flag) / 1e6 for flag in (0, 1))
        yield f"| {size} | {kernels(config):,} | {SENT_WITH_GRAPH} | {held:.0f} | {read:.0f} |"


def page_with(tables: str) -> str:
    """``docs/cuda.md`` with ``tables`` between its marks."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


def arguments() -> argparse.ArgumentParser:
    """The options; their defaults are what the page shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=CONTEXT, metavar="TOKENS")
    parser.add_argument("--host-us", type=float, default=HOST_US, metavar="US")
    parser.add_argument("--kernel-us", type=float, default=KERNEL_US, metavar="US")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/cuda.md")
    return parser


def main() -> None:
    """Print the tables, or write them."""
    asked = arguments().parse_args()
    tables = "\n".join(model_lines(asked)) + "\n"
    if asked.write:
        PAGE.write_text(page_with(tables), encoding="utf-8")
    else:
        print(tables, end="")


if __name__ == "__main__":
    main()
