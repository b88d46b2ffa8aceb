"""Hold an engine before its steps, so that a test decides when it goes on."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from gemma3_export.runtimes.generation.loop import GenerationLoop


class Gate:
    """Holds the engine before each of its steps until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)  # one for each step that has begun to wait
        self.is_open = False
        original = GenerationLoop.step

        def step(loop: GenerationLoop) -> Any:
            if not self.is_open and threading.current_thread().name == "gemma3-engine":
                self.arrived.release()
                assert self.steps.acquire(timeout=30), "the test has failed, or forgotten a step"
            return original(loop)

        monkeypatch.setattr(GenerationLoop, "step", step)

    def allow(self, count: int = 1) -> None:
        self.steps.release(count)

    def open(self) -> None:
        self.is_open = True
        self.steps.release()
