"""Measure what a grammar costs per token: masks alone, and generation with and without overlap.

    python -m benchmarks.structured DIR

The prompt ends where an answer in JSON begins. Generations with a grammar alternate with free ones
of as many tokens, so that a change in the load of the machine affects all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from numpy.typing import NDArray

import gemma3_export
from benchmarks.common import bundle_argument, rounds_option, show_spread, threads_option
from gemma3_export.api.model import Model
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.structured.constraint import ConstraintFactory, GrammarConstraint
from gemma3_export.runtimes.structured.grammar import Grammar

__all__ = ["main"]

SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 80},
            "year": {"type": "integer", "minimum": 1800, "maximum": 2100},
            "genre": {"enum": ["novel", "poetry", "drama", "essay"]},
            "authors": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["title", "year", "genre", "authors"],
        "additionalProperties": False,
    },
    "minItems": 20,
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "JSON schema": {"json_schema": SCHEMA},
    "regex": {"regex": r"([A-Z][a-z]+ ){1,20}[0-9]{4}(\n.*)*"},
}
PROMPT = "A list of books in JSON, with title, year, genre and authors:\n\n"


@click.command()
@bundle_argument
@threads_option
@rounds_option
@click.option("--tokens", default=128, show_default=True, help="Tokens per generation.")
def main(bundle_path: Path, threads: int | None, rounds: int, tokens: int) -> None:
    """Print what masks cost, and decoding speeds with and without a grammar."""
    model = gemma3_export.load(bundle_path, device="cpu", threads=threads)
    assert model.tokenizer is not None
    factory = ConstraintFactory(model.tokenizer, model.config.vocab_size)
    started, computed = perf_counter(), process_time()
    factory.new(Grammar.of_regex("a"), ())
    click.echo(
        f"prepare {model.config.vocab_size:,} tokens, once: {perf_counter() - started:.2f} s, of "
        f"which {process_time() - computed:.2f} s are computation"
    )
    for name, options in GRAMMARS.items():
        click.echo(name)
        measure_masks(model, factory, options, tokens)
        measure_generation(model, options, tokens, rounds)


def measure_masks(
    model: Model, factory: ConstraintFactory, options: dict[str, Any], tokens: int
) -> None:
    """Follow a generated text, and time each mask by itself."""
    started = perf_counter()
    grammar = gemma3_export.GenerateOptions(**options).grammar
    assert grammar is not None
    compile_s = perf_counter() - started
    done = model.generate(PROMPT, max_new_tokens=tokens, **options)
    constraint = factory.new(grammar, model.stop_token_ids(is_chat=False))
    times, allowed = [], []
    for token_id in done.token_ids:
        started = perf_counter()
        mask = constraint.allowed()
        times.append((perf_counter() - started) * 1e3)
        allowed.append(int(mask.sum()))
        constraint.accept(token_id)
        if constraint.has_ended:
            break
    click.echo(
        f"  grammar {compile_s * 1e3:.1f} ms, first mask {times[0]:.1f} ms; the other "
        f"{len(times) - 1}: median {statistics.median(times[1:]):.2f} ms, "
        f"p99 {np.percentile(times[1:], 99):.2f} ms, worst {max(times[1:]):.2f} ms "
        f"(tokens allowed: median {statistics.median(allowed):,.0f})"
    )


def measure_generation(model: Model, options: dict[str, Any], tokens: int, rounds: int) -> None:
    """Alternate free generations with constrained ones, whose masks are overlapped or not."""
    kinds: dict[str, Callable[[], Completion]] = {
        "free": lambda: model.generate(PROMPT, max_new_tokens=tokens),
        "free, all logits": lambda: model.generate(PROMPT, max_new_tokens=tokens, logprobs=0),
        "masks beside the step": lambda: model.generate(PROMPT, max_new_tokens=tokens, **options),
        "masks after the step": lambda: masks_in_turn(model, options, tokens),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for measured in range(rounds + 1):
        for name, generate in kinds.items():
            done = generate()
            if measured:  # the first round warms up
                found[name].append(done.decode_s / (len(done.tokens) - 1) * 1e3)
    for name, times in found.items():
        click.echo(f"  {name:24s} {show_spread(times, 2)} ms per token")


def masks_in_turn(model: Model, options: dict[str, Any], tokens: int) -> Completion:
    """Generate with masks that are begun only once the logits are there."""
    begin, allowed = GrammarConstraint.begin, GrammarConstraint.allowed

    def begun_and_allowed(constraint: GrammarConstraint) -> NDArray[np.bool_]:
        begin(constraint)
        return allowed(constraint)

    with (
        patch.object(GrammarConstraint, "begin", lambda constraint: None),
        patch.object(GrammarConstraint, "allowed", begun_and_allowed),
    ):
        done: Completion = model.generate(PROMPT, max_new_tokens=tokens, **options)
    return done


if __name__ == "__main__":
    main()
