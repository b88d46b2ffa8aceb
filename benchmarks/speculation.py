"""Measure decoding with and without prompt-lookup drafts, on text that is copied and on other text.

    python -m benchmarks.speculation DIR --threads 2
    python -m benchmarks.speculation DIR --threads 2 --rounds 9 --report build/speculation.json

The prompts come from every Python installation: functions of the standard library to rewrite with
an edit, and passages of its manual to quote. Other prompts begin a text with nothing to copy. They
are continued greedily, where small models soon repeat themselves, and sampled, where they do not.

Runs without and with drafts take turns, prompt by prompt, so a change in the machine's load affects
both. A ratio compares two such turns; the table shows the median and the range of the rounds.
Speeds cover all tokens after the first and include drafting. Stop tokens do not end a text, so all
texts have the same length.

Goals, for the medians: copied text is 1.8 times as fast (each group as a whole), and all other text
is at least 0.95 times as fast (each prompt on its own).
"""

from __future__ import annotations

import ast
import importlib.util
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import click

from benchmarks.common import (
    bundle_argument,
    report_option,
    rounds_option,
    runtime_option,
    show_spread,
    threads_option,
    write_report,
)
from gemma3_export.api.model_files import bundle_tokenizer
from gemma3_export.api.opening import open_runtime
from gemma3_export.bench.machine import describe_machine
from gemma3_export.bundle import Bundle
from gemma3_export.runtimes.generation.generate import generate
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.speculation import MAX_DRAFT_TOKENS, PromptLookup
from gemma3_export.runtimes.protocol import Runtime

GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.0, top_k=64, seed=7)
COPY_GOAL, OTHER_GOAL = 1.8, 0.95
GOALS = {"code edits": COPY_GOAL, "quotes": COPY_GOAL, "free text": OTHER_GOAL}  # by group

BEGUN_LINES = 3  # of the edited function, which show the model the edit
EDITS = (  # module, function, new name, instruction, old and new name of an argument
    ("heapq", "_siftup", "_sift_to_leaf", "with `queue` instead of `heap`", "heap", "queue"),
    ("bisect", "insort_left", "insort_first", "with `value` instead of `x`", "x", "value"),
    ("textwrap", "indent", "indent_lines", "with `source` instead of `text`", "text", "source"),
    ("colorsys", "rgb_to_hls", "hls_from_rgb", "with `red` instead of `r`", "r", "red"),
)
PASSAGE_CHARS = 900
QUOTED_WORDS = 4  # given, so the model knows where to begin
TOPICS = ("truth", "context-managers", "in", "exceptions")
BEGINNINGS = (
    "The sea is",
    "Once upon a time, in a village between two rivers,",
    "Dear Ms Keller,\n\nI am writing to you because",
    "The three main causes of the French Revolution were",
)


@dataclass(frozen=True)
class Case:
    """A prompt and how to continue it."""

    group: str
    name: str
    prompt: str
    sampling: SamplingParams = GREEDY


@dataclass(frozen=True)
class Turns:
    """One round without and with drafts, of one case or summed over several."""

    tokens: int  # after the first, the same number in both
    plain_s: float
    drafting_s: float
    drafted_tokens: int
    accepted_tokens: int
    texts: int
    equal_texts: int  # token by token

    @property
    def ratio(self) -> float:
        """Return the speedup from drafts."""
        return self.plain_s / self.drafting_s


def function_source(module: str, name: str) -> str:
    """Return the source of a module's function, even if a C implementation replaces it.

    Raises:
        LookupError: this Python does not have the function.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"there is no source of {module}")
    text = Path(spec.origin).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return ast.get_source_segment(text, node) or ""
    raise LookupError(f"there is no {name} in {module}")


def edit_prompt(module: str, name: str, new_name: str, instruction: str, old: str, new: str) -> str:
    """Return a function, the instruction, and the first lines of the edited function."""
    source = function_source(module, name)
    changed = re.sub(rf"\b{name}\b", new_name, re.sub(rf"\b{old}\b", new, source))
    begun = "\n".join(changed.splitlines()[:BEGUN_LINES])
    return (
        f"{source}\n\n\n# The same function again, called {new_name}, {instruction}:\n\n{begun}\n"
    )


def quote_prompt(topic: str) -> str:
    """Return a passage of Python's manual, and the first words of a quotation from it."""
    _, *paragraphs = topics[topic].strip().split("\n\n")  # without the heading
    passage = paragraphs.pop(0)
    while paragraphs and len(passage) + len(paragraphs[0]) < PASSAGE_CHARS:
        passage += "\n\n" + paragraphs.pop(0)
    begun = " ".join(passage.split()[:QUOTED_WORDS])
    return f'{passage}\n\nThe passage says, in its own words:\n\n"{begun}'


def all_cases() -> list[Case]:
    """Return all cases in the order of the table."""
    edits = [Case("code edits", f"{edit[0]}.{edit[1]}", edit_prompt(*edit)) for edit in EDITS]
    quotes = [Case("quotes", topic, quote_prompt(topic)) for topic in TOPICS]
    free = [
        Case("free text", f"{' '.join(text.split()[:3])} ({how})", text, sampling)
        for how, sampling in (("greedy", GREEDY), ("drawn", DRAWN))
        for text in BEGINNINGS
    ]
    return edits + quotes + free


def complete(
    runtime: Runtime, prompt: Sequence[int], sampling: SamplingParams, new_tokens: int, drafts: int
) -> Completion:
    """Generate ``new_tokens`` tokens, drafting up to ``drafts`` at a time (0: no drafts)."""
    return generate(
        runtime,
        [prompt],
        sampling,
        GenerationOptions(
            max_new_tokens=new_tokens, stop_token_ids=(), max_draft_tokens=drafts or 1
        ),
        drafter=PromptLookup if drafts else None,
    ).collect()[0]


def take_turns(
    runtime: Runtime, prompt: Sequence[int], sampling: SamplingParams, new_tokens: int, drafts: int
) -> Turns:
    """Measure one prompt without and with drafts."""
    plain = complete(runtime, prompt, sampling, new_tokens, 0)
    drafting = complete(runtime, prompt, sampling, new_tokens, drafts)
    return Turns(
        tokens=len(plain.tokens) - 1,
        plain_s=plain.decode_s,
        drafting_s=drafting.decode_s,
        drafted_tokens=drafting.drafted_tokens,
        accepted_tokens=drafting.accepted_tokens,
        texts=1,
        equal_texts=int(plain.token_ids == drafting.token_ids),
    )


def sum_of(turns: Sequence[Turns]) -> Turns:
    """Sum the turns of several prompts."""
    fields = [asdict(one) for one in turns]
    return Turns(**{name: sum(one[name] for one in fields) for name in fields[0]})


HEADING = (
    f"{'':36s}  tokens  {'tokens/s without':26s}  {'with drafts':26s}  {'ratio':20s}  "
    "accepted      equal texts"
)


def row(name: str, rounds: Sequence[Turns]) -> str:
    """Return a line of the table: speeds, ratios, and the drafts of one round."""
    first, total = rounds[0], sum_of(rounds)
    return (
        f"{name:36s}  {first.tokens:6d}  "
        f"{show_spread([one.tokens / one.plain_s for one in rounds], 1):26s}  "
        f"{show_spread([one.tokens / one.drafting_s for one in rounds], 1):26s}  "
        f"{show_spread([one.ratio for one in rounds], 2):20s}  "
        f"{first.accepted_tokens:4d} of {first.drafted_tokens:<4d}  "
        f"{total.equal_texts} of {total.texts}"
    )


def judge(group: str, cases: Sequence[Sequence[Turns]]) -> dict[str, object]:
    """Return the ratio that the group's goal applies to, and whether it is met.

    Args:
        group: one of ``GOALS``.
        cases: the rounds of each case in the group.
    """
    goal = GOALS[group]
    if goal == COPY_GOAL:
        judged, judged_rounds = "all prompts together", [together(cases)]
    else:
        judged, judged_rounds = "the slowest prompt", [list(rounds) for rounds in cases]
    ratio = min(statistics.median(one.ratio for one in rounds) for rounds in judged_rounds)
    return {"goal": goal, "judged": judged, "ratio": ratio, "is_met": ratio >= goal}


def together(cases: Sequence[Sequence[Turns]]) -> list[Turns]:
    """Sum the cases of each round."""
    return [sum_of(one) for one in zip(*cases, strict=True)]


def report_group(group: str, found: dict[Case, list[Turns]]) -> dict[str, object]:
    """Print a group's table and verdict, and return them for the report."""
    mine = {case: rounds for case, rounds in found.items() if case.group == group}
    click.echo(f"\n{group}\n{HEADING}")
    for case, rounds in mine.items():
        click.echo(row(f"  {case.name}", rounds))
    whole = together(list(mine.values()))
    click.echo(row("  together", whole))
    verdict = judge(group, list(mine.values()))
    total = sum_of(whole)
    click.echo(
        f"  goal {verdict['goal']} x for {verdict['judged']}: {verdict['ratio']:.3f} x, "
        f"{'met' if verdict['is_met'] else 'MISSED'}; "
        f"{total.equal_texts} of {total.texts} texts the same with drafts"
    )
    cases = [
        {"name": case.name, "rounds": [asdict(one) for one in rounds]}
        for case, rounds in mine.items()
    ]
    return {"group": group, **verdict, "cases": cases}


@click.command()
@bundle_argument
@runtime_option
@threads_option
@rounds_option
@click.option("--new-tokens", type=click.IntRange(min=2), default=96, show_default=True)
@click.option(
    "--draft-tokens", type=click.IntRange(min=1), default=MAX_DRAFT_TOKENS, show_default=True
)
@report_option
def main(
    bundle_path: Path,
    runtime: str,
    threads: int | None,
    rounds: int,
    new_tokens: int,
    draft_tokens: int,
    report: Path | None,
) -> None:
    """Measure, and print speeds, ratios and whether the goals are met."""
    bundle = Bundle(bundle_path)
    tokenizer = bundle_tokenizer(bundle)
    if tokenizer is None:
        raise click.UsageError(
            f"{bundle_path} has no tokenizer to encode the prompts; export with a tokenizer"
        )
    machine = describe_machine()  # before this process loads the machine
    opened = open_runtime(bundle, runtime, threads=threads)
    prompts = {case: tokenizer.encode(case.prompt) for case in all_cases()}
    take_turns(opened, next(iter(prompts.values())), GREEDY, min(16, new_tokens), draft_tokens)
    found: dict[Case, list[Turns]] = {case: [] for case in prompts}
    for _ in range(rounds):
        for case, prompt in prompts.items():
            turns = take_turns(opened, prompt, case.sampling, new_tokens, draft_tokens)
            found[case].append(turns)
    groups = [report_group(group, found) for group in GOALS]
    settings = {
        "runtime": runtime,
        "threads": threads,
        "new_tokens": new_tokens,
        "draft_tokens": draft_tokens,
    }
    write_report(report, {"machine": machine, **settings, "groups": groups})


if __name__ == "__main__":
    main()
