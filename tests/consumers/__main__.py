"""``python -m tests.consumers``: see the package's docstring."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gemma3_export.api.exporting import export_onnx, export_torchscript, open_weights
from gemma3_export.bundle import Bundle
from gemma3_export.staging import write_text_atomically
from tests.consumers.consumers import CONSUMERS, Answer
from tests.consumers.jobs import CASES, job_for
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

PAGE = Path("docs/consumers.md")
REPORT = Path("build/consumers.json")
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
VOCAB_SIZE = 400


def export_tiny(folder: Path) -> Path:
    """Export the tiny model, for ONNX Runtime and as TorchScript."""
    weights = folder / "weights"
    write_hf_folder(weights, tiny_config(vocab_size=VOCAB_SIZE))
    tiny_gemma_tokenizer(VOCAB_SIZE).save(weights)
    bundle = folder / "bundle"
    with open_weights(str(weights)) as source:
        export_onnx(source, bundle, verify=False)
        export_torchscript(source, bundle, verify=False)
    return bundle


def verdicts(answer: Answer, expected: Mapping[str, object]) -> dict[str, str]:
    """Return ``same``, ``different`` or ``-`` (does not apply) for every case."""
    if answer.problem is not None:
        return dict.fromkeys(CASES, f"failed: {answer.problem}")
    found = {}
    for case in CASES:
        if case not in answer.tokens:
            found[case] = "-"
        else:
            found[case] = "same" if answer.tokens[case] == expected[case] else "different"
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [f"| consumer | version | {' | '.join(CASES)} |", "|---" * (2 + len(CASES)) + "|"]
    for result in results:
        cells = [result["cases"][case] for case in CASES]
        lines.append(f"| {result['name']} | {result['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--bundle", type=click.Path(path_type=Path), help="Use this bundle.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(".cache/consumers"), show_default=True
)
@click.option("--pip-args", default="", help="More arguments for pip.")
@click.option("--docs", is_flag=True, help="Write the table of the docs from the last results.")
def main(
    names: tuple[str, ...], bundle: Path | None, folder: Path, pip_args: str, docs: bool
) -> None:
    """Run consumers on one bundle; the exit code is 1 if any of them answers unexpectedly."""
    if docs:
        results = json.loads(REPORT.read_text(encoding="utf-8"))
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        write_text_atomically(PAGE, f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
        return
    with tempfile.TemporaryDirectory(prefix="gemma3-consumers-") as temporary:
        opened = Bundle(bundle or export_tiny(Path(temporary)))
        job, expected = job_for(opened)
        results, surprises = [], []
        for consumer in CONSUMERS:
            if names and consumer.name not in names:
                continue
            consumer.install(folder, shlex.split(pip_args), lambda text: click.echo(text, err=True))
            answer = consumer.answer(folder, job)
            cases = verdicts(answer, expected)
            results.append({"name": consumer.name, "version": answer.version, "cases": cases})
            click.echo(f"{consumer.name} {answer.version}: {cases}")
            surprises += [
                f"{consumer.name}, {case}: {verdict}"
                for case, verdict in cases.items()
                if verdict not in ("-", consumer.expected_verdict(case))
            ]
    write_text_atomically(REPORT, json.dumps(results, indent=1) + "\n")
    if surprises:
        raise click.ClickException("; ".join(surprises))


if __name__ == "__main__":
    main()
