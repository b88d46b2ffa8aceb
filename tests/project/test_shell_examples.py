"""The commands in the documents run, on tiny models in place of those that they name.

Commands of one page run in their order, in one folder, so that a command finds what an earlier one
made. Exports are not proven again, as in tests/exporters; generation and training are short.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.chat_templates import chat_bundle
from tests.support.command_line import run, run_ok
from tests.support.exported_bundles import made_once
from tests.support.tiny_models import tiny_config, tiny_weights, write_gguf, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in REPOSITORY.glob("docs/*.md")))
ELSEWHERE = {"docs/fine-tunes.md": "test_fine_tunes_page.py"}  # pages with a test of their own
# What no test runs, by a pattern of the command, and why.
NOT_RUN = {
    r"^(pip|python -m pip) ": "installs packages; release/check_extras.py does",
    r"^make ": "test_packaging.py checks that the target exists",
    r"^docker |\| docker ": "needs Docker; test_dockerfile.py",
    r"docker compose|^(cd examples/compose|install -d|openssl|chmod) ?": "test_deployments.py",
    r"^kubectl ": "needs a cluster; test_deployments.py",
    r"^torchrun ": "needs several processes; test_training_distributed.py",
    r"^python -m benchmarks": "measures for minutes; tests/bench",
    r"^pytest ": "test_the_tutorial_of_ci_runs",
    r"--device cuda|doctor$": "needs an NVIDIA GPU; tests marked cuda",
    r"--cuda-placement": "needs onnxruntime-gpu; tests marked placement",
    r"--size 4b ": "writes 16 GB",
    r" bench ": "measures for minutes; tests/bench",
    r"--(against|weights) (transformers|FOLDER|SRC)": "names no weights; test_check.py",
    r"user\.json": "needs a schema; the tests of structured output",
    r"tiktoken:": "needs a download; test_tiktoken_tokenizer.py",
    r"completion (bash|zsh|fish)": "writes to the home folder; test_completion_and_suggestions.py",
    r"--dtype mixed": "measures many formats; test_quantized_export.py",
    r"--adapter": "test_fine_tunes_page.py",
    r"--reduce-vocab": "test_reduce_vocab_option.py",
    r"^gemma3-export push ": "needs the Hub",
    r"--for web": "tests/exporters",
    r"^(cd examples/browser|npm |ln -s|python3 -m http)": "tests/project/test_browser_example.py",
    r"gemma3-export serve ": "does not end; tests/serve",
    r"^tritonserver |localhost:8000/v2/": "needs Triton; make test-triton",
    r" serve run ": "needs Ray; make test-ray",
    r"^(lm_eval|lm-eval) ": "needs tasks from the Hub; tests/serve",
}
MODELS = r"(google/)?gemma-3-\S+?-it-qat-q4_0-unquantized|google/gemma-3-\w+(-it)?|my-fine-tune"
WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
LAYERS = {"num_hidden_layers": 1, "layer_types": ("full_attention",), "vocab_size": 600}
SHORT = {
    "generate": ["--max-new-tokens", "4"],
    "batch": ["--max-new-tokens", "4", "--force"],
    "chat": ["--max-new-tokens", "4"],
    "train": ["--steps", "2", "--batch-size", "2", "--context-length", "16"],
    "onnx": ["--no-verify"],
    "torchscript": ["--no-verify"],
    "pt2": ["--no-verify"],
}


def commands(document: str) -> list[str]:
    """Return the commands in the shell blocks of a document, without comments."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, flags=re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines]
    return [line for line in found if line]


def python_blocks(document: str) -> list[str]:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def reason(command: str) -> str | None:
    """Return why a command is not run, or None."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


RUN = [
    document
    for document in DOCUMENTS
    if document not in ELSEWHERE and any(not reason(line) for line in commands(document))
]


def test_every_command_runs_or_has_a_reason_not_to():
    lines = [line for document in DOCUMENTS for line in commands(document)]
    unknown = [line for line in lines if not reason(line) and "gemma3-export " not in line]
    assert unknown == []
    assert len([line for line in lines if not reason(line)]) > 30
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, x) for x in lines)]
    assert set(unused) <= {r"--dtype mixed", r"^gemma3-export push ", r"--for web"}


def write_base(folder: Path) -> None:
    write_hf_folder(folder, tiny_config(**LAYERS, **WIDTHS))
    tiny_gemma_tokenizer(600).save(folder)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder that has what the documents take as given."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(**LAYERS, **WIDTHS)
    base = made_once("weights/shell", write_base)
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(base, tmp_path / "run")
    shutil.copytree(base, tmp_path / "tuned")
    write_gguf(tmp_path / "model.gguf", config, tiny_weights(config), "Q4_0")
    torch.save(dict(tiny_weights(config)), tmp_path / "model.pt")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base / name, tmp_path)
    text = "".join(f"Once upon a time the sea is blue, {n} times.\n" for n in range(2000))
    (tmp_path / "notes").mkdir()
    for name in ("book.txt", "notes/one.txt", "letter.txt", "texts.txt"):
        (tmp_path / name).write_text(text if "letter" not in name else "The sea", encoding="utf-8")
    (tmp_path / "questions.txt").write_text("The sea\n", encoding="utf-8")
    turns = [{"role": role, "content": "the sea"} for role in ("user", "assistant")]
    rows = [json.dumps({"messages": turns}) for _ in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    question = json.dumps({"id": 1, "messages": turns[:1]})
    for name in ("questions.jsonl", "texts.jsonl"):
        (tmp_path / name).write_text(f"{question}\n", encoding="utf-8")
    function = {"name": "now", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    (tmp_path / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    return tmp_path


def run_line(line: str, work: Path, bundle: Path) -> None:
    """Run a command of a document, shortened and on tiny models."""
    stdin = ""
    if piped := re.match(r"cat (\S+) \| (.*)", line):
        stdin, line = (work / piped[1]).read_text(encoding="utf-8"), piped[2]
    if redirected := re.search(r" < (\S+)$", line):
        stdin, line = (work / redirected[1]).read_text(encoding="utf-8"), line[: redirected.start()]
    line = re.sub(r"^[A-Z_]+=\S+ ", "", line)
    line = re.sub(r"--size (270m|1b)(-it)?", "--weights base", line)
    line = re.sub(r"data -o", "data book.txt notes/ --tokenizer tokenizer.json -o", line)
    line = line.replace("2,651,4864", "2,65,48")
    line = re.sub(r"--weights demo", "--weights base", line)
    line = re.sub(r"\S+\.gguf", "model.gguf", line)
    line = re.sub(r" --revision \w+", "", line)
    program, command, *words = shlex.split(re.sub(rf"(?<=\s)({MODELS})(?=\s|$)", "base", line))
    assert program == "gemma3-export", line
    if (
        command in ("generate", "chat", "batch", "verify", "inspect", "triton")
        and not (work / words[0]).exists()
    ):
        functions = chat_bundle("functiongemma")
        words[0] = str(functions if words[0].startswith("functiongemma") else bundle)
    if command in ("generate", "chat") and "--prompt" not in line and "--prompt-" not in line:
        command = "chat"  # what generate is without a prompt, in a terminal
    if "--chat" in words or command in ("chat", "batch"):
        words[0] = str(chat_bundle("functiongemma"))
    words = [word.replace("gemma-3-270m/tokenizer.json", "base/tokenizer.json") for word in words]
    for option in {"--weights", "--tokenizer"} & set(words):
        value = words.index(option) + 1
        words[value] = re.sub(r"^gemma-3-\w+-it$", "base", words[value])
    if command == "verify" and words[0] == str(bundle) and "--runtime" not in words:
        words += ["--variant", "fp32"]
    if (command == "onnx" and "int4" in words) or (command == "torchscript" and "int8" in words):
        words += ["--block-size", "32"]  # the tiny matrices have 64 and 96 columns
    words += SHORT.get(command, [])
    if "-o" in words and (work / words[words.index("-o") + 1]).exists():
        result = run(command, *words, stdin=stdin)  # may add to a bundle
        if result.exit_code == 0:
            return
        assert "--force" in result.output, (line, result.output)
        words.append("--force")
    run_ok(command, *words, stdin=stdin)


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Return a bundle with graphs for several runtimes."""

    def make(folder: Path) -> None:
        weights = made_once("weights/shell", write_base)
        run_ok("onnx", "--weights", weights, "-o", folder)
        run_ok("onnx", "--weights", weights, "--dtype", "int8", "--no-verify", "-o", folder)
        run_ok("torchscript", "--weights", weights, "--no-verify", "-o", folder)

    return made_once("with tokenizer/shell", make)


def test_the_tutorial_runs(work: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands("docs/five-minutes.md"):
        run_line(line, work, bundle)
    assert (work / "parity.html").is_file()
    (code,) = python_blocks("docs/five-minutes.md")
    exec(compile(code.replace("=40", "=4"), "five-minutes.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_tutorial_of_ci_runs(work: Path, ort_bundle: Path) -> None:
    shutil.copytree(ort_bundle, work / "models/demo")
    conftest, test = python_blocks("docs/parity-in-ci.md")
    (work / "conftest.py").write_text(conftest, encoding="utf-8")
    (work / "test_models.py").write_text(test, encoding="utf-8")
    (command,) = [line for line in commands("docs/parity-in-ci.md") if line.startswith("pytest")]
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    reports = work / "reports" / "test_our_bundle_is_exact"
    assert sorted(path.suffix for path in reports.iterdir()) == [".html", ".json", ".xml"]


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN)
def test_the_commands_run(document: str, work: Path, bundle: Path) -> None:
    for line in commands(document):
        if reason(line) is None:
            run_line(line, work, bundle)
