"""Any options of a generation, and any config in any dialect: a right result, or a named error."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemma3_export
from gemma3_export.config import Gemma3Config, config_from_json, config_to_json
from gemma3_export.errors import Gemma3ExportError
from tests.faults.harness.models import in_wrapper, nested_rope
from tests.support.tiny_models import tiny_config

MAX_NEW_TOKENS = 6
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just([1]),
    st.just({}),
)


def option(*sound: Any) -> st.SearchStrategy[Any]:
    """Draw a sound value as often as anything else."""
    return st.one_of(st.sampled_from(sound), anything)


requests = st.fixed_dictionaries(
    {},
    optional={
        "temperature": option(0.0, 0.7, 2),
        "top_k": option(1, 5, 400),
        "top_p": option(0.5, 1.0),
        "min_p": option(0.1),
        "repetition_penalty": option(0.7, 1.3),
        "seed": option(0, 7),
        "stop": option("e", ("a", "the"), ()),
        "prompt_lookup": option(0, 4),
        "prefix_cache_bytes": option(0, 10**6),
        "prefill_chunk": option(1, 3),
        "logprobs": option(1, 3),
    },
)
prompts = st.one_of(
    st.text(max_size=20),
    st.lists(st.integers(-2, 500), max_size=5),
    st.lists(st.integers(4, 399), min_size=1, max_size=5),
    anything,
)
quick = functools.partial(
    settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def model(ort_bundle: Path) -> gemma3_export.Model:
    return gemma3_export.load(ort_bundle, threads=1)


@quick(max_examples=40)
@given(prompt=prompts, options=requests)
def test_a_request_is_answered_rightly_or_rejected(
    model: gemma3_export.Model, prompt: Any, options: dict[str, Any]
) -> None:
    try:
        answers = model.start([prompt], max_new_tokens=MAX_NEW_TOKENS, **options).collect()
    except Gemma3ExportError:
        return
    (answer,) = answers
    vocab_size = model.config.vocab_size
    assert len(answer.token_ids) <= MAX_NEW_TOKENS
    assert all(0 <= token < vocab_size for token in answer.token_ids)
    stops = options.get("stop", ())
    for stop in [stops] if isinstance(stops, str) else stops:
        assert stop not in answer.text
    plain = options | {"prompt_lookup": 0, "prefix_cache_bytes": 0, "seed": answer.seed}
    (again,) = model.start([prompt], max_new_tokens=MAX_NEW_TOKENS, **plain).collect()
    assert again.token_ids == answer.token_ids
    assert again.text == answer.text


sizes = st.integers(1, 64)
reals = st.floats(1e-6, 1e7)


@st.composite
def configs(draw: st.DrawFn) -> Gemma3Config:
    layers, kv_heads, vocab_size = draw(sizes), draw(sizes), draw(st.integers(8, 10**6))
    kinds = st.sampled_from(("full_attention", "sliding_attention"))
    return tiny_config(
        vocab_size=vocab_size,
        hidden_size=draw(sizes),
        intermediate_size=draw(sizes),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(sizes),
        max_position_embeddings=draw(st.integers(1, 10**6)),
        sliding_window=draw(sizes),
        query_pre_attn_scalar=draw(reals),
        layer_types=tuple(draw(st.lists(kinds, min_size=layers, max_size=layers))),
        rope_theta=draw(reals),
        rope_local_base_freq=draw(reals),
        rope_scaling_factor=draw(st.one_of(st.just(1.0), reals)),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        tie_word_embeddings=draw(st.booleans()),
    )


@quick(max_examples=30)
@given(config=configs())
def test_a_config_is_the_same_in_every_dialect(config: Gemma3Config) -> None:
    for dialect in (config_to_json, nested_rope, in_wrapper):
        assert config_from_json(dialect(config), where="config.json") == config
