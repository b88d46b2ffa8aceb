"""Generate over the CUDA stub, in another interpreter, and print the stub's counters per step.

Values are meaningless; the control flow is that of the runtime and of the generation loop. Needs
onnxruntime, numpy and gemma3-export. Arguments: the bundle, and a JSON object with ``rows``,
``capacity``, ``steps``, ``prompt_tokens`` (of the first row; each further row has one more),
``graph`` (CUDA graph), ``device`` and ``top_k`` (null is greedy). Prints one JSON object: counters
of the load, of the prefill, and of each step.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from gemma3_export.cuda.stub import COUNTERS
from gemma3_export.device import CudaOptions
from gemma3_export.runtimes.generation import candidates
from gemma3_export.runtimes.generation.generate import generate
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.generation.request import TokenEvent
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.onnx import runtime as onnx_runtime
from gemma3_export.runtimes.onnx.session import choose_device


class Meter:
    """Reads the counters of the stub, which is preloaded into this process."""

    def __init__(self) -> None:
        self.read_counters = ctypes.CDLL(None).gemma3_stub_counters
        self.last = dict.fromkeys(COUNTERS, 0)

    def since(self) -> dict[str, int]:
        """Return how much each counter has grown since the last call."""
        values = (ctypes.c_longlong * len(COUNTERS))()
        self.read_counters(values)
        now = dict(zip(COUNTERS, values, strict=True))
        changed = {name: now[name] - self.last[name] for name in COUNTERS}
        self.last = now
        return changed


def as_they_are(values: Any, ids: Any, total: float, needed: int) -> candidates.Candidates:
    """Replace ``candidates_from_top_k``, for which the stub's zeros would all be ties."""
    del total, needed
    return candidates.Candidates(ids.astype(np.int64), values.copy())


def decode(bundle: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Prefill every row, then decode them together, as the package does."""
    meter = Meter()
    vars(candidates)["candidates_from_top_k"] = as_they_are
    onnxruntime.preload_dlls = lambda: None  # real libraries would replace the stub
    # it refuses a graph that falls back; here the cost of falling back is measured
    vars(onnx_runtime)["device_for"] = lambda graph, device: choose_device(device)
    runtime = onnx_runtime.OnnxRuntime(
        bundle, device=plan["device"], cuda=CudaOptions(graph=plan["graph"])
    )
    rows = plan["rows"]
    events = generate(
        runtime,
        [[1] * (plan["prompt_tokens"] + row) for row in range(rows)],
        SamplingParams(top_k=plan["top_k"], seed=0),
        GenerationOptions(
            max_new_tokens=1 + plan["steps"], stop_token_ids=(), capacity=plan["capacity"]
        ),
    )
    found: dict[str, Any] = {
        "load": meter.since(),
        "described": runtime.info.to_json(),
        "steps": [],
    }
    tokens = 0
    for event in events:
        tokens += isinstance(event, TokenEvent)
        # All rows' tokens arrive together: first those after the prompts, then those of each step.
        if isinstance(event, TokenEvent) and tokens % rows == 0:
            found["steps"].append(meter.since())
    found["prefill"] = found["steps"].pop(0)
    found["completions"] = [len(done.token_ids) for done in events.completions]
    return found


if __name__ == "__main__":
    print(json.dumps(decode(Path(sys.argv[1]), json.loads(sys.argv[2]))))
