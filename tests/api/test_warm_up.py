"""Warming up when a model is opened: it takes the steps of a generation and changes no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gemma3_export
from gemma3_export.api import model_runtimes
from gemma3_export.api.opening import WARM_UP_STEPS, open_runtime, warm_up
from gemma3_export.runtimes.onnx.decode_steps import DeviceDecodeSteps
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.torch.decode_steps import TorchDecodeSteps
from gemma3_export.runtimes.torch.runtime import ArchiveRuntime
from tests.exporters.test_torchscript import exported
from tests.support.command_line import run_ok
from tests.support.exported_bundles import exported_bundle
from tests.support.fake_runtime import FakeRuntime
from tests.support.tiny_models import tiny_config

GENERATE = ("--prompt", "a", "--max-new-tokens", "2", "--threads", 1, "--device", "cpu")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of the tokens of every step that ONNX runtimes take."""
    found: list[tuple[int, ...]] = []
    original = OnnxRuntime.step

    def step(self: OnnxRuntime, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        found.append(input_ids.shape)
        return original(self, input_ids, *arguments, **options)

    monkeypatch.setattr(OnnxRuntime, "step", step)
    return found


def test_loading_prefills_and_decodes_if_asked_to(
    ort_bundle: Path, shapes: list[tuple[int, ...]]
) -> None:
    gemma3_export.load(ort_bundle, device="cpu", threads=1)
    assert shapes == []
    gemma3_export.load(ort_bundle, device="cpu", threads=1, warm_up=True)
    assert shapes == [(1, 16)] + [(1, 1)] * WARM_UP_STEPS


def test_every_runtime_that_a_model_opens_is_warmed_up(
    ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm: list[object] = []
    monkeypatch.setattr(model_runtimes, "warm_up", warm.append)
    model = gemma3_export.load(ort_bundle, device="cpu", threads=1, warm_up=True)
    assert warm == [model.runtime]
    model.generate("a", max_new_tokens=2, draft_model=ort_bundle)
    assert len(warm) == 2
    monkeypatch.setattr(model_runtimes, "_evicts", lambda runtime: True)
    shared = [[2, *range(10, 57)]] * 2  # opens it again, with caches that hold every token
    model.generate(shared, max_new_tokens=2)
    assert warm[2:] == [model.runtime]


def test_the_command_line_warms_up_only_if_asked_to(
    ort_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm: list[object] = []
    monkeypatch.setattr(model_runtimes, "warm_up", warm.append)
    without = run_ok("generate", ort_bundle, *GENERATE)
    run_ok("generate", ort_bundle, *GENERATE, "--no-warm-up")
    assert warm == []
    monkeypatch.undo()
    assert run_ok("generate", ort_bundle, *GENERATE, "--warm-up").stdout == without.stdout


@pytest.mark.parametrize("sliding_window_cache", [True, False])
def test_a_text_is_the_same_after_warming_up(ort_bundle: Path, sliding_window_cache: bool) -> None:
    def text(warm: bool) -> tuple[int, ...]:
        model = gemma3_export.load(
            ort_bundle,
            device="cpu",
            threads=1,
            warm_up=warm,
            sliding_window_cache=sliding_window_cache,
        )
        return model.generate("The sea", max_new_tokens=20, temperature=1.0, seed=5).token_ids

    assert text(True) == text(False)


@pytest.mark.parametrize(
    ("bundle", "runtime", "steps"),
    [
        (lambda: exported_bundle("ort"), "onnx", DeviceDecodeSteps),
        (exported, "torchscript", TorchDecodeSteps),
    ],
)
def test_steps_at_fixed_addresses_run_often_enough_to_be_captured(
    bundle: Callable[[], Path], runtime: str, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the third step is the first to replay a captured one."""
    taken: list[tuple[int, ...]] = []
    original = steps.run

    def run(self: Any, ids: Any, *arguments: Any) -> None:
        taken.append(ids.shape)
        original(self, ids, *arguments)

    monkeypatch.setattr(steps, "run", run)
    opened = open_runtime(bundle(), runtime, device="cpu", threads=1)
    assert isinstance(opened, OnnxRuntime | ArchiveRuntime)
    opened.decodes_on_device = True
    warm_up(opened)
    assert taken == [(1, 1)] * WARM_UP_STEPS
    assert len(taken) > 2


@pytest.mark.parametrize("room", [1, 2, 5, 17])
def test_it_fits_the_shortest_context(room: int) -> None:
    config = tiny_config(max_position_embeddings=room)
    warm_up(FakeRuntime(config))
