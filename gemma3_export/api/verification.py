"""Check a bundle's parity, as ``gemma3-export verify`` and the end of every export do.

    import gemma3_export

    assert gemma3_export.verify("gemma-3-270m").passed

A graph that another tool exported is compared with weights by the same check.

Importing this module imports nothing heavy; calling it needs the extra ``export``.
"""

from __future__ import annotations

import importlib.util
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_export.api.checks import (
    check_budget,
    check_callables,
    check_cuda,
    check_flags,
    check_integers,
    check_paths,
    check_texts,
)
from gemma3_export.api.model_files import bundle_tokenizer
from gemma3_export.api.opening import open_runtime
from gemma3_export.api.options import merged
from gemma3_export.api.other_graphs import file_hashes, find_graph, open_graph
from gemma3_export.bundle import MANIFEST, RUNTIMES, Bundle
from gemma3_export.bundle.manifest import source_identity
from gemma3_export.config import CONFIG_NAME, Gemma3Config, load_config
from gemma3_export.dtypes import DEFAULT_MAX_KLD
from gemma3_export.errors import InputError, ParityError, UnavailableError
from gemma3_export.files import is_file, to_path
from gemma3_export.limits import MAX_SEED, check_threads
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.staging import reject_existing
from gemma3_export.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gemma3_export.bundle import Graph
    from gemma3_export.device import CudaOptions
    from gemma3_export.parity import ParityReport, VerifyOptions
    from gemma3_export.parity.report.model import HalfRanges
    from gemma3_export.reference.weights import WeightSource
    from gemma3_export.runtimes.protocol import Runtime

__all__ = ["ParityCheck", "VerifyRequest", "require_packages", "verify"]

PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript")
TRANSFORMERS = "transformers"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """A parity check to run.

    Args:
        runtime: which runtime of the bundle to check; a graph of another tool has ``onnx`` only.
        variant: which of its graphs, such as ``int8``; None is the default, or what an opened
            bundle uses.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: intra-op threads of torch and ONNX Runtime; None is all cores, or 1 for models
            whose largest matrix has fewer than 4 million elements.
        cuda: what may be done on a GPU; ignored on the CPU.
        weights: the weights that the bundle was made from, as :func:`open_weights` takes or
            returns them; None takes those in the bundle, so a quantized bundle is not compared
            with full precision. A graph of another tool needs them.
        adapter: the LoRA adapter that was merged into ``weights``, or into the base it names.
        tokenizer: a tokenizer as :func:`gemma3_export.tokenizer.load_tokenizer` takes it, for the
            cases with text; None takes that of the bundle, or else of the weights.
        against: another runtime of this bundle by its name, another bundle's folder,
            ``transformers`` (which gets the bundle's weights) or a Hugging Face folder; None is the
            reference in float64. Of a folder, tokenizer, templates and special tokens are compared
            too.
        stamp: add the report of a passing check to the bundle, which then counts as verified. The
            proof is that of an export: on the CPU, against the weights that the manifest names.
        seed: of the random token ids.
        max_kld: largest divergence from full precision, in mean nats per token; None is what the
            bundle was exported with.
        progress: callback that receives (stage, done, total).
    """

    runtime: str = "onnx"
    variant: str | None = None
    device: str = "auto"
    threads: int | None = None
    cuda: CudaOptions | None = None
    weights: WeightSource | Path | str | None = None
    adapter: Path | str | None = None
    tokenizer: Path | str | None = None
    against: Path | str | None = None
    stamp: bool = False
    seed: int = 0
    max_kld: float | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_texts(self, "runtime", "device", "variant")
        check_threads(self.threads)
        check_integers(self, 0, "seed", most=MAX_SEED)
        check_budget(self)
        check_paths(self, "against", "adapter", "tokenizer")
        check_flags(self, "stamp")
        check_callables(self, "progress")
        check_cuda(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is checked, and what it is checked with.

    ``source`` has the weights that the candidate should have, dequantized where it is quantized,
    and ``full_source`` those that it was quantized from.
    """

    path: Path
    candidate: Runtime
    source: WeightSource
    full_source: WeightSource | None
    tokenizer: Tokenizer | None
    files: dict[str, str]  # SHA-256 by name
    bundle: Bundle | None  # None: a graph of another tool


def verify(
    bundle: Bundle | Path | str, request: VerifyRequest | None = None, **changes: Any
) -> ParityReport:
    """Compare a runtime of ``bundle`` with the reference, or with another runtime.

    Every file of the bundle is hashed first.

    Args:
        bundle: an opened bundle, or its folder; or a graph that another tool exported: a ``.onnx``
            file, or a folder with one. Such a graph is compared with ``weights``.
        request: what to compare it with, and how.
        changes: fields of :class:`VerifyRequest`, such as ``against="transformers"``.

    Returns:
        The report; ``passed`` is the verdict.

    Raises:
        InputError: the bundle is not what was exported, the two are different models, the graph of
            another tool cannot be fed, or the budget is not a positive number.
        UnavailableError: a package or the device is missing.
    """
    require_packages()
    request = merged(VerifyRequest, request, changes)
    graph = None if isinstance(bundle, Bundle) else find_graph(bundle)
    with ExitStack() as stack:
        if graph is not None:
            return _verify_graph(graph, request, stack)
        return _verify_bundle(
            bundle if isinstance(bundle, Bundle) else Bundle(bundle), request, stack
        )


def _verify_bundle(bundle: Bundle, request: VerifyRequest, stack: ExitStack) -> ParityReport:
    bundle = bundle.with_variant(request.variant)
    if request.stamp:
        request = _stampable(bundle, request)
    budget = bundle.max_kld(request.runtime) if request.max_kld is None else request.max_kld
    options = _options(request, budget)
    request = _with_threads(bundle.config, request, stack)
    progress = request.progress or ignore_progress
    bundle.check_files(progress=progress)
    source = None
    if request.weights is not None or request.adapter is not None:
        source = stack.enter_context(opened_weights(request.weights, request.adapter))
        source = _as_in_bundle(bundle, source)
        if request.stamp:
            _require_source(bundle, source)
    progress("opening the runtime", 0, 1)
    candidate = open_runtime(
        bundle,
        request.runtime,
        device=request.device,
        threads=request.threads,
        cuda=request.cuda,
    )
    progress("opening the runtime", 1, 1)
    from gemma3_export.reference.weights.bundle_weights import open_bundle_weights

    full_source = None
    if source is None or bundle.is_quantized(request.runtime):  # such a graph has other weights
        full_source, source = source, open_bundle_weights(bundle, request.runtime)
    subject = Subject(
        path=bundle.path,
        candidate=candidate,
        source=source,
        full_source=full_source,
        tokenizer=_tokenizer(request, bundle.config) or bundle_tokenizer(bundle),
        files={name: record.sha256 for name, record in bundle.manifest.files.items()},
        bundle=bundle,
    )
    report = _compared(subject, request, options)
    if request.stamp and report.passed:
        from gemma3_export.exporters.bundle_writer import stamp_bundle

        stamp_bundle(bundle, bundle.graph(request.runtime), report.to_json())
    return report


def _stampable(bundle: Bundle, request: VerifyRequest) -> VerifyRequest:
    """Return the request of the check that an export runs, before anything that takes long.

    Raises:
        InputError: the request is for another check, or the bundle cannot be replaced.
    """
    if request.weights is None and request.adapter is None:
        raise InputError(
            "a stamp is a proof against the weights that the bundle was made from; pass them with "
            f"--weights (the manifest names {bundle.manifest.source.get('location', 'none')})"
        )
    if request.against is not None:
        raise InputError("a stamp is a proof against the reference; leave out --against")
    if request.device not in ("auto", "cpu"):
        raise InputError(
            f"a stamp is a proof on the CPU, as that of an export; leave out --device "
            f"{request.device}"
        )
    if request.runtime == "reference":
        raise InputError("the reference is what graphs are compared with; choose another --runtime")
    bundle.graph(request.runtime)
    reject_existing(bundle.path.absolute(), force=True)
    return replace(request, device="cpu")


def _require_source(bundle: Bundle, source: WeightSource) -> None:
    """Check that weights are those that a bundle was made from.

    Raises:
        InputError: their files have other hashes.
    """
    if source_identity(source.fingerprint()) != source_identity(bundle.manifest.source):
        raise InputError(
            f"{source.origin} has other files than the weights that {bundle.path} was made from "
            f"({bundle.manifest.source.get('location')}), so it cannot prove it; pass those "
            "weights, or leave out --stamp"
        )


def _verify_graph(path: Path, request: VerifyRequest, stack: ExitStack) -> ParityReport:
    """Compare a graph that another tool exported with weights.

    Raises:
        InputError: there are no weights, or the graph cannot be fed.
    """
    if request.weights is None and request.adapter is None:
        raise InputError(
            f"{path} has no manifest, so nothing says what it should compute; "
            "pass the weights that it was made from with --weights"
        )
    if request.runtime != "onnx":
        raise InputError(f"{path} is an ONNX graph, which the {request.runtime} runtime cannot run")
    if request.stamp:
        raise InputError(f"{path} is not a bundle, so it has no manifest to stamp")
    if request.variant is not None:
        raise InputError(
            f"{path} is one graph, so there is no variant {request.variant!r:.40} of it; give the "
            "path of the graph to check"
        )
    options = _options(request, request.max_kld or DEFAULT_MAX_KLD)
    source = stack.enter_context(opened_weights(request.weights, request.adapter))
    request = _with_threads(source.config, request, stack)
    tokenizer = _tokenizer(request, source.config)
    if tokenizer is None and (file := source.tokenizer_file()) is not None:
        tokenizer = load_tokenizer(file)
        tokenizer.check_vocab_size(source.config.vocab_size)
    candidate = open_graph(
        path, source, device=request.device, threads=request.threads, cuda=request.cuda
    )
    subject = Subject(
        path=path,
        candidate=candidate,
        source=source,
        full_source=None,
        tokenizer=tokenizer,
        files=file_hashes(candidate),
        bundle=None,
    )
    return _compared(subject, request, options)


def _options(request: VerifyRequest, budget: float) -> VerifyOptions:
    from gemma3_export.parity import VerifyOptions

    return VerifyOptions.for_budget(budget, seed=request.seed)


def _with_threads(config: Gemma3Config, request: VerifyRequest, stack: ExitStack) -> VerifyRequest:
    """Return ``request`` with the number of threads, which torch uses until the stack is left."""
    from gemma3_export.parity.options import threads_for, torch_threads

    threads = threads_for(config, request.threads)
    stack.enter_context(torch_threads(threads))
    return replace(request, threads=threads)


def _tokenizer(request: VerifyRequest, config: Gemma3Config) -> Tokenizer | None:
    if request.tokenizer is None:
        return None
    tokenizer = load_tokenizer(request.tokenizer)
    tokenizer.check_vocab_size(config.vocab_size)
    return tokenizer


def _as_in_bundle(bundle: Bundle, source: WeightSource) -> WeightSource:
    """Return ``source`` with the embedding rows that ``bundle`` kept.

    Raises:
        InputError: the bundle has a reduced vocabulary, which is not of these weights.
    """
    recorded = bundle.manifest.source.get("reduced_vocabulary")
    tokenizer = bundle_tokenizer(bundle)
    if not isinstance(recorded, dict) or tokenizer is None:
        source.keep_rows(bundle.config.vocab_size)
        return source
    if source.config.vocab_size == bundle.config.vocab_size:  # reduced already
        return source
    from gemma3_export.reference.weights.reduced_vocabulary import reduce_as_recorded

    return reduce_as_recorded(source, recorded, tokenizer)


def _check_vocabulary(bundle: Bundle, folder: Path) -> None:
    """Check that a folder in Hugging Face format has the tokens of a bundle.

    Raises:
        InputError: the bundle has a reduced vocabulary, and the folder has not.
    """
    recorded = bundle.manifest.source.get("reduced_vocabulary")
    if recorded is None or not is_file(folder / CONFIG_NAME):
        return
    rows = load_config(folder).vocab_size
    if rows != bundle.config.vocab_size:
        raise InputError(
            f"{bundle.path} has a reduced vocabulary of {bundle.config.vocab_size} tokens, but "
            f"{folder} has {rows}; compare with a folder from to-hf --reduce-vocab, or pass "
            f"--weights {folder} instead of --against"
        )


def _compared(subject: Subject, request: VerifyRequest, options: VerifyOptions) -> ParityReport:
    """Return the report on ``subject``; see :func:`verify`."""
    from gemma3_export.parity import compare
    from gemma3_export.parity import verify as compare_with_reference
    from gemma3_export.parity.tokenizer_gate import tokenizer_gate

    bundle, source = subject.bundle, subject.source
    if request.against is None:
        return compare_with_reference(
            subject.candidate,
            source,
            options=options,
            tokenizer=subject.tokenizer,
            full_source=subject.full_source,
            files=subject.files,
            progress=request.progress,
            releases_candidate=True,
        )
    if bundle is not None and request.against in RUNTIMES:
        baseline = open_runtime(
            bundle, str(request.against), device=request.device, threads=request.threads
        )
    else:
        if bundle is not None:
            _check_vocabulary(bundle, to_path(request.against, "against"))
        baseline = open_baseline(request.against, source, request)
    report = compare(
        subject.candidate,
        baseline,
        source,
        options=options,
        tokenizer=subject.tokenizer,
        files=subject.files,
        progress=request.progress,
    )
    gate = None
    if bundle is not None and request.against not in (*RUNTIMES, TRANSFORMERS):
        gate = tokenizer_gate(bundle.path, Path(request.against))
    return report if gate is None else replace(report, gates=(*report.gates, gate))


@dataclass(frozen=True, kw_only=True)
class ParityCheck:
    """The parity check as the last step of an export.

    It is a :class:`gemma3_export.exporters.bundle_writer.Verification`, and runs on the CPU so that
    the proof does not depend on the machine that exports.
    """

    progress: Progress | None = None
    threads: int | None = None  # as for :class:`VerifyRequest`

    def __call__(
        self, folder: Path, source: WeightSource, graph: Graph, ranges: HalfRanges | None = None
    ) -> str:
        """Return the report of ``graph`` as JSON.

        Raises:
            ParityError: naming the first case and the layer that differ.
        """
        from gemma3_export.parity import VerifyOptions, verify
        from gemma3_export.parity.options import threads_for, torch_threads
        from gemma3_export.reference.weights.bundle_weights import open_bundle_weights

        runtime = graph.runtime
        bundle = Bundle(folder, graph.variant)
        is_quantized = bundle.is_quantized(runtime)
        threads = threads_for(bundle.config, self.threads)
        progress = self.progress or ignore_progress
        with torch_threads(threads):
            progress("opening the runtime", 0, 1)
            candidate = open_runtime(bundle, runtime, device="cpu", threads=threads)
            progress("opening the runtime", 1, 1)
            report = verify(
                candidate,
                open_bundle_weights(bundle, runtime) if is_quantized else source,
                options=VerifyOptions.for_budget(graph.max_kld),
                full_source=source if is_quantized else None,
                tokenizer=bundle_tokenizer(bundle),
                files={name: record.sha256 for name, record in bundle.manifest.files.items()},
                ranges=ranges,
                progress=self.progress,
                releases_candidate=True,
            )
        if not report.passed:
            raise ParityError(_why_it_failed(report, graph.max_kld))
        return report.to_json()


def _why_it_failed(report: ParityReport, budget: float) -> str:
    """One message: what failed, by how much, and what can be done.

    Args:
        report: a report that did not pass.
        budget: mean nats per token that the export was allowed.
    """
    from gemma3_export.parity.report.terminal import describe_divergence, verdict_line

    is_exact = all(gate.passed for gate in report.gates if gate.name != "quality")
    what = (
        "the weights diverge too far from full precision"
        if is_exact
        else "the export does not compute what the model computes"
    )
    where = f"; {describe_divergence(report.divergence)}" if report.divergence else ""
    remedy = (
        f"The limits of KLD, agreement and perplexity all follow from --max-kld, {budget:g} here: "
        "raise it to accept this divergence, or choose another --dtype. "
        if is_exact
        else ""
    )
    return (
        f"{what}, and nothing was kept: {verdict_line(report)}{where}. {remedy}To investigate, "
        "export with --no-verify and run `gemma3-export verify DIR --html report.html`"
    )


def open_baseline(
    against: Path | str,
    source: WeightSource,
    request: VerifyRequest,
) -> Runtime:
    """Open the runtime that ``against`` names.

    Raises:
        InputError: it is neither a bundle nor a Hugging Face folder.
        UnavailableError: transformers is not installed.
    """
    folder = to_path(against, "against")
    if is_file(folder / MANIFEST):
        other = Bundle(folder)
        other.check_files()
        if other.config.vocab_size != source.config.vocab_size:
            raise InputError(
                f"{folder} has {other.config.vocab_size} tokens, but the bundle to check has "
                f"{source.config.vocab_size}; compare two exports of one model"
            )
        return open_runtime(
            other,
            request.runtime,
            device=request.device,
            threads=request.threads,
            cuda=request.cuda,
        )
    from gemma3_export.parity.transformers_runtime import TransformersRuntime

    if is_file(folder / "config.json"):
        return TransformersRuntime(folder, vocab_size=source.config.vocab_size)
    if against != TRANSFORMERS:
        raise InputError(
            f"{str(against)!r} is not a bundle, a Hugging Face folder or a runtime; give one of "
            f"them ({', '.join(RUNTIMES)}), or {TRANSFORMERS!r} to compare with that package"
        )
    from gemma3_export.reference.training.model_folder import export_hf_folder

    with tempfile.TemporaryDirectory(prefix="gemma3-export-") as parent:
        export_hf_folder(source, Path(parent) / "model", dtype=None)
        return TransformersRuntime(Path(parent) / "model")


def opened_weights(
    weights: WeightSource | Path | str | None, adapter: Path | str | None = None
) -> AbstractContextManager[WeightSource]:
    """Open weights by name, to be closed again, or take an opened source, which stays open.

    Args:
        weights: their name or an opened source; None with an adapter is the base that it names.
        adapter: a LoRA adapter to merge into weights that are given by name.

    Raises:
        TypeError: they are neither.
        InputError: they cannot be opened.
    """
    from gemma3_export.reference.weights import WeightSource, open_weights

    if isinstance(weights, Path | str) or (weights is None and adapter is not None):
        spec = None if weights is None else str(weights)
        return open_weights(spec, adapter=None if adapter is None else str(adapter))
    if not isinstance(weights, WeightSource):
        raise TypeError(
            f"weights must be a path, a Hub id or what open_weights returns, not {weights!r:.60}"
        )
    if adapter is not None:
        raise InputError(
            f"adapter is {str(adapter)!r:.80}, but the weights are open already; pass the adapter "
            "to open_weights"
        )
    return nullcontext(weights)


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
