"""The documents say what is."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from gemma3_export.api.exporting import open_weights
from gemma3_export.config import config_to_json
from gemma3_export.reference.loading import load_reference

REPOSITORY = Path(__file__).parents[2]


def test_the_command_line_page_is_current():
    generator = runpy.run_path(str(REPOSITORY / "docs/generate_cli.py"))
    page = (REPOSITORY / "docs/cli.md").read_text(encoding="utf-8")
    assert page == generator["cli_page"](), "run `make docs`"


DOCUMENTS = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md")
    for path in REPOSITORY.glob(pattern)
)


def anchors(document: Path) -> set[str]:
    """What ``#...`` may name in a document: its headings, as GitHub spells them in addresses."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    path = REPOSITORY / document
    links = re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8"))
    for link, anchor in links:
        target = path.parent / link if link else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def example(document: str, beginning: str) -> str:
    """The Python example of ``document`` that contains ``beginning``."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (block,) = [block for block in blocks if beginning in block]
    return block


def readme_example(beginning: str) -> str:
    return example("README.md", beginning)


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


def test_the_example_of_a_service_reuses_a_system_prompt(ort_bundle, capsys):
    code = example("docs/decoding.md", "PrefixCache").replace("gemma-3-270m", str(ort_bundle))
    assert "windowed=False" in code  # nothing else for the tiny model, and an error for real ones
    # The tiny model's context is shorter than a prefill chunk.
    code = code.replace("max_bytes=2**30", "max_bytes=2**30, granularity=1").replace("* 120", "* 2")
    code = code.replace("max_new_tokens=64", "max_new_tokens=2")
    exec(compile(code, "decoding.md", "exec"), {})
    first, second = map(int, capsys.readouterr().out.split())
    assert first == 0 < second


def test_the_example_of_own_training_ends_in_weights_to_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(example("docs/training.md", "load_reference"), "training.md", "exec"), scope)
    with open_weights("demo") as before:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(config_to_json(before.config)), encoding="utf-8")
    with open_weights("model.pt", config_path=config) as source:
        after = load_reference(source).state_dict()
    trained = scope["model"].state_dict()
    assert all(torch.equal(after[name], trained[name]) for name in trained)
