"""What a TorchScript archive computes does not depend on how often, or on what, it ran before.

Torch's fuser is what makes it depend on that, on GPUs. It is forced to fuse on the CPU here, where
it has kernels for float32 only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime
from tests.exporters.test_torchscript import exported
from tests.support.generation import generate

RUNS = 6
PROMPT = [2, 5, 9, 7, 8]
SAMPLED = SamplingParams(temperature=1.5, top_k=40, seed=3)


@pytest.fixture
def cpu_fuser() -> Iterator[None]:
    """Let torch fuse on the CPU, with its interpreter of kernels, as it does on GPUs."""
    settings: Any = torch._C
    before = (
        settings._jit_can_fuse_on_cpu(),
        settings._jit_get_te_must_use_llvm_cpu(),
        settings._jit_texpr_fuser_enabled(),
    )
    settings._jit_override_can_fuse_on_cpu(True)
    settings._jit_set_te_must_use_llvm_cpu(False)
    settings._jit_set_texpr_fuser_enabled(True)
    yield
    settings._jit_override_can_fuse_on_cpu(before[0])
    settings._jit_set_te_must_use_llvm_cpu(before[1])
    settings._jit_set_texpr_fuser_enabled(before[2])


def opened(dtype: str) -> TorchScriptRuntime:
    runtime = TorchScriptRuntime(exported(dtype=dtype), device="cpu", threads=1)
    runtime.decodes_on_device = True  # as on a GPU
    return runtime


def logits_of_a_run(runtime: TorchScriptRuntime, capacity: int = 24) -> bytes:
    """Prefill and decode, and return all logits as bytes."""
    cache = runtime.new_cache(1, capacity)
    found = [runtime.step(np.array([PROMPT]), cache, num_logits=0)]
    for token in (3, 9, 11, 4):
        assert runtime.step_candidates(np.array([[token]]), cache, [SamplingParams()]) is not None
        found.append(runtime.decode_steps(cache).fetch())
    return b"".join(logits.tobytes() for logits in found)


@pytest.mark.usefixtures("cpu_fuser")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_run_gives_the_bits_and_the_text_of_the_first(dtype: str) -> None:
    runtime = opened(dtype)
    assert len({logits_of_a_run(runtime) for _ in range(RUNS)}) == 1
    runtime = opened(dtype)
    texts = {
        generate(runtime, [PROMPT], SAMPLED, max_new_tokens=12, stop_token_ids=())
        .collect()[0]
        .token_ids
        for _ in range(RUNS)
    }
    assert len(texts) == 1


@pytest.mark.usefixtures("cpu_fuser")
def test_runs_of_other_shapes_in_between_change_no_bit() -> None:
    fresh, used = opened("fp32"), opened("fp32")
    for capacity in (12, 33, 60, 17):
        logits_of_a_run(used, capacity)
    assert logits_of_a_run(used) == logits_of_a_run(fresh)


@pytest.mark.usefixtures("cpu_fuser")
def test_torch_s_own_setting_would_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above could not fail."""
    runtime = opened("fp32")
    monkeypatch.setattr(runtime, "execution_context", nullcontext)
    first = logits_of_a_run(runtime)
    assert any(logits_of_a_run(runtime) != first for _ in range(RUNS))
