"""What exporting commands share: where weights come from, where the bundle goes, the summary."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
from click.core import ParameterSource

from gemma3_export.progress import Progress, ProgressBars

if TYPE_CHECKING:
    from gemma3_export.device import CudaOptions
    from gemma3_export.exporters.bundle_writer import ExportResult
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.tokenizer import Tokenizer

__all__ = [
    "CudaRequest",
    "ExportOptions",
    "cuda_options",
    "export_options",
    "memory_size",
    "refuse_if_given",
    "run_export",
    "threads_option",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """The shared options, as given."""

    weights: str | None
    size: str | None
    config_path: Path | None
    revision: str | None
    hf_token: str | None
    random_weights: int | None
    tokenizer_path: str | None
    output: Path
    no_verify: bool
    force: bool
    threads: int | None


class Export(Protocol):
    """The part that differs between the commands."""

    def __call__(
        self,
        source: WeightSource,
        output: Path,
        *,
        tokenizer: Tokenizer | None,
        verify: bool,
        force: bool,
        threads: int | None,
        progress: Progress,
    ) -> ExportResult:
        """Export in one format."""


threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads an operator, of torch and ONNX Runtime [default: all processors; 1 for fewer "
    "than 20M parameters].",
)
EXPORT_OPTIONS = (
    click.option(
        "--weights",
        metavar="SRC",
        help="Hub id, folder, .safetensors, .gguf or .pt; demo: the model in this package.",
    ),
    click.option("--size", metavar="S", help="Published size, such as 270m or 4b-it."),
    click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        help="config.json to use instead of the one that comes with the weights.",
    ),
    click.option("--revision", help="Branch, tag or commit of a Hub repository."),
    click.option(
        "--hf-token", metavar="TOKEN", help="Hub access token (default: HF_TOKEN or login)."
    ),
    click.option(
        "--random-weights", type=int, metavar="SEED", help="Draw weights of --size or --config."
    ),
    click.option(
        "--tokenizer",
        "tokenizer_path",
        metavar="PATH",
        help="tokenizer.json, its folder, a .gguf file, or tiktoken:NAME (default: the weights').",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        help="The folder to create, or a bundle of the same weights to add this format to.",
    ),
    click.option("--no-verify", is_flag=True, help="Skip the parity check; the bundle says so."),
    click.option(
        "--force", is_flag=True, help="Replace an existing folder that this program made."
    ),
    threads_option,
)


def export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options; ``command`` gets them as its first argument."""

    @wraps(command)
    def collect(**values: Any) -> None:
        own = {name: values.pop(name) for name in set(values) - set(ExportOptions.__slots__)}
        command(ExportOptions(**values), **own)

    wrapped: Callable[..., None] = collect
    for option in reversed(EXPORT_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def run_export(options: ExportOptions, runtime: str, description: str, export: Export) -> None:
    """Open the weights, export them, and say what was made.

    Args:
        options: the shared options.
        runtime: the backend that runs the new graph.
        description: dtype and target, for the summary.
        export: writes the bundle.
    """
    from gemma3_export.api.exporting import open_weights
    from gemma3_export.tokenizer import load_tokenizer

    refuse_early(options.output, runtime, force=options.force)
    tokenizer = None if options.tokenizer_path is None else load_tokenizer(options.tokenizer_path)
    source = open_weights(
        options.weights,
        size=options.size,
        config_path=options.config_path,
        revision=options.revision,
        token=options.hf_token,
        random_seed=options.random_weights,
    )
    with source, ProgressBars() as progress:
        result = export(
            source,
            options.output,
            tokenizer=tokenizer,
            verify=not options.no_verify,
            force=options.force,
            threads=options.threads,
            progress=progress,
        )
        parameters = source.config.num_parameters
    print_summary(result, runtime, f"{parameters / 1e6:,.1f}M parameters, {description}")


def refuse_early(output: Path, runtime: str, *, force: bool) -> None:
    """Complain about the output before weights are downloaded.

    A bundle that has no graph for ``runtime`` yet may get one.
    """
    from gemma3_export.bundle import MANIFEST, Bundle
    from gemma3_export.staging import refuse_existing

    if not force and (output / MANIFEST).is_file():
        runtimes = [graph.runtime for graph in Bundle(output).manifest.graphs]
        if runtime not in runtimes:
            return
    refuse_existing(output, force=force)


def print_summary(result: ExportResult, runtime: str, description: str) -> None:
    """What was made, whether it is proven, and what to type next."""
    path = result.path
    click.echo(f"{path}: {description}, {result.size_bytes / 1e6:,.1f} MB")
    click.echo(f"export: {result.seconds['export']:.1f} s")
    suffix = "" if runtime == "onnx" else f" --runtime {runtime}"
    if result.verified:
        click.echo(f"parity: {proof_line(path, runtime)} ({result.seconds['parity']:.1f} s)")
    else:
        click.echo(
            "parity: NOT CHECKED (--no-verify). Nothing shows that this bundle computes what the "
            f"model computes; to check it: gemma3-export verify {path}{suffix}"
        )
    if (path / "tokenizer.json").is_file():
        click.echo(f'next: gemma3-export generate {path}{suffix} --prompt "The sea is"')
    else:
        click.echo("no tokenizer came with the weights; --tokenizer adds one, or give token ids")
        click.echo(f"next: gemma3-export generate {path}{suffix} --prompt-ids 2")


def proof_line(path: Path, runtime: str) -> str:
    """The new graph's parity report in one line."""
    from gemma3_export.bundle import PARITY
    from gemma3_export.bundle.inspection import parity_line

    return parity_line(json.loads((path / PARITY).read_text(encoding="utf-8"))[runtime])


# What ``generate``, ``bench`` and ``verify`` let CUDA do, and what happens where it cannot.

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
    """Bytes in ``8GB``, ``512MiB``, ``1.5 GB`` or ``1000000``.

    Raises:
        click.BadParameter: it is no size, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in UNITS:
        raise click.BadParameter(f"{text!r} is no size; give one such as 8GB, 512MiB or 1000000")
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
    """What was asked for on the command line."""

    cuda_graph: bool
    tf32: bool
    gpu_memory_limit: int | None
    cpu_fallback: bool

    def settle(self, device: str, runtime: str) -> tuple[str, CudaOptions | None]:
        """The device to use and what CUDA may do there; None where nothing was asked.

        With ``auto`` the options hold where CUDA is chosen.

        Raises:
            click.UsageError: an option could have no effect.
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
    """``device`` where the doctor finds it usable, else the CPU, with a warning that says why.

    ``auto`` is CUDA or the CPU, without a warning where there is no GPU that might be meant.
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
    """Add the options; the command gets them as one :class:`CudaRequest` called ``cuda``."""

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
        help="On CUDA: capture a decode step once and replay it. Off by default.",
    ),
    click.option(
        "--tf32",
        is_flag=True,
        help="On CUDA: let float32 products round their inputs to 10 bits of mantissa.",
    ),
    click.option(
        "--gpu-memory-limit",
        type=memory_size,
        metavar="SIZE",
        help="On CUDA: of weights and activations, such as 8GB; caches come on top.",
    ),
    click.option(
        "--cpu-fallback",
        is_flag=True,
        help="Go on on the CPU, with a warning, where CUDA cannot be used. Otherwise: exit code 3.",
    ),
)


# Whether an option was given, so that one that would have no effect can be refused.


def refuse_if_given(parameter: str, option: str, reason: str) -> None:
    """End with a usage error where the running command was given ``option`` explicitly.

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
