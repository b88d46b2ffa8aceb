"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gemma3_export.cli.styles import styled
from gemma3_export.dtypes import require_max_kld
from gemma3_export.errors import InputError
from gemma3_export.files import to_path
from gemma3_export.limits import (
    MAX_COUNT,
    MAX_SEED,
    MAX_SIZE_BYTES,
    check_integer,
    check_threads,
    shown,
)

if TYPE_CHECKING:
    from gemma3_export.bundle import Bundle
    from gemma3_export.device import CudaOptions
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.reference.weights.reduced_vocabulary import ReducedSource

__all__ = [
    "BUDGET",
    "PATH",
    "REAL",
    "SEED",
    "TEXT_PATH",
    "THREADS",
    "WHOLE",
    "CudaRequest",
    "Number",
    "adapter_option",
    "cache_size",
    "cuda_options",
    "describe_adapter",
    "describe_reduction",
    "force_option",
    "hf_token_option",
    "integer",
    "is_given",
    "is_terminal",
    "memory_size",
    "note_variant",
    "reduce_vocab_option",
    "reject_if_given",
    "revision_option",
    "runtime_threads_option",
    "threads_option",
    "tokenizer_option",
    "variant_option",
]


class Number(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """A number that a function of ``limits.py`` accepts.

    Args:
        kind: int or float.
        check: raises InputError for a number that is out of range; its message is shown. None
            leaves the range to the Python API.
    """

    def __init__(
        self, kind: type[int] | type[float], check: Callable[[Any], object] | None = None
    ) -> None:
        self.name = "N" if kind is int else "float"  # what --help shows
        self._kind, self._check = kind, check

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        """Return ``value`` as a number."""
        try:
            number = self._kind(value)
        except (ValueError, OverflowError):  # not a number, or more digits than Python reads
            self.fail(f"{shown(value)} is not {WORDS[self._kind]}", param, ctx)
        try:
            if self._check is not None:
                self._check(number)
        except InputError as error:
            self.fail(str(error), param, ctx)
        return number


class FilePath(click.ParamType):  # type: ignore[type-arg]
    """A path that a file can have: see :func:`gemma3_export.files.to_path`.

    Args:
        any_bytes: also accept a name that is not UTF-8.
    """

    name = "path"

    def __init__(self, *, any_bytes: bool = False) -> None:
        self._any_bytes = any_bytes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return ``value`` as a path."""
        try:
            return to_path(value, any_bytes=self._any_bytes)
        except InputError as error:
            self.fail(str(error), param, ctx)


def integer(least: int = 1, most: int = MAX_COUNT) -> Number:
    """Return the type of integers from ``least`` to ``most``."""
    return Number(int, partial(check_integer, "it", least=least, most=most))


WORDS: dict[type, str] = {int: "a whole number", float: "a number"}
THREADS = Number(int, check_threads)
WHOLE, REAL = Number(int), Number(float)
SEED = integer(0, MAX_SEED)
PATH, TEXT_PATH = FilePath(), FilePath(any_bytes=True)
BUDGET = Number(float, require_max_kld)

threads_option = click.option(
    "--threads",
    type=THREADS,
    metavar="N",
    help="Intra-op threads of torch and ONNX Runtime.  [default: all cores that this process may "
    "use; 1 for models whose largest matrix has fewer than 4M elements]",
)
runtime_threads_option = click.option(
    "--threads",
    type=THREADS,
    metavar="N",
    help="Intra-op threads.  [default: chosen by the runtime, within the CPU limit of a container]",
)
adapter_option = click.option(
    "--adapter",
    metavar="SRC",
    help="Folder or Hub id of a PEFT adapter (LoRA, rsLoRA, DoRA) to merge into the weights. "
    "Without --weights, the base is the model that it names.",
)
reduce_vocab_option = click.option(
    "--reduce-vocab",
    metavar="FILE|LANGS",
    help="Keep only the tokens for a text file, or for a list of languages or scripts, such as "
    "en,de or latin,greek. Other text is encoded as bytes.",
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub repository.")
hf_token_option = click.option(
    "--hf-token", metavar="TOKEN", help="Hub access token.  [default: HF_TOKEN or login]"
)
tokenizer_option = click.option(
    "--tokenizer",
    "tokenizer_path",
    metavar="PATH",
    help="tokenizer.json, its folder, a .gguf file, or tiktoken:NAME.  [default: the weights' own]",
)
variant_option = click.option(
    "--variant",
    metavar="NAME",
    help="Which of several graphs in DIR to use, such as fp32, int8 or int4-fp16.  "
    "[default: the one in model.onnx, otherwise the first]",
)
force_option = click.option(
    "--force", is_flag=True, help="Replace an existing folder that gemma3-export made."
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
        raise click.BadParameter(
            f"{shown(text)} is not a size; give one such as 8GB, 512MiB or 1000000"
        )
    size = float(match[1]) * UNITS[match[2].lower()]
    if not 1 <= size <= MAX_SIZE_BYTES:
        what = "less than a byte" if size < 1 else "more than any memory"
        raise click.BadParameter(f"{shown(text)} is {what}; give a size such as 8GB")
    return int(size)


def cache_size(text: str) -> int:
    """Return the bytes in a size such as ``256MB``; 0 is allowed.

    Raises:
        click.BadParameter: it is not a size.
    """
    return 0 if text.strip() == "0" else memory_size(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaRequest:
    """The CUDA options as given on the command line."""

    cuda_graph: bool | None
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
        if device == "cpu" or not (given or self.cuda_graph is False):
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
            styled(
                f"warning: {report.facts.device} cannot be used, so this runs on the CPU "
                f"(--cpu-fallback): {problem.what}; fix: {problem.fix}"
            ),
            err=True,
        )
    return "cpu"


def describe_adapter(source: WeightSource) -> str:
    """Return the adapter that was merged into ``source``, for a summary; empty if none was."""
    from gemma3_export.reference.weights.adapter import AdapterSource

    if not isinstance(source, AdapterSource):
        return ""
    adapter = source.adapter
    return f" ({adapter.config.kind} adapter {adapter.origin} merged with {source.base.origin})"


def describe_reduction(source: ReducedSource, bytes_per_parameter: float) -> str:
    """Return a line about the tokens that were kept, and what that saves."""
    kept, full = source.config.vocab_size, source.base.config.vocab_size
    saved = source.saved_parameters
    return (
        f"vocabulary: {kept:,} of {full:,} tokens ({source.reduction.about}); saves "
        f"{saved / 1e6:,.1f}M parameters, {saved * bytes_per_parameter / 1e6:,.1f} MB"
    )


def cuda_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the CUDA options; the command receives them as a :class:`CudaRequest` named ``cuda``."""

    @functools.wraps(command)
    def with_request(
        *arguments: Any,
        cuda_graph: bool | None,
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
        default=None,
        help="On CUDA: capture decode steps as CUDA graphs and replay them.  "
        "[default: if possible]",
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
        help="Fall back to the CPU, with a warning, if CUDA is unavailable.  "
        "[default: exit code 3]",
    ),
)


def note_variant(bundle: Bundle, used: str) -> None:
    """Say on stderr which of several variants was used, if none was chosen."""
    variants = bundle.variants()
    if bundle.variant is None and len(variants) > 1:
        click.echo(
            f"note: {bundle.path} has the variants {', '.join(variants)}; this is {used} (choose "
            "with --variant)",
            err=True,
        )


def is_given(parameter: str) -> bool:
    """Return whether an option, by its name in Python, was given to the running command."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source not in (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def is_terminal() -> bool:
    """Return whether somebody types and reads in a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def reject_if_given(parameter: str, option: str, reason: str) -> None:
    """Raise a usage error if ``option`` was given explicitly to the running command.

    Args:
        parameter: the option's name in Python, such as ``block_size``.
        option: the same on the command line, such as ``--block-size``.
        reason: why it would have no effect.

    Raises:
        click.UsageError: it was given.
    """
    if is_given(parameter):
        raise click.UsageError(f"{option} would have no effect: {reason}; leave it out")
