"""Programs that we did not write find the server as its description and the OpenAI API say.

Each has an environment of its own in ``.cache/serve-tools``, which the first run creates.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.environments import create_environment, python_of
from gemma3_export import Model
from tests.conftest import REPOSITORY
from tests.serve.conftest import NAME, Running, running

pytestmark = [pytest.mark.slow, pytest.mark.network]

FOLDER = REPOSITORY / ".cache" / "serve-tools"
TIMEOUT_S = 1800  # a safety net
PACKAGES = {
    "schemathesis": ("schemathesis==4.32.5",),
    "lm-eval": ("lm-eval[api]==0.4.13", "transformers==5.23.0"),
}
# It expects that every value of the right type is accepted. The description has the ranges of
# fields, but not which fields exclude each other.
NOT_CHECKED = "positive_data_acceptance"
QUESTIONS = ["The sea is", "A sky", "Blue and wide"]
CHOICES = [" blue", " wide and deep", " a sky"]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "generate_until",
        "doc_to_target": "question",
        "generation_kwargs": {"until": ["~"], "max_gen_toks": 9, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def run(tool: str, folder: Path, *arguments: object, **variables: str) -> str:
    """Run a module of a tool's environment in a folder; return what it prints."""
    environment = FOLDER / tool
    create_environment(environment, PACKAGES[tool], echo=lambda line: print(line, file=sys.stderr))
    done = subprocess.run(
        [python_of(environment), "-m", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "NO_PROXY": "*", "PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("key", [None, "secret"])
def test_schemathesis_finds_nothing(model: Model, key: str | None, tmp_path: Path) -> None:
    """No 5xx, undocumented status, or answer that differs from its schema; no way around a key."""
    with running(model, key=key) as served:
        report = run(
            "schemathesis",
            tmp_path,
            *("schemathesis.cli", "run", f"{served.url}/openapi.json", "--no-color"),
            *("--header", f"Authorization: Bearer {key}", "--exclude-checks", NOT_CHECKED),
            *("--max-examples", os.environ.get("EXAMPLES", 30), "--seed", 1),
        )
    print(report)
    assert "Tested: 7" in report


def test_lm_eval_measures_what_the_model_says(
    served: Running, model: Model, tmp_path: Path
) -> None:
    rows = [{"question": text, "choices": CHOICES, "answer": 0} for text in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
            "doc_to_text": "question",
            "target_delimiter": "",
        }
        # YAML includes JSON
        (tmp_path / f"{name}.yaml").write_text(json.dumps(shared | task))
    run(
        "lm-eval",
        tmp_path,
        *("lm_eval", "--model", "local-completions", "--tasks", ",".join(TASKS)),
        *("--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"),
        "--model_args",
        f"base_url={served.url}/v1/completions,model={NAME},tokenizer={model.path},"
        "add_bos_token=true,num_concurrent=2,max_retries=1",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "home"),
    )

    samples = {name: _samples(tmp_path / "out", name) for name in TASKS}
    for text in QUESTIONS:
        found = samples["choices"][text]
        for (logprob, is_greedy), choice in zip(found, CHOICES, strict=True):
            expected = _logprobs(model, text, choice)
            assert float(logprob) == pytest.approx(expected[0], abs=1e-3)
            assert str(is_greedy) == str(expected[1])
        assert samples["texts"][text] == [model.generate(text, max_new_tokens=9).text]


def _samples(folder: Path, task: str) -> dict[str, Any]:
    """Return what lm-eval got from the server, by question."""
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["doc"]["question"]: line["filtered_resps"] for line in lines}


def _logprobs(model: Model, text: str, choice: str) -> tuple[float, bool]:
    """Return the log-probability of ``choice`` after ``text``, and whether it is greedy."""
    ids = model.encode(text + choice)
    start = len(model.encode(text))
    logits = model.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = range(start, len(ids))
    return (
        float(sum(logprobs[at - 1, ids[at]] for at in places)),
        all(int(logits[at - 1].argmax()) == ids[at] for at in places),
    )
