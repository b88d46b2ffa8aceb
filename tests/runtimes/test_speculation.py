"""Speculative decoding gives the same events as decoding without it, in fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from gemma3_export.errors import InputError
from gemma3_export.runtimes.generation.generate import Event
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.speculation import (
    ALLOWANCE,
    CANDIDATE_COSTS,
    FIRST_TOKENS,
    PLAIN_COSTS,
    DraftBudget,
    PromptLookup,
    StepCosts,
)
from tests.support.fake_runtime import FAKE_CONFIG, ByteDecoder, FakeRuntime, ScriptedRuntime
from tests.support.generation import generate

GREEDY = SamplingParams(seed=3)
SAMPLED = SamplingParams(temperature=1.0, top_k=64, seed=7, repetition_penalty=1.2, logprobs=2)


class Guessing:
    """A drafter that knows all answers, and is right with a given probability per token."""

    token_cost = 0.0

    def __init__(self, texts: Sequence[Sequence[int]], quality: float, seed: int = 0) -> None:
        self.texts, self.quality = [list(text) for text in texts], quality
        self.generator = np.random.default_rng(seed)
        self.seen: list[int] = []

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        assert max_tokens > 0
        assert list(tokens[: len(self.seen)]) == self.seen, "the tokens only ever grow"
        self.seen = list(tokens)
        count = int(self.generator.integers(max_tokens + 1)) if self.quality < 1 else max_tokens
        known = next((text for text in self.texts if text[: len(tokens)] == self.seen), self.seen)
        right = known[len(tokens) : len(tokens) + count]
        right += [5] * (count - len(right))
        wrong = self.generator.random(count) >= self.quality
        return [(t + 1) % FAKE_CONFIG.vocab_size if w else t for t, w in zip(right, wrong)]  # noqa: B905


def without_measurements(event: Event) -> Event:
    if not isinstance(event, Completion):
        return event
    return replace(
        event,
        time_to_first_token_s=None,
        prefill_s=0.0,
        decode_s=0.0,
        drafted_tokens=0,
        accepted_tokens=0,
    )


def events_of(
    runtime: FakeRuntime, prompts: list[list[int]], options: dict, stop_after: int | None, how: str
) -> list[Event]:
    """Return all events, until the consumer cancels or closes after ``stop_after`` of them."""
    seen: list[Event] = []
    cancel = (lambda: len(seen) >= stop_after) if how == "cancel" and stop_after else None
    generation = generate(runtime, prompts, **options, cancel=cancel)
    for event in generation:
        seen.append(without_measurements(event))
        if how == "close" and len(seen) == stop_after:
            generation.close()
    return seen + [without_measurements(done) for done in generation.completions]


def random_case(generator: np.random.Generator) -> tuple[list[list[int]], dict]:
    """Return prompts and options that lead to every kind of end."""
    prompts = [
        [int(generator.integers(2, 4)), *generator.integers(8, 250, generator.integers(0, 30))]
        for _ in range(generator.integers(1, 4))
    ]
    options = {
        "sampling": GREEDY if generator.random() < 0.5 else SAMPLED,
        "max_new_tokens": int(generator.integers(1, 50)),
        "prefill_chunk": int(generator.integers(1, 20)),
        "detokenize": ByteDecoder,
    }
    if generator.random() < 0.4:
        longest = max(map(len, prompts))
        options["capacity"] = int(generator.integers(longest, longest + 30))
    if generator.random() < 0.5:
        options["stop_token_ids"] = generator.integers(0, 256, 6).tolist()
    if generator.random() < 0.5:
        options["stop_texts"] = [chr(generator.integers(32, 127)) for _ in range(3)]
    return [list(map(int, prompt)) for prompt in prompts], options


def compare(
    make_runtime: Callable[[], FakeRuntime], seed: int, prompts: list[list[int]], options: dict
) -> None:
    generator = np.random.default_rng(seed)
    stop_after = int(generator.integers(1, 40)) if generator.random() < 0.5 else None
    how = str(generator.choice(["cancel", "close"]))
    plain = events_of(make_runtime(), prompts, options, stop_after, how)
    answers = generate(
        make_runtime(), prompts, **options | {"stop_token_ids": (), "stop_texts": ()}
    )
    texts = [
        [*prompt, *done.token_ids] for prompt, done in zip(prompts, answers.collect(), strict=True)
    ]
    quality = float(generator.choice([0, 0.3, 0.8, 0.95, 1]))
    drafters = [lambda: Guessing(texts, quality, seed), PromptLookup]
    for drafter in drafters:
        runtime = make_runtime()
        drafted = options | {
            "drafter": drafter,
            "max_draft_tokens": int(generator.integers(1, 20)),
        }
        assert events_of(runtime, prompts, drafted, stop_after, how) == plain


@pytest.mark.parametrize("seed", range(150))
def test_events_are_those_of_decoding_without_drafts(seed: int) -> None:
    prompts, options = random_case(np.random.default_rng(1000 + seed))
    compare(FakeRuntime, seed, prompts, options)


@pytest.mark.parametrize("seed", range(30))
def test_events_are_the_same_for_repetitive_text(seed: int) -> None:
    """Scripts repeat themselves, so prompt lookup drafts a lot and is often right."""
    generator = np.random.default_rng(seed)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 6))) for _ in range(4)]
    scripts = {
        first: b" ".join(words[i] for i in generator.integers(0, 4, 20)) + b"\x01"
        for first in (2, 3)
    }
    prompts, options = [[2], [3]][: generator.integers(1, 3)], {"detokenize": ByteDecoder}
    options |= {"sampling": GREEDY, "max_new_tokens": 90, "stop_texts": [words[3].decode() * 2]}
    compare(lambda: ScriptedRuntime(scripts), seed, prompts, options)


def test_right_drafts_save_steps_and_are_counted() -> None:
    runtime = FakeRuntime()
    (plain,) = generate(runtime, [[2, 30]], GREEDY, max_new_tokens=60).collect()
    drafter = Guessing([[2, 30, *plain.token_ids]], quality=1)
    runtime = FakeRuntime()
    (drafted,) = generate(
        runtime, [[2, 30]], GREEDY, max_new_tokens=60, drafter=lambda: drafter
    ).collect()
    assert drafted.token_ids == plain.token_ids
    assert drafted.drafted_tokens == drafted.accepted_tokens > 45
    assert len(runtime.calls) == 60 - drafted.accepted_tokens
    assert len(runtime.calls) < 12
    assert plain.drafted_tokens == plain.accepted_tokens == 0


def test_a_row_that_has_ended_was_fed_all_but_its_last_token() -> None:
    runtime = ScriptedRuntime({2: b"abcabcabcabcabcabcabc\x01abc"})
    (done,) = generate(
        runtime, [[2]], GREEDY, max_new_tokens=50, detokenize=ByteDecoder, drafter=PromptLookup
    ).collect()
    assert done.text == "abc" * 7
    assert done.accepted_tokens > 5
    assert runtime.cache is not None
    assert runtime.cache.histories[0] == [2, *done.token_ids[:-1]]


def test_drafts_begin_when_only_one_prompt_is_left() -> None:
    runtime = ScriptedRuntime({2: b"xy\x01", 3: b"abcd" * 20 + b"\x01"})
    options = {"max_new_tokens": 100, "detokenize": ByteDecoder, "drafter": PromptLookup}
    short, long = generate(runtime, [[2], [3]], GREEDY, **options).collect()
    assert (short.text, long.text) == ("xy", "abcd" * 20)
    assert short.drafted_tokens == 0
    assert long.accepted_tokens > 50
    assert all(shape[1] == 1 for shape, row in runtime.calls if row is None)
    assert all(row == 1 for _, row in runtime.calls[4:])


class TestBudget:
    """All numbers are in plain decode steps, the unit of the constants."""

    @pytest.mark.parametrize("token_cost", [0.0, 0.2])
    @pytest.mark.parametrize("max_tokens", [1, 4, 16])
    @pytest.mark.parametrize("costs", [PLAIN_COSTS, CANDIDATE_COSTS])
    @pytest.mark.parametrize("seed", range(20))
    def test_the_loss_stays_below_the_allowance(
        self, seed: int, max_tokens: int, token_cost: float, costs: StepCosts
    ) -> None:
        """Drafts are right for a while and wrong for a while, in any order."""
        generator = np.random.default_rng(seed)
        budget = DraftBudget(max_tokens, token_cost, costs)
        token_cost += costs.token
        spent, tokens = 0.0, 0
        for _ in range(40):
            quality = generator.choice([0.0, 0.1, 0.5, 1.0])
            for _ in range(generator.integers(1, 60)):
                drafted = budget.max_draft()
                assert 0 <= drafted <= max_tokens
                right = generator.random(drafted) < quality
                accepted = drafted if right.all() else int(right.argmin())
                budget.record(drafted, accepted)
                tokens += 1 + accepted
                spent += 1 + (costs.draft if drafted else 0) + drafted * token_cost
                first = costs.draft + FIRST_TOKENS * token_cost
                assert spent <= tokens * (1 + ALLOWANCE) + first

    def test_drafts_that_are_never_right_almost_stop(self) -> None:
        budget, drafted = DraftBudget(), 0
        for _ in range(1000):
            count = budget.max_draft()
            drafted += count
            budget.record(count, 0)
        assert 0 < drafted < 1000 * ALLOWANCE / PLAIN_COSTS.token

    def test_drafts_that_are_right_become_as_long_as_allowed(self) -> None:
        budget, lengths = DraftBudget(16), []
        for _ in range(6):
            lengths.append(budget.max_draft())
            budget.record(lengths[-1], lengths[-1])
        assert lengths == sorted(lengths)
        assert lengths[-1] == 16

    def test_invalid_lengths_are_rejected(self) -> None:
        with pytest.raises(InputError, match="max_draft_tokens is 0; it must be at least 1"):
            DraftBudget(0)
        with pytest.raises(InputError, match="max_draft_tokens is -1; it must be at least 1"):
            generate(FakeRuntime(), [[2]], GREEDY, max_new_tokens=1, max_draft_tokens=-1)


class TestPromptLookup:
    @pytest.mark.parametrize(
        ("tokens", "count", "draft"),
        [
            ([0, 1, 2, 3, 4, 5, 0, 1, 2], 3, [3, 4, 5]),
            ([0, 1, 2, 3, 9, 0, 1, 2, 4, 9, 0, 1, 2], 1, [4]),  # the latest
            ([7, 0, 1, 2, 3, 8, 0, 1, 2, 4, 7, 0, 1, 2], 1, [3]),  # the longest before the latest
            ([1, 2, 3, 4, 9, 9, 2, 3], 4, []),  # two tokens do not match
            ([1, 2, 1, 2, 1], 5, [2, 1, 2, 1, 2]),  # a loop continues
            ([4, 4, 4, 4], 4, [4, 4, 4, 4]),
            ([1, 2], 4, []),
            ([1], 4, []),
        ],
    )
    def test_drafts_what_followed_an_earlier_occurrence(
        self, tokens: list[int], count: int, draft: list[int]
    ) -> None:
        assert PromptLookup().draft(tokens, count) == draft
        growing = PromptLookup()
        drafts = [growing.draft(tokens[:end], count) for end in range(1, len(tokens) + 1)]
        assert drafts[-1] == draft

    def test_single_tokens_match_on_request(self) -> None:
        assert PromptLookup(min_ngram=1).draft([1, 2, 3, 9, 2], 2) == [3, 9]

    @pytest.mark.parametrize(("most", "fewest"), [(2, 3), (1, 0), (0, 0)])
    def test_invalid_sizes_are_rejected(self, most: int, fewest: int) -> None:
        with pytest.raises(InputError, match="min_ngram"):
            PromptLookup(max_ngram=most, min_ngram=fewest)
