"""Prove that a runtime computes what the reference computes.

``gemma3-export verify`` makes these calls::

    bundle = Bundle(path)
    bundle.check_files()                                     # InputError: a file was changed
    runtime = open_runtime(bundle, "onnx", device=device)    # UnavailableError: exit code 3
    source = open_bundle_weights(bundle, "onnx")             # or open_weights(...), the original
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
    with ProgressBars() as progress:
        report = verify(
            runtime,
            source,
            options=VerifyOptions(seed=seed),
            tokenizer=tokenizer,
            full_source=None,                                # the unrounded weights, for gate B
            files={name: record.sha256 for name, record in bundle.manifest.files.items()},
            progress=progress,
        )
    print(render_terminal(report))
    write_text_atomically(output, report.to_json())          # or render_junit, render_html
    exit(0 if report.passed else 1)

``--against OTHER_DIR`` opens a second runtime and calls ``compare(runtime, other, source, ...)``;
``--against transformers`` does so with ``TransformersRuntime(folder)``. To check several runtimes
of one bundle, compute the expensive part once: ``ground_truth = GroundTruth.for_runtime(runtime,
source, ...)``, then ``verify(each, source, ground_truth=ground_truth)``.
"""

from gemma3_export.parity.check import compare, verify
from gemma3_export.parity.ground_truth import GroundTruth
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.report.html import render_html
from gemma3_export.parity.report.junit import render_junit
from gemma3_export.parity.report.model import ParityReport
from gemma3_export.parity.report.terminal import render_terminal

__all__ = [
    "GroundTruth",
    "ParityReport",
    "VerifyOptions",
    "compare",
    "render_html",
    "render_junit",
    "render_terminal",
    "verify",
]
