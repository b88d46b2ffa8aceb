"""The sampler against Hugging Face's filters, exact probabilities and bad input."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.runtimes.generation.sampling import (
    SampledToken,
    Sampler,
    SamplingParams,
    report_logprobs,
    select_candidates,
)


def random_logits(size: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Return the normalized probabilities [V] that the filters leave."""
    ids, weights = select_candidates(logits, params)
    assert (np.diff(ids) > 0).all()
    assert weights.max() == 1
    result = np.zeros(logits.size)
    result[ids] = weights / weights.sum(dtype=np.float64)
    return result


def hf_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    filters = LogitsProcessorList([TemperatureLogitsWarper(params.effective_temperature)])
    if params.top_k:
        filters.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        filters.append(TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        filters.append(MinPLogitsWarper(params.min_p))
    scores = filters(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits.copy())[None])
    return scores[0].double().softmax(-1).numpy()


def draw_many(logits: np.ndarray, count: int, **values: object) -> list[int]:
    sampler = Sampler(SamplingParams(**values))
    return [sampler.sample(logits).token_id for _ in range(count)]


class TestParams:
    @pytest.mark.parametrize(
        ("given", "temperature"),
        [
            ({}, 0.0),
            ({"top_k": 5}, 1.0),
            ({"top_p": 0.9}, 1.0),
            ({"min_p": 0.1}, 1.0),
            ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, 0.0),
            ({"repetition_penalty": 1.2, "seed": 3}, 0.0),
            ({"temperature": 0, "top_k": 5}, 0.0),
            ({"temperature": 0.7, "top_k": 5}, 0.7),
        ],
    )
    def test_is_greedy_unless_a_temperature_or_filter_is_given(self, given, temperature):
        params = SamplingParams(**given)
        assert params.effective_temperature == temperature
        assert params.is_greedy == (temperature == 0)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("temperature", [-0.1, float("nan"), float("inf"), "1", True]),
            ("top_k", [-1, 2.5, float("nan"), True]),
            ("top_p", [0, -0.5, 1.01, float("nan"), float("inf")]),
            ("min_p", [-0.1, 1.1, float("nan")]),
            ("repetition_penalty", [0, -1.0, float("nan"), float("inf"), None]),
            ("frequency_penalty", [-2.1, 2.1, float("nan"), None, True]),
            ("presence_penalty", [-2.1, 2.1, float("nan"), None, "1"]),
            ("seed", [-1, 2**64, 1.0]),
            ("request_index", [-1, None]),
            ("logprobs", [-1, 0.5, True]),
        ],
    )
    def test_rejects_values_out_of_range_and_names_them(self, name, values):
        for value in values:
            with pytest.raises(InputError, match=f"{name} is .*; it must be a") as caught:
                SamplingParams(**{name: value})
            assert repr(value) in str(caught.value)

    @pytest.mark.parametrize(
        "bias",
        [[(1, 2.0)], {-1: 1.0}, {1.0: 1.0}, {True: 1.0}, {"1": 1.0}, {1: 101}, {1: float("nan")}],
    )
    def test_a_bias_maps_token_ids_to_numbers_in_range(self, bias):
        with pytest.raises(InputError, match="logit_bias"):
            SamplingParams(logit_bias=bias)


class TestFilters:
    @pytest.mark.parametrize("size", [50, 3000, 70_001])
    @pytest.mark.parametrize(
        "values",
        [
            {"temperature": 0.3},
            {"temperature": 2.5},
            {"top_k": 1},
            {"top_k": 64},
            {"top_k": 2500},
            {"top_p": 0.01},
            {"top_p": 0.5},
            {"top_p": 0.95},
            {"top_p": 0.999, "temperature": 3.0},
            {"min_p": 0.05},
            {"min_p": 1.0},
            {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
            {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.1},
            {"temperature": 1.5, "top_p": 0.9, "min_p": 0.02},
        ],
        ids=str,
    )
    def test_keeps_what_transformers_keeps(self, size, values):
        params = SamplingParams(**values)
        for seed in range(3):
            logits = random_logits(size, seed)
            ours, theirs = probabilities(logits, params), hf_probabilities(logits, params)
            disputed = (ours > 0) != (theirs > 0)
            # float32 cumulative sums may place the very last token of a nucleus differently
            assert disputed.sum() <= (params.top_p is not None and size > 1000)
            np.testing.assert_allclose(
                ours, theirs, rtol=2e-3 if disputed.any() else 1e-4, atol=1e-6
            )

    def test_top_k_keeps_ties_with_the_last_as_transformers_does(self):
        logits = np.array([1, 3, 2, 3, 0, 2], dtype=np.float32)
        params = SamplingParams(top_k=3)
        assert select_candidates(logits, params)[0].tolist() == [1, 2, 3, 5]
        np.testing.assert_allclose(
            probabilities(logits, params), hf_probabilities(logits, params), rtol=1e-6
        )

    def test_top_k_finds_the_largest_in_a_large_vocabulary_wherever_they_are(self):
        logits = random_logits(262_144 + 17)
        for best in ([0, 1, 2], [262_160, 262_150, 5], [64, 128, 4096 * 3]):
            logits[best] = [90, 80, 70]
            assert select_candidates(logits, SamplingParams(top_k=3))[0].tolist() == sorted(best)
            logits[best] = 0

    def test_top_p_keeps_the_lowest_ids_of_ties(self):
        logits = np.log(np.array([0.125, 0.25, 0.125, 0.25, 0.25], dtype=np.float32))
        assert select_candidates(logits, SamplingParams(top_p=0.7))[0].tolist() == [1, 3, 4]
        assert select_candidates(logits, SamplingParams(top_p=0.5))[0].tolist() == [1, 3]
        flat = np.zeros(5000, dtype=np.float32)
        assert select_candidates(flat, SamplingParams(top_p=0.5))[0].tolist() == [*range(2500)]

    @pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
    def test_nucleus_of_a_large_vocabulary_is_the_smallest_that_reaches_p(self, scale):
        logits = random_logits(200_000, scale=scale)
        exact = np.exp(logits.astype(np.float64) - logits.max())
        exact /= exact.sum()
        order = np.argsort(-exact, kind="stable")
        for top_p in (0.001, 0.3, 0.9, 0.9999):
            expected = int(np.searchsorted(exact[order].cumsum(), top_p)) + 1
            ids, _ = select_candidates(logits, SamplingParams(top_p=top_p))
            assert abs(ids.size - expected) <= 1 + expected // 10_000
            assert set(ids) <= set(order[: expected + 1 + expected // 10_000])

    @pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-6, 1e6, 1e300])
    def test_extreme_temperatures_tend_to_greedy_and_to_uniform(self, temperature):
        for size in (10, 5000):
            logits = random_logits(size)
            for top_k in (None, 5):
                params = SamplingParams(temperature=temperature, top_k=top_k)
                result = probabilities(logits, params)
                left = top_k or size
                expected = 1.0 if temperature < 1 else 1 / left
                np.testing.assert_allclose(result.max(), expected, rtol=1e-4)

    def test_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(self):
        logits = random_logits(40)
        prompt = [3, 3, int(logits.argmax()), int(logits.argmin())]
        sampler = Sampler(SamplingParams(repetition_penalty=1.7), prompt)
        history = list(prompt)
        for _ in range(12):
            scores = RepetitionPenaltyLogitsProcessor(1.7)(
                torch.tensor([history]), torch.from_numpy(logits.copy())[None]
            )
            before = logits.copy()
            token_id = sampler.sample(logits).token_id
            assert token_id == int(scores[0].argmax())
            np.testing.assert_array_equal(logits, before)
            history.append(token_id)
        assert len(set(history)) > 6

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_penalties_count_the_answer_as_openai_defines_them(self, temperature):
        """With the formula of OpenAI's documentation; a bias is that of transformers."""
        bias = {7: 0.75, 11: -100.0, 39: 100.0, 5: 1.5}
        params = SamplingParams(
            temperature=temperature,
            seed=3,
            repetition_penalty=1.25,
            frequency_penalty=0.5,
            presence_penalty=-0.25,
            logit_bias=bias,
        )
        sampler, prompt, answer = Sampler(params, [7, 3]), [7, 3], []
        for step in range(30):
            logits = random_logits(40, seed=step // 10)  # so that tokens repeat
            logits[[2, 39]] = -np.inf
            history = torch.tensor([[*prompt, *answer]])
            scores = torch.from_numpy(logits.copy())[None]
            biases = {(token,): float(value) for token, value in bias.items()}
            scores = SequenceBiasLogitsProcessor(biases)(history, scores)
            scores = RepetitionPenaltyLogitsProcessor(1.25)(history, scores)[0].numpy()
            for token, count in Counter(answer).items():
                scores[token] = scores[token] - count * 0.5 - float(count > 0) * -0.25
            token_id = sampler.sample(logits).token_id
            plain = Sampler(SamplingParams(temperature=temperature, seed=3))
            plain.position = step
            assert token_id == plain.sample(scores).token_id
            answer.append(token_id)
        assert max(Counter(answer).values()) > 2

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize(("penalty", "chosen"), [(1e300, 3), (1e-300, 1), (1e39, 3)])
    def test_a_penalty_beyond_the_range_of_logits_is_clamped(self, penalty, chosen, temperature):
        params = SamplingParams(repetition_penalty=penalty, temperature=temperature, seed=0)
        logits = np.array([0.0, 2.0, -1.0, 30.0, -np.inf], np.float32)
        assert Sampler(params, [0, 1, 2, 4]).sample(logits).token_id == chosen

    def test_repetition_penalty_moves_both_signs_away_from_repetition(self):
        logits = np.array([2.0, 1.5, -8.0, -9.0], dtype=np.float32)
        assert Sampler(SamplingParams(repetition_penalty=2.0), [0]).sample(logits).token_id == 1
        negative = np.array([-1.0, -1.5, -8.0], dtype=np.float32)
        assert Sampler(SamplingParams(repetition_penalty=2.0), [0]).sample(negative).token_id == 1


class TestDraws:
    @pytest.mark.parametrize(
        "values",
        [
            {"temperature": 1.0},
            {"temperature": 2.0, "top_k": 7},
            {"top_p": 0.8},
            {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("size", [30, 1500])
    def test_follows_the_exact_distribution(self, size, values):
        logits = random_logits(size, seed=1, scale=2.0)
        count = 6_000
        params = SamplingParams(**values, seed=11)
        exact = probabilities(logits, params)
        counts = np.bincount(draw_many(logits, count, **values, seed=11), minlength=size)
        assert counts[exact == 0].sum() == 0
        # cells with few expected draws are pooled, as the chi-square approximation needs
        common = exact * count >= 10
        rest = exact[~common].sum() * count
        observed, expected = list(counts[common]), list(exact[common] * count)
        if rest >= 10:
            observed, expected = [*observed, counts[~common].sum()], [*expected, rest]
        squares = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
        freedom = len(expected) - 1
        assert freedom > 3
        assert squares < freedom + 4 * (2 * freedom) ** 0.5

    def test_same_seed_gives_the_same_draws_and_another_does_not(self):
        logits = random_logits(500)
        first = draw_many(logits, 50, temperature=1.0, seed=5)
        assert first == draw_many(logits, 50, temperature=1.0, seed=5)
        assert first != draw_many(logits, 50, temperature=1.0, seed=6)
        assert first != draw_many(logits, 50, temperature=1.0, seed=5, request_index=1)
        assert len(set(first)) > 10

    def test_draws_are_pinned(self):
        """A seed must give the same text in every release, so these numbers must not change."""
        flat = np.zeros(1000, dtype=np.float32)
        drawn = draw_many(flat, 5, temperature=1.0, seed=42)
        assert drawn == [820, 368, 876, 66, 986]

    def test_without_a_seed_two_samplers_differ_and_report_their_seed(self):
        logits = np.zeros(100_000, dtype=np.float32)
        one, two = (Sampler(SamplingParams(temperature=1.0)) for _ in range(2))
        drawn = [one.sample(logits).token_id for _ in range(4)]
        assert drawn != [two.sample(logits).token_id for _ in range(4)]
        assert drawn == draw_many(logits, 4, temperature=1.0, seed=one.seed)

    def test_a_draw_hardly_depends_on_the_noise_of_a_backend(self):
        generator = np.random.default_rng(2)
        logits = random_logits(2000)
        logits[10:20] = logits.max()  # ties, which noise reorders
        params = SamplingParams(top_k=64, top_p=0.95, seed=3)
        one, two = Sampler(params), Sampler(params)
        for _ in range(300):
            noise = generator.standard_normal(2000).astype(np.float32) * 1e-5
            assert one.sample(logits) == two.sample(logits + noise)

    def test_greedy_takes_the_lowest_id_of_ties(self):
        logits = np.array([0, 5, 1, 5], dtype=np.float32)
        assert Sampler(SamplingParams()).sample(logits).token_id == 1

    def test_a_token_at_minus_infinity_is_never_drawn(self):
        logits = np.full(3000, -np.inf, dtype=np.float32)
        logits[[7, 2999]] = 1.0
        for values in ({}, {"temperature": 1.0}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.1}):
            assert set(draw_many(logits, 40, **values, seed=1)) <= {7, 2999}


class TestLogprobs:
    def test_are_those_of_the_unmodified_distribution(self):
        logits = random_logits(5000)
        exact = torch.from_numpy(logits).double().log_softmax(-1).numpy()
        params = SamplingParams(
            temperature=0.2, top_k=3, repetition_penalty=1.5, seed=0, logprobs=5
        )
        token = Sampler(params, [int(logits.argmax())]).sample(logits)
        assert token.logprob == pytest.approx(exact[token.token_id], abs=1e-5)
        order = np.argsort(-exact)[:5]
        assert [token_id for token_id, _ in token.top_logprobs] == order.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(exact[order], abs=1e-5)

    def test_are_absent_unless_requested(self):
        logits = random_logits(10)
        best = int(logits.argmax())
        assert Sampler(SamplingParams()).sample(logits) == SampledToken(token_id=best)
        token = Sampler(SamplingParams(logprobs=0)).sample(logits)
        assert token.logprob is not None
        assert token.top_logprobs == ()

    def test_do_not_depend_on_the_size_of_the_logits(self):
        logits = random_logits(100)
        huge = logits + np.float32(1e4)
        assert report_logprobs(huge, 3, 0).logprob == pytest.approx(
            report_logprobs(logits, 3, 0).logprob, abs=1e-2
        )

    def test_of_ties_the_lowest_ids_are_reported_and_at_most_the_vocabulary(self):
        report = report_logprobs(np.zeros(8, dtype=np.float32), 5, 3)
        assert [token_id for token_id, _ in report.top_logprobs] == [0, 1, 2]
        assert len(report_logprobs(np.zeros(8, dtype=np.float32), 5, 100).top_logprobs) == 8


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "values", [{}, {"temperature": 1.0}, {"top_k": 4}, {"top_p": 0.5}, {"repetition_penalty": 2.0}]
)
def test_logits_that_are_not_finite_are_an_error(bad, values):
    for where in (0, 13, slice(None)):
        logits = random_logits(100)
        logits[where] = bad
        with pytest.raises(Gemma3ExportError, match=f"largest logit is {bad}"):
            Sampler(SamplingParams(**values), [1, 2]).sample(logits)


def test_no_token_is_chosen_when_all_are_banned_or_the_shape_is_wrong():
    with pytest.raises(Gemma3ExportError, match="largest logit is -inf"):
        Sampler(SamplingParams()).sample(np.full(9, -np.inf, dtype=np.float32))
    with pytest.raises(InputError, match=r"shape \(1, 9\)"):
        Sampler(SamplingParams()).sample(np.zeros((1, 9), dtype=np.float32))
