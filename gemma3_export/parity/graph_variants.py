"""Other forms of the graph under test: computed or read otherwise, or with other caches.

What a graph computes is checked in full on the form that people run. The others share its weights
and nearly all of its nodes, so the cases that feed and read the cache in every way are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gemma3_export.config import Gemma3Config
from gemma3_export.parity.candidate_check import chosen_logits
from gemma3_export.parity.cases import Case, cases_for, needed_positions
from gemma3_export.parity.expected import Truth
from gemma3_export.parity.judge import Limits, judge_case
from gemma3_export.parity.noise_floor import NoiseFloor, Yardstick
from gemma3_export.parity.report.model import CaseResult
from gemma3_export.progress import Progress
from gemma3_export.runtimes.protocol import CacheVariants, Float32MatMul, Runtime

__all__ = ["prepare_floor", "run_chosen_cases", "run_float_cases", "run_sibling_cases"]


def run_float_cases(
    candidate: Runtime, yardstick: Yardstick, limits: Limits, progress: Progress
) -> list[CaseResult]:
    """A few cases of a quantised graph with float products: see activations.py."""
    if yardstick.float_truth is None or yardstick.float_floor is None:
        return []
    exact = candidate.with_float32_matmul() if isinstance(candidate, Float32MatMul) else None
    if exact is None:
        return []
    options = replace(yardstick.options, decode_steps=min(6, yardstick.options.decode_steps))
    every = cases_for(exact, yardstick.config, yardstick.sequences, options)
    form = Form("float", "float products", yardstick.float_truth, yardstick.float_floor)
    return run_form(form, exact, variant_cases(every), limits, progress)


def run_sibling_cases(
    candidate: Runtime, yardstick: Yardstick, limits: Limits, progress: Progress
) -> list[CaseResult]:
    """A few cases of the graph's sibling with another kind of cache, if it has one."""
    sibling = candidate.with_other_cache() if isinstance(candidate, CacheVariants) else None
    if sibling is None:
        return []
    every = cases_for(sibling, yardstick.config, yardstick.sequences, yardstick.options)
    kind = sibling.info.cache
    assert kind is not None
    form = Form(kind, f"{kind} caches", yardstick.truth, yardstick.floor)
    return run_form(form, sibling, variant_cases(every), limits, progress)


def run_chosen_cases(
    candidate: Runtime, yardstick: Yardstick, limits: Limits, progress: Progress
) -> list[CaseResult]:
    """Cached steps of a runtime that chooses candidates, if it does."""
    chosen = chosen_logits(candidate)
    if chosen is None:
        return []
    every = cases_for(chosen, yardstick.config, yardstick.sequences, yardstick.options)
    form = Form("chosen", "candidates only", yardstick.truth, yardstick.floor)
    steps = [case for case in every if case.checks_candidates]
    return run_form(form, chosen, steps, limits, progress)


@dataclass(frozen=True, slots=True)
class Form:
    """Another form of the graph under test, and what it is held against."""

    prefix: str  # of its cases' names
    description: str
    truth: Truth
    floor: NoiseFloor


def variant_cases(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that feed and read the cache in every way."""
    return [case for case in cases if case.checks_variants]


def run_form(
    form: Form, runtime: Runtime, cases: Sequence[Case], limits: Limits, progress: Progress
) -> list[CaseResult]:
    """Run ``cases`` on another form of the graph and judge them."""
    results = []
    for index, case in enumerate(cases):
        progress(f"comparing {case.name}, {form.description}", index, len(cases))
        prepare_floor(case, runtime.config, form.floor)
        result, _ = judge_case(case, case.run(runtime), form.truth, form.floor, limits)
        name, title = f"{form.prefix}-{case.name}", f"{case.title}, {form.description}"
        results.append(replace(result, name=name, title=title))
    return results


def prepare_floor(case: Case, config: Gemma3Config, floor: NoiseFloor) -> None:
    """Compute what a case will need in blocks: one position at a time would read the head anew."""
    needed = needed_positions(config, [case], floor.sequences)
    for sequence, positions in needed.items():
        floor.logits(sequence, np.array(sorted(positions)))
