"""The steps of the generation loop: who gets a row, what is computed next, what it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.exporters.torch.pt2 import Pt2Writer
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.runtimes.generation.loop import GenerationLoop, StepEvent
from gemma3_export.runtimes.generation.prepare import GenerationOptions, prepare_request
from gemma3_export.runtimes.generation.request import Completion, Failure, TokenEvent
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.scheduler import (
    DecodeStep,
    PrefillChunk,
    ScheduledRequest,
    Scheduler,
    in_turns,
    prompts_first,
)
from gemma3_export.runtimes.generation.speculation import PromptLookup
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import NO_LOGITS, Runtime
from gemma3_export.runtimes.torch.runtime import Pt2Runtime, TorchScriptRuntime
from tests.support.exported_bundles import VARIANTS, exported, exported_bundle, source_of
from tests.support.fake_runtime import ByteDecoder, FakeRuntime, ScriptedRuntime
from tests.support.generation import generate

GREEDY = SamplingParams()
CHUNK = 4


@functools.cache
def tiny_runtime(name: str) -> Runtime:
    if name == "reference":
        return ReferenceRuntime(load_reference(source_of()))
    if name == "torchscript":
        return TorchScriptRuntime(exported(TorchScriptWriter()), device="cpu")
    if name == "pt2":
        return Pt2Runtime(exported(Pt2Writer()), device="cpu")
    return OnnxRuntime(
        exported_bundle("portable")
        if name == "portable"
        else exported_bundle("ort", "screened" if name == "screened" else "irregular"),
        device="cpu",
        threads=1,
        sliding_window_cache=name in ("windowed", "screened"),
    )


def request_for(
    runtime: Runtime,
    index: int,
    prompt: Sequence[int] | int,
    new_tokens: int,
    params: SamplingParams = GREEDY,
    **arguments: Any,
) -> ScheduledRequest:
    """Return a request; a number means a prompt of that many tokens."""
    ids = [2, *range(10 + index, 9 + index + prompt)] if isinstance(prompt, int) else prompt
    options = GenerationOptions(
        max_new_tokens=new_tokens, stop_token_ids=(), prefill_chunk=CHUNK, capacity=64
    )
    return prepare_request(
        runtime, index, np.array(ids, np.int64), params, options, 64, **arguments
    )


def described(plan: Any) -> Any:
    """Return a plan as (request, start, stop) of a chunk, or the requests of a decode step."""
    if isinstance(plan, PrefillChunk):
        return plan.request.state.index, plan.start, plan.stop
    if isinstance(plan, DecodeStep):
        return [request.state.index for request in plan.requests]
    return plan


class Observed(GenerationLoop):
    """A loop of a fake runtime that records its plans."""

    def __init__(self, rows: int, **arguments: Any) -> None:
        runtime = FakeRuntime()
        super().__init__(runtime, runtime.new_cache(rows, 64), **arguments)
        self.plans: list[Any] = []

    def add(self, index: int, prompt: Sequence[int] | int, new_tokens: int) -> ScheduledRequest:
        request = request_for(self.runtime, index, prompt, new_tokens)
        self.submit(request)
        return request

    def step(self) -> list[StepEvent]:
        events = super().step()
        self.plans.append(described(self.scheduler.last))
        return events

    def finish(self) -> dict[int, tuple[int, ...]]:
        """Step until idle; return the tokens of each completion."""
        found = {}
        while not self.is_idle:
            for event in self.step():
                if isinstance(event, Completion):
                    found[event.request] = event.token_ids
        return found


class TestPlans:
    def test_whole_prompts_come_first_in_order_of_arrival(self) -> None:
        loop = Observed(2)
        loop.add(0, 6, 2)
        loop.add(1, 3, 2)
        loop.finish()
        assert loop.plans == [(0, 0, 4), (0, 4, 6), (1, 0, 3), [0, 1]]

    def test_in_turns_a_chunk_follows_each_decode_step(self) -> None:
        loop = Observed(2, plan_next=in_turns)
        loop.add(0, 2, 5)
        loop.add(1, 11, 2)
        loop.finish()
        assert loop.plans == [(0, 0, 2), [0], (1, 0, 4), [0], (1, 4, 8), [0], (1, 8, 11), [0, 1]]

    def test_prompts_run_at_full_speed_while_nothing_decodes(self) -> None:
        loop = Observed(2, plan_next=in_turns)
        loop.add(0, 9, 1)
        loop.finish()
        assert loop.plans == [(0, 0, 4), (0, 4, 8), (0, 8, 9)]

    def test_only_the_last_chunk_of_a_prompt_computes_logits(self) -> None:
        loop = Observed(1)
        loop.add(0, 11, 2)
        loop.finish()
        assert loop.plans == [(0, 0, 4), (0, 4, 8), (0, 8, 11), [0]]
        assert loop.runtime.num_logits == [NO_LOGITS, NO_LOGITS, 1, 1]

    def test_a_short_prompt_does_not_wait_for_a_long_one(self) -> None:
        loop = Observed(2, plan_next=in_turns)
        loop.add(0, 60, 1)
        loop.step()
        loop.add(1, 3, 1)
        loop.finish()
        assert loop.plans.index((1, 0, 3)) <= 2

    def test_short_prompts_do_not_starve_a_long_one(self) -> None:
        loop = Observed(3, plan_next=in_turns)
        loop.add(0, 40, 1)  # 10 chunks
        for index in range(1, 60):
            loop.add(index, 3, 1)
        ended = []
        while 0 not in ended:
            ended += [event.request for event in loop.step() if isinstance(event, Completion)]
        assert len(loop.plans) <= 2 * 10

    def test_a_step_computes_the_rows_that_decode_and_no_others(self) -> None:
        loop = Observed(4)
        for index, new_tokens in enumerate([2, 5, 2, 5]):
            loop.add(index, 3, new_tokens)
        loop.finish()
        decodes = [shape for shape, _ in loop.runtime.calls[4:]]
        assert decodes == [(4, 1), (2, 1), (2, 1), (2, 1)]

    def test_rows_move_only_where_a_gap_would_be_computed(self) -> None:
        swaps = []
        loop = Observed(4)
        original = loop.cache.swap
        loop.cache.swap = lambda *rows: (swaps.append(rows), original(*rows))  # type: ignore
        for index, new_tokens in enumerate([2, 9, 5, 9]):
            loop.add(index, 3, new_tokens)
        loop.finish()
        assert swaps == [(3, 0)], "rows 1 to 3 stay; then row 3 moves beside row 1"


class TestAdmission:
    def test_requests_wait_for_a_row_in_order_of_arrival(self) -> None:
        loop = Observed(2)
        for index in range(5):
            loop.add(index, 3, 3)
        loop.finish()
        order = [plan[0] for plan in loop.plans if isinstance(plan, tuple)]
        assert order == [0, 1, 2, 3, 4]

    def test_tokens_are_reserved_for_prompt_and_answer(self) -> None:
        loop = Observed(3, max_tokens=20)
        for index in range(3):
            loop.add(index, 5, 6)  # 10 tokens; the last new one is never cached
        loop.step()
        assert loop.scheduler.reserved_tokens == 20
        assert len(loop.scheduler.waiting) == 1
        loop.finish()
        assert loop.scheduler.reserved_tokens == 0

    def test_small_requests_do_not_overtake_a_large_one(self) -> None:
        loop = Observed(3, max_tokens=20, plan_next=in_turns)
        loop.add(0, 5, 6)
        loop.add(1, 10, 10)  # needs almost everything
        for index in range(2, 9):
            loop.add(index, 2, 2)
        loop.finish()
        order = [plan[0] for plan in loop.plans if isinstance(plan, tuple)]
        assert order.index(1) < order.index(2)

    @pytest.mark.parametrize(("row", "limit"), [(20, None), (64, 20)], ids=["row", "all"])
    def test_a_request_that_never_fits_is_rejected(self, row: int, limit: int | None) -> None:
        runtime = FakeRuntime()
        loop = GenerationLoop(runtime, runtime.new_cache(2, row), max_tokens=limit)
        loop.submit(request_for(runtime, 0, 16, 5))
        with pytest.raises(InputError, match=r"need 21 tokens of the cache.* can have 20"):
            loop.submit(request_for(runtime, 1, 16, 6))


class TestEnds:
    def test_a_cancelled_request_frees_its_row_before_the_next_step(self) -> None:
        loop = Observed(1)
        first = loop.add(0, 3, 30)
        loop.add(1, 3, 2)
        loop.step()
        loop.step()
        assert loop.cancel(first).finish_reason == "cancelled"
        loop.step()
        assert loop.plans[-1] == (1, 0, 3)

    @pytest.mark.parametrize("steps", [0, 1, 4], ids=["waiting", "in its prompt", "decoding"])
    def test_a_request_can_be_cancelled_anywhere(self, steps: int) -> None:
        loop = Observed(2, plan_next=in_turns)
        other = loop.add(0, 3, 6)
        request = loop.add(1, 7, 5)
        for _ in range(steps):
            loop.step()
        loop.cancel(request)
        alone = Observed(1)
        alone.add(0, other.state.prompt_ids.tolist(), 6)
        assert loop.finish() == alone.finish()
        assert loop.scheduler.rows == [None, None]

    def test_an_error_of_one_request_ends_that_request_only(self) -> None:
        class Raises(ByteDecoder):
            def push(self, token_id: int, /) -> str:
                raise ValueError("no text for this")

        loop = Observed(2)
        failing = request_for(loop.runtime, 0, 3, 5, detokenize=Raises)
        loop.submit(failing)
        loop.add(1, 3, 5)
        events = []
        while not loop.is_idle:
            events += loop.step()
        (failure,) = [event for event in events if isinstance(event, Failure)]
        assert failure.request == 0
        assert str(failure.error) == "no text for this"
        (completion,) = [event for event in events if isinstance(event, Completion)]
        assert (completion.request, len(completion.tokens)) == (1, 5)

    def test_logits_that_are_not_finite_end_the_request_only(self) -> None:
        class Breaks(FakeRuntime):
            def logits_after(self, history: Sequence[int]) -> Any:
                logits = super().logits_after(history)
                return logits * np.nan if len(history) > 4 and history[1] == 10 else logits

        runtime = Breaks()
        loop = GenerationLoop(runtime, runtime.new_cache(2, 64))
        for index in range(2):
            loop.submit(request_for(runtime, index, 3, 5))
        events = []
        while not loop.is_idle:
            events += loop.step()
        assert [type(event.error) for event in events if isinstance(event, Failure)] == [
            Gemma3ExportError
        ]
        assert [event.request for event in events if isinstance(event, Completion)] == [1]


class Oracle:
    """Drafts what a fake runtime will choose, and something else as every fourth token."""

    token_cost = 0.0

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        history, found = list(tokens), []
        for place in range(max_tokens):
            best = int(FakeRuntime().logits_after(history).argmax())
            found.append(best if place % 4 < 3 else (best + 1) % 256)
            history.append(found[-1])
        return found


@pytest.mark.parametrize("steps", range(2, 14))
def test_drafts_end_cleanly_when_another_request_joins(steps: int) -> None:
    """At some of these steps, verified tokens are pending or rejected ones are in the cache."""
    loop = Observed(2)
    drafting = request_for(loop.runtime, 0, 3, 30, drafter=Oracle)
    loop.submit(drafting)
    for _ in range(steps):
        loop.step()
    loop.add(1, 3, 9)
    found = loop.finish()
    assert drafting.state.accepted_tokens > 0
    for index, new_tokens in ((0, 30), (1, 9)):
        alone = Observed(1)
        alone.add(index, 3, new_tokens)
        assert found[index] == alone.finish()[index]


class Repeats:
    """Drafts the newest token again."""

    token_cost = 0.0

    def draft(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        return [tokens[-1]] * max_tokens


@pytest.mark.parametrize("steps", range(2, 12))
@pytest.mark.parametrize("joint", range(1, 7))
def test_logits_verified_before_others_joined_are_not_used_after_them(
    steps: int, joint: int
) -> None:
    """A text of equal tokens cannot tell by the token which position they belong to."""
    script = b"aaaaaaaaabaaaaaaaac"
    runtime = ScriptedRuntime({2: script, 3: b"x" * joint})
    loop = GenerationLoop(runtime, runtime.new_cache(2, 64))
    drafting = request_for(runtime, 0, [2], len(script), drafter=Repeats)
    loop.submit(drafting)
    for _ in range(steps):
        loop.step()
    loop.submit(request_for(runtime, 1, [3], joint))
    while not loop.is_idle:
        loop.step()
    assert bytes(token.token_id for token in drafting.state.tokens) == script


# --- results ---------------------------------------------------------------------------------


def random_schedule(
    runtime: Runtime, seed: int, *, with_drafts: bool, longest: int = 24
) -> list[tuple[int, ScheduledRequest, int | None]]:
    """Return requests with the step of their arrival, and maybe that of their cancellation."""
    generator = np.random.default_rng(seed)
    schedule = []
    for index in range(9):
        size = int(generator.integers(1, longest))
        # few different tokens, so that drafts find repetitions
        ids = generator.integers(10, 10 + int(generator.integers(2, 60)), size)
        params = (
            GREEDY
            if generator.random() < 0.5
            else SamplingParams(temperature=1.3, top_k=9, seed=int(generator.integers(99)))
        )
        request = request_for(
            runtime,
            index,
            ids.tolist(),
            int(generator.integers(1, 24)),
            params,
            drafter=PromptLookup if with_drafts and generator.random() < 0.7 else None,
        )
        arrival = int(generator.integers(0, 60))
        end = arrival + int(generator.integers(0, 30)) if generator.random() < 0.25 else None
        schedule.append((arrival, request, end))
    return schedule


def run_schedule(
    loop: GenerationLoop, schedule: list[tuple[int, ScheduledRequest, int | None]]
) -> dict[int, list[int]]:
    """Return the tokens of each request, from its events."""
    tokens: dict[int, list[int]] = {}
    last = max(max(arrival, end or 0) for arrival, _, end in schedule)
    step = 0
    while step <= last or not loop.is_idle:
        for arrival, request, end in schedule:
            if arrival == step:
                loop.submit(request)
            if end == step and request.state.finish_reason is None:
                loop.cancel(request)
        for event in loop.step():
            if isinstance(event, TokenEvent):
                tokens.setdefault(event.request, []).append(event.token_id)
        step += 1
    return tokens


def assert_like_alone(
    runtime: Runtime,
    seed: int,
    plan_next: Callable[[Scheduler], Any],
    *,
    spoil: Callable[[Any], None] | None = None,
) -> None:
    """Check random arrivals and cancellations against requests that run alone."""
    schedule = random_schedule(runtime, seed, with_drafts=seed % 2 == 0)
    cache = runtime.new_cache(3, 64)
    if spoil is not None:
        spoil(cache)
    loop = GenerationLoop(runtime, cache, plan_next=plan_next, max_tokens=100)
    tokens = run_schedule(loop, schedule)
    assert loop.scheduler.rows == [None] * 3
    for _, request, end in schedule:
        state = request.state
        (alone,) = generate(
            runtime,
            [state.prompt_ids],
            [state.params],
            max_new_tokens=state.max_cached_tokens + 1 - state.prompt_ids.size,
            stop_token_ids=(),
            prefill_chunk=CHUNK,
        ).collect()
        found = tuple(tokens.get(state.index, ()))
        if end is None:
            assert found == alone.token_ids
        else:
            assert found == alone.token_ids[: len(found)]


@pytest.mark.parametrize("plan_next", [prompts_first, in_turns])
@pytest.mark.parametrize("seed", range(12))
def test_any_schedule_gives_each_request_what_it_gets_alone(
    seed: int, plan_next: Callable[[Scheduler], Any]
) -> None:
    assert_like_alone(FakeRuntime(), seed, plan_next)


@pytest.mark.parametrize(
    "backend",
    [
        *("ort", "windowed", "portable", "screened", "torchscript", "reference"),
        pytest.param("pt2", marks=pytest.mark.slow),  # its steps are torchscript's
    ],
)
def test_every_runtime_keeps_requests_apart(backend: str) -> None:
    """Texts pass the window of 6 tokens many times, and rows are used again and again."""
    for seed in range(2):
        assert_like_alone(tiny_runtime(backend), seed, in_turns)


def test_steps_on_the_device_keep_requests_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, every step computes every row, also those whose prompts are being computed."""
    runtime = OnnxRuntime(
        exported_bundle("ort"), device="cpu", threads=1, sliding_window_cache=False
    )
    monkeypatch.setattr(runtime, "decodes_on_device", True)
    for seed in range(3):
        assert_like_alone(runtime, seed, in_turns)


@pytest.mark.parametrize("backend", ["ort", "windowed"])
def test_nothing_beyond_a_rows_tokens_is_read(backend: str) -> None:
    def fill_with_nan(cache: Any) -> None:
        for array in cache.arrays:
            array[...] = np.nan

    assert_like_alone(tiny_runtime(backend), 1, in_turns, spoil=fill_with_nan)


def test_an_emptied_row_keeps_nothing_of_its_former_text() -> None:
    """PyTorch's attention multiplies masked values by zero, which would leave NaN."""
    runtime = tiny_runtime("reference")
    cache = runtime.new_cache(2, 32)
    ids = np.arange(10, 30)[None]
    runtime.step(ids, cache, num_logits=1, row=0)
    runtime.step(ids, cache, num_logits=1, row=1)
    for buffer in cache.buffers:
        buffer[1, :, : ids.size] = float("nan")
    cache.truncate(1, 0)
    runtime.step(ids[:, :5], cache, num_logits=1, row=1)
    both = runtime.step(np.array([[3], [4]]), cache, num_logits=1)
    assert np.isfinite(both).all()


@pytest.mark.parametrize("backend", ["ort", "windowed", "portable", "reference"])
def test_swapped_rows_go_on_where_they_were(backend: str) -> None:
    runtime = tiny_runtime(backend)
    plain, swapped = runtime.new_cache(3, 64), runtime.new_cache(3, 64)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, 90, (1, size)) for size in (5, 23, 11)]
    for row, ids in enumerate(prompts):
        runtime.step(ids, plain, num_logits=1, row=row)
        runtime.step(ids, swapped, num_logits=1, row=row)
    order = [0, 1, 2]
    for _ in range(12):
        row, other = generator.choice(3, 2, replace=False)
        swapped.swap(int(row), int(other))
        order[row], order[other] = order[other], order[row]
        newest = generator.integers(2, 90, (3, 1))
        expected = runtime.step(newest, plain, num_logits=1)
        found = runtime.step(newest[order], swapped, num_logits=1)
        assert swapped.lengths.tolist() == plain.lengths[order].tolist()
        np.testing.assert_allclose(found, expected[order], atol=2e-5)
    with pytest.raises(InputError, match="row 3 does not exist"):
        swapped.swap(0, 3)
    assert VARIANTS["irregular"].sliding_window < 12
