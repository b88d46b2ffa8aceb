"""Conversations: the history that the model sees, and the cache that its turns share."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

import gemma3_export
from gemma3_export import InputError, Model
from gemma3_export.api import model_runtimes
from gemma3_export.runtimes.generation.kept_cache import KeptCache
from gemma3_export.runtimes.generation.request import RequestState
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.protocol import IntArray, KVCache, Logits, Runtime
from tests.support.exported_bundles import exported_bundle
from tests.support.generation import generate


@pytest.fixture(scope="module")
def model(ort_bundle: Path) -> Model:
    return gemma3_export.load(ort_bundle, device="cpu", threads=1)


def fresh(model: Model, messages: list[dict[str, str]], **options: object) -> str:
    return model.generate(messages, **options).text


def interrupted(request: RequestState, logits: object) -> NoReturn:
    raise KeyboardInterrupt


class TestTurns:
    def test_each_turn_equals_generating_from_the_whole_conversation(self, model: Model) -> None:
        chat = model.chat(system="Be brief.", max_new_tokens=10)
        said = [{"role": "system", "content": "Be brief."}]
        for text in ("Who wrote Faust?", "And when?", "Where?"):
            said.append({"role": "user", "content": text})
            answer = chat.send(text)
            assert answer.text == fresh(model, said, max_new_tokens=10)
            said.append({"role": "assistant", "content": answer.text})
            assert chat.messages == said

    def test_a_turn_computes_only_new_tokens(self, model: Model) -> None:
        chat = model.chat(max_new_tokens=6)
        first = chat.send("A rather long first message, which should not be computed twice.")
        second = chat.send("More")
        assert first.reused_tokens == 0
        assert second.reused_tokens >= first.prompt_tokens
        assert second.prompt_tokens - second.reused_tokens < 30

    def test_a_finished_stream_is_added_to_the_conversation(self, model: Model) -> None:
        chat = model.chat(max_new_tokens=6)
        stream = chat.stream("Hello")
        assert chat.messages == []
        text = "".join(stream)
        assert chat.messages[-1] == {"role": "assistant", "content": text}

    def test_a_closed_stream_is_added_with_its_text_so_far(self, model: Model) -> None:
        chat = model.chat(max_new_tokens=50)
        stream = chat.stream("Hello")
        next(stream)
        stream.close()
        partial = stream.completion.text
        assert chat.messages[-1]["content"] == partial
        said = [*chat.messages, {"role": "user", "content": "Go on"}]
        assert chat.send("Go on", max_new_tokens=8).text == fresh(model, said, max_new_tokens=8)

    def test_a_rejected_turn_is_not_added(self, model: Model) -> None:
        chat = model.chat(max_new_tokens=4)
        chat.send("Hello")
        before = list(chat.messages)
        limit = model.config.max_position_embeddings
        with pytest.raises(InputError, match="shorten the prompt"):
            chat.send("word " * limit)
        with pytest.raises(InputError, match="temperature"):
            chat.send("Hello", temperature=-1.0)
        assert chat.messages == before
        assert chat.send("Hello again").reused_tokens > 0

    def test_conversations_do_not_mix(self, model: Model) -> None:
        one, two = model.chat(max_new_tokens=5), model.chat(max_new_tokens=5)
        one.send("First")
        two.send("Second")
        said = [*two.messages, {"role": "user", "content": "More"}]
        assert two.send("More").text == fresh(model, said, max_new_tokens=5)

    def test_a_conversation_outlives_its_first_runtime(self, ort_bundle: Path) -> None:
        model = gemma3_export.load(ort_bundle, device="cpu", threads=1)
        chat = model.chat(max_new_tokens=5)
        chat.send("First")
        model.close()
        said = [*chat.messages, {"role": "user", "content": "More"}]
        assert chat.send("More").text == fresh(model, said, max_new_tokens=5)

    def test_a_turn_may_need_another_kind_of_cache(
        self, ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Drafts longer than a window open the runtime again, amid the turn."""
        asked: list[object] = []
        real = model_runtimes.open_runtime

        def windowed_at_first(*arguments: object, **options: object) -> object:
            asked.append(options["sliding_window_cache"])
            if len(asked) == 1:
                options["sliding_window_cache"] = True
            return real(*arguments, **options)

        monkeypatch.setattr(model_runtimes, "open_runtime", windowed_at_first)
        model = gemma3_export.load(ort_bundle, device="cpu", threads=1)
        chat = model.chat(max_new_tokens=5)
        chat.send("First")
        said = [*chat.messages, {"role": "user", "content": "More"}]
        answer = chat.send("More", prompt_lookup=model.config.sliding_window)
        assert asked == [None, False]
        assert answer.text == fresh(model, said, max_new_tokens=5)
        assert chat.send("Again").reused_tokens > 0

    def test_only_one_turn_runs_at_a_time(self, model: Model) -> None:
        """Each would append to the history it began with, and lose the other's messages."""
        chat = model.chat(max_new_tokens=20)
        stream = chat.stream("One")
        with pytest.raises(InputError, match="another turn"):
            chat.send("Two")
        next(stream)
        with pytest.raises(InputError, match="another turn"):
            chat.stream("Two")
        stream.close()
        chat.send("Two")
        assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["One", "Two"]

    def test_a_discarded_stream_does_not_block_the_next_turn(self, model: Model) -> None:
        chat = model.chat(max_new_tokens=20)
        for _ in chat.stream("One"):
            break
        gc.collect()
        chat.send("Two")
        assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["Two"]

    def test_a_failed_turn_is_not_added(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat = model.chat(max_new_tokens=20)
        chat.send("One", max_new_tokens=2)
        before = list(chat.messages)
        stream = chat.stream("Two")
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(RequestState, "accept", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        assert list(stream) == []  # the error ended it
        stream.close()
        assert chat.messages == before
        said = [*before, {"role": "user", "content": "Three"}]
        assert chat.send("Three").text == fresh(model, said, max_new_tokens=20)

    def test_the_cache_grows_beyond_its_initial_capacity(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Up to the context, with the texts of fresh generations, and no further."""
        monkeypatch.setattr(gemma3_export.api.model, "CHAT_CAPACITY", 16)
        chat = model.chat(max_new_tokens=9)
        said = [{"role": "user", "content": "More"}]
        while len(model.encode(said)) <= model.config.max_position_embeddings:
            assert chat.send("More").text == fresh(model, said, max_new_tokens=9)
            said = [*chat.messages, {"role": "user", "content": "More"}]
        with pytest.raises(InputError, match="shorten"):
            chat.send("More")
        assert chat.messages == said[:-1]
        assert len(chat.messages) > 6

    def test_kept_prefixes_hold_no_tokens_of_answers(self, ort_bundle: Path) -> None:
        """Answers were computed one by one, which may give other bits than whole chunks."""
        model = gemma3_export.load(ort_bundle, device="cpu", threads=1, kept_prefix_bytes=10**7)
        chat = model.chat(max_new_tokens=16)
        first = chat.send("A first message of many words, so that there is something to keep.")
        chat.send("More")
        again = model.generate(chat.messages[:-1], max_new_tokens=1)
        assert 0 < again.reused_tokens <= first.prompt_tokens

    def test_a_system_message_must_be_text(self, model: Model) -> None:
        for system in (5, b"x", ["x"], {"role": "system"}):
            with pytest.raises(InputError, match="system"):
                model.chat(system)
        with pytest.raises(TypeError, match="Model"):
            gemma3_export.Chat("a path")

    def test_a_bundle_without_turn_tokens_cannot_chat(self) -> None:
        bare = gemma3_export.load(exported_bundle("ort"), device="cpu")
        with pytest.raises(InputError, match="turn tokens"):
            bare.chat()


class TestKeptCache:
    @pytest.fixture(params=["windowed", "full", "portable"])
    def runtime(self, request: pytest.FixtureRequest) -> Runtime:
        target = "portable" if request.param == "portable" else "ort"
        return gemma3_export.open_runtime(
            exported_bundle(target),
            device="cpu",
            threads=1,
            sliding_window_cache=request.param == "windowed" or None,
        )

    def continued(self, runtime: Runtime, kept: KeptCache, prompt: list[int]) -> tuple[int, ...]:
        done = generate(
            runtime, [prompt], SamplingParams(), max_new_tokens=5, kept_cache=kept
        ).collect()[0]
        return done.token_ids

    def alone(self, runtime: Runtime, prompt: list[int]) -> tuple[int, ...]:
        done = generate(runtime, [prompt], SamplingParams(), max_new_tokens=5).collect()[0]
        return done.token_ids

    def test_every_next_prompt_gives_the_same_as_with_an_empty_cache(
        self, runtime: Runtime
    ) -> None:
        generator = np.random.default_rng(3)
        kept = KeptCache(runtime)
        prompt = [2, 5, 9]
        for turn in range(12):
            assert self.continued(runtime, kept, prompt) == self.alone(runtime, prompt), turn
            cut = int(generator.integers(1, len(prompt) + 1))  # far back, across the window too
            new = generator.integers(3, 60, int(generator.integers(1, 9))).tolist()
            prompt = [*prompt[: cut if turn % 3 == 2 else len(prompt)], *new]

    def test_the_same_prompt_again_computes_one_token(self, runtime: Runtime) -> None:
        kept = KeptCache(runtime)
        prompt = [2, 5, 9, 11, 13]
        self.continued(runtime, kept, prompt)
        done = generate(
            runtime, [prompt], SamplingParams(), max_new_tokens=1, kept_cache=kept
        ).collect()[0]
        assert done.reused_tokens == len(prompt) - 1

    def test_after_an_error_the_cache_starts_empty(self, runtime: Runtime) -> None:
        class Failing:
            """The runtime, whose third step fails after it has computed."""

            def __init__(self) -> None:
                self.steps = 0
                self.config = runtime.config

            def new_cache(self, batch_size: int, capacity: int) -> KVCache:
                return runtime.new_cache(batch_size, capacity)

            def step(
                self, input_ids: IntArray, cache: KVCache, *, num_logits: int, row: int = 0
            ) -> Logits:
                self.steps += 1
                logits = runtime.step(input_ids, cache, num_logits=num_logits, row=row)
                if self.steps == 3:
                    raise KeyboardInterrupt
                return logits

        failing = Failing()
        kept = KeptCache(failing)
        with pytest.raises(KeyboardInterrupt):
            self.continued(failing, kept, [2, 5, 9])
        assert self.continued(failing, kept, [2, 5, 9]) == self.alone(runtime, [2, 5, 9])

    def test_a_kept_cache_belongs_to_one_runtime_and_takes_one_prompt(
        self, runtime: Runtime, model: Model
    ) -> None:
        kept = KeptCache(runtime)
        with pytest.raises(InputError, match="one prompt"):
            generate(runtime, [[2], [3]], SamplingParams(), max_new_tokens=1, kept_cache=kept)
        with pytest.raises(InputError, match="another runtime"):
            generate(
                model.runtime, [[2]], SamplingParams(), max_new_tokens=1, kept_cache=kept
            ).collect()
