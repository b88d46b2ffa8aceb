"""Export weights as a bundle, parity check included.

    import gemma3_export

    gemma3_export.export_onnx("google/gemma-3-270m", "gemma-3-270m", dtype="int8")

Importing this module imports nothing heavy; calling it needs the extra ``export``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.api.checks import (
    check_budget,
    check_callables,
    check_flags,
    check_integers,
    check_paths,
    check_texts,
)
from gemma3_export.api.options import merged
from gemma3_export.api.verification import ParityCheck, opened_weights, require_packages
from gemma3_export.dtypes import EXPORT_DTYPES
from gemma3_export.errors import InputError
from gemma3_export.files import to_path
from gemma3_export.limits import check_threads, is_number, shown
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gemma3_export.exporters.bundle_writer import ExportResult, GraphWriter
    from gemma3_export.progress import Progress
    from gemma3_export.reference.weights import WeightSource

__all__ = [
    "ExportOptions",
    "OnnxOptions",
    "Pt2Options",
    "TorchScriptOptions",
    "export_onnx",
    "export_pt2",
    "export_torchscript",
    "open_weights",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Options of every export.

    Args:
        dtype: how weights are stored, or several such dtypes, which become variants in one bundle;
            :func:`gemma3_export.dtypes.dtype_choices` lists what each format supports. Options that
            some of several dtypes do not have are ignored for those.
        adapter: folder or Hub id of a LoRA adapter of PEFT to merge into the weights.
        tokenizer: a tokenizer, or the path of one; None is the one that came with the weights.
        reduce_vocab: keep only the tokens that a text file needs, or a list of languages or scripts
            such as ``en,de`` or ``latin,greek``.
        verify: check parity; otherwise the manifest says that the graph is unproven.
        force: replace an existing folder that this program made.
        threads: intra-op threads of torch and ONNX Runtime; None is all cores, or 1 for models
            whose largest matrix has fewer than 4 million elements.
        progress: callback that receives (stage, done, total).
    """

    dtype: str | Sequence[str] = "fp32"
    adapter: Path | str | None = None
    tokenizer: Tokenizer | Path | str | None = None
    reduce_vocab: Path | str | None = None
    verify: bool = True
    force: bool = False
    threads: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        dtypes = self.dtype
        if not isinstance(dtypes, str | Sequence) or not all(isinstance(n, str) for n in dtypes):
            raise InputError(f"dtype is {dtypes!r:.60}; it must be a string or a list of strings")
        check_flags(self, "verify", "force")
        check_threads(self.threads)
        check_callables(self, "progress")
        check_paths(self, "adapter", "reduce_vocab")
        if not isinstance(self.tokenizer, Tokenizer | Path | str | None):
            raise InputError(
                f"tokenizer is {self.tokenizer!r:.60}; it must be a Tokenizer or the path of one"
            )

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes as a tuple."""
        return (self.dtype,) if isinstance(self.dtype, str) else tuple(self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxOptions(ExportOptions):
    """Options of an ONNX export.

    Args:
        target: ``ort`` for ONNX Runtime's fused kernels, ``portable`` for standard operators,
            ``web`` for browsers.
        activations: element type that a quantized graph computes in: ``fp32`` for the CPU,
            ``bf16`` or ``fp16`` for CUDA.
        block_size: inputs of an ``int8`` or ``int4`` matrix that share a scale; for ``mixed``, the
            fewest.
        max_kld: divergence from full precision, in mean nats per token, at which the export fails;
            None is the default of ``dtype``: 0.01, for ``mixed`` 0.05 and for ``int4`` 0.1.
        calibration: UTF-8 text to calibrate ``int4`` and ``mixed`` with; None lets the model
            write it.
        rounding: how ``int4`` rounds: ``gptq``, ``q4_0`` (llama.cpp's rule, for QAT checkpoints),
            or ``auto``, which recognizes weights that were trained for ``q4_0``.
        screen: also store the head of an ``fp32`` export for ``ort`` in 8 bits, so that greedy and
            top-k decoding on the CPU reads a quarter of it; None is wherever that pays.
        opset: version of the standard operator set of a ``portable`` graph: 21 for runtimes without
            opset 23, such as ONNX Runtime 1.18; None is 23.
    """

    target: str = "ort"
    activations: str = "fp32"
    block_size: int = 32
    max_kld: float | None = None
    calibration: Path | str | None = None
    rounding: str = "auto"
    screen: bool | None = None
    opset: int | None = None

    def __post_init__(self) -> None:
        ExportOptions.__post_init__(self)
        check_texts(self, "target", "activations", "rounding")
        check_integers(self, 1, "block_size", "opset")
        check_budget(self)
        check_paths(self, "calibration")
        check_flags(self, "screen")


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchScriptOptions(ExportOptions):
    """Options of a TorchScript export.

    Args:
        prepack: let the archive lay out its matrices for the CPU when it is loaded.
        block_size: inputs of an ``int8`` matrix that share a scale.
        max_kld: as for :class:`OnnxOptions`.
    """

    prepack: bool = True
    block_size: int = 128
    max_kld: float | None = None

    def __post_init__(self) -> None:
        ExportOptions.__post_init__(self)
        check_flags(self, "prepack")
        check_integers(self, 1, "block_size")
        check_budget(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pt2Options(ExportOptions):
    """Options of a ``torch.export`` export."""


def open_weights(
    spec: Path | str | None = None,
    *,
    adapter: Path | str | None = None,
    size: str | None = None,
    config_path: Path | str | None = None,
    revision: str | None = None,
    token: str | None = None,
    random_seed: int | None = None,
) -> WeightSource:
    """Open weights, reading no more than their headers.

    Args:
        spec: a folder in Hugging Face's format, a ``.safetensors``, ``.gguf`` or ``.pt`` file, or
            the id of a Hub repository. A LoRA adapter of PEFT is merged into the base it names.
        adapter: folder or Hub id of a LoRA adapter of PEFT to merge into the weights; without
            ``spec`` and ``size``, into the base that it names.
        size: a published size; alone it means the official Hub repository.
        config_path: the ``config.json`` to use instead of the one that comes with the weights.
        revision: branch, tag or commit of a Hub repository.
        token: Hub access token.
        random_seed: draw random weights of ``size`` or ``config_path`` instead.

    Raises:
        InputError: the weights are absent, damaged, not accessible, or do not fit their config.
        UnavailableError: the extra ``export`` is not installed, or the Hub cannot be reached.
    """
    require_packages()
    from gemma3_export.reference.weights import open_weights as open_source

    for name, value in (("size", size), ("revision", revision), ("token", token)):
        if not isinstance(value, str | None):
            raise TypeError(f"{name} is a string, not {value!r:.60}")
    if random_seed is not None and not is_number(random_seed, Integral):
        raise TypeError(f"random_seed is an integer, not {shown(random_seed)}")
    return open_source(
        None if spec is None else str(to_path(spec, "the weights")),
        adapter=None if adapter is None else str(to_path(adapter, "adapter")),
        size=size,
        config_path=None if config_path is None else to_path(config_path, "config_path"),
        revision=revision,
        token=token,
        random_seed=random_seed,
    )


def export_onnx(
    weights: WeightSource | Path | str,
    output: Path | str,
    options: OnnxOptions | None = None,
    **changes: Any,
) -> ExportResult:
    """Export ``weights`` as an ONNX bundle at ``output``, and prove it.

    Args:
        weights: what :func:`open_weights` takes or returns; the folder of an adapter merges it.
        output: the folder to create, or a bundle of the same weights to add the graphs to; it
            appears when it is complete and proven.
        options: how to export.
        changes: fields of :class:`OnnxOptions`, such as ``dtype="int8"`` or
            ``dtype=("fp32", "int8")``.

    Raises:
        InputError: the folder exists, or weights, config and tokenizer contradict each other.
        ParityError: the graph does not compute what the reference computes; nothing is kept.
        UnavailableError: the extra ``export`` is not installed.
        Gemma3ExportError: the disk is full or cannot be written.
    """
    require_packages()
    from gemma3_export.exporters.onnx.writer import OnnxWriter
    from gemma3_export.exporters.quantize.calibration import CalibrationOptions

    chosen = merged(OnnxOptions, options, changes)
    calibration = CalibrationOptions(
        file=None if chosen.calibration is None else to_path(chosen.calibration)
    )
    writers = [
        OnnxWriter(
            target=item.target,
            dtype=dtype,
            activations=item.activations,
            block_size=item.block_size,
            max_kld=item.max_kld,
            calibration=calibration,
            rounding=item.rounding,
            screen=item.screen,
            opset=item.opset,
        )
        for dtype in chosen.dtypes
        for item in [_for_one_of_several(chosen, dtype)]
    ]
    return _export(writers, weights, output, chosen)


def _for_one_of_several(options: OnnxOptions, dtype: str) -> OnnxOptions:
    """Return ``options`` without those that only others of several dtypes have."""
    takers = {
        "activations": [n for n, item in EXPORT_DTYPES.items() if item.has_half_activations],
        "block_size": [n for n, item in EXPORT_DTYPES.items() if item.has_block_size],
        "rounding": ["int4"],
        "screen": ["fp32"],
    }
    defaults = OnnxOptions()
    return replace(
        options,
        **{
            name: getattr(defaults, name)
            for name, dtypes in takers.items()
            if dtype not in dtypes and not set(dtypes).isdisjoint(options.dtypes)
        },
    )


def export_torchscript(
    weights: WeightSource | Path | str,
    output: Path | str,
    options: TorchScriptOptions | None = None,
    **changes: Any,
) -> ExportResult:
    """Export ``weights`` as a TorchScript bundle at ``output``, and prove it.

    Args:
        weights: what :func:`open_weights` takes or returns.
        output: the folder to create, or a bundle of the same weights to add the archive to.
        options: how to export.
        changes: fields of :class:`TorchScriptOptions`.

    Raises:
        Gemma3ExportError: as :func:`export_onnx`.
    """
    require_packages()
    from gemma3_export.exporters.torch.torchscript import TorchScriptWriter

    chosen = merged(TorchScriptOptions, options, changes)
    writers = [
        TorchScriptWriter(
            dtype=dtype,
            prepack=chosen.prepack,
            block_size=chosen.block_size,
            max_kld=chosen.max_kld,
        )
        for dtype in chosen.dtypes
    ]
    return _export(writers, weights, output, chosen)


def export_pt2(
    weights: WeightSource | Path | str,
    output: Path | str,
    options: Pt2Options | None = None,
    **changes: Any,
) -> ExportResult:
    """Export ``weights`` as a ``torch.export`` program, and prove it.

    Args:
        weights: what :func:`open_weights` takes or returns.
        output: the folder to create, or a bundle of the same weights to add the program to.
        options: how to export.
        changes: fields of :class:`Pt2Options`.

    Raises:
        Gemma3ExportError: as :func:`export_onnx`.
    """
    require_packages()
    from gemma3_export.exporters.torch.pt2 import Pt2Writer

    chosen = merged(Pt2Options, options, changes)
    return _export([Pt2Writer(dtype=dtype) for dtype in chosen.dtypes], weights, output, chosen)


def _export(
    writers: Sequence[GraphWriter],
    weights: WeightSource | Path | str,
    output: Path | str,
    options: ExportOptions,
) -> ExportResult:
    from gemma3_export.exporters.bundle_writer import export_bundle
    from gemma3_export.parity.options import threads_for, torch_threads
    from gemma3_export.reference.weights.reduced_vocabulary import reduce_vocabulary

    check = ParityCheck(progress=options.progress, threads=options.threads)
    tokenizer = options.tokenizer
    if isinstance(tokenizer, Path | str):
        tokenizer = load_tokenizer(tokenizer)
    with (
        opened_weights(weights, options.adapter) as source,
        torch_threads(threads_for(source.config, options.threads)),
    ):
        if options.reduce_vocab is not None:
            source = reduced = reduce_vocabulary(source, options.reduce_vocab, tokenizer)
            tokenizer = reduced.tokenizer
        return export_bundle(
            source,
            to_path(output, "output"),
            *writers,
            tokenizer=tokenizer,
            force=options.force,
            verification=check if options.verify else None,
            progress=options.progress,
        )
