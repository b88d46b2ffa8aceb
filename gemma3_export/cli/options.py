"""Options that several commands share: threads, and what CUDA may do."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from gemma3_export.device import CudaOptions

__all__ = [
    "CudaRequest",
    "cache_size",
    "cuda_options",
    "memory_size",
    "refuse_if_given",
    "threads_option",
]

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Intra-op threads of torch and ONNX Runtime [default: all cores; 1 for models with fewer "
    "than 20M parameters].",
)
TAKEN_BY = {  # runtimes for which an option has an effect
    "--cuda-graph": ("onnx", "torchscript"),
    "--tf32": ("onnx",),
    "--gpu-memory-limit": ("onnx",),
}
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def memory_size(text: str) -> int:
    """Return the bytes in a size such as ``8GB``, ``512MiB``, ``1.5 GB`` or ``1000000``.

    Raises:
        click.BadParameter: it is not a size, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in UNITS:
        raise click.BadParameter(f"{text!r} is not a size; give one such as 8GB, 512MiB or 1000000")
    size = int(float(match[1]) * UNITS[match[2].lower()])
    if size < 1:
        raise click.BadParameter(f"{text!r} is less than a byte; give a size such as 8GB")
    return size


def cache_size(text: str) -> int:
    """Return the bytes in a size such as ``256MB``; 0 is allowed.

    Raises:
        click.BadParameter: it is not a size.
    """
    return 0 if text.strip() == "0" else memory_size(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaRequest:
    """The CUDA options as given on the command line."""

    cuda_graph: bool
    tf32: bool
    gpu_memory_limit: int | None
    cpu_fallback: bool

    def settle(self, device: str, runtime: str) -> tuple[str, CudaOptions | None]:
        """Return the device to use, and what CUDA may do there (None for the defaults).

        With ``auto`` the options apply if CUDA is chosen.

        Raises:
            click.UsageError: an option cannot have an effect.
            InputError: the device's name is unknown.
        """
        from gemma3_export.device import CudaOptions, parse_device

        wanted = parse_device(device)
        given = self._given()
        for option in given:
            if runtime not in TAKEN_BY[option]:
                raise click.UsageError(
                    f"{option} is for {' and '.join(TAKEN_BY[option])}, not for the {runtime} "
                    "runtime; leave it out"
                )
        if wanted is not None and wanted.kind == "cpu":
            if self.cpu_fallback:
                given.append("--cpu-fallback")
            if given:
                raise click.UsageError(
                    f"{given[0]} has no effect on the CPU; leave it out, or pass --device cuda"
                )
        if self.cpu_fallback:
            device = usable_device(device, runtime)
        if not given or device == "cpu":
            return device, None
        return device, CudaOptions(
            graph=self.cuda_graph, tf32=self.tf32, memory_limit_bytes=self.gpu_memory_limit
        )

    def _given(self) -> list[str]:
        asked = {
            "--cuda-graph": self.cuda_graph,
            "--tf32": self.tf32,
            "--gpu-memory-limit": self.gpu_memory_limit,
        }
        return [name for name, value in asked.items() if value]


def usable_device(device: str, runtime: str) -> str:
    """Return ``device`` if the doctor finds it usable, else ``cpu`` with a warning.

    ``auto`` falls back without a warning on a machine that has no GPU.
    """
    from gemma3_export.cuda.doctor import examine

    asked = "cuda" if device == "auto" else device
    report = examine(asked, runtime)
    if report.is_usable:
        return asked
    has_gpu = report.facts.driver is not None and report.facts.driver.gpus
    if device != "auto" or has_gpu:
        problem = next(problem for problem in report.problems if problem.blocks)
        click.echo(
            f"warning: {report.facts.device} cannot be used, so this runs on the CPU "
            f"(--cpu-fallback): {problem.what}; fix: {problem.fix}",
            err=True,
        )
    return "cpu"


def cuda_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the CUDA options; the command receives them as a :class:`CudaRequest` named ``cuda``."""

    @functools.wraps(command)
    def with_request(
        *arguments: Any,
        cuda_graph: bool,
        tf32: bool,
        gpu_memory_limit: int | None,
        cpu_fallback: bool,
        **options: Any,
    ) -> None:
        request = CudaRequest(
            cuda_graph=cuda_graph,
            tf32=tf32,
            gpu_memory_limit=gpu_memory_limit,
            cpu_fallback=cpu_fallback,
        )
        command(*arguments, cuda=request, **options)

    for option in reversed(CUDA_OPTIONS):
        with_request = option(with_request)
    return with_request


CUDA_OPTIONS = (
    click.option(
        "--cuda-graph/--no-cuda-graph",
        default=False,
        help="On CUDA: capture a decode step as a CUDA graph and replay it. Off by default.",
    ),
    click.option(
        "--tf32",
        is_flag=True,
        help="On CUDA: allow TF32 in float32 matrix products (10 bits of mantissa).",
    ),
    click.option(
        "--gpu-memory-limit",
        type=memory_size,
        metavar="SIZE",
        help="On CUDA: limit on weights and activations, such as 8GB; caches are not included.",
    ),
    click.option(
        "--cpu-fallback",
        is_flag=True,
        help="Fall back to the CPU, with a warning, if CUDA is unavailable [default: exit code 3].",
    ),
)


def refuse_if_given(parameter: str, option: str, reason: str) -> None:
    """Raise a usage error if ``option`` was given explicitly to the running command.

    Args:
        parameter: the option's name in Python, such as ``block_size``.
        option: the same on the command line, such as ``--block-size``.
        reason: why it would have no effect.

    Raises:
        click.UsageError: it was given.
    """
    source = click.get_current_context().get_parameter_source(parameter)
    if source not in (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP):
        raise click.UsageError(f"{option} would have no effect: {reason}; leave it out")
