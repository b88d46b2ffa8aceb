"""All kinds of cases by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.harness.bundles import bundle_case, request_case
from tests.faults.harness.cases import Generator, Result, run_case
from tests.faults.harness.checkpoints import torch_case
from tests.faults.harness.disks import disk_case
from tests.faults.harness.models import config_case, tokenizer_case
from tests.faults.harness.schedules import SCHEDULES
from tests.faults.harness.training import run_case as training_run_case
from tests.faults.harness.training import token_folder_case
from tests.faults.harness.weights import gguf_case, safetensors_case

INPUTS: dict[str, Generator] = {
    "safetensors": safetensors_case,
    "gguf": gguf_case,
    "pt": torch_case,
    "config": config_case,
    "tokenizer": tokenizer_case,
    "bundle": bundle_case,
    "request": request_case,
    "tokens": token_folder_case,
    "run": training_run_case,
}
KINDS: dict[str, Callable[[int, Path], Result]] = {
    **{name: partial(run_case, name, make) for name, make in INPUTS.items()},
    **SCHEDULES,
    "disk": disk_case,
}
