"""The protocol of a benchmark's worker process: one JSON object per line, over the process's pipes.

The first line says what to load; the answer describes what was loaded. Each further line asks for
one measurement. Answers go to the original stdout, and everything that libraries print goes to
stderr.

This file also runs in the environments of other engines, which do not have gemma3-export, so it
needs only the standard library and numpy. As a program:

    python -P serving.py WORKER.py                          answer a benchmark
    python -P serving.py WORKER.py convert FROM TO FORMAT   convert a Hugging Face folder

``-P`` keeps the modules next to this file from shadowing installed packages.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidate", "Load", "serve"]

IntArray = NDArray[np.int64]


class Candidate(Protocol):
    """A loaded model that can be timed."""

    def describe(self) -> dict[str, object]:
        """Return versions, the device and threads in use, and ``bytes_per_token``.

        ``bytes_per_token`` is how many bytes of weights one decode step reads.
        """

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """Continue ``prompt`` [B, T] greedily, past end-of-text tokens.

        Returns:
            Seconds to the first token, seconds for the next ``new_tokens``, and all these tokens
            [B, 1 + new_tokens].
        """

    def logits(self, ids: IntArray) -> NDArray[np.float32]:
        """Return logits [T, V] after each of the tokens ``ids`` [T]."""


Load = Callable[[], Candidate]


def serve(opener: Callable[[dict[str, Any]], Load]) -> None:
    """Answer the parent process until it closes the pipe.

    Args:
        opener: takes the first request, imports the framework and returns the function that loads
            the model. Loading is timed without the imports.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            request = json.loads(sys.stdin.readline())
            started = time.perf_counter()
            load = opener(request)
            imported = time.perf_counter()
            candidate = load()
            loaded = time.perf_counter()
            answer(
                {
                    "import_s": imported - started,
                    "load_s": loaded - imported,
                    "load_peak_memory_bytes": peak_memory_bytes(),
                    "describe": candidate.describe(),
                }
            )
            for line in sys.stdin:
                answer(respond(candidate, json.loads(line)))
        except Exception as error:
            # The parent prints our own errors as they are; a library's error needs its traceback.
            if not hasattr(error, "exit_code"):
                traceback.print_exc()
            answer({"error": type(error).__name__, "message": str(error)})


def respond(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """Measure once, or write logits to a file, and return the answer."""
    if "logits_of" in request:
        logits = candidate.logits(np.array(request["logits_of"], dtype=np.int64))
        np.save(request["file"], np.asarray(logits, dtype=np.float32))
        return {"shape": list(logits.shape)}
    prompt = np.array(request["prompt"], dtype=np.int64)
    started, busy = time.perf_counter(), time.process_time()
    first_s, decode_s, tokens = candidate.run(prompt, request["new_tokens"])
    busy_s = time.process_time() - busy
    return {
        "time_to_first_token_s": first_s,
        "decode_s": decode_s,
        "tokens": tokens.tolist(),
        "busy_processors": busy_s / (time.perf_counter() - started),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """Return the peak memory of this process, including code and mapped weights."""
    status = Path("/proc/self/status")  # rusage would include the process that forked this one
    if status.exists() and (
        found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
    ):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        raise AssertionError("run_benchmark rejects Windows")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(worker: str, *conversion: str) -> None:
    """Run a worker: a module with ``load`` and ``convert``, which may import its neighbors."""
    file = Path(worker)
    sys.path.insert(0, str(file.parent))
    if conversion:
        _, source, target, weight_format = conversion
        importlib.import_module(file.stem).convert(Path(source), Path(target), weight_format)
        return

    def opener(request: dict[str, Any]) -> Load:
        module = importlib.import_module(file.stem)
        arguments = (Path(request["model"]), request["format"], request["threads"])
        return lambda: module.load(*arguments)

    serve(opener)


if __name__ == "__main__":
    main(*sys.argv[1:])
