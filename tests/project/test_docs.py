"""Documents are current: generated pages, links between them, and examples that run."""

from __future__ import annotations

import ast
import json
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import gemma3_export
from gemma3_export.config import config_to_json
from gemma3_export.reference.loading import load_reference
from tests.support.chat_templates import chat_bundle
from tests.support.command_line import run_ok

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
    """Return the anchors of a document: its headings, as GitHub spells them in URLs."""
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


def python_examples(document: str) -> list[str]:
    """Return the Python blocks of a document."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def example(document: str, part: str) -> str:
    """Return the only Python block of ``document`` that contains ``part``."""
    (block,) = [block for block in python_examples(document) if part in block]
    return block


# The matrices of the tiny model do not divide into the default blocks.
SMALLER_BLOCKS = {'dtype="int8"': 'dtype="int8", block_size=16'}


def run_example(code: str, document: str, **replacements: str) -> None:
    """Run a block of ``document`` with some names replaced; each must occur."""
    for old, new in replacements.items():
        assert old in code, old
        code = code.replace(old, new)
    exec(compile(code, document, "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_imports_in_python_examples_resolve(document):
    for block in python_examples(document):
        tree = ast.parse(block, document)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names: dict[str, object] = {}
        exec(compile(ast.Module(imports, []), document, "exec"), names)
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for node in attributes:
            if isinstance(node.value, ast.Name) and node.value.id == "gemma3_export":
                assert hasattr(gemma3_export, node.attr), node.attr


@pytest.mark.parametrize(
    ("heading", "options", "undocumented"),
    [
        ("Load a bundle", gemma3_export.LoadOptions, set()),
        # Only batches of the package's own loop number their requests.
        ("Generate", gemma3_export.GenerateOptions, {"request_index"}),
    ],
)
def test_the_python_page_lists_all_options(heading, options, undocumented):
    text = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted({field.name for field in fields(options)} - undocumented)


GENERATING = [
    (document, block)
    for document in ("README.md", "docs/python.md")
    for block in python_examples(document)
    if ".load(" in block and "functiongemma" not in block
]


@pytest.mark.parametrize(
    ("document", "code"),
    GENERATING,
    ids=[f"{document}-{index}" for index, (document, _) in enumerate(GENERATING)],
)
def test_examples_of_generation_run(tiny_bundle, document, code, capsys):
    code = re.sub('"gemma-3-270m(-it)?"', repr(str(tiny_bundle)), code)
    # The tiny model has 400 tokens and a context of 256.
    code = code.replace("[2, 818, 5275]", "[2, 18, 75]").replace("=64", "=8")
    code = re.sub(r"chat\((system=[^,)]*)\)", r"chat(\1, max_new_tokens=8)", code)
    run_example(code, document)
    assert capsys.readouterr().out.strip() or "generate" not in code


def test_the_example_of_function_calls_runs(capsys):
    code = example("docs/python.md", "functiongemma")
    bundle = chat_bundle("functiongemma")
    code = code.replace("tools=[weather]", "tools=[weather], max_new_tokens=8")
    run_example(code, "docs/python.md", **{"functiongemma-270m-it": str(bundle)})
    assert capsys.readouterr().out.strip()
    (tools,) = re.findall(
        r"```json\n(\[.*?)```", (REPOSITORY / "docs/generate.md").read_text(), flags=re.DOTALL
    )
    options = gemma3_export.GenerateOptions(tools=json.loads(tools)).chat()
    tokenizer = gemma3_export.Tokenizer.from_folder(bundle)
    text = tokenizer.chat.render([{"role": "user", "content": "x"}], options)
    assert "declaration:get_weather{description:<escape>Get the weather.<escape>" in text


def test_the_example_of_structured_output_runs(ort_bundle, capsys):
    pytest.importorskip("llguidance", reason="run `make setup`")
    document = "docs/structured-output.md"
    run_example(example(document, "json_schema"), document, **{"gemma-3-270m-it": str(ort_bundle)})
    assert capsys.readouterr().out.splitlines()[-1] in ("yes", "no")


def test_the_example_with_onnxruntime_alone_writes_the_same_text(ort_bundle, capsys):
    code = example("docs/bundle.md", "onnxruntime.InferenceSession")
    run_example(code, "docs/bundle.md", **{"gemma-3-270m": str(ort_bundle)})
    printed = capsys.readouterr().out
    text = gemma3_export.load(ort_bundle).generate("The sea is", max_new_tokens=20).text
    assert ascii_part(printed) == ascii_part(text)
    assert ascii_part(text).strip()


def test_the_examples_of_batches_run(ort_bundle, tmp_path, monkeypatch, capsys):
    page = (REPOSITORY / "docs/generate.md").read_text(encoding="utf-8")
    section = page.partition("\n## Many prompts from a file\n")[2].partition("\n## ")[0]
    (rows,) = re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("questions.jsonl", "texts.jsonl"):
        Path(name).write_text(rows, encoding="utf-8")
    (code,) = (block for block in python_examples("docs/generate.md") if "run_batch" in block)
    run_example(code, "docs/generate.md", **{"gemma-3-270m-it": str(ort_bundle), "=64": "=4"})
    assert capsys.readouterr().out == "4 16\n"
    commands = re.findall(r"gemma3-export (batch .*)", section)
    assert len(commands) == 3
    for command in commands:
        words = re.sub(r"gemma-3-270m(-it)?", "BUNDLE", command).split()
        words = [str(ort_bundle) if word == "BUNDLE" else word for word in words]
        run_ok(*words, "--force")
        written = Path(words[3]).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in written] == [1, 2, 3, 4]
        assert all(json.loads(line)["token_ids"] for line in written)


def ascii_part(text: str) -> str:
    """Return printable ASCII only: the two show bytes that are not UTF-8 differently."""
    return re.sub(r"[^ -~]", "", text)


def test_the_example_with_onnxruntime_alone_runs_a_portable_bundle(portable_bundle, capsys):
    code = example("docs/bundle.md", "onnxruntime.InferenceSession")
    run_example(code, "docs/bundle.md", **{"gemma-3-270m": str(portable_bundle)})
    assert capsys.readouterr().out.strip()


def test_readme_example_of_export_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = example("README.md", "export_onnx(")
    replacements = SMALLER_BLOCKS | {"google/gemma-3-270m": str(tiny_folder)}
    run_example(code, "README.md", **replacements)
    assert capsys.readouterr().out == "True\n"


def test_examples_of_export_run(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_example(
        example("docs/python.md", 'export_onnx("google'),
        "docs/python.md",
        **{"google/gemma-3-270m": str(tiny_folder)},
    )
    assert "True" in capsys.readouterr().out
    run_example(
        example("docs/python.md", "open_weights("),
        "docs/python.md",
        **SMALLER_BLOCKS
        | {
            'size="1b", revision="main"': repr(str(tiny_folder)),
            'dtype="bf16"': 'dtype="bf16", verify=False',  # proven in tests/exporters
        },
    )


def test_the_example_of_verification_runs(ort_bundle, capsys):
    code = example("docs/python.md", "gemma3_export.verify(")
    run_example(code, "docs/python.md", **{"gemma-3-270m": str(ort_bundle)})
    assert capsys.readouterr().out == "True\n"


def test_the_example_of_a_service_reuses_a_system_prompt(ort_bundle, capsys):
    run_example(
        example("docs/decoding.md", "kept_prefix_bytes"),
        "docs/decoding.md",
        # The tiny model's context is short.
        **{"gemma-3-270m": str(ort_bundle), "* 120": "* 2", "=64": "=2"},
    )
    first, second = map(int, capsys.readouterr().out.split())
    assert first == 0 < second


def test_the_example_of_own_training_ends_in_weights_to_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(example("docs/training.md", "load_reference"), "training.md", "exec"), scope)
    with gemma3_export.open_weights("demo") as before:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(config_to_json(before.config)), encoding="utf-8")
    with gemma3_export.open_weights("model.pt", config_path=config) as source:
        after = load_reference(source).state_dict()
    trained = scope["model"].state_dict()
    assert all(torch.equal(after[name], trained[name]) for name in trained)
