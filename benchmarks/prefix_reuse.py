"""Time to the first token after a long system prompt, computed anew and reused.

    python benchmarks/prefix_reuse.py DIR --threads 2
    python benchmarks/prefix_reuse.py DIR --threads 2 --granularity 1

The prompts are random tokens. The two kinds take turns, so a change of the machine's load strikes
both, and what is printed of the ratios is the median and the least to the greatest of the turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from gemma3_export.api.opening import open_runtime
from gemma3_export.runtimes.generation.loop import Completion, GenerationOptions, generate
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import Runtime

QUESTION_TOKENS = 20


def complete(
    runtime: Runtime, prompt: Sequence[int], chunk: int, cache: PrefixCache | None
) -> Completion:
    """One prompt, two tokens of answer."""
    generation = generate(
        runtime,
        [prompt],
        SamplingParams(),
        GenerationOptions(max_new_tokens=2, stop_token_ids=(), prefill_chunk=chunk),
        prefix_cache=cache,
    )
    return generation.collect()[0]


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the least to the greatest."""
    shown = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return f"{statistics.median(values):.{digits}f} ({' to '.join(shown)})"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--runtime", "name", default="onnx", show_default=True)
@click.option("--threads", type=int)
@click.option("--system-tokens", multiple=True, type=int, default=(512, 1500), show_default=True)
@click.option("--prefill-chunk", default=512, show_default=True)
@click.option("--granularity", type=int, help="Default: whole prefill chunks, bit by bit the same.")
@click.option("--max-bytes", default=2**28, show_default=True)
@click.option("--repeat", default=5, show_default=True)
def main(
    bundle: Path,
    name: str,
    threads: int | None,
    system_tokens: tuple[int, ...],
    prefill_chunk: int,
    granularity: int | None,
    max_bytes: int,
    repeat: int,
) -> None:
    """Measure and print ratios."""
    runtime = open_runtime(bundle, name, threads=threads, sliding_window_cache=False)
    generator = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = generator.integers(0, runtime.config.vocab_size, count).tolist()
        return drawn

    complete(runtime, tokens(64), prefill_chunk, None)
    for length in system_tokens:
        cache = PrefixCache(runtime, max_bytes=max_bytes, granularity=granularity)
        system = tokens(length)
        complete(runtime, system + tokens(QUESTION_TOKENS), prefill_chunk, cache)
        pairs = []
        for _ in range(repeat):
            prompt = system + tokens(QUESTION_TOKENS)
            plain = complete(runtime, prompt, prefill_chunk, None)
            reusing = complete(runtime, prompt, prefill_chunk, cache)
            pairs.append((plain, reusing))
        anew = [1000 * (plain.time_to_first_token_s or 0) for plain, _ in pairs]
        reused = [1000 * (reusing.time_to_first_token_s or 0) for _, reusing in pairs]
        ratios = [one / other for one, other in zip(anew, reused, strict=True)]
        same = sum(plain.token_ids == reusing.token_ids for plain, reusing in pairs)
        click.echo(
            f"{length} + {QUESTION_TOKENS} tokens, {pairs[0][1].reused_tokens} reused: first token "
            f"after {spread(anew, 0)} ms anew and {spread(reused, 0)} ms reused, "
            f"{spread(ratios, 1)} x; {same} of {repeat} answers equal; "
            f"{cache.used_bytes / 1e6:.1f} MB held"
        )


if __name__ == "__main__":
    main()
