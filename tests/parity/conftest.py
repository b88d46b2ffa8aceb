"""Fixtures that several parity tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gemma3_export.parity import GroundTruth, ParityReport, VerifyOptions, verify
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.reference.weights import WeightSource, open_weights
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

VOCAB = 400
OPTIONS = VerifyOptions(decode_steps=12, greedy_steps=4)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: tiny tensors only lose time to the hand-over between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "tiny"
    write_hf_folder(path, tiny_config(vocab_size=VOCAB))
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> WeightSource:
    return open_weights(str(folder))


@pytest.fixture(scope="module")
def ground_truth(source: WeightSource) -> GroundTruth:
    runtime = ReferenceRuntime(load_reference(source))
    tokenizer = tiny_gemma_tokenizer(VOCAB)
    return GroundTruth.for_runtime(runtime, source, options=OPTIONS, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def passing(source: WeightSource, ground_truth: GroundTruth) -> ParityReport:
    return verify(ReferenceRuntime(load_reference(source)), source, ground_truth=ground_truth)
