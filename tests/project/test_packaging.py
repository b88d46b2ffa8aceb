"""The wheel has everything in the checkout under one name, and thin modules import no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("reference", "exporters", "runtimes")
DATA_SUFFIXES = (".typed", ".json", ".html", ".jinja", ".css", ".js", ".txt", ".toml")


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    data = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return data["tool"]["setuptools"]


def sources() -> dict[str, Path]:
    """Map the path inside the installed package to the file, for all that must be installed."""
    found = {}
    for top in ("gemma3_export", *FOLDERS):
        prefix = "gemma3_export" if top == "gemma3_export" else f"gemma3_export/{top}"
        for path in (REPOSITORY / top).rglob("*"):
            relative = path.relative_to(REPOSITORY / top)
            is_linked = top == "gemma3_export" and relative.parts[0] in FOLDERS
            is_wanted = path.suffix in (".py", *DATA_SUFFIXES) and "__pycache__" not in path.parts
            if path.is_file() and is_wanted and not is_linked:
                found[f"{prefix}/{relative.as_posix()}"] = path
    return found


def test_links_match_the_mapping(settings):
    mapping = {
        name.removeprefix("gemma3_export."): to for name, to in settings["package-dir"].items()
    }
    assert mapping == {folder: folder for folder in FOLDERS}
    for name in FOLDERS:
        link = REPOSITORY / "gemma3_export" / name
        assert link.is_symlink()
        assert link.resolve() == REPOSITORY / name


def test_every_package_on_disk_is_listed(settings):
    on_disk = {
        Path(name).parent.as_posix().replace("/", ".") for name in sources() if name.endswith(".py")
    }
    assert sorted(settings["packages"]) == sorted(on_disk)


def test_every_package_has_an_init():
    folders = {path.parent for path in sources().values() if path.suffix == ".py"}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_wheel_has_one_name_and_everything(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--quiet", "-w", tmp_path, copy_of_sources(tmp_path / "checkout")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = next(name for name in names if name.endswith("METADATA"))
        described = archive.read(metadata).decode("utf-8")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gemma3_export"}
    assert {name for name in names if name.startswith("gemma3_export/")} == set(sources())
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in described


def copy_of_sources(folder: Path) -> Path:
    """Copy the checkout, so that no build folder appears in the real one."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    for source in sources().values():
        target = folder / source.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for name in FOLDERS:
        (folder / "gemma3_export" / name).symlink_to(Path("..") / name)
    return folder


@pytest.mark.parametrize(
    "module",
    [
        "gemma3_export",
        "gemma3_export.cli",
        "gemma3_export.api.opening",
        "gemma3_export.cuda.doctor",
        "gemma3_export.api.exporting",
        "gemma3_export.bundle.inspection",
        "gemma3_export.api.verification",
        "gemma3_export.reference.training.documents",
        "gemma3_export.reference.training.preparation",
        "gemma3_export.runtimes.generation.loop",
        "gemma3_export.runtimes.onnx.runtime",
        "gemma3_export.tokenizer.tokenizer",
    ],
)
def test_thin_modules_import_no_torch(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "onnx", "onnxruntime", "ray"} & set(done.stdout.split())


WITHOUT_EXTRAS = """
import json, sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tiktoken", "gguf"):
    sys.modules[name] = None
from click.testing import CliRunner
from gemma3_export.cli import command_line
results = [CliRunner().invoke(command_line, line) for line in json.loads(sys.argv[1])]
print(json.dumps([(result.exit_code, result.output) for result in results]))
"""


def test_commands_name_the_extra_that_they_need(ort_bundle, tmp_path):
    out = tmp_path / "out"
    extras = {
        ("onnx", "--weights", "demo", "-o", out): "export",
        ("torchscript", "--weights", "demo", "-o", out): "export",
        ("pt2", "--weights", "demo", "-o", out): "export",
        ("to-hf", "--weights", "demo", "-o", out): "export",
        ("verify", ort_bundle): "export",
        ("generate", ort_bundle, "--prompt", "sea"): "cpu",
        ("bench", ort_bundle, "--prompt-tokens", 4, "--new-tokens", 4): "cpu",
        ("data", __file__, "-o", out, "--tokenizer", "tiktoken:gpt2"): "tiktoken",
        ("train", out, "-o", tmp_path / "run"): "train",
    }
    commands = json.dumps([[str(word) for word in words] for words in extras])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, commands],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    for (words, extra), (code, output) in zip(extras.items(), results, strict=True):
        assert code == 3, (words, output)
        assert f'pip install "gemma3-export[{extra}' in output.replace("'", '"'), (words, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_no_module_is_named_after_a_dependency():
    names = {Path(name).stem for name in sources()}
    assert not names & {
        "torch",
        "onnx",
        "onnxruntime",
        "tokenizers",
        "numpy",
        "click",
        "gguf",
        "ray",
    }


def documented_commands(text: str) -> list[tuple[str, set[str]]]:
    """Return name and options of every ``gemma3-export`` command in the shell examples."""
    found = []
    for block in re.findall(r"```(?:sh|console|bash)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:^|\s)gemma3-export (\w[\w-]*)(.*)", line):
                options = set(re.findall(r"(?<=\s)--[a-z-]+", match[2]))
                found.append((match[1], options))
    return found


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in REPOSITORY.glob("docs/*.md")),
]


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_documented_commands_exist(document):
    from gemma3_export.cli import command_line

    text = (REPOSITORY / document).read_text(encoding="utf-8")
    for name, options in documented_commands(text):
        command = command_line.get_command(None, name)
        assert command is not None, name
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert options <= known, (name, options - known)


def test_documented_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for document in DOCUMENTS:
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        assert set(re.findall(r"`?make ([a-z-]+)`", text)) <= targets


def test_constraints_satisfy_pyproject():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    data = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    extras = data["project"]["optional-dependencies"]
    listed = [
        *data["project"]["dependencies"],
        *(item for extra in ("cpu", "export", "tiktoken") for item in extras[extra]),
        *data["dependency-groups"]["dev"],
    ]
    for text in listed:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), (
            text
        )
