"""Numbers beyond what a library takes: exit 2 and the range, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import gemma3_export
from gemma3_export.api.options import GenerateOptions, LoadOptions
from gemma3_export.api.verification import VerifyRequest
from gemma3_export.bench.run import BenchmarkOptions
from gemma3_export.device import CudaOptions, parse_device
from gemma3_export.errors import InputError
from gemma3_export.limits import check_integer, check_number, check_threads, max_threads, shown
from gemma3_export.parity.options import VerifyOptions, threads_for
from gemma3_export.reference.training.options import TrainOptions
from gemma3_export.reference.training.preparation import train_bpe
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from tests.support.command_line import run, run_ok
from tests.support.tiny_models import tiny_config

DIGITS = "9" * 400
MORE_DIGITS = "9" * 5000  # more than Python reads
TOO_MANY = (str(2**31), str(2**70), DIGITS, MORE_DIGITS, "-1", "1e3", "", "nan", "½")
COUNTS = (
    ("generate", "x", "--prompt", "a", "--max-new-tokens"),
    ("generate", "x", "--prompt", "a", "--prefill-chunk"),
    ("generate", "x", "--prompt", "a", "--prompt-lookup"),
    ("generate", "x", "--prompt", "a", "--threads"),
    ("verify", "x", "--threads"),
    ("onnx", "--weights", "demo", "-o", "x", "--threads"),
    ("pt2", "--weights", "demo", "-o", "x", "--threads"),
    ("torchscript", "--weights", "demo", "-o", "x", "--threads"),
    ("bench", "x", "--threads"),
    ("bench", "x", "--batch"),
    ("bench", "x", "--prompt-tokens"),
    ("bench", "x", "--new-tokens"),
    ("bench", "x", "--repeat"),
    ("data", "x", "-o", "y", "--limit"),
    ("data", "x", "-o", "y", "--vocab-size"),
)
SEEDS = (
    ("verify", "x", "--seed"),
    ("onnx", "--size", "270m", "-o", "x", "--random-weights"),
)
BUDGETS = (
    ("onnx", "--weights", "demo", "-o", "x", "--max-kld"),
    ("torchscript", "--weights", "demo", "-o", "x", "--max-kld"),
)
TRAIN = ("train", "x", "--size", "demo", "-o", "y")
TRAIN_COUNTS = (
    *("steps", "batch-size", "context-length", "accumulation", "warmup-steps", "eval-interval"),
    *("loss-chunk-tokens", "eval-batches", "sample-interval", "sample-tokens"),
    *("checkpoint-interval", "keep-checkpoints", "log-interval", "seed"),
)
TRAIN_NUMBERS = (
    *("learning-rate", "min-learning-rate", "beta1", "beta2", "epsilon", "weight-decay"),
    "clip-norm",
)


def rejected(arguments: tuple[str, ...], value: str) -> str:
    """Run a command with an impossible last option; return its last line of stderr."""
    result = run(*arguments[:-1], f"{arguments[-1]}={value}")
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    line = result.stderr.splitlines()[-1]
    name = arguments[-1].removeprefix("--").replace("-", "_")
    assert arguments[-1] in line or line.startswith(f"error: {name} is ")  # not about the folder
    assert len(line) < 300
    return line


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", COUNTS, ids=" ".join)
def test_impossible_counts(arguments: tuple[str, ...]) -> None:
    for value in TOO_MANY:
        rejected(arguments, value)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("arguments", SEEDS, ids=" ".join)
def test_impossible_seeds(arguments: tuple[str, ...]) -> None:
    for value in (str(2**63), str(2**64), "-1", DIGITS, MORE_DIGITS, "x"):
        rejected(arguments, value)


@pytest.mark.parametrize("arguments", BUDGETS, ids=" ".join)
def test_impossible_budgets(arguments: tuple[str, ...]) -> None:
    for value in ("0", "-1", "nan", "inf", "1e300", "101", DIGITS, MORE_DIGITS, "x"):
        rejected(arguments, value)


@pytest.mark.parametrize("name", TRAIN_COUNTS)
def test_impossible_counts_of_a_training(name: str) -> None:
    for value in (str(2**64), str(2**70), DIGITS, MORE_DIGITS, "-1", "1.5"):
        rejected((*TRAIN, f"--{name}"), value)


@pytest.mark.parametrize("name", TRAIN_NUMBERS)
def test_impossible_numbers_of_a_training(name: str) -> None:
    for value in ("nan", "inf", "-inf", "-1", "1e300", DIGITS, MORE_DIGITS, "x"):
        rejected((*TRAIN, f"--{name}"), value)


def test_impossible_fractions_and_sizes() -> None:
    fraction = ("data", "x", "-o", "y", "--validation-fraction")
    for value in ("1", "1.5", "-0.1", "nan", "inf", DIGITS, "x"):
        rejected(fraction, value)
    for option in ("--prefix-cache", "--gpu-memory-limit"):
        for value in ("-1", "nan", DIGITS, f"{DIGITS}GB", "9999999999999999TB", "x"):
            rejected(("generate", "x", "--prompt", "a", option), value)


def test_a_device_of_many_digits_is_unknown() -> None:
    for number in (DIGITS, MORE_DIGITS, "-1", "1e3"):
        with pytest.raises(InputError, match="unknown device") as caught:
            parse_device(f"cuda:{number}")
        assert len(str(caught.value)) < 200
    assert str(parse_device("cuda:12")) == "cuda:12"


@pytest.mark.parametrize(
    "options",
    [
        *(("--temperature", value) for value in (DIGITS, f"-{DIGITS}", "nan", "1e400")),
        *(("--repetition-penalty", value) for value in (DIGITS, "nan", "-1", "0")),
        *(("--top-p", value) for value in (DIGITS, "0", "nan", "1.1")),
        *(("--top-k", value) for value in (DIGITS, str(2**70), "-1")),
        *(("--seed", value) for value in (str(2**64), "-1", DIGITS, MORE_DIGITS)),
        *(("--logprobs", value, "--json") for value in (str(2**70), "-1", DIGITS)),
        *(("--stop-token", value) for value in (DIGITS, MORE_DIGITS)),
        *(("--prompt-ids", value) for value in (str(2**70), DIGITS, MORE_DIGITS, "-1", "1e2")),
    ],
    ids=lambda options: " ".join(options)[:40],
)
def test_impossible_numbers_of_a_generation(ort_bundle: Path, options: tuple[str, ...]) -> None:
    name, value, *others = options
    result = run("generate", ort_bundle, "--prompt", "a", f"{name}={value}", *others)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()[-1]) < 400


def test_extreme_numbers_that_are_possible_generate(ort_bundle: Path) -> None:
    for options in (
        ("--temperature", f"0.{'0' * 400}1"),
        ("--temperature", "1e-320", "--seed", str(2**64 - 1)),
        ("--temperature", "1e308", "--seed", "0"),
        ("--top-k", str(2**31 - 1), "--logprobs", str(2**31 - 1), "--json"),
        ("--prefill-chunk", str(2**31 - 1)),
        ("--threads", str(max_threads())),
    ):
        arguments = ("--prompt", "a", "--max-new-tokens", 3, *options)
        assert run_ok("generate", ort_bundle, *arguments).stdout


HUGE = 10**5000
IMPOSSIBLE: tuple[tuple[type, dict[str, Any]], ...] = (
    (LoadOptions, {"threads": 2**31}),
    (LoadOptions, {"threads": 1000 * (os.cpu_count() or 1)}),
    (LoadOptions, {"threads": 0}),
    (LoadOptions, {"threads": 1.5}),
    (LoadOptions, {"threads": True}),
    (LoadOptions, {"threads": HUGE}),
    (LoadOptions, {"kept_prefix_bytes": 2**63}),
    (GenerateOptions, {"max_new_tokens": 2**31}),
    (GenerateOptions, {"prefill_chunk": HUGE}),
    (GenerateOptions, {"prompt_lookup": 2**40}),
    (GenerateOptions, {"prefix_cache_bytes": 2**64}),
    (GenerateOptions, {"temperature": HUGE}),
    (GenerateOptions, {"temperature": float("nan")}),
    (GenerateOptions, {"seed": 2**64}),
    (GenerateOptions, {"seed": -HUGE}),
    (GenerateOptions, {"top_k": HUGE}),
    (GenerateOptions, {"logprobs": HUGE}),
    (VerifyRequest, {"threads": HUGE}),
    (VerifyRequest, {"seed": 2**63}),
    (VerifyRequest, {"max_kld": float("inf")}),
    (VerifyRequest, {"max_kld": 1e300}),
    (VerifyRequest, {"max_kld": HUGE}),
    (VerifyOptions, {"seed": HUGE}),
    (VerifyOptions, {"seed": "7"}),
    (gemma3_export.OnnxOptions, {"threads": HUGE}),
    (gemma3_export.OnnxOptions, {"max_kld": float("nan")}),
    (gemma3_export.OnnxOptions, {"block_size": HUGE}),
    (gemma3_export.TorchScriptOptions, {"max_kld": 0}),
    (gemma3_export.Pt2Options, {"threads": -1}),
    (BenchmarkOptions, {"batch": (2**40,)}),
    (BenchmarkOptions, {"threads": 2**31}),
    (BenchmarkOptions, {"repeat": HUGE}),
    (TrainOptions, {"seed": 2**64}),
    (TrainOptions, {"steps": HUGE}),
    (TrainOptions, {"batch_size": "4"}),
    (TrainOptions, {"learning_rate": float("nan")}),
    (TrainOptions, {"beta1": 1.0}),
    (CudaOptions, {"memory_limit_bytes": HUGE}),
)


@pytest.mark.parametrize(
    ("kind", "values"), IMPOSSIBLE, ids=[f"{k.__name__} {[*v]}" for k, v in IMPOSSIBLE]
)
def test_impossible_numbers_in_python(kind: type, values: dict[str, Any]) -> None:
    (name,) = values
    words = "memory limit" if name == "memory_limit_bytes" else name
    with pytest.raises(InputError, match=words) as caught:
        kind(**values)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("token_id", [2**70, -(2**70), HUGE, 2**31, -1], ids="abcde")
def test_impossible_token_ids_in_python(ort_bundle: Path, token_id: int) -> None:
    model = gemma3_export.load(ort_bundle, threads=1)
    for call in (model.generate, model.logits):
        with pytest.raises(InputError, match=r"token id.* vocabulary|token ids must be from 0"):
            call([5, token_id])


def test_threads_are_checked_by_every_runtime(ort_bundle: Path) -> None:
    most = max_threads()
    for threads in (most + 1, 0):
        with pytest.raises(InputError, match=f"at most {most}, 4 times the processors"):
            OnnxRuntime(ort_bundle, threads=threads)
        with pytest.raises(InputError, match=f"at most {most}"):
            gemma3_export.open_runtime(ort_bundle, "reference", threads=threads)
        with pytest.raises(InputError, match=f"at most {most}"):
            threads_for(tiny_config(), threads)
    assert check_threads(None) is None
    assert check_threads(most) == most


def test_a_vocabulary_that_no_text_fills_is_not_allocated() -> None:
    with pytest.raises(InputError, match="at most 1048576"):
        train_bpe([], 2**40)


def test_the_ends_of_a_range_are_within_it() -> None:
    assert check_integer("n", 3, 3, 5) == check_integer("n", 5, 3, 5) - 2 == 3
    assert check_number("x", 0.5, 0.5, 1) == 0.5
    assert check_number("x", 1, 0.5, 1) == 1.0
    with pytest.raises(InputError, match=r"x is 0\.5; it must be a number above 0\.5 and at most"):
        check_number("x", 0.5, 0.5, 1, is_open=True)
    for value in (2, 6, 4.0, "4", None, False):
        with pytest.raises(InputError, match=r"n is .* at least 3 and at most 5"):
            check_integer("n", value, 3, 5)
    for wrong in (float("nan"), 1.1, "1", None, True):
        with pytest.raises(InputError, match="x is "):
            check_number("x", wrong, 0.5, 1)


def test_values_are_shown_in_a_few_characters() -> None:
    assert shown(12) == "12"
    assert shown("a" * 100) == "'" + "a" * 56 + "..."
    assert shown(HUGE) == "an integer of more than 4,300 digits"
