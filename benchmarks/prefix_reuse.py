"""Measure the time to the first token after a long system prompt, with and without prefix reuse.

    python -m benchmarks.prefix_reuse DIR --threads 2
    python -m benchmarks.prefix_reuse DIR --threads 2 --granularity 1

The prompts are random tokens. Runs with and without reuse take turns, so a change in the machine's
load affects both. Times and ratios are printed as the median and the range of the rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks.common import (
    bundle_argument,
    rounds_option,
    runtime_option,
    show_spread,
    threads_option,
)
from gemma3_export.api.opening import open_runtime
from gemma3_export.runtimes.generation.generate import generate
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import Runtime

QUESTION_TOKENS = 20


def complete(
    runtime: Runtime, prompt: Sequence[int], chunk: int, cache: PrefixCache | None
) -> Completion:
    """Generate two tokens after one prompt."""
    generation = generate(
        runtime,
        [prompt],
        SamplingParams(),
        GenerationOptions(max_new_tokens=2, stop_token_ids=(), prefill_chunk=chunk),
        prefix_cache=cache,
    )
    return generation.collect()[0]


@click.command()
@bundle_argument
@runtime_option
@threads_option
@click.option("--system-tokens", multiple=True, type=int, default=(512, 1500), show_default=True)
@click.option("--prefill-chunk", default=512, show_default=True)
@click.option(
    "--granularity",
    type=int,
    help="Default: whole prefill chunks, which reproduce logits bit for bit.",
)
@click.option("--max-bytes", default=2**28, show_default=True)
@rounds_option
def main(
    bundle_path: Path,
    runtime: str,
    threads: int | None,
    system_tokens: tuple[int, ...],
    prefill_chunk: int,
    granularity: int | None,
    max_bytes: int,
    rounds: int,
) -> None:
    """Measure, and print times and ratios."""
    opened = open_runtime(bundle_path, runtime, threads=threads, sliding_window_cache=False)
    generator = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = generator.integers(0, opened.config.vocab_size, count).tolist()
        return drawn

    complete(opened, tokens(64), prefill_chunk, None)
    for length in system_tokens:
        cache = PrefixCache(opened, max_bytes=max_bytes, granularity=granularity)
        system = tokens(length)
        complete(opened, system + tokens(QUESTION_TOKENS), prefill_chunk, cache)
        pairs = []
        for _ in range(rounds):
            prompt = system + tokens(QUESTION_TOKENS)
            plain = complete(opened, prompt, prefill_chunk, None)
            reusing = complete(opened, prompt, prefill_chunk, cache)
            pairs.append((plain, reusing))
        computed = [1000 * (plain.time_to_first_token_s or 0) for plain, _ in pairs]
        reused = [1000 * (reusing.time_to_first_token_s or 0) for _, reusing in pairs]
        ratios = [one / other for one, other in zip(computed, reused, strict=True)]
        same = sum(plain.token_ids == reusing.token_ids for plain, reusing in pairs)
        click.echo(
            f"{length} + {QUESTION_TOKENS} tokens, {pairs[0][1].reused_tokens} reused: first token "
            f"after {show_spread(computed, 0)} ms without reuse, "
            f"{show_spread(reused, 0)} ms with it, {show_spread(ratios, 1)} x; "
            f"{same} of {rounds} answers equal; {cache.used_bytes / 1e6:.1f} MB of cache"
        )


if __name__ == "__main__":
    main()
