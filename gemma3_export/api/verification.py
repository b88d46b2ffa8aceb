"""Check a bundle in one call: what ``gemma3-export verify`` and the end of every export run.

    from gemma3_export.api.verification import verify_bundle

    report = verify_bundle("gemma-3-270m")
    assert report.passed

Importing this module imports nothing heavy; calling it needs the extra ``export``.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma3_export.api.opening import open_runtime
from gemma3_export.bundle import MANIFEST, RUNTIMES, Bundle
from gemma3_export.errors import InputError, ParityError, UnavailableError
from gemma3_export.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gemma3_export.parity import ParityReport, VerifyOptions
    from gemma3_export.parity.report.model import HalfRanges
    from gemma3_export.progress import Progress
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.runtimes.onnx.session import CudaOptions
    from gemma3_export.runtimes.protocol import Runtime
    from gemma3_export.tokenizer import Tokenizer

__all__ = ["ParityCheck", "bundle_tokenizer", "require_packages", "verify_bundle"]

PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript")
TRANSFORMERS = "transformers"


def verify_bundle(
    bundle: Bundle | Path | str,
    *,
    runtime: str = "onnx",
    device: str = "auto",
    threads: int | None = None,
    cuda: CudaOptions | None = None,
    source: WeightSource | None = None,
    against: str | None = None,
    seed: int = 0,
    max_kld: float | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Hold a runtime of ``bundle`` against the reference, or against another runtime.

    Args:
        bundle: an opened bundle, or its folder; all its files are hashed first.
        runtime: which runtime of the bundle to check.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads inside one operator, of torch and ONNX Runtime; None is all processors,
            and one for models of fewer than 20 million parameters.
        cuda: what may be done on a GPU; ignored on the CPU.
        source: the weights it was made from; None takes those in the bundle, which leaves a
            quantised bundle without gate B.
        against: another runtime of this bundle by its name, another bundle's folder,
            ``transformers`` (which gets the bundle's weights) or a Hugging Face folder; None is the
            reference in float64.
        seed: of the random token ids.
        max_kld: gate B's budget, mean nats a token; None is what the bundle was exported with.
        progress: told the stage, and how far it is.

    Raises:
        InputError: the bundle is not what was exported, the two are different models, or the budget
            is no positive number.
        UnavailableError: a package or the device is missing.
    """
    require_packages()
    from gemma3_export.parity import VerifyOptions
    from gemma3_export.parity.options import threads_for, torch_threads

    if not isinstance(bundle, Bundle):
        bundle = Bundle(Path(bundle))
    budget = bundle.max_kld(runtime) if max_kld is None else max_kld
    options = VerifyOptions.for_budget(budget, seed=seed)
    threads = threads_for(bundle.config, threads)
    bundle.check_files()
    with torch_threads(threads):
        return _compared(
            bundle,
            open_runtime(bundle, runtime, device=device, threads=threads, cuda=cuda),
            source,
            against,
            options,
            progress,
            runtime=runtime,
            device=device,
            threads=threads,
            cuda=cuda,
        )


def _compared(
    bundle: Bundle,
    candidate: Runtime,
    source: WeightSource | None,
    against: str | None,
    options: VerifyOptions,
    progress: Progress | None,
    *,
    runtime: str,
    device: str,
    threads: int | None,
    cuda: CudaOptions | None,
) -> ParityReport:
    """The report on ``candidate``; see :func:`verify_bundle`."""
    from gemma3_export.parity import compare, verify
    from gemma3_export.reference.weights.bundle_weights import open_bundle_weights

    tokenizer = bundle_tokenizer(bundle)
    full_source = None
    if source is None or bundle.is_quantized(runtime):  # such a graph has other weights
        full_source, source = source, open_bundle_weights(bundle, runtime)
    files = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    if against is None:
        return verify(
            candidate,
            source,
            options=options,
            tokenizer=tokenizer,
            full_source=full_source,
            files=files,
            progress=progress,
        )
    if against in RUNTIMES:
        baseline = open_runtime(bundle, against, device=device, threads=threads)
    else:
        baseline = open_baseline(
            against, source, runtime, device=device, threads=threads, cuda=cuda
        )
    return compare(
        candidate,
        baseline,
        source,
        options=options,
        tokenizer=tokenizer,
        files=files,
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class ParityCheck:
    """The parity check as the last step of an export.

    It is a :class:`gemma3_export.exporters.bundle_writer.Verification`, and runs on the CPU so that
    the proof does not depend on the machine that exports.
    """

    runtime: str
    progress: Progress | None = None
    threads: int | None = None  # as for :func:`verify_bundle`

    def __call__(self, folder: Path, source: WeightSource, ranges: HalfRanges | None = None) -> str:
        """Return the text of ``parity.json``.

        Raises:
            ParityError: naming the first case and the layer that differ.
        """
        from gemma3_export.parity import VerifyOptions, verify
        from gemma3_export.parity.options import threads_for, torch_threads
        from gemma3_export.reference.weights.bundle_weights import open_bundle_weights

        bundle = Bundle(folder)
        is_quantized = bundle.is_quantized(self.runtime)
        threads = threads_for(bundle.config, self.threads)
        with torch_threads(threads):
            report = verify(
                open_runtime(bundle, self.runtime, device="cpu", threads=threads),
                open_bundle_weights(bundle, self.runtime) if is_quantized else source,
                options=VerifyOptions.for_budget(bundle.max_kld(self.runtime)),
                full_source=source if is_quantized else None,
                tokenizer=bundle_tokenizer(bundle),
                files={name: record.sha256 for name, record in bundle.manifest.files.items()},
                ranges=ranges,
                progress=self.progress,
            )
        if not report.passed:
            raise ParityError(_why_it_failed(report, bundle.max_kld(self.runtime)))
        return report.to_json()


def _why_it_failed(report: ParityReport, budget: float) -> str:
    """One message: what failed, by how much, and what can be done.

    Args:
        report: a report that did not pass.
        budget: mean nats a token that the export was allowed.
    """
    from gemma3_export.parity.report.terminal import describe_divergence, verdict_line

    is_exact = all(gate.passed for gate in report.gates if gate.name != "quality")
    what = (
        "the weights lie too far from full precision"
        if is_exact
        else "the export does not compute what the model computes"
    )
    where = f"; {describe_divergence(report.divergence)}" if report.divergence else ""
    remedy = (
        f"The limits of KLD, agreement and perplexity all follow from --max-kld, {budget:g} here: "
        "give a larger one to accept that, or take another --dtype. "
        if is_exact
        else ""
    )
    return (
        f"{what}, and nothing was kept: {verdict_line(report)}{where}. {remedy}To look into it, "
        "export with --no-verify and run `gemma3-export verify DIR --html report.html`"
    )


def bundle_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The tokenizer of ``bundle``, checked against its model, or None.

    Raises:
        InputError: it is damaged, or another model's.
    """
    path = bundle.file("tokenizer.json")
    if not path.is_file():
        return None
    tokenizer = load_tokenizer(path)
    tokenizer.check_vocab_size(bundle.config.vocab_size)
    return tokenizer


def open_baseline(
    against: str,
    source: WeightSource,
    runtime: str,
    *,
    device: str,
    threads: int | None,
    cuda: CudaOptions | None,
) -> Runtime:
    """The runtime that ``against`` names: see :func:`verify_bundle`.

    Raises:
        InputError: it is neither a bundle nor a Hugging Face folder.
        UnavailableError: transformers is not installed.
    """
    folder = Path(against)
    if (folder / MANIFEST).is_file():
        other = Bundle(folder)
        other.check_files()
        return open_runtime(other, runtime, device=device, threads=threads, cuda=cuda)
    from gemma3_export.parity.transformers_runtime import TransformersRuntime

    if (folder / "config.json").is_file():
        return TransformersRuntime(folder)
    if against != TRANSFORMERS:
        raise InputError(
            f"{against!r} is neither a bundle nor a Hugging Face folder; give one of them, or "
            f"{TRANSFORMERS!r} to compare with that package"
        )
    from gemma3_export.reference.training.model_folder import export_hf_folder

    with tempfile.TemporaryDirectory(prefix="gemma3-export-") as parent:
        export_hf_folder(source, Path(parent) / "model", dtype=None)
        return TransformersRuntime(Path(parent) / "model")


def require_packages() -> None:
    """Complain when the extra ``export`` is not installed.

    Raises:
        UnavailableError: naming what is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f'this needs {", ".join(missing)}; run: pip install "gemma3-export[export,cpu]"'
        )
