"""`make lint` holds the order of the rooms: reversed imports are found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Copy the package with real folders instead of its three links, as import-linter needs."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "gemma3_export", tmp_path / "gemma3_export", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [program, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_import_points_to_its_own_room_or_a_lower_one(copied: Path) -> None:
    done = lint_imports(copied)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


REVERSED = [
    ("errors", "gemma3_export.dtypes"),
    ("runtimes/protocol", "gemma3_export.reference.model"),
    ("parity/judge", "gemma3_export.exporters.decoder_step"),
    ("parity/differences", "gemma3_export.parity.judge"),  # a cycle
]


def test_reversed_imports_are_found(copied: Path) -> None:
    for importer, imported in REVERSED:
        module = copied / "gemma3_export" / f"{importer}.py"
        module.write_text(module.read_text(encoding="utf-8") + f"\n\nimport {imported}\n")
    done = lint_imports(copied)
    assert done.returncode == 1
    assert "Rooms are stacked in one order BROKEN" in done.stdout
    assert "No cycles BROKEN" in done.stdout
    rooms, cycles = done.stdout.split("\nNo cycles\n")
    for importer, imported in REVERSED[:3]:
        assert f"gemma3_export.{importer.replace('/', '.')} -> {imported}" in rooms, done.stdout
    assert "differences" in cycles, done.stdout
