"""Check the Dockerfile by reading it, without a build (`make lint-docker` lints it)."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from gemma3_export.cli import command_line

REPOSITORY = Path(__file__).parents[2]
EXACT_TAG = re.compile(r"[a-z0-9./_-]+:\d+\.\d+\.\d+[a-z0-9.-]*|.+@sha256:[0-9a-f]{64}")
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Return each instruction with its arguments, without comments and continuation lines."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in found]


@pytest.fixture(scope="module")
def dockerfile() -> list[Instruction]:
    return instructions((REPOSITORY / "Dockerfile").read_text(encoding="utf-8"))


def stages(dockerfile: list[Instruction]) -> dict[str, list[Instruction]]:
    """Return the instructions of each stage by its name, after those that it builds on."""
    found: dict[str, list[Instruction]] = {}
    for name, rest in dockerfile:
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = list(found.get(base, []))
        found[stage].append((name, rest))
    return found


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def image(dockerfile: list[Instruction], request: pytest.FixtureRequest) -> list[Instruction]:
    """Return the stage that becomes an image."""
    return stages(dockerfile)[request.param]


def copied(dockerfile: list[Instruction]) -> list[str]:
    """Return the paths copied from the checkout."""
    found = [rest.split() for name, rest in dockerfile if name == "COPY"]
    return [source for words in found if not words[0].startswith("--from") for source in words[:-1]]


def is_sent(path: str) -> bool:
    """Return whether .dockerignore sends ``path`` to the build; the last matching line decides."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        prefixes = ["/".join(parts[: index + 1]) for index in range(len(parts))]
        names = prefixes + (parts if "**/" in line else [])
        # A star matches one folder level only.
        if line and not line.startswith("#"):
            same = [name for name in names if name.count("/") == pattern.count("/")]
            if any(fnmatch.fnmatchcase(name, pattern) for name in same):
                sent = line.startswith("!")
    return sent


def test_bases_are_pinned(dockerfile: list[Instruction]) -> None:
    bases = {rest.split()[0] for name, rest in dockerfile if name == "FROM"}
    (base,) = bases - set(stages(dockerfile)) - {"scratch"}  # all stages need the same Python
    assert EXACT_TAG.fullmatch(base)


def test_the_default_image_is_for_gpus(dockerfile: list[Instruction]) -> None:
    assert list(stages(dockerfile))[-1] == "cuda"


def test_only_packages_are_downloaded(dockerfile: list[Instruction]) -> None:
    assert "ADD" not in {name for name, _ in dockerfile}
    for name, rest in dockerfile:
        if name == "RUN":
            assert not re.search(r"\b(curl|wget|git)\b|https?://", rest), rest
            assert "pip install" not in rest or "--no-cache-dir -c constraints.txt" in rest


def test_copied_paths_exist_and_are_sent(dockerfile: list[Instruction]) -> None:
    paths = [path.rstrip("/") for path in copied(dockerfile)]
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    assert [path for path in paths if not is_sent(path)] == []


def test_the_whole_package_is_copied(dockerfile: list[Instruction]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {*project["tool"]["setuptools"]["package-dir"].values(), "gemma3_export"}
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert folders | files <= {path.rstrip("/") for path in copied(dockerfile)}
    found = re.findall(r'"\.\[([\w,]+)\]"', " ".join(rest for _, rest in dockerfile))
    assert found == ["cuda,serve,structured", "cpu,serve,structured"]
    for extras in found:
        assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


@pytest.mark.parametrize(
    "path",
    [
        "model.gguf",
        ".cache/gemma-3-270m-q4_k_m.gguf",
        "demo/bundled/onnx/model.onnx_data",
        "gemma-3-270m/onnx/model.onnx",
        "gemma3_export/copy.gguf",
        ".git/config",
        "examples/cpp/generate.cpp",
        "gemma3_export/cli/__pycache__/x.pyc",
        "tests/test_dockerfile.py",
    ],
)
def test_weights_and_history_are_not_sent(path: str) -> None:
    assert not is_sent(path)


def test_the_image_does_not_run_as_root(image: list[Instruction]) -> None:
    users = [rest for name, rest in image if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "a number, which Kubernetes can check"
    after = image[image.index(("USER", users[-1])) :]
    assert not {"RUN", "COPY"} & {name for name, _ in after}


def test_entry_point_command_and_health_check_parse(
    image: list[Instruction],
) -> None:
    found = dict(image)
    entry, command = json.loads(found["ENTRYPOINT"]), json.loads(found["CMD"])
    health = json.loads(found["HEALTHCHECK"].partition("CMD")[2])
    assert command[1] == "/model"
    for words in (entry + command, health):
        if words[:2] == ["python", "-c"]:
            compile(words[2], "HEALTHCHECK", "exec")
            continue
        assert words[0] == "gemma3-export"
        context = click.Context(command_line, **command_line.context_settings)
        subcommand = command_line.get_command(context, words[1])
        assert subcommand is not None, words
        subcommand.make_parser(click.Context(subcommand, parent=context)).parse_args(words[2:])


def test_the_examples_in_its_comments_exist() -> None:
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^#\s+(?:.*\| )?(docker run .*)$", text, flags=re.MULTILINE):
        rest = shlex.split(re.split("gemma3-export:(?:cpu|cuda)", line)[1])
        assert rest == [] or command_line.get_command(click.Context(command_line), rest[0])
