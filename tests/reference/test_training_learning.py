"""Test that training reaches known optimal losses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma3_export.reference.training.metrics import read_metrics_log
from gemma3_export.reference.training.runs import train
from tests.support.token_folders import quick_options, small_config, write_config, write_tokens

SYMBOLS = 8  # of the grammar, with ids after the special tokens
FIRST_ID = 4


class Grammar:
    """A random second-order Markov chain over the symbols.

    A table of single symbols or of pairs of neighbors misses this: attention has to look back.
    """

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.next = generator.dirichlet(np.full(SYMBOLS, 0.3), size=(SYMBOLS, SYMBOLS))

    def pair_shares(self) -> NDArray[np.float64]:
        """Return the stationary probabilities of pairs of symbols."""
        share = np.full((SYMBOLS, SYMBOLS), 1 / SYMBOLS**2)
        for _ in range(2000):
            share = np.einsum("ab,abc->bc", share, self.next)
        return share

    def entropy(self) -> float:
        """Return the entropy in nats per symbol, which no model can undercut."""
        safe = np.where(self.next > 0, self.next, 1.0)
        given_pair = -(self.next * np.log(safe)).sum(-1)
        return float((self.pair_shares() * given_pair).sum())

    def entropy_after_one(self) -> float:
        """Return the entropy in nats per symbol given only the previous symbol."""
        pairs = self.pair_shares()
        joint = np.einsum("ab,abc->bc", pairs, self.next)
        conditional = joint / joint.sum(1, keepdims=True)
        return float(-(joint * np.log(np.where(conditional > 0, conditional, 1.0))).sum())

    def write(self, count: int, seed: int) -> NDArray[np.int64]:
        generator = np.random.default_rng(seed)
        cumulated, draws = self.next.cumsum(-1), generator.random(count)
        ids = np.zeros(count, np.int64)
        for i in range(2, count):
            row = cumulated[ids[i - 2], ids[i - 1]]
            ids[i] = min(int(np.searchsorted(row, draws[i])), SYMBOLS - 1)
        return ids + FIRST_ID


def test_loss_converges_to_the_entropy_of_a_grammar(tmp_path: Path) -> None:
    grammar = Grammar(seed=5)
    entropy, after_one = grammar.entropy(), grammar.entropy_after_one()
    assert after_one > 1.25 * entropy, "a model of neighbors must not pass"
    tokens = write_tokens(
        tmp_path / "tokens", grammar.write(120_000, seed=1), grammar.write(30_000, seed=2)
    )
    options = quick_options(
        steps=500,
        batch_size=16,
        context_length=48,
        learning_rate=1e-2,
        min_learning_rate=1e-4,
        warmup_steps=30,
        eval_interval=500,
        eval_batches=30,
        checkpoint_interval=500,
        log_interval=100,
    )
    config = write_config(tmp_path / "config.json", small_config(intermediate_size=128))
    result = train(tokens, tmp_path / "run", options, config_path=config, report=lambda line: None)
    loss = result.state.best_validation_loss
    # The first two symbols of a window lack context, which costs a little.
    assert loss == pytest.approx(entropy, rel=0.05), f"{loss:.4f} against {entropy:.4f}"
    assert loss > 0.98 * entropy, "less than the entropy means that the answer leaked"


def test_model_memorizes_a_short_text(tmp_path: Path) -> None:
    vocab_size = 60
    # No token occurs twice, so each token determines the next one.
    text = np.random.default_rng(7).permutation(np.arange(4, vocab_size))[:49]
    tokens = write_tokens(tmp_path / "tokens", text, vocab_size=vocab_size)
    options = quick_options(
        steps=250, batch_size=2, context_length=24, learning_rate=1e-2, min_learning_rate=1e-4
    )
    config = write_config(tmp_path / "config.json", small_config(vocab_size=vocab_size))
    train(tokens, tmp_path / "run", options, config_path=config, report=lambda line: None)
    rows = read_metrics_log(tmp_path / "run")
    assert rows[0].train_loss == pytest.approx(math.log(vocab_size), rel=0.1), "knows nothing yet"
    assert np.mean([row.train_loss for row in rows[-20:]]) < 0.02
