"""The sampler, shared by all backends: from the logits of one position to one token.

Logits are changed in this order, which is vLLM's: logit bias, repetition penalty, frequency and
presence penalty, temperature, top-k, top-p, min-p. Each filter keeps what the Hugging Face filter
of the same name keeps. The token is then drawn by inverting the cumulative distribution in token-id
order, with a random number that depends only on seed, request and position. So a seed gives the
same text on every backend: if two backends disagree on the order of two nearly equal logits, the
cumulative sums hardly move and the draw stays the same.

Shapes: V vocabulary, C candidates that passed the filters.
"""

from __future__ import annotations

import functools
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma3_export.errors import Gemma3ExportError, InputError
from gemma3_export.limits import MAX_COUNT, is_number, shown

__all__ = [
    "MAX_BIAS",
    "SampledToken",
    "Sampler",
    "SamplingParams",
    "report_logprobs",
    "select_candidates",
]

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Weights = NDArray[np.float32] | NDArray[np.float64]

_Rule = tuple[str, type, Callable[[Any], bool], str]
_LARGEST = sys.float_info.max
MAX_BIAS = 100
_RULES: tuple[_Rule, ...] = (  # field, type, valid range, the range in words
    ("temperature", Real, lambda t: 0 <= t <= _LARGEST, "a finite number, 0 or more"),
    ("top_k", Integral, lambda k: 0 <= k <= MAX_COUNT, "an integer, 0 (off) or more"),
    ("top_p", Real, lambda p: 0 < p <= 1, "a number above 0 and up to 1 (off)"),
    ("min_p", Real, lambda p: 0 <= p <= 1, "a number from 0 (off) to 1"),
    ("repetition_penalty", Real, lambda r: 0 < r <= _LARGEST, "a finite number above 0 (1: off)"),
    ("frequency_penalty", Real, lambda p: -2 <= p <= 2, "a number from -2 to 2 (0: off)"),
    ("presence_penalty", Real, lambda p: -2 <= p <= 2, "a number from -2 to 2 (0: off)"),
    ("seed", Integral, lambda s: 0 <= s < 2**64, "an integer from 0 to 2**64 - 1"),
    ("request_index", Integral, lambda i: 0 <= i < 2**64, "an integer from 0 to 2**64 - 1"),
    (
        "logprobs",
        Integral,
        lambda n: 0 <= n <= MAX_COUNT,
        "an integer, 0 (chosen token) or more",
    ),
    (
        "prompt_logprobs",
        Integral,
        lambda n: 0 <= n <= MAX_COUNT,
        "an integer, 0 (the prompt's tokens) or more",
    ),
)
_REQUIRED = ("repetition_penalty", "frequency_penalty", "presence_penalty", "request_index")
_STRIDES = 64  # rows into which the vocabulary is reshaped to find its largest logits
_BLOCK = 512  # candidates per partial sum; only the drawn block needs its own cumulative sum
_SORTABLE = 1024  # below this size, sorting is cheaper than partitioning


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request; the default is greedy.

    Raises:
        InputError: a value is outside its range.
    """

    temperature: float | None = None  # 0 is greedy; None is 1 with a filter, 0 without
    top_k: int | None = None  # keep the k largest and ties with the last; 0 or None is off
    top_p: float | None = None  # keep the fewest tokens that reach probability p; 1 or None is off
    min_p: float | None = None  # keep tokens with this share of the largest; 0 or None is off
    repetition_penalty: float = 1.0  # above 1 discourages tokens of the prompt and the answer
    frequency_penalty: float = 0.0  # subtracted for each time that a token is in the answer
    presence_penalty: float = 0.0  # subtracted once if a token is in the answer
    logit_bias: Mapping[int, float] | None = None  # added to the logits of tokens, by id
    seed: int | None = None  # None draws a random one
    request_index: int = 0  # distinguishes requests that share a seed
    logprobs: int | None = None  # alternatives to report; 0: chosen token only; None: nothing
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    def __post_init__(self) -> None:
        for name, kind, is_legal, words in _RULES:
            value = getattr(self, name)
            if value is None and name not in _REQUIRED:
                continue
            # NaN fails every comparison; bool is a number to Python
            if not isinstance(value, kind) or isinstance(value, bool) or not is_legal(value):
                raise InputError(f"{name} is {shown(value)}; it must be {words}")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def has_filter(self) -> bool:
        """Return True if top-k, top-p or min-p is set to a value that can remove a token."""
        return bool(self.top_k) or self.top_p not in (None, 1) or bool(self.min_p)

    @property
    def effective_temperature(self) -> float:
        """The given temperature; by default 1 with a filter, 0 without."""
        if self.temperature is not None:
            return float(self.temperature)
        return 1.0 if self.has_filter else 0.0

    @property
    def changes_logits(self) -> bool:
        """Return True if a penalty or a bias changes logits before the filters."""
        return self.repetition_penalty != 1.0 or self.counts_tokens or bool(self.logit_bias)

    @property
    def counts_tokens(self) -> bool:
        """Return True if it matters how often the answer has a token."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def is_greedy(self) -> bool:
        """Return True if the largest logit always wins."""
        return self.effective_temperature == 0.0


def _checked_bias(bias: object) -> dict[int, float]:
    """Return a bias per token id.

    Raises:
        InputError: it is not a mapping of token ids to numbers from -100 to 100.
    """
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias is {shown(bias)}; it must map token ids to numbers")
    found = {}
    for token_id, value in bias.items():
        if not is_number(token_id, Integral) or not 0 <= token_id <= MAX_COUNT:
            raise InputError(f"logit_bias has the key {shown(token_id)}, which is not a token id")
        if not is_number(value, Real) or not -MAX_BIAS <= value <= MAX_BIAS:
            raise InputError(
                f"logit_bias of token {token_id} is {shown(value)}; it must be a number from "
                f"-{MAX_BIAS} to {MAX_BIAS}"
            )
        found[int(token_id)] = float(value)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """One sampled token, with log-probabilities if ``SamplingParams.logprobs`` is set.

    They are those of the model, before bias, penalties, temperature and filters, and before a
    constraint: tokens that it does not allow count and are reported too.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), largest first


class Sampler:
    """Samples the tokens of one request, one per call.

    Because a draw depends only on seed and position, tokens that are verified several at a time
    (speculative decoding) are those that plain decoding would have drawn.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = ()) -> None:
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else int(params.seed)
        self.position = 0  # tokens sampled so far
        is_repetition_penalized = params.repetition_penalty != 1.0
        seen = np.fromiter(prompt_ids if is_repetition_penalized else (), dtype=np.int64)
        self._seen: Ids | None = np.unique(seen) if is_repetition_penalized else None
        bias = params.logit_bias or {}
        self._biased: Ids = np.fromiter(bias, dtype=np.int64)
        self._biases: Scores = np.fromiter(bias.values(), dtype=np.float32)
        self._counted: Ids = np.empty(0, dtype=np.int64)  # the tokens of the answer
        self._counts: Scores = np.empty(0, dtype=np.float32)  # how often it has each

    def choose(self, ids: Ids, scores: Scores) -> SampledToken:
        """Choose the next token from candidates, as :meth:`sample` would from all logits.

        Penalties, biases and log-probabilities need all logits, so they must be off.

        Args:
            ids: [C] tokens in ascending order.
            scores: [C] their logits, including every token that could be chosen.
        """
        assert not self.params.changes_logits
        assert self.params.logprobs is None
        if self.params.is_greedy:
            token_id = int(ids[scores.argmax()])
        else:
            kept, weights = select_candidates(scores, self.params)
            token_id = int(ids[kept[_draw(weights, self._uniform())]])
        self.position += 1
        return SampledToken(token_id=token_id)

    def sample(self, logits: Scores, allowed: NDArray[np.bool_] | None = None) -> SampledToken:
        """Choose the next token.

        Args:
            logits: [V] float32, unchanged by the call; an entry of -inf bans its token.
            allowed: [V] the tokens to choose from, before all filters; None is all of them.

        Raises:
            Gemma3ExportError: a logit is NaN or +inf, or every token is banned.
            InputError: ``logits`` has more than one axis.
        """
        if logits.ndim != 1:
            raise InputError(f"logits have shape {logits.shape}; give those of one position, [V]")
        scores, kept = self._changed(logits), None
        if allowed is not None:
            _check_finite(logits.max())  # of the tokens that are not allowed, too
            kept = np.flatnonzero(allowed)
            scores = scores[kept]
        if self.params.is_greedy:
            index = int(scores.argmax())  # the first of ties; NaN counts as the largest
            _check_finite(scores[index])
        else:
            ids, weights = select_candidates(scores, self.params)
            index = int(ids[_draw(weights, self._uniform())])
        token_id = index if kept is None else int(kept[index])
        self.position += 1
        self._count(token_id)
        if self.params.logprobs is None:
            return SampledToken(token_id=token_id)
        return report_logprobs(logits, token_id, self.params.logprobs)

    def _changed(self, logits: Scores) -> Scores:
        """Return logits [V] with the bias and the penalties; banned tokens stay banned."""
        if not self.params.changes_logits:
            return logits
        scores = logits.copy()
        scores[self._biased] += self._biases
        if self._seen is not None:
            scores[self._seen] = self._penalized(scores[self._seen])
        each, once = self.params.frequency_penalty, self.params.presence_penalty
        scores[self._counted] -= np.float32(each) * self._counts + np.float32(once)
        return scores

    def _penalized(self, seen: Scores) -> Scores:
        """Divide positive and multiply negative logits of tokens already seen."""
        most = float(np.finfo(seen.dtype).max) / 4  # differences must be finite too
        penalty = min(max(self.params.repetition_penalty, 1 / most), most)
        with np.errstate(over="ignore"):
            penalized = np.where(seen > 0, seen / penalty, seen * penalty).clip(-most, most)
        return np.where(np.isfinite(seen), penalized, seen)

    def _count(self, token_id: int) -> None:
        """Note that the answer has a token."""
        if self._seen is not None and token_id not in self._seen:
            self._seen = np.append(self._seen, token_id)
        if self.params.counts_tokens:
            at = np.flatnonzero(self._counted == token_id)
            self._counts[at] += 1
            if not at.size:
                self._counted = np.append(self._counted, token_id)
                self._counts = np.append(self._counts, np.float32(1))

    def _uniform(self) -> float:
        """Return a number in [0, 1) that is a function of seed, request and position."""
        key = np.array([self.seed, self.params.request_index], dtype=np.uint64)
        counter = np.array([self.position, 0, 0, 0], dtype=np.uint64)
        return (int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) * 2.0**-53


def select_candidates(scores: Scores, params: SamplingParams) -> tuple[Ids, Weights]:
    """Apply temperature, top-k, top-p and min-p; return tokens and unnormalized probabilities.

    Args:
        scores: [V] float32 logits, after bias and penalties.
        params: must not be greedy.

    Returns:
        [C] token ids in ascending order, and [C] weights whose largest is 1.

    Raises:
        Gemma3ExportError: a logit is NaN or +inf, or every token is banned.
    """
    top = scores.max()  # NaN if there is one
    _check_finite(top)
    ids = _largest(scores, params.top_k) if params.top_k else _all_ids(scores.size)
    few = ids.size < scores.size
    # a whole vocabulary stays in float32: float64 would take four times as long
    weights = _weigh(scores[ids] if few else scores, top, params.effective_temperature, few)
    if params.top_p is not None and params.top_p < 1.0:
        kept = _nucleus(weights, params.top_p * float(weights.sum()))
        ids, weights = ids[kept], weights[kept]
    if params.min_p:
        kept = np.flatnonzero(weights >= params.min_p)  # the largest weight is 1
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def report_logprobs(logits: Scores, token_id: int, count: int) -> SampledToken:
    """Return ``token_id`` and the ``count`` most likely tokens with their log-probabilities.

    Args:
        logits: [V] float32, as the model returned them.
        token_id: the token to report on.
        count: how many alternatives, at most V; ties are ordered by id.

    Raises:
        Gemma3ExportError: a logit is NaN or +inf, or every token is banned.
    """
    top = logits.max()
    _check_finite(top)
    # numpy sums float32 pairwise: the error is far below that of the logits themselves
    log_total = float(top) + float(np.log(np.exp(logits - top).sum()))
    ids = _largest(logits, min(count, logits.size)) if count else np.empty(0, dtype=np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
    return SampledToken(
        token_id=token_id,
        logprob=float(logits[token_id]) - log_total,
        top_logprobs=tuple((int(i), float(logits[i]) - log_total) for i in ids),
    )


@functools.lru_cache(maxsize=1)
def _all_ids(size: int) -> Ids:
    """Return all token ids [V]; cached, because creating them would double the cost of a call."""
    ids = np.arange(size)
    ids.flags.writeable = False
    return ids


def _largest(scores: Scores, count: int) -> Ids:
    """Return the ids, ascending, of the ``count`` largest scores and of ties with the last."""
    if count >= scores.size:
        return _all_ids(scores.size)
    columns = scores.size // _STRIDES
    threshold: np.float32
    if count * 4 > columns:
        threshold = np.partition(scores, scores.size - count)[scores.size - count]
        return np.flatnonzero(scores >= threshold)
    # The count-th largest column maximum is a lower bound of the count-th largest score. Finding
    # it takes one vectorized pass, several times faster than partitioning all scores.
    maxima = scores[: columns * _STRIDES].reshape(_STRIDES, columns).max(axis=0)
    threshold = np.partition(maxima, columns - count)[columns - count]
    ids = np.flatnonzero(scores >= threshold)
    values = scores[ids]
    threshold = np.partition(values, values.size - count)[values.size - count]
    largest: Ids = ids[values >= threshold]
    return largest


def _weigh(scores: Scores, top: np.float32, temperature: float, in_float64: bool) -> Weights:
    """Return probabilities [C] relative to that of ``top``."""
    differences = (scores.astype(np.float64) if in_float64 else scores) - top
    # A temperature outside the dtype's range would give 0/0 or inf/inf; clamp it instead.
    limits = np.finfo(differences.dtype)
    divisor = min(max(temperature, float(limits.tiny)), float(limits.max))
    with np.errstate(over="ignore"):
        differences /= divisor
    return np.exp(differences, out=differences)


def _nucleus(weights: Weights, target: float) -> Ids:
    """Return the indices, ascending, of the fewest weights that sum to ``target``."""
    pool: NDArray[Any] = weights  # contains the smallest weight to keep
    above, share = 0, 32  # kept weights above the pool; start with its largest 1/32
    while pool.size > _SORTABLE:
        middle = pool.size - pool.size // share
        pool, share = np.partition(pool, middle), 2
        upper_sum = float(pool[middle:].sum(dtype=np.float64))
        if upper_sum >= target:
            pool = pool[middle:]
        else:
            above, target, pool = above + pool.size - middle, target - upper_sum, pool[:middle]
    descending = np.sort(pool)[::-1]
    index = int(descending.cumsum(dtype=np.float64).searchsorted(target))
    index = min(index, pool.size - 1)  # rounding may leave the sum short of the target
    kept: Ids = np.flatnonzero(weights >= descending[index])
    if surplus := kept.size - (above + index + 1):
        equals = np.flatnonzero(weights[kept] == descending[index])
        kept = np.delete(kept, equals[-surplus:])
    return kept


def _draw(weights: Weights, uniform: float) -> int:
    """Return the index where the cumulative sum passes the share ``uniform`` of the total."""
    starts = np.arange(0, weights.size, _BLOCK)
    cumulative = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    target = uniform * cumulative[-1]
    block = _locate(cumulative, target)
    if block:
        target -= cumulative[block - 1]
    start = int(starts[block])
    return start + _locate(weights[start : start + _BLOCK].cumsum(dtype=np.float64), target)


def _locate(cumulative: NDArray[np.float64], target: float) -> int:
    """Return the first index whose sum exceeds ``target``."""
    index = int(cumulative.searchsorted(target, side="right"))
    # rounding may raise the target to the total: then take the last one with any weight
    return min(index, int(cumulative.searchsorted(cumulative[-1])))


def _check_finite(top: np.float32) -> None:
    if not np.isfinite(top):
        raise Gemma3ExportError(
            f"the largest logit is {top}, so no token can be chosen; the weights are damaged or "
            "the computation overflowed (float16 overflows on Gemma 3: use bfloat16 or float32)"
        )
