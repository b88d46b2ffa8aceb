"""The generation loop with its options as keyword arguments, which reads better in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from gemma3_export.runtimes.generation.generate import Generation
from gemma3_export.runtimes.generation.generate import generate as start
from gemma3_export.runtimes.generation.prepare import GenerationOptions
from gemma3_export.runtimes.protocol import Runtime

OPTIONS = {field.name for field in fields(GenerationOptions)}


def generate(
    runtime: Runtime, prompts: Sequence[Any], sampling: Any, **arguments: Any
) -> Generation:
    options = {name: arguments.pop(name) for name in OPTIONS & arguments.keys()}
    return start(runtime, prompts, sampling, GenerationOptions(**options), **arguments)
