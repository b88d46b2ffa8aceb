"""Parity: proof that a runtime computes what the reference computes.

The call sequence of ``gemma3-export verify``::

    bundle = Bundle(path)
    bundle.check_files()                                     # InputError: not what was exported
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
    write_text_atomically(output, report.to_json())          # render_junit, render_html alike
    exit(0 if report.passed else 1)

``--against OTHER_DIR`` opens a second runtime and calls ``compare(runtime, other, source, ...)``;
``--against transformers`` does so with ``TransformersRuntime(folder)``. Several runtimes of one
bundle share the expensive part: ``yardstick = make_yardstick(runtime, source, ...)``, then
``verify(each, source, yardstick=yardstick)``.
"""

from gemma3_export.parity.check import compare, make_yardstick, verify
from gemma3_export.parity.options import VerifyOptions
from gemma3_export.parity.report.html import render_html
from gemma3_export.parity.report.junit import render_junit
from gemma3_export.parity.report.model import ParityReport
from gemma3_export.parity.report.terminal import render_terminal

__all__ = [
    "ParityReport",
    "VerifyOptions",
    "compare",
    "make_yardstick",
    "render_html",
    "render_junit",
    "render_terminal",
    "verify",
]
