"""`gemma3_export.load` and what it returns: the one door for Python and the command line."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gemma3_export
from gemma3_export import Chat, GenerateOptions, InputError, LoadOptions, Model, TextStream
from gemma3_export.api import model_runtimes
from gemma3_export.device import Device
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.weights.bundle_weights import open_bundle_weights
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.tokenizer import StreamingDecoder
from tests.support.exported_bundles import exported_bundle
from tests.support.generation import generate

USER = [{"role": "user", "content": "The sea is wide."}]
LONG = [2, *range(10, 57)]  # a multiple of the 16 tokens that prefixes are shared in


@pytest.fixture(scope="module")
def model(ort_bundle: Path) -> Model:
    return gemma3_export.load(ort_bundle, device="cpu", threads=1)


def opened(bundle: Path, **changes: object) -> Model:
    return Model(bundle, device="cpu", threads=1, **changes)


class TestPrompts:
    def test_a_text_gives_the_same_as_the_generation_loop(self, model: Model) -> None:
        tokenizer = model.tokenizer
        assert tokenizer is not None
        (expected,) = generate(
            model.runtime,
            [tokenizer.encode("The sea is")],
            SamplingParams(),
            max_new_tokens=12,
            detokenize=lambda: StreamingDecoder(tokenizer),
        ).collect()
        found = model.generate("The sea is", max_new_tokens=12)
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text

    def test_a_list_gives_a_list_in_order(self, model: Model) -> None:
        one, two = model.generate(["One", "Two words"], max_new_tokens=5)
        assert one.token_ids == model.generate("One", max_new_tokens=5).token_ids
        assert two.token_ids == model.generate("Two words", max_new_tokens=5).token_ids

    @pytest.mark.parametrize("ids", [[2, 7, 11], (2, 7, 11), np.array([2, 7, 11])])
    def test_token_ids_are_one_prompt(self, model: Model, ids: object) -> None:
        assert model.generate(ids, max_new_tokens=4).prompt_tokens == 3

    def test_a_list_of_lists_of_token_ids_is_many_prompts(self, model: Model) -> None:
        found = model.generate([[2, 7], [2, 7, 11]], max_new_tokens=4)
        assert [done.prompt_tokens for done in found] == [2, 3]

    def test_a_conversation_is_encoded_by_the_template(self, model: Model) -> None:
        assert model.tokenizer is not None
        assert model.encode(USER) == model.tokenizer.encode_chat(USER)
        assert model.generate(USER, max_new_tokens=3).prompt_tokens == len(model.encode(USER))

    def test_a_conversation_ends_with_the_models_turn(self, model: Model) -> None:
        assert model.tokenizer is not None
        end = model.tokenizer.token_id("<end_of_turn>")
        assert end in model.stop_token_ids(is_chat=True)
        assert end not in model.stop_token_ids(is_chat=False)

    @pytest.mark.parametrize(
        "prompt",
        [
            b"bytes",
            {"role": "user"},
            7,
            None,
            bytearray(b"ab"),
            memoryview(b"ab"),
            np.array(5),
            {2, 3},
            (token_id for token_id in (2, 3)),
            [b"ab"],
            [2.5, 3.5],
            [{2, 3}],
            ["text", 5],
            [None],
            [Path("text")],
        ],
    )
    def test_invalid_prompts_are_rejected(self, model: Model, prompt: object) -> None:
        with pytest.raises(InputError, match="a prompt is"):
            model.generate(prompt)

    @pytest.mark.parametrize(
        "prompt",
        [
            [2, 3.9],
            [2, "7"],
            [2, "x"],
            [2, None],
            [True, False],
            [["2", "3"]],
            [["text"]],
            [[[2, 3]]],
            [np.array([2.0, 3.0])],
            [2, 3j],
            np.array([2, "3"], dtype=object),
        ],
    )
    def test_nothing_but_integers_is_taken_as_a_token_id(
        self, model: Model, prompt: object
    ) -> None:
        with pytest.raises(InputError, match="not an integer"):
            model.generate(prompt)

    @pytest.mark.parametrize("prompts", ["abc", {"a"}, None, (text for text in "ab")])
    def test_start_takes_a_list(self, model: Model, prompts: object) -> None:
        with pytest.raises(InputError, match="list of prompts"):
            model.start(prompts)

    def test_prompts_that_end_differently_do_not_mix(self, model: Model) -> None:
        with pytest.raises(InputError, match="two calls"):
            model.generate(["The sea is", USER])

    @pytest.mark.parametrize("prompt", [[], ()])
    def test_empty_prompts_are_rejected(self, model: Model, prompt: object) -> None:
        with pytest.raises(InputError, match="empty"):
            model.generate(prompt)

    def test_text_without_a_tokenizer_is_rejected(self) -> None:
        bare = opened(exported_bundle("ort"))
        with pytest.raises(InputError, match=r"no tokenizer.*token ids"):
            bare.generate("The sea is")
        assert bare.generate([2, 3], max_new_tokens=2).text == ""


class TestOptions:
    def test_keywords_are_fields_of_the_options(self, model: Model) -> None:
        options = GenerateOptions(max_new_tokens=9, temperature=0.9, seed=5)
        by_options = model.generate("A", options)
        assert (
            by_options.token_ids
            == model.generate("A", max_new_tokens=9, temperature=0.9, seed=5).token_ids
        )
        assert len(model.generate("A", options, max_new_tokens=2).token_ids) == 2

    def test_a_mistyped_option_is_named_with_the_nearest(self, model: Model) -> None:
        with pytest.raises(TypeError, match=r"max_new_token'.*did you mean 'max_new_tokens'"):
            model.generate("A", max_new_token=5)
        with pytest.raises(TypeError, match="did you mean 'device'"):
            gemma3_export.load(model.bundle, devise="cpu")

    @pytest.mark.parametrize(
        "change",
        [
            {"max_new_tokens": 0},
            {"temperature": -1.0},
            {"prompt_lookup": -1},
            {"prefix_cache_bytes": -1},
            {"prefill_chunk": 0},
            {"stop": ("",)},
            {"stop": 5},
            {"stop": [1]},
            {"stop": ["a", ["b"]]},
            {"stop": b"x"},
            {"stop": None},
            {"stop": {"x": 1}.items()},
            {"stop": (text for text in "ab")},  # would be empty for the second turn of a chat
            {"max_new_tokens": "5"},
            {"max_new_tokens": 2.5},
            {"max_new_tokens": True},
            {"max_new_tokens": None},
            {"prompt_lookup": 2.5},
            {"prefix_cache_bytes": "256MB"},
            {"prefix_cache_bytes": None},
            {"prefill_chunk": 1.5},
            {"draft_model": 5},
            {"draft_model": "\ud800"},
            {"draft_model": "a\0b"},
            {"temperature": 10**400},
            {"repetition_penalty": 10**400},
            {"cancel": 5},
        ],
    )
    def test_an_impossible_value_is_named(self, model: Model, change: dict[str, object]) -> None:
        with pytest.raises(InputError, match=next(iter(change))):
            model.generate("A", **change)

    @pytest.mark.parametrize(
        "options", [LoadOptions(), {"max_new_tokens": 3}, 64, GenerateOptions, SamplingParams()]
    )
    def test_options_of_another_kind_are_rejected(self, model: Model, options: object) -> None:
        with pytest.raises(TypeError, match="must be of type GenerateOptions"):
            model.generate("A", options)
        with pytest.raises(TypeError, match="must be of type GenerateOptions"):
            model.chat(None, options)
        with pytest.raises(TypeError, match="must be of type GenerateOptions"):
            Chat(model, None, options)

    @pytest.mark.parametrize(
        "change",
        [
            {"threads": 0},
            {"threads": 2.5},
            {"threads": "2"},
            {"threads": True},
            {"kept_prefix_bytes": -1},
            {"kept_prefix_bytes": "1MB"},
            {"device": None},
            {"device": 5},
            {"runtime": None},
            {"trust": "no"},
            {"sliding_window_cache": "no"},
            {"shares_weights": 1},
            {"cuda": {"graph": True}},
        ],
    )
    def test_an_impossible_load_option_is_named(
        self, ort_bundle: Path, change: dict[str, object]
    ) -> None:
        with pytest.raises(InputError, match=next(iter(change))):
            gemma3_export.load(ort_bundle, **change)
        if "kept_prefix_bytes" not in change:
            with pytest.raises(InputError, match=next(iter(change))):
                gemma3_export.open_runtime(ort_bundle, **change)

    def test_a_drawn_seed_repeats_the_text(self, model: Model) -> None:
        drawn = model.generate("A", max_new_tokens=16, temperature=1.5)
        again = model.generate("A", max_new_tokens=16, temperature=1.5, seed=drawn.seed)
        assert again.token_ids == drawn.token_ids

    def test_a_single_stop_text_needs_no_list(self, model: Model) -> None:
        text = model.generate("A", max_new_tokens=24).text
        cut = text[3:6]
        assert model.generate("A", max_new_tokens=24, stop=cut).text == text[: text.index(cut)]


class TestStream:
    def test_pieces_add_up_to_the_text(self, model: Model) -> None:
        stream = model.stream("The sea is", max_new_tokens=12)
        pieces = list(stream)
        assert len(pieces) > 1
        assert "".join(pieces) == stream.completion.text
        assert stream.completion.text == model.generate("The sea is", max_new_tokens=12).text
        assert stream.completion.finish_reason == "length"

    def test_closing_keeps_the_text_so_far(self, model: Model) -> None:
        stream = model.stream("The sea is", max_new_tokens=200)
        first = next(stream)
        stream.close()
        assert stream.completion.finish_reason == "cancelled"
        assert stream.completion.text.startswith(first)

    def test_a_stream_is_closed_twice_and_by_leaving_its_block(self, model: Model) -> None:
        with model.stream("The sea is", max_new_tokens=200) as stream:
            next(stream)
        stream.close()
        assert list(stream) == []
        assert stream.completion.finish_reason == "cancelled"

    def test_another_thread_closes_it_within_a_step(self, model: Model) -> None:
        """The step that is running ends, and nothing follows it."""
        stepping, proceed = threading.Event(), threading.Event()

        def wait() -> bool:
            stepping.set()
            proceed.wait(60)
            return False

        generation = model.start(["The sea is"], max_new_tokens=50, cancel=wait)
        stream = TextStream(generation)
        with ThreadPoolExecutor(2) as pool:
            reading = pool.submit(list, stream)
            assert stepping.wait(60)
            closing = pool.submit(stream.close)
            assert generation._closing.wait(60)
            proceed.set()
            closing.result(60)
            reading.result(60)
        assert stream.completion.finish_reason == "cancelled"
        assert len(stream.completion.tokens) <= 1

    def test_a_signal_handler_closes_it_within_a_step(self, model: Model) -> None:
        """Such a handler runs in the thread of the step, which cannot wait for itself."""
        closed: list[TextStream] = []

        def interrupt() -> bool:
            stream.close()
            closed.append(stream)
            return False

        stream = TextStream(model.start(["The sea is"], max_new_tokens=50, cancel=interrupt))
        list(stream)
        assert stream.completion.finish_reason == "cancelled"
        assert len(closed) <= 2

    def test_two_threads_may_read_it(self, model: Model) -> None:
        stream = model.stream("The sea is", max_new_tokens=40)
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda _: list(stream), range(2)))
        assert sum(map(len, parts), 0) > 0
        assert stream.completion.text == model.generate("The sea is", max_new_tokens=40).text

    def test_a_list_is_rejected(self, model: Model) -> None:
        with pytest.raises(InputError, match="stream takes one prompt"):
            model.stream(["One", "Two"])


class TestLogits:
    def test_logits_equal_those_of_the_reference(self, model: Model) -> None:
        ids = LONG[:30]
        reference = load_reference(open_bundle_weights(model.bundle))
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0].numpy()
        found = model.logits(ids)
        assert found.shape == (30, model.config.vocab_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-4)

    def test_logits_do_not_depend_on_the_chunk_size(
        self, model: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = model.logits(LONG)
        small = GenerateOptions(prefill_chunk=7)
        monkeypatch.setattr(model_runtimes, "GenerateOptions", lambda: small)
        np.testing.assert_allclose(model.logits(LONG), whole, atol=2e-4)

    @pytest.mark.parametrize(
        "ids",
        [
            [],
            [[2, 3]],
            [-1],
            [2, 400],
            [2**70],
            [2.7, 3],
            np.array([2.0]),
            ["2", "3"],
            ["x"],
            "text",
            [True],
            [[2], [3, 4]],
            np.array(2),
            None,
        ],
    )
    def test_invalid_token_lists_are_rejected(self, model: Model, ids: object) -> None:
        with pytest.raises(InputError, match="token"):
            model.logits(ids)

    def test_more_than_the_context_holds_is_rejected(self, model: Model) -> None:
        with pytest.raises(InputError, match="context"):
            model.logits([2] * (model.config.max_position_embeddings + 1))


class TestDefaults:
    def test_the_runtime_opens_with_the_first_generation(self, ort_bundle: Path) -> None:
        lazy = opened(ort_bundle)
        assert not lazy._runtimes.is_open
        lazy.generate("A", max_new_tokens=1)
        assert lazy._runtimes.is_open
        lazy.close()
        assert not lazy._runtimes.is_open

    def test_prompts_that_share_a_prefix_share_its_computation(self, ort_bundle: Path) -> None:
        shared = opened(ort_bundle)
        prompts = [[*LONG, 5], [*LONG, 6], [*LONG, 7]]
        together = shared.generate(prompts, max_new_tokens=6)
        assert [done.reused_tokens for done in together] == [0, len(LONG), len(LONG)]
        alone = [shared.generate(prompt, max_new_tokens=6) for prompt in prompts]
        assert [done.token_ids for done in together] == [done.token_ids for done in alone]
        off = shared.generate(prompts, max_new_tokens=6, prefix_cache_bytes=0)
        assert [done.reused_tokens for done in off] == [0, 0, 0]

    def test_sliding_window_caches_are_replaced_only_to_share_a_prefix(
        self, ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[object] = []
        real = model_runtimes.open_runtime

        def noting(*arguments: object, **options: object) -> object:
            asked.append(options["sliding_window_cache"])
            if len(asked) == 1:  # as for a model whose window is longer than the tiny one's
                options["sliding_window_cache"] = True
            return real(*arguments, **options)

        monkeypatch.setattr(model_runtimes, "open_runtime", noting)
        model = opened(ort_bundle)
        model.open()
        prompts = [[*LONG, 5], [*LONG, 6]]
        assert model.generate(prompts, max_new_tokens=2)[1].reused_tokens == len(LONG)
        model.generate("A", max_new_tokens=2)
        assert asked == [None, False]

    def test_requested_sliding_window_caches_are_kept_and_share_no_prefix(
        self, ort_bundle: Path
    ) -> None:
        model = opened(ort_bundle, sliding_window_cache=True)
        prompts = [[*LONG, 5], [*LONG, 6]]
        found = model.generate(prompts, max_new_tokens=6)
        assert [done.reused_tokens for done in found] == [0, 0]
        plain = opened(ort_bundle, sliding_window_cache=False)
        for done, prompt in zip(found, prompts, strict=True):
            assert done.token_ids == plain.generate(prompt, max_new_tokens=6).token_ids

    def test_prefixes_are_kept_between_calls_on_request(self, ort_bundle: Path) -> None:
        model = gemma3_export.load(
            ort_bundle, LoadOptions(device="cpu", threads=1, kept_prefix_bytes=10**7)
        )
        assert model.generate([*LONG, 5], max_new_tokens=2).reused_tokens == 0
        assert model.generate([*LONG, 6], max_new_tokens=2).reused_tokens == len(LONG)

    @pytest.mark.parametrize(
        ("changes", "is_drafted"),
        [({}, True), ({"is_quantized": True}, False), ({"device": Device("cuda")}, False)],
        ids=["float32 on the CPU", "quantized", "CUDA"],
    )
    def test_tokens_are_drafted_by_default_where_that_cannot_change_the_text(
        self,
        ort_bundle: Path,
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, object],
        is_drafted: bool,
    ) -> None:
        model = opened(ort_bundle)
        monkeypatch.setattr(model.runtime, "info", replace(model.runtime.info, **changes))
        prompt = [2, *[11, 12, 13, 14, 15] * 8]
        assert bool(model.generate(prompt, max_new_tokens=60).drafted_tokens) == is_drafted
        assert model.generate(prompt, max_new_tokens=60, prompt_lookup=4).drafted_tokens > 0
        assert model.generate(prompt, max_new_tokens=60, prompt_lookup=0).drafted_tokens == 0

    def test_a_closed_model_keeps_no_prefixes_of_its_old_runtime(self, ort_bundle: Path) -> None:
        """A generation that another thread closes the model amid still has the old runtime."""
        model = opened(ort_bundle, kept_prefix_bytes=10**7)
        old = model.open()
        model.close()
        model._runtimes.prefix_cache(old, [LONG], GenerateOptions())
        assert model.generate([*LONG, 5], max_new_tokens=2).reused_tokens == 0
        assert model.generate([*LONG, 6], max_new_tokens=2).reused_tokens == len(LONG)

    def test_a_draft_model_is_opened_once(
        self, ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = opened(ort_bundle)
        plain = model.generate(LONG, max_new_tokens=20, prompt_lookup=0)
        opened_drafts: list[object] = []
        real = model_runtimes.open_runtime

        def counted(bundle: object, *arguments: object, **options: object) -> object:
            opened_drafts.append(bundle)
            return real(bundle, *arguments, **options)

        monkeypatch.setattr(model_runtimes, "open_runtime", counted)
        for _ in range(2):
            drafted = model.generate(LONG, max_new_tokens=20, draft_model=ort_bundle)
            assert drafted.token_ids == plain.token_ids
            assert 0 < drafted.accepted_tokens <= drafted.drafted_tokens
        assert len(opened_drafts) == 1


def test_a_model_shows_its_folder_and_runtime(model: Model, ort_bundle: Path) -> None:
    assert repr(model) == f"Model('{ort_bundle}', runtime='onnx')"


def test_models_are_shared_between_threads(model: Model) -> None:
    prompts = [f"Prompt {number}" for number in range(8)]
    expected = [model.generate(prompt, max_new_tokens=6).token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda p: model.generate(p, max_new_tokens=6).token_ids, prompts)
        assert list(found) == expected


def test_importing_the_package_is_light_and_offers_all_names() -> None:
    code = (
        "import sys, gemma3_export; loaded = set(sys.modules); "
        "print({'torch', 'onnxruntime', 'onnx', 'numpy', 'tokenizers'} & loaded); "
        "print([n for n in gemma3_export.__all__ if getattr(gemma3_export, n, None) is None]); "
        "print({'torch', 'onnxruntime', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["set()", "[]", "set()"]
    with pytest.raises(AttributeError, match="nothing"):
        gemma3_export.nothing  # noqa: B018
