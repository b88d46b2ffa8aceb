"""Weights shared between processes: the same logits, and rejected where they would be slow."""

from __future__ import annotations

import numpy as np
import pytest

from gemma3_export.api.opening import open_runtime
from gemma3_export.errors import InputError
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.runtimes.onnx import runtime as onnx_runtime
from gemma3_export.runtimes.onnx.runtime import NO_PACKING, OnnxRuntime
from tests.support.exported_bundles import exported, exported_bundle
from tests.support.tiny_models import TINY


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_shared_weights_give_the_same_logits(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    opened = onnx_runtime.open_session

    def spy(*arguments: object, **options: object) -> object:
        seen.append(options["entries"])
        return opened(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_runtime, "open_session", spy)
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 20))
    logits = []
    for shares in (False, True):
        runtime = OnnxRuntime(exported_bundle(target), device="cpu", shares_weights=shares)
        logits.append(runtime.step(ids, runtime.new_cache(1, 20), num_logits=0))
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    assert seen == [{}, {NO_PACKING: "1"}]
    assert runtime.info.to_json()["weights"] == "shared"


def test_quantized_weights_are_not_shared() -> None:
    bundle = exported(OnnxWriter(dtype="int8", block_size=16))
    with pytest.raises(InputError, match="kernels for int8 need their own layout"):
        OnnxRuntime(bundle, device="cpu", shares_weights=True)


def test_other_runtimes_reject_sharing() -> None:
    with pytest.raises(InputError, match="by the onnx runtime, not by reference"):
        open_runtime(exported_bundle("ort"), "reference", shares_weights=True)
