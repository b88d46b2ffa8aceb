"""The documents say what is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from gemma3_export.exporting import open_weights

REPOSITORY = Path(__file__).parent.parent


def test_the_command_line_page_is_current():
    generator = runpy.run_path(str(REPOSITORY / "docs/generate_cli.py"))
    page = (REPOSITORY / "docs/cli.md").read_text(encoding="utf-8")
    assert page == generator["cli_page"](), "run `make docs`"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_between_documents_lead_somewhere(document):
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def readme_example(beginning: str) -> str:
    """The Python example of the README that contains ``beginning``."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (block,) = [block for block in blocks if beginning in block]
    return block


@pytest.mark.parametrize("beginning", ["onnxruntime.InferenceSession", "open_runtime"])
def test_readme_examples_of_inference_run(tiny_bundle, beginning, capsys):
    code = readme_example(beginning).replace("gemma-3-270m", str(tiny_bundle))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_two_inference_examples_give_the_same_text(ort_bundle, capsys):
    printed = []
    for beginning in ("onnxruntime.InferenceSession", "open_runtime"):
        code = readme_example(beginning).replace("gemma-3-270m", str(ort_bundle))
        code = code.replace("temperature=0.8, top_k=64, seed=7", "")
        code = code.replace("max_new_tokens=64", "max_new_tokens=20")
        exec(compile(code, "README.md", "exec"), {})
        # the two show bytes that are no UTF-8 differently
        printed.append(re.sub(r"[^ -~]", "", capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_readme_example_of_export_runs(one_layer, tmp_path, capsys):
    code = readme_example("export_onnx(")
    code = code.replace('open_weights("google/gemma-3-270m")', "SOURCE")
    code = code.replace('"gemma-3-270m"', repr(str(tmp_path / "out")))
    source = open_weights(config_path=one_layer, random_seed=0)
    exec(compile(code, "README.md", "exec"), {"SOURCE": source})
    assert "True" in capsys.readouterr().out
