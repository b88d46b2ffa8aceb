"""The engine: many requests at once, from threads and event loops, with the results of one."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

import gemma3_export
from gemma3_export import (
    Engine,
    EngineClosedError,
    EngineOptions,
    Gemma3ExportError,
    GenerateOptions,
    InputError,
    Model,
    QueueFullError,
)
from gemma3_export.api import engine as engine_module
from gemma3_export.limits import CPU_PREFILL_CHUNK
from gemma3_export.runtimes.generation.scheduler import ScheduledRequest
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.engine_gate import Gate

PROMPTS = ["a", "The sea", "is blue and the sky is", "one two three four five six seven eight"]
LONG = GenerateOptions(max_new_tokens=200, stop_tokens=())


@pytest.fixture(scope="module")
def model(ort_bundle: Path) -> Model:
    return gemma3_export.load(ort_bundle, device="cpu", threads=1)


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, slots=3) as opened:
        yield opened
        opened.close(drain=False)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    opened = Gate(monkeypatch)
    yield opened
    opened.open()


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )


class TestResults:
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_k": 20, "seed": 5}])
    def test_many_at_once_get_what_each_gets_alone(
        self, engine: Engine, model: Model, options: dict[str, Any]
    ) -> None:
        streams = [
            engine.stream(prompt, max_new_tokens=6 + 5 * index, **options)
            for index, prompt in enumerate(PROMPTS * 2)
        ]
        for index, (prompt, stream) in enumerate(zip(PROMPTS * 2, streams, strict=True)):
            alone = model.generate(prompt, max_new_tokens=6 + 5 * index, **options)
            found = stream.result()
            assert found.token_ids == alone.token_ids
            assert found.text == alone.text == "".join(stream)
            assert (found.finish_reason, found.seed) == (alone.finish_reason, alone.seed)
            assert found.prompt_tokens == alone.prompt_tokens

    def test_prompts_are_what_a_model_takes(self, engine: Engine, model: Model) -> None:
        for prompt in ([2, 30, 31], np.array([2, 40]), [{"role": "user", "content": "Hello"}]):
            alone = model.generate(prompt, max_new_tokens=5)
            assert engine.stream(prompt, max_new_tokens=5).result().token_ids == alone.token_ids

    def test_prompts_get_log_probabilities_past_the_window_and_beside_others(
        self, engine: Engine, model: Model
    ) -> None:
        ids = [2, *range(30, 30 + 2 * model.config.sliding_window + 70)]
        beside = engine.stream("The sea", max_new_tokens=20)
        engine.stream(ids, max_new_tokens=1).result()  # a prefix that is kept has no logits
        found = engine.stream(ids, max_new_tokens=2, prompt_logprobs=2).result()
        logits = model.logits(ids).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert [token.token_id for token in found.prompt_logprobs] == ids[1:]
        for at, token in enumerate(found.prompt_logprobs):
            assert token.logprob == pytest.approx(expected[at, ids[at + 1]], abs=1e-4)
            best = sorted(expected[at])[:-3:-1]
            assert [value for _, value in token.top_logprobs] == pytest.approx(best, abs=1e-4)
        assert found.token_ids == model.generate(ids, max_new_tokens=2).token_ids
        assert beside.result().token_ids == model.generate("The sea", max_new_tokens=20).token_ids

    def test_events_carry_log_probabilities(self, engine: Engine, model: Model) -> None:
        alone = model.generate("The sea", max_new_tokens=5, logprobs=2)
        events = list(engine.stream("The sea", max_new_tokens=5, logprobs=2).events())
        assert tuple(event.token_id for event in events) == alone.token_ids
        for event, token in zip(events, alone.tokens, strict=True):
            assert event.token.logprob == pytest.approx(token.logprob, abs=1e-4)

    def test_prompts_of_one_engine_share_prefixes(self, ort_bundle: Path) -> None:
        with Engine(ort_bundle, device="cpu", threads=1, kept_prefix_bytes=10**7) as engine:
            prompt = [2, *range(30, 80)]
            first = engine.stream([*prompt, 90], max_new_tokens=3).result()
            second = engine.stream([*prompt, 91], max_new_tokens=3).result()
            assert (first.reused_tokens, second.reused_tokens) == (0, 48)
            assert engine.stats().reused_tokens == 48

    @pytest.mark.parametrize(
        ("engine_chunk", "own_chunk", "longest"),
        [(None, None, CPU_PREFILL_CHUNK), (23, None, 23), (23, 7, 7), (7, 64, 64)],
    )
    def test_prompts_run_in_chunks_that_let_answers_go_on(
        self,
        model: Model,
        monkeypatch: pytest.MonkeyPatch,
        engine_chunk: int | None,
        own_chunk: int | None,
        longest: int,
    ) -> None:
        prompt = [2, *range(30, 180)]
        options = GenerateOptions(max_new_tokens=9, prefill_chunk=own_chunk)
        steps: list[tuple[int, int]] = []
        step = OnnxRuntime.step

        def counted(self: OnnxRuntime, input_ids: Any, *rest: Any, **named: Any) -> Any:
            steps.append(input_ids.shape)
            return step(self, input_ids, *rest, **named)

        alone = model.generate(prompt, max_new_tokens=9)
        with Engine(model, slots=2, prefill_chunk=engine_chunk) as engine:
            answering = engine.stream("a", LONG)
            next(answering.events())
            monkeypatch.setattr(OnnxRuntime, "step", counted)
            assert engine.stream(prompt, options).result().token_ids == alone.token_ids
            answering.cancel()
            answering.result()
            beside = [*steps]
            steps.clear()
            assert engine.stream(prompt, options).result().token_ids == alone.token_ids
        assert max(count for _, count in beside) == longest
        first = beside.index((1, longest))
        assert beside[first + 1] == (1, 1), "the answer goes on after one chunk"
        idle = longest if own_chunk else min(len(prompt), 512 // longest * longest)
        assert max(count for _, count in steps) == idle, "no answer waits"

    def test_drafts_do_not_change_texts(self, engine: Engine, model: Model) -> None:
        prompts = [[2, *[20, 21, 22] * size] for size in (2, 4, 6)]
        streams = [engine.stream(p, max_new_tokens=30, prompt_lookup=4) for p in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            alone = model.generate(prompt, max_new_tokens=30, prompt_lookup=0)
            assert stream.result().token_ids == alone.token_ids


class TestAsyncio:
    def test_async_for_and_await(self, model: Model) -> None:
        async def run() -> None:
            async with Engine(model, slots=2) as engine:
                pieces = [piece async for piece in engine.stream("The sea", max_new_tokens=9)]
                done = await asyncio.gather(
                    *(engine.generate(prompt, max_new_tokens=9) for prompt in PROMPTS)
                )
                alone = model.generate(PROMPTS, max_new_tokens=9)
                assert [each.token_ids for each in done] == [each.token_ids for each in alone]
                assert "".join(pieces) == model.generate("The sea", max_new_tokens=9).text
                stream = engine.stream("The sea", max_new_tokens=9)
                events = [event async for event in stream.events()]
                assert len(events) == len((await stream).tokens) == 9

        asyncio.run(run())

    @pytest.mark.parametrize("how", ["iterating", "waiting"])
    def test_cancelling_the_task_frees_the_slot(self, model: Model, gate: Gate, how: str) -> None:
        async def run() -> None:
            async with Engine(model, slots=1) as engine:
                stream = engine.stream("The sea", LONG)

                async def read() -> None:
                    if how == "waiting":
                        await stream
                    async for _ in stream.events():
                        pass

                task = asyncio.create_task(read())
                gate.allow(3)
                while not stream.completion.tokens:
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                gate.open()
                assert (await engine.generate("a", max_new_tokens=2)).finish_reason == "length"
                assert stream.result().finish_reason == "cancelled"

        asyncio.run(run())

    def test_a_closed_event_loop_does_not_disturb_the_engine(
        self, engine: Engine, gate: Gate
    ) -> None:
        streams = []

        async def leave() -> None:
            streams.append(engine.stream("The sea", LONG))
            task = asyncio.create_task(streams[0].__anext__())
            await asyncio.sleep(0)
            del task

        asyncio.run(leave())
        gate.open()
        assert engine.stream("a", max_new_tokens=3).result().finish_reason == "length"


class TestCancelling:
    def test_a_cancelled_request_keeps_its_text_and_frees_its_slot(
        self, model: Model, gate: Gate
    ) -> None:
        with Engine(model, slots=1) as engine:
            stream = engine.stream("The sea", LONG)
            waiting = engine.stream("a", max_new_tokens=2)
            gate.allow(3)
            for _ in range(4):  # the fourth step waits
                gate.arrived.acquire()
            stream.cancel()
            gate.allow()  # the step that is running
            gate.arrived.acquire()
            assert stream.result().finish_reason == "cancelled"
            assert len(stream.completion.tokens) == 4
            gate.open()
            assert waiting.result().finish_reason == "length"
            assert engine.stats().finished == {"cancelled": 1, "length": 1}

    @pytest.mark.parametrize("how", ["with", "collected"])
    def test_a_stream_that_nobody_reads_is_cancelled(self, model: Model, how: str) -> None:
        with Engine(model, slots=1) as engine:
            stream = engine.stream("The sea", LONG)
            if how == "with":
                with stream:
                    next(stream)
            del stream
            gc.collect()
            assert engine.stream("a", max_new_tokens=2).result().finish_reason == "length"
            assert engine.stats().finished["cancelled"] == 1

    def test_a_waiting_request_can_be_cancelled(self, model: Model, gate: Gate) -> None:
        with Engine(model, slots=1) as engine:
            first = engine.stream("The sea", max_new_tokens=4)
            second = engine.stream("a", LONG)
            second.cancel()
            gate.open()
            assert second.result().finish_reason == "cancelled"
            assert second.completion.tokens == ()
            assert first.result().finish_reason == "length"
            second.cancel()  # again, when it has ended
            assert first.result().finish_reason == "length"


class TestErrors:
    def test_invalid_requests_are_rejected_at_once(self, model: Model) -> None:
        with Engine(model, slots=1, max_request_tokens=16) as engine:
            with pytest.raises(InputError, match="prompt 1 has 17 tokens"):
                engine.stream([2] * 17)
            with pytest.raises(InputError, match="one prompt per request"):
                engine.stream(["a", "b"])
            with pytest.raises(InputError, match="token id 5000"):
                engine.stream([5000])
            with pytest.raises(InputError, match="temperature"):
                engine.stream("a", temperature=-1.0)
            with pytest.raises(TypeError, match="did you mean 'max_new_tokens'"):
                engine.stream("a", max_new_token=3)
            assert engine.stream([2] * 16, max_new_tokens=9).result().finish_reason == "length"

    def test_the_queue_has_a_limit(self, model: Model, gate: Gate) -> None:
        with Engine(model, slots=2, queue_limit=1) as engine:
            streams = [engine.stream("a", max_new_tokens=2) for _ in range(3)]
            with pytest.raises(QueueFullError, match=r"3 requests.*queue_limit"):
                engine.stream("a")
            stats = engine.stats()
            assert stats.running + stats.waiting == 3
            gate.open()
            assert [stream.result().finish_reason for stream in streams] == ["length"] * 3
            engine.stream("a", max_new_tokens=2).result()

    def test_a_request_waits_for_memory(self, model: Model, gate: Gate) -> None:
        cache = model.runtime.new_cache(4, 64)
        size_bytes = next(n for n in range(10**7) if cache.tokens_within(n) >= 40)
        with Engine(model, slots=4, max_request_tokens=64, cache_bytes=size_bytes) as engine:
            assert engine.stats().max_tokens == 40
            with pytest.raises(InputError, match=r"may need 41 tokens.*can have 40"):
                engine.stream([2] * 30, max_new_tokens=12)
            streams = [engine.stream([2] * 10, max_new_tokens=7) for _ in range(4)]  # 16 tokens
            gate.allow(2)  # the first may come before the last request
            for _ in range(3):
                gate.arrived.acquire()
            assert engine.stats().running == 2
            gate.open()
            assert [stream.result().finish_reason for stream in streams] == ["length"] * 4
        with pytest.raises(InputError, match="cache_bytes is 10, too little"):
            Engine(model, cache_bytes=10)

    def test_an_error_of_one_request_is_its_own(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare = Model.prepare

        def prepared(self: Model, *arguments: Any, **named: Any) -> ScheduledRequest:
            request = prepare(self, *arguments, **named)
            if request.state.prompt_ids.size == 3:
                request.state._decoder.push = fail  # type: ignore[method-assign]
            return request

        def fail(token_id: int) -> str:
            raise ValueError("no text for this")

        monkeypatch.setattr(Model, "prepare", prepared)
        bad, good = engine.stream([2, 3, 4]), engine.stream([2, 3], max_new_tokens=5)
        with pytest.raises(ValueError, match="no text for this"):
            bad.result()
        with pytest.raises(ValueError, match="no text for this"):
            list(bad)
        assert good.result().finish_reason == "length"
        assert engine.stats().finished == {"error": 1, "length": 1}

    def test_after_an_error_of_the_runtime_waiting_requests_go_on(
        self, model: Model, monkeypatch: pytest.MonkeyPatch, gate: Gate
    ) -> None:
        alone = model.generate("a", max_new_tokens=4).token_ids
        with Engine(model, slots=2) as engine:
            runtime, original = model.runtime, model.runtime.step

            def step(*arguments: Any, **named: Any) -> Any:
                monkeypatch.setattr(runtime, "step", original)
                raise Gemma3ExportError("the device has gone")

            first, second = engine.stream("The sea", LONG), engine.stream("The sea", LONG)
            third = engine.stream("a", max_new_tokens=4)
            gate.allow(2)
            for _ in range(3):
                gate.arrived.acquire()
            monkeypatch.setattr(runtime, "step", step)
            gate.open()
            for stream in (first, second):
                with pytest.raises(Gemma3ExportError, match="the device has gone"):
                    stream.result()
            assert third.result().token_ids == alone
            assert engine.stream("a", max_new_tokens=4).result().token_ids == alone

    def test_an_engine_without_a_cache_stops_clearly(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = Engine(model, slots=2)

        def fail(*arguments: Any, **named: Any) -> Any:
            raise Gemma3ExportError("no memory")

        monkeypatch.setattr(model.runtime, "step", fail)
        monkeypatch.setattr(model.runtime, "new_cache", fail)
        with pytest.raises(EngineClosedError, match="stopped after an error: no memory"):
            engine.stream("a").result()
        with pytest.raises(EngineClosedError, match="no memory"):
            engine.stream("a")
        engine.close()


class TestClosing:
    def test_closing_drains(self, model: Model, gate: Gate) -> None:
        engine = Engine(model, slots=1)
        streams = [engine.stream("a", max_new_tokens=4) for _ in range(3)]
        closing = threading.Thread(target=engine.close)
        gate.open()
        closing.start()
        assert [stream.result().finish_reason for stream in streams] == ["length"] * 3
        closing.join()
        with pytest.raises(EngineClosedError, match="closed"):
            engine.stream("a")
        engine.close()  # again

    @pytest.mark.parametrize("arguments", [{"drain": False}, {"timeout": 0.0}])
    def test_closing_cancels_what_it_does_not_drain(
        self,
        model: Model,
        arguments: dict[str, Any],
        gate: Gate,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        told = threading.Event()

        class Inbox(SimpleQueue[Any]):
            def put(self, item: Any, *arguments: Any) -> None:
                super().put(item, *arguments)
                if isinstance(item, engine_module._CancelAll):
                    told.set()

        monkeypatch.setattr(engine_module, "SimpleQueue", Inbox)
        engine = Engine(model, slots=1)
        streams = [engine.stream("a", LONG) for _ in range(3)]
        gate.arrived.acquire()
        closing = threading.Thread(target=lambda: engine.close(**arguments))
        closing.start()
        told.wait()
        gate.open()
        closing.join()
        assert [stream.result().finish_reason for stream in streams] == ["cancelled"] * 3

    @pytest.mark.parametrize("is_given", [True, False])
    def test_closing_releases_the_model_unless_it_was_given(
        self, ort_bundle: Path, model: Model, is_given: bool
    ) -> None:
        engine = Engine(model) if is_given else Engine(ort_bundle, device="cpu", threads=1)
        runtime = weakref.ref(engine.model.runtime)
        engine.stream("a", max_new_tokens=2).result()
        engine.close()
        gc.collect()
        assert (runtime() is not None) == is_given

    def test_a_block_that_raises_cancels(self, model: Model) -> None:
        engine = Engine(model, slots=1)
        stream = engine.stream("a", LONG)
        next(stream.events())
        with pytest.raises(ZeroDivisionError), engine:
            raise ZeroDivisionError
        assert stream.result().finish_reason == "cancelled"

    def test_an_engine_that_is_dropped_ends_its_thread(self, model: Model) -> None:
        engine = Engine(model, slots=1)
        engine.stream("a", max_new_tokens=2).result()
        thread, reference = engine._worker._thread, weakref.ref(engine)
        del engine
        gc.collect()
        assert reference() is None
        thread.join()

    def test_a_program_that_ends_without_closing_ends_at_once(self, ort_bundle: Path) -> None:
        program = (
            "import sys, gemma3_export\n"
            f"engine = gemma3_export.Engine({str(ort_bundle)!r}, device='cpu', threads=1)\n"
            "stream = engine.stream('a', max_new_tokens=200, stop_tokens=())\n"
            "next(stream.events())\n"
            "assert 'torch' not in sys.modules\n"
        )
        done = run_program(program)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    def test_a_fork_cannot_use_the_engine_and_does_not_wait_for_it(self, ort_bundle: Path) -> None:
        program = (
            "import os, sys, gemma3_export\n"
            f"engine = gemma3_export.Engine({str(ort_bundle)!r}, device='cpu', threads=1)\n"
            "engine._worker._lock.acquire()\n"  # as another thread may hold it
            "if child := os.fork():\n"
            "    engine._worker._lock.release()\n"
            "    engine.stream('a', max_new_tokens=2).result()\n"
            "    engine.close()\n"
            "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
            "try:\n"
            "    engine.stream('a')\n"
            "except gemma3_export.EngineClosedError as error:\n"
            "    engine.close()\n"
            "    os._exit(7 if 'forked' in str(error) else 1)\n"
        )
        done = run_program(program)
        assert (done.returncode, done.stderr) == (7, "")


class TestOptions:
    def test_options_of_loading_reach_the_model(self, ort_bundle: Path) -> None:
        options = EngineOptions(device="cpu", threads=1, sliding_window_cache=False, slots=2)
        # fewer tokens than the prompt that warms up has
        with Engine(ort_bundle, options, warm_up=True, max_request_tokens=3) as engine:
            assert engine.model.options.threads == 1
            assert not engine.model.runtime.uses_sliding_window_cache
            assert engine.stats().slots == 2
            assert engine.stats().new_tokens == 0, "warming up does not count"

    def test_a_loaded_model_decides_how_it_was_loaded(self, model: Model) -> None:
        with pytest.raises(InputError, match="already loaded"):
            Engine(model, threads=1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"slots": 0}, "slots is 0"),
            ({"queue_limit": -1}, "queue_limit is -1"),
            ({"max_request_tokens": 0}, "max_request_tokens is 0"),
            ({"prefill_chunk": 0}, "prefill_chunk is 0"),
            ({"max_request_tokens": 10**6}, "context"),
            ({"cache_bytes": 0}, "cache_bytes is 0"),
        ],
    )
    def test_limits_are_checked(self, model: Model, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Engine(model, **changes)

    def test_a_windowed_cache_counts_its_windows_once(self, ort_bundle: Path) -> None:
        """The sliding layers' memory does not grow with the text."""
        runtime = OnnxRuntime(ort_bundle, device="cpu", threads=1, sliding_window_cache=True)
        cache = runtime.new_cache(2, 200)
        held = [array.nbytes for array in cache.arrays]
        sliding = sum(size for size, is_it in zip(held, cache.is_sliding, strict=True) if is_it)
        per_token = (sum(held) - sliding) // (2 * 200)
        assert cache.tokens_within(sliding + 100 * per_token) == 100
        assert cache.tokens_within(sliding - 1) == 0


def test_threads_can_share_an_engine(model: Model) -> None:
    """Threads submit, read, cancel and ask for statistics at the same time."""
    alone = {prompt: model.generate(prompt, max_new_tokens=12).token_ids for prompt in PROMPTS}
    with Engine(model, slots=3, queue_limit=100) as engine:

        def use(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for _ in range(6):
                prompt = PROMPTS[generator.integers(len(PROMPTS))]
                stream = engine.stream(prompt, max_new_tokens=12)
                if generator.random() < 0.3:
                    next(stream.events())
                    stream.cancel()
                    assert stream.result().finish_reason in ("cancelled", "length")
                else:
                    assert stream.result().token_ids == alone[prompt]
                assert engine.stats().running <= 3

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(8)))
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.reserved_tokens) == (0, 0, 0)
        assert sum(stats.finished.values()) == 48


def test_importing_the_package_does_not_start_anything() -> None:
    assert "Engine" in gemma3_export.__all__
    assert engine_module.Engine is gemma3_export.Engine
