"""The map in CONTRIBUTING.md lists every module of the package once, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("gemma3_export", "reference", "exporters", "runtimes")
INSTALLED = re.compile(r"gemma3_export/(reference|exporters|runtimes)/")


def listed() -> list[tuple[str, str]]:
    """Return the map's lines as path and description; the path of a folder ends in ``/``."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("\n## The map\n")[2].partition("\n## ")[0]
    block = section.split("```")[1].partition("\n")[2]
    lines = [line.split(maxsplit=1) for line in block.splitlines() if line.strip()]
    assert all(len(line) == 2 for line in lines), [line for line in lines if len(line) < 2]
    return [(path, description) for path, description in lines]


def modules() -> set[str]:
    """Return the path of every module; a package is its folder."""
    found = set()
    for root in ROOTS:
        for path in (REPOSITORY / root).rglob("*.py"):
            relative = path.relative_to(REPOSITORY).as_posix()
            if not INSTALLED.match(relative):  # the links, which some versions of glob follow
                found.add(relative.removesuffix("__init__.py"))
    return found


def test_every_module_is_in_the_map() -> None:
    assert sorted(modules() - {path for path, _ in listed()}) == []


def test_every_path_in_the_map_exists() -> None:
    missing = [path for path, _ in listed() if not (REPOSITORY / path).exists()]
    assert missing == []
    folders = [path for path, _ in listed() if (REPOSITORY / path).is_dir()]
    assert [path for path in folders if not path.endswith("/")] == []


def test_no_path_is_in_the_map_twice() -> None:
    counts = Counter(path for path, _ in listed())
    assert [path for path, count in counts.items() if count > 1] == []
