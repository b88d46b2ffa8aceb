"""Export in one call, parity check included: what ``gemma3-export onnx`` runs.

    from gemma3_export.api.exporting import export_onnx, open_weights

    with open_weights("google/gemma-3-270m") as source:
        result = export_onnx(source, "gemma-3-270m")

Importing this module imports nothing heavy; calling it needs the extra ``export``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma3_export.api.verification import ParityCheck, require_packages

if TYPE_CHECKING:
    from gemma3_export.exporters.bundle_writer import ExportResult, GraphWriter
    from gemma3_export.progress import Progress
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["export_onnx", "export_pt2", "export_torchscript", "open_weights"]


def open_weights(
    spec: str | None = None,
    *,
    size: str | None = None,
    config_path: Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    random_seed: int | None = None,
) -> WeightSource:
    """Open weights, reading no more than their headers.

    Args:
        spec: a folder as Hugging Face writes it, a ``.safetensors``, ``.gguf`` or ``.pt`` file, or
            the id of a Hub repository.
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

    return open_source(
        spec,
        size=size,
        config_path=config_path,
        revision=revision,
        token=token,
        random_seed=random_seed,
    )


def export_onnx(
    source: WeightSource,
    output: Path | str,
    *,
    target: str = "ort",
    dtype: str = "fp32",
    activations: str = "fp32",
    block_size: int = 32,
    max_kld: float | None = None,
    calibration: Path | None = None,
    screen: bool | None = None,
    tokenizer: Tokenizer | None = None,
    verify: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export ``source`` as an ONNX bundle at ``output``, and prove it.

    Args:
        source: from :func:`open_weights`.
        output: the folder to create; it appears when it is complete and proven.
        target: ``ort`` for ONNX Runtime's fused kernels, ``portable`` for standard operators.
        dtype: ``fp32``, ``bf16`` or ``fp16``; ``int8`` or ``int4`` for matrices in 8-bit or 4-bit
            blocks; ``mixed`` for each matrix in the smallest format that the budget allows;
            ``keep`` for the blocks of a quantised GGUF.
        activations: what a quantised graph computes in: ``fp32`` for the CPU, ``bf16`` or ``fp16``
            for CUDA.
        block_size: inputs of an ``int8`` or ``int4`` matrix that share a scale; the fewest, for
            ``mixed``.
        max_kld: the divergence from full precision, mean nats a token, at which the export fails;
            None is 0.01, for ``mixed`` 0.05 and for ``int4`` 0.1.
        calibration: UTF-8 text that ``int4`` and ``mixed`` are made with; None lets the model
            write it.
        screen: store the head of an ``fp32`` export for ``ort`` a second time, in 8 bits, so that
            greedy and top-k decoding on the CPU reads a quarter of it; None is wherever that pays.
        tokenizer: None takes the one that came with the weights, if any.
        verify: check parity; without it the manifest says that the bundle is unproven.
        force: replace an existing folder.
        threads: threads inside one operator, of torch and ONNX Runtime; None is all processors, and
            one for models of fewer than 20 million parameters.
        progress: told the stage, and how far it is.

    Raises:
        InputError: the folder exists, or weights, config and tokenizer contradict each other.
        ParityError: the graph does not compute what the reference computes; nothing is kept.
        UnavailableError: the extra ``export`` is not installed.
        Gemma3ExportError: the disk is full or cannot be written.
    """
    require_packages()
    from gemma3_export.exporters.onnx.writer import OnnxWriter
    from gemma3_export.exporters.quantize.calibration import CalibrationPlan

    return _export(
        OnnxWriter(
            target=target,
            dtype=dtype,
            activations=activations,
            block_size=block_size,
            max_kld=max_kld,
            calibration=CalibrationPlan(file=calibration),
            screen=screen,
        ),
        source,
        output,
        tokenizer=tokenizer,
        verify=verify,
        force=force,
        threads=threads,
        progress=progress,
    )


def export_torchscript(
    source: WeightSource,
    output: Path | str,
    *,
    dtype: str = "fp32",
    prepack: bool = True,
    block_size: int = 128,
    max_kld: float | None = None,
    tokenizer: Tokenizer | None = None,
    verify: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export ``source`` as a TorchScript bundle at ``output``, and prove it.

    Args:
        source: from :func:`open_weights`.
        output: the folder to create, or a bundle of the same weights to add the archive to.
        dtype: element type of weights and cache: ``fp32``, ``bf16`` or ``fp16``; ``int8`` for
            matrices in 8-bit blocks and all else in bf16.
        prepack: let the archive lay out its matrices for the CPU when it is loaded.
        block_size: inputs of an ``int8`` matrix that share a scale.
        max_kld: the divergence from full precision, mean nats a token, at which the export fails;
            None is 0.01.
        tokenizer: None takes the one that came with the weights, if any.
        verify: check parity; without it the manifest says that the archive is unproven.
        force: replace an existing folder.
        threads: threads inside one operator, of torch and ONNX Runtime; None is all processors, and
            one for models of fewer than 20 million parameters.
        progress: told the stage, and how far it is.

    Raises:
        Gemma3ExportError: as :func:`export_onnx`.
    """
    require_packages()
    from gemma3_export.exporters.torch.torchscript import TorchScriptWriter

    return _export(
        TorchScriptWriter(dtype=dtype, prepack=prepack, block_size=block_size, max_kld=max_kld),
        source,
        output,
        tokenizer=tokenizer,
        verify=verify,
        force=force,
        threads=threads,
        progress=progress,
    )


def export_pt2(
    source: WeightSource,
    output: Path | str,
    *,
    dtype: str = "fp32",
    tokenizer: Tokenizer | None = None,
    verify: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export ``source`` as a ``torch.export`` program, and prove it.

    Args:
        source: from :func:`open_weights`.
        output: the folder to create, or a bundle of the same weights to add the program to.
        dtype: element type of weights and cache: ``fp32``, ``bf16`` or ``fp16``.
        tokenizer: None takes the one that came with the weights, if any.
        verify: check parity; without it the manifest says that the program is unproven.
        force: replace an existing folder.
        threads: threads inside one operator, of torch and ONNX Runtime; None is all processors, and
            one for models of fewer than 20 million parameters.
        progress: told the stage, and how far it is.

    Raises:
        Gemma3ExportError: as :func:`export_onnx`.
    """
    require_packages()
    from gemma3_export.exporters.torch.pt2 import Pt2Writer

    return _export(
        Pt2Writer(dtype=dtype),
        source,
        output,
        tokenizer=tokenizer,
        verify=verify,
        force=force,
        threads=threads,
        progress=progress,
    )


def _export(
    writer: GraphWriter,
    source: WeightSource,
    output: Path | str,
    *,
    tokenizer: Tokenizer | None,
    verify: bool,
    force: bool,
    threads: int | None,
    progress: Progress | None,
) -> ExportResult:
    from gemma3_export.exporters.bundle_writer import export_bundle
    from gemma3_export.parity.options import threads_for, torch_threads

    check = ParityCheck(runtime=writer.runtime, progress=progress, threads=threads)
    with torch_threads(threads_for(source.config, threads)):
        return export_bundle(
            source,
            Path(output),
            writer,
            tokenizer=tokenizer,
            force=force,
            verification=check if verify else None,
            progress=progress,
        )
