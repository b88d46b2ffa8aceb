"""The consumers, how to install each, and how to run its program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import Echo, create_environment, python_of, run
from tests.consumers.jobs import Job, Rows

__all__ = ["CONSUMERS", "Answer", "Consumer"]

WORKERS = Path(__file__).parent / "workers"
TIMEOUT_S = 600  # a safety net


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a worker returned."""

    version: str
    tokens: dict[str, Rows]  # by case; cases that the consumer does not have are missing
    problem: str | None = None  # why it returned nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Consumer:
    """One version of a consumer.

    Without packages it runs in this environment.
    """

    name: str
    worker: str  # a file of WORKERS
    packages: tuple[str, ...] = ()  # of pip, or of npm
    known_differences: tuple[str, ...] = ()  # cases that docs/consumers.md says are wrong

    @property
    def is_node(self) -> bool:
        """True if the worker runs under Node."""
        return self.worker.endswith(".mjs")

    def expected_verdict(self, case: str) -> str:
        """Return whether the tokens of a case should be the same or different."""
        return "different" if case in self.known_differences else "same"

    def install(self, folder: Path, pip_arguments: Sequence[str], echo: Echo) -> None:
        """Create the environment if it does not exist.

        Raises:
            UnavailableError: the installation failed.
        """
        target = folder / self.name
        if self.is_node and not (target / "node_modules").exists():
            echo(f"{target}: installing {self.name}")
            target.mkdir(parents=True, exist_ok=True)
            (target / "package.json").write_text('{"private": true}', encoding="utf-8")
            npm = [
                "npm",
                "install",
                "--silent",
                "--ignore-scripts",
                "--prefix",
                str(target),
                *self.packages,
            ]
            run(npm, f"installing {self.name}")
        elif self.packages and not self.is_node:
            create_environment(target, self.packages, pip_arguments=pip_arguments, echo=echo)

    def answer(self, folder: Path, job: Job) -> Answer:
        """Run the worker on a job."""
        target = folder / self.name
        program = "node" if self.is_node else sys.executable
        if self.packages and not self.is_node:
            program = str(python_of(target))
        options = [] if self.is_node else ["-I"]  # nothing of this project, or of the user
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(
            [program, *options, str(WORKERS / self.worker)],
            input=json.dumps(job.to_json()),
            capture_output=True,
            encoding="utf-8",
            cwd=target if self.is_node else None,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return Answer(version="", tokens={}, problem=f"exit code {done.returncode}: {last}")
        found: dict[str, Any] = json.loads(lines[-1])
        return Answer(version=found["version"], tokens=found["tokens"])


ORT = "onnxruntime_worker.py"
CONSUMERS = (
    Consumer(name="onnxruntime-1.24", worker=ORT, packages=("onnxruntime==1.24.4",)),
    Consumer(name="onnxruntime", worker=ORT),
    Consumer(
        name="optimum-onnx",
        worker="optimum_worker.py",
        packages=("-r", "benchmarks/peers/requirements/optimum-onnx.txt"),
    ),
    Consumer(
        name="onnxruntime-genai-0.12",
        worker="genai_worker.py",
        packages=("onnxruntime-genai==0.12.2", "onnxruntime==1.32.0"),
    ),
    Consumer(
        name="onnxruntime-genai-0.18",
        worker="genai_worker.py",
        packages=("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
    ),
    Consumer(
        name="transformers.js",
        worker="transformers_js_worker.mjs",
        packages=("@huggingface/transformers@4.2.0",),
    ),
    Consumer(
        name="openvino",
        worker="openvino_worker.py",
        packages=("openvino==2026.4.1",),
        known_differences=("left",),
    ),
    Consumer(name="torch-2.6", worker="torchscript_worker.py", packages=("torch==2.6.0", "numpy")),
    Consumer(name="torch", worker="torchscript_worker.py"),
    Consumer(
        name="transformers-4.57",
        worker="tokenizer_worker.py",
        packages=("transformers==4.57.6",),
    ),
    Consumer(name="transformers", worker="tokenizer_worker.py"),
)
