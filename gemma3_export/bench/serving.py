"""The protocol of a benchmark's worker: one JSON object a line, over the process's pipes.

First what to load, which is answered with facts about what was loaded; then one line for each
measurement. Answers go to what was stdout; whatever libraries print goes to stderr.

This file runs in the environments of peers, beside the workers in this folder and without
gemma3-export: it needs the standard library and numpy. As a program:

    python serving.py MODULE                          answer a benchmark
    python serving.py MODULE convert FROM TO FORMAT   make the peer's model from a folder of weights
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
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
        """Versions, device and threads really used, and ``bytes_per_token`` that decoding reads."""

    def run(self, prompt: IntArray, new_tokens: int) -> tuple[float, float, IntArray]:
        """Continue ``prompt`` [B, T] greedily, ends of text included.

        Returns:
            Seconds to the first token, seconds for ``new_tokens`` more, and all of these
            [B, 1 + new_tokens].
        """

    def logits(self, ids: IntArray) -> NDArray[np.float32]:
        """Logits [T, V] after each of the tokens ``ids`` [T]."""


Load = Callable[[], Candidate]


def serve(opener: Callable[[dict[str, Any]], Load]) -> None:
    """Answer the parent until its pipe closes.

    Args:
        opener: told what to load, it imports the framework and returns what loads the model, so
            that loading is timed without imports.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            asked = json.loads(sys.stdin.readline())
            started = time.perf_counter()
            load = opener(asked)
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
            # The parent shows its own errors as they are; of a library's, the place matters too.
            if not hasattr(error, "exit_code"):
                traceback.print_exc()
            answer({"error": type(error).__name__, "message": str(error)})


def respond(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """One measurement, or logits written to a file, as JSON."""
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
    """The most memory that this process has held, code and mapped weights included."""
    status = Path("/proc/self/status")  # rusage would count the process that forked us
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    name, *rest = arguments
    if rest:
        _, source, target, form = rest
        importlib.import_module(name).convert(Path(source), Path(target), form)
        return

    def opener(asked: dict[str, Any]) -> Load:
        module = importlib.import_module(name)
        model, form, threads = Path(asked["model"]), asked["format"], asked["threads"]
        return lambda: module.load(model, form, threads)

    serve(opener)


if __name__ == "__main__":
    main(sys.argv[1:])
