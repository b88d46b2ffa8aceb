"""The generation loop over backends whose output depends on every token that they were fed."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.runtimes.generation.request import Completion, StopTexts, TokenEvent
from gemma3_export.runtimes.generation.sampling import SamplingParams, report_logprobs
from tests.support.fake_runtime import FAKE_CONFIG, ByteDecoder, FakeRuntime, ScriptedRuntime
from tests.support.generation import generate

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=7)
PROMPTS = [[2, 30, 31, 32, 33], [2], [2, 40, 41, 42, 43, 44, 45, 46, 47], [2, 50, 51]]


def answer_alone(prompt, params=GREEDY, **options):
    (completion,) = generate(FakeRuntime(), [prompt], params, **options).collect()
    return completion


def run_script(script: bytes, **options) -> tuple[list[TokenEvent], Completion]:
    """Return events and completion of one prompt that is continued by ``script``."""
    options = {"max_new_tokens": 50, "detokenize": ByteDecoder} | options
    events = list(generate(ScriptedRuntime({2: script}), [[2]], GREEDY, **options))
    *tokens, completion = events
    assert isinstance(completion, Completion)
    assert all(isinstance(event, TokenEvent) for event in tokens)
    assert "".join(event.text for event in tokens) == completion.text
    assert tuple(event.token_id for event in tokens) == completion.token_ids
    return tokens, completion


class TestLoop:
    def test_greedy_follows_the_largest_logit_of_the_whole_history(self):
        runtime = FakeRuntime()
        history = [2, 30, 31]
        for _ in range(10):
            history.append(int(runtime.logits_after(history).argmax()))
        completion = answer_alone([2, 30, 31], max_new_tokens=10)
        assert list(completion.token_ids) == history[3:]
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)
        assert (completion.request, completion.prompt_tokens, completion.text) == (0, 3, "")

    @pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    @pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 512])
    def test_a_batch_gives_each_prompt_what_it_gets_alone(self, params, chunk):
        options = {"max_new_tokens": 12, "prefill_chunk": chunk}
        together = generate(FakeRuntime(), PROMPTS, [params] * 4, **options).collect()
        alone = [answer_alone(prompt, params, max_new_tokens=12) for prompt in PROMPTS]
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert [c.request for c in together] == [0, 1, 2, 3]
        assert [c.prompt_tokens for c in together] == [5, 1, 9, 3]

    def test_every_row_is_fed_its_prompt_and_all_but_the_last_token_of_its_answer(self):
        runtime = FakeRuntime()
        completions = generate(
            runtime, PROMPTS, GREEDY, max_new_tokens=6, prefill_chunk=2
        ).collect()
        for prompt, completion, fed in zip(
            PROMPTS, completions, runtime.cache.histories, strict=True
        ):
            assert fed == prompt + list(completion.token_ids[:-1])

    def test_prefill_is_per_row_in_chunks_and_decoding_is_batched(self):
        runtime = FakeRuntime()
        generate(runtime, PROMPTS[:2], GREEDY, max_new_tokens=3, prefill_chunk=2).collect()
        prefill = [((1, 2), 0), ((1, 2), 0), ((1, 1), 0), ((1, 1), 1)]
        assert runtime.calls == [*prefill, ((2, 1), 0), ((2, 1), 0)]

    def test_rows_that_end_early_leave_the_others_alone(self):
        scripts = {2: b"abc\x01", 3: b"d\x07", 4: b"efghij\x01", 5: b"\x01"}
        runtime = ScriptedRuntime(scripts)
        prompts = [[2], [3], [4], [5]]
        events = list(generate(runtime, prompts, GREEDY, max_new_tokens=50, detokenize=ByteDecoder))
        results = {e.request: e for e in events if isinstance(e, Completion)}
        assert [results[row].text for row in range(4)] == ["abc", "d", "efghij", ""]
        assert [results[row].stop_reason for row in range(4)] == [1, 7, 1, 1]
        assert [event.request for event in events if isinstance(event, Completion)] == [3, 1, 0, 2]
        for row in range(4):  # a completion is the last event of its request
            assert [e for e in events if e.request == row][-1] is results[row]
        assert len(runtime.calls) == 4 + 6

    def test_equal_prompts_differ_under_one_seed_and_agree_under_one_each(self):
        prompts = [[2, 9]] * 3
        shared = generate(FakeRuntime(), prompts, SAMPLED, max_new_tokens=8).collect()
        assert len({c.token_ids for c in shared}) == 3
        assert shared[0].token_ids == answer_alone([2, 9], SAMPLED, max_new_tokens=8).token_ids
        other = SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=7, request_index=2)
        assert shared[2].token_ids == answer_alone([2, 9], other, max_new_tokens=8).token_ids
        each = generate(FakeRuntime(), prompts, [SAMPLED] * 3, max_new_tokens=8).collect()
        assert len({c.token_ids for c in each}) == 1
        assert {c.seed for c in each + shared} == {7}

    def test_a_seed_without_effect_is_not_reported(self):
        assert answer_alone([2, 9], SamplingParams(seed=5), max_new_tokens=2).seed is None
        assert answer_alone([2, 9], SamplingParams(top_k=4), max_new_tokens=2).seed is not None

    def test_repetition_penalty_sees_the_prompt(self):
        plain = answer_alone([2, 30], max_new_tokens=1).token_ids[0]
        prompt = [plain, 2, 30]
        free = answer_alone(prompt, max_new_tokens=1).token_ids[0]
        runtime = FakeRuntime()
        logits = runtime.logits_after(prompt)
        logits[prompt] = np.where(logits[prompt] > 0, logits[prompt] / 1e6, logits[prompt] * 1e6)
        params = SamplingParams(repetition_penalty=1e6)
        assert answer_alone(prompt, params, max_new_tokens=1).token_ids == (int(logits.argmax()),)
        repeated = answer_alone([free, *prompt], params, max_new_tokens=30)
        assert len({*repeated.token_ids, *prompt, free}) == 30 + len({*prompt, free})

    def test_prefill_progress_counts_all_prompts(self):
        seen: list[tuple[int, int]] = []
        options = {"max_new_tokens": 1, "prefill_chunk": 4}
        generate(
            FakeRuntime(), PROMPTS, GREEDY, **options, prefill_progress=lambda *a: seen.append(a)
        ).collect()
        assert seen == [(n, 18) for n in (4, 5, 6, 10, 14, 15, 18)]

    def test_timings_are_reported_if_there_was_something_to_time(self):
        two = generate(FakeRuntime(), PROMPTS[:2], GREEDY, max_new_tokens=4).collect()
        for completion in two:
            assert 0 < completion.prefill_s <= completion.time_to_first_token_s
            assert completion.prefill_tokens_per_s > 0
            assert completion.decode_tokens_per_s == pytest.approx(3 / completion.decode_s)
        assert two[0].time_to_first_token_s < two[1].time_to_first_token_s
        one = answer_alone([2], max_new_tokens=1)
        assert one.decode_tokens_per_s is None

    def test_logprobs_are_those_of_the_backend(self):
        params = SamplingParams(temperature=0.5, top_k=4, seed=1, logprobs=3)
        completion = answer_alone([2, 30], params, max_new_tokens=5)
        history = [2, 30]
        for token in completion.tokens:
            logits = FakeRuntime().logits_after(history)
            assert token == report_logprobs(logits, token.token_id, 3)
            history.append(token.token_id)

    def test_damaged_logits_raise_an_error_and_keep_what_was_generated(self):
        class Breaking(ScriptedRuntime):
            def logits_after(self, history):
                logits = super().logits_after(history)
                return logits if len(history) < 4 else logits * np.nan

        generation = generate(
            Breaking({2: b"abcdef"}), [[2]], GREEDY, max_new_tokens=9, detokenize=ByteDecoder
        )
        with pytest.raises(Gemma3ExportError, match="nan"):
            generation.collect()
        assert generation.completions[0].text == "abc"


class TestLimits:
    def test_stops_where_the_cache_is_full(self):
        completion = answer_alone([2, 30, 31], max_new_tokens=100, capacity=8)
        assert len(completion.token_ids) == 6  # the sixth is never fed
        assert completion.finish_reason == "length"
        assert completion.token_ids == answer_alone([2, 30, 31], max_new_tokens=6).token_ids

    def test_stops_where_the_context_of_the_model_ends(self):
        completion = answer_alone([2] * 120, max_new_tokens=100)
        assert len(completion.token_ids) == FAKE_CONFIG.max_position_embeddings - 120 + 1
        assert completion.finish_reason == "length"

    def test_a_full_prompt_still_gets_one_token(self):
        assert len(answer_alone([2] * 128, max_new_tokens=100).token_ids) == 1
        assert len(answer_alone([2] * 8, max_new_tokens=100, capacity=8).token_ids) == 1

    def test_a_row_that_fills_its_cache_does_not_end_the_others(self):
        prompts = [[2] * 15, [2, 30], [2, 31, 32]]
        together = generate(
            FakeRuntime(), prompts, GREEDY, max_new_tokens=100, capacity=16
        ).collect()
        assert [len(c.token_ids) for c in together] == [2, 15, 14]
        for prompt, completion in zip(prompts, together, strict=True):
            alone = answer_alone(prompt, max_new_tokens=100, capacity=16)
            assert completion.token_ids == alone.token_ids

    @pytest.mark.parametrize(
        ("prompts", "options", "message"),
        [
            ([], {}, "no prompt"),
            ([[]], {}, "prompt 1 is empty"),
            ([[2], []], {}, "prompt 2 is empty"),
            ([2, 3], {}, "prompt 1 has shape"),
            ([[2, 3.5]], {}, "prompt 1 .* type float64"),
            ([["a"]], {}, "sequence of token ids"),
            ([[2, 256]], {}, "token id 256, outside the model's vocabulary of 256"),
            ([[2], [-1]], {}, "prompt 2 holds token id -1"),
            ([[2] * 129], {}, "prompt 1 has 129 tokens, more than the model's context of 128"),
            ([[2], [2] * 9], {"capacity": 8}, "prompt 2 has 9 tokens, more than .* capacity of 8"),
            ([[2]], {"capacity": 129}, "capacity is 129; it must be from 1 to the model's 128"),
            ([[2]], {"capacity": 0}, "capacity is 0"),
            ([[2]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
            ([[2]], {"max_new_tokens": -3}, "max_new_tokens is -3"),
            ([[2]], {"prefill_chunk": 0}, "prefill_chunk is 0"),
            ([[2]], {"stop_texts": ["x"], "detokenize": None}, "give detokenize"),
            ([[2]], {"stop_texts": ["x", ""]}, "not empty"),
            ([[2]], {"stop_texts": "x"}, "give a list"),
            ([[2], [3]], {"sampling": [GREEDY]}, "1 sampling parameters for 2 prompts"),
        ],
    )
    def test_invalid_input_is_rejected_before_any_work(self, prompts, options, message):
        options = {"sampling": GREEDY, "max_new_tokens": 5, "detokenize": ByteDecoder} | options
        with pytest.raises(InputError, match=message):
            generate(FakeRuntime(), prompts, **options)


class TestStops:
    def test_the_stop_token_is_kept_among_the_tokens_and_adds_no_text(self):
        tokens, completion = run_script(b"hello\x07world")
        assert (completion.text, completion.finish_reason) == ("hello", "stop")
        assert completion.stop_reason == 7
        assert completion.token_ids == (*b"hello", 7)
        assert [event.text for event in tokens] == [*"hello", ""]

    def test_given_stop_tokens_replace_those_of_the_config(self):
        assert run_script(b"ab\x07cd\x01e", stop_token_ids=[1])[1].text == "ab\x07cd"
        completion = run_script(b"ab\x01\x07cd", stop_token_ids=[], max_new_tokens=6)[1]
        assert (completion.text, completion.finish_reason) == ("ab\x01\x07cd", "length")

    @pytest.mark.parametrize(
        ("script", "stops", "text", "stop"),
        [
            (b"aab and on", ["ab"], "a", "ab"),
            (b"say STOP now", ["STOP"], "say ", "STOP"),
            (b"SSTSTOSTOP", ["STOP"], "SSTSTO", "STOP"),
            (b"abababac.", ["ababac"], "ab", "ababac"),
            (b"one\n\nUser: two", ["\nUser:"], "one\n", "\nUser:"),
            (b"xabcd", ["abcd", "bc"], "xa", "bc"),
            (b"xab", ["ab", "b"], "x", "ab"),
            (b"STOP", ["STOP"], "", "STOP"),
            ("né€é!".encode(), ["€é"], "né", "€é"),
            (b"never\x01", ["verb", "er!"], "never", 1),
        ],
    )
    def test_stop_texts_end_the_text_and_no_part_of_them_shows(self, script, stops, text, stop):
        tokens, completion = run_script(script, stop_texts=stops)
        assert completion.text == text
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        shown = ""
        for event in tokens:  # never more than the final text was shown
            shown += event.text
            assert text.startswith(shown)

    def test_the_tokens_of_a_stop_text_are_kept(self):
        assert run_script(b"hi STOP more", stop_texts=["STOP"])[1].token_ids == tuple(b"hi STOP")

    @pytest.mark.parametrize("ending", ["length", "token"])
    def test_the_beginning_of_a_stop_text_is_shown_if_the_rest_does_not_follow(self, ending):
        options = {"max_new_tokens": 6} if ending == "length" else {}
        script = b"ok STOx" if ending == "length" else b"ok STO\x01"
        tokens, completion = run_script(script, stop_texts=["STOP"], **options)
        assert completion.text == "ok STO"
        assert [event.text for event in tokens if event.text][:4] == ["o", "k", " ", "STO"]

    def test_a_stop_text_at_the_last_allowed_token_counts_as_stop(self):
        completion = run_script(b"hi STOP", stop_texts=["STOP"], max_new_tokens=7)[1]
        assert (completion.finish_reason, completion.text) == ("stop", "hi ")

    def test_text_is_released_as_soon_as_it_cannot_be_a_stop(self):
        stops = StopTexts(["aab", "xyz"])
        assert [stops.push(piece) for piece in "aaaabx"] == ["", "", "a", "a", "", ""]
        assert stops.matched == "aab"

    def test_the_result_does_not_depend_on_how_text_is_split(self):
        generator = np.random.default_rng(0)
        for _ in range(400):
            text = "".join(generator.choice([*"abc"], 14))
            stops = ["".join(generator.choice([*"abc"], generator.integers(1, 5))) for _ in "123"]
            results = set()
            for size in (1, 2, 3, 5, 14):
                matcher = StopTexts(stops)
                pieces = [text[at : at + size] for at in range(0, 14, size)]
                shown = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
                results.add((shown, matcher.matched))
            ((shown, matched),) = results
            assert not any(stop in shown for stop in stops)
            assert text.startswith(shown + (matched or ""))
            assert matched or shown == text

    def test_characters_split_over_tokens_appear_whole(self):
        tokens, completion = run_script("a€😀é\x01".encode())
        assert completion.text == "a€😀é"
        assert [event.text for event in tokens if event.text] == ["a", "€", "😀", "é"]

    def test_an_incomplete_character_at_the_end_is_flushed_into_the_last_event(self):
        tokens, completion = run_script("a😀".encode(), max_new_tokens=3)
        assert completion.text == "a\N{REPLACEMENT CHARACTER}"
        assert tokens[-1].text == "\N{REPLACEMENT CHARACTER}"


class TestInterruption:
    def test_cancelling_during_prefill_computes_no_further_chunk(self):
        cancel = threading.Event()
        runtime = FakeRuntime()

        def cancel_at_8(done: int, total: int) -> None:
            if done == 8:
                cancel.set()

        completions = generate(
            runtime,
            [[2] * 3, [2] * 20, [2]],
            GREEDY,
            max_new_tokens=5,
            prefill_chunk=5,
            cancel=cancel,
            prefill_progress=cancel_at_8,
        ).collect()
        assert [shape for shape, _ in runtime.calls] == [(1, 3), (1, 5)]
        assert [c.finish_reason for c in completions] == ["cancelled"] * 3
        assert [len(c.token_ids) for c in completions] == [1, 0, 0]
        assert completions[1].time_to_first_token_s is None
        assert completions[1].prefill_tokens_per_s is None

    def test_cancelling_during_decoding_keeps_the_tokens_and_ends_every_request(self):
        cancel = threading.Event()
        runtime = FakeRuntime()
        events = []
        for event in generate(runtime, PROMPTS, GREEDY, max_new_tokens=50, cancel=cancel.is_set):
            events.append(event)
            if len(events) == 4 + 4 * 2:
                cancel.set()
        completions = [event for event in events if isinstance(event, Completion)]
        assert [c.finish_reason for c in completions] == ["cancelled"] * 4
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            assert completion.token_ids == answer_alone(prompt, max_new_tokens=3).token_ids
        assert len(runtime.calls) == 4 + 2

    def test_cancelling_leaves_finished_requests_as_they_are(self):
        runtime = ScriptedRuntime({2: b"ab\x01", 3: b"cdefghij"})
        completions = generate(
            runtime,
            [[2], [3]],
            GREEDY,
            max_new_tokens=50,
            detokenize=ByteDecoder,
            cancel=lambda: len(runtime.calls) == 6,
        ).collect()
        assert [(c.text, c.finish_reason) for c in completions] == [
            ("ab", "stop"),
            ("cdefg", "cancelled"),
        ]

    def test_a_cancelled_text_is_the_text_that_was_shown(self):
        runtime = ScriptedRuntime({2: b"ok STOP"})
        generation = generate(
            runtime,
            [[2]],
            GREEDY,
            max_new_tokens=50,
            detokenize=ByteDecoder,
            stop_texts=["STOP"],
            cancel=lambda: len(runtime.calls) == 5,
        )
        (completion,) = generation.collect()
        assert (completion.text, completion.token_ids) == ("ok ", tuple(b"ok ST"))

    def test_closing_keeps_what_was_generated(self):
        generation = generate(
            ScriptedRuntime({2: b"abcdef"}), [[2]], GREEDY, max_new_tokens=6, detokenize=ByteDecoder
        )
        shown = next(generation).text + next(generation).text
        generation.close()
        assert list(generation) == []
        (completion,) = generation.completions
        assert completion.text == shown == "ab"
        assert completion.finish_reason == "cancelled"

    def test_ctrl_c_inside_the_backend_keeps_what_was_generated(self):
        class Interrupted(ScriptedRuntime):
            def logits_after(self, history):
                if len(history) == 4:
                    raise KeyboardInterrupt
                return super().logits_after(history)

        generation = generate(
            Interrupted({2: b"abcdef"}), [[2]], GREEDY, max_new_tokens=6, detokenize=ByteDecoder
        )
        with pytest.raises(KeyboardInterrupt):
            generation.collect()
        assert generation.completions[0].text == "abc"

    def test_the_cache_is_released_when_the_generation_is_closed_or_dropped(self):
        class Forgetful(FakeRuntime):
            def new_cache(self, batch_size, capacity):
                cache = super().new_cache(batch_size, capacity)
                self.cache, self.reference = None, weakref.ref(cache)
                return cache

        runtime = Forgetful()
        generation = generate(runtime, [[2]], GREEDY, max_new_tokens=5)
        next(generation)
        assert runtime.reference() is not None
        generation.close()
        assert runtime.reference() is None
        generation = generate(runtime, [[2]], GREEDY, max_new_tokens=5)
        next(generation)
        del generation
        assert runtime.reference() is None
