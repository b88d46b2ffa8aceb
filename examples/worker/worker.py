"""Answer jobs from a queue: JSON lines on stdin become JSON lines on stdout as they are done.

python examples/worker/worker.py gemma-3-270m < jobs.jsonl

A job has an `id`, a `prompt`, and maybe `options` of GenerateOptions. Replace `take` and `put` with
the client of a message broker. Jobs run at once, as many as the engine has slots; a job that fails
is answered with an `error`.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gemma3_export import Engine, Gemma3ExportError

SLOTS = 8
reading, writing = threading.Lock(), threading.Lock()


def take() -> str:
    """Return the next job, empty after the last one."""
    with reading:
        return sys.stdin.readline()


def put(answer: dict[str, Any]) -> None:
    """Send an answer."""
    with writing:
        print(json.dumps(answer), flush=True)


def answer(engine: Engine, line: str) -> dict[str, Any]:
    """Run one job."""
    number = None
    try:
        job = json.loads(line)
        number = job["id"]
        done = engine.stream(job["prompt"], **job.get("options", {})).result()
    except (Gemma3ExportError, KeyError, TypeError, ValueError, AttributeError) as error:
        return {"id": number, "error": f"{type(error).__name__}: {error}"}
    return {"id": number, "text": done.text, "finish_reason": done.finish_reason}


def work(engine: Engine) -> None:
    """Run jobs until there are no more."""
    while line := take():
        put(answer(engine, line))


def main(bundle: str) -> None:
    """Run all jobs, and end when those that were taken are answered."""
    with Engine(bundle, slots=SLOTS) as engine, ThreadPoolExecutor(SLOTS) as pool:
        for thread in [pool.submit(work, engine) for _ in range(SLOTS)]:
            thread.result()


if __name__ == "__main__":
    main(sys.argv[1])
