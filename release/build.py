"""Build the wheel and the sdist for PyPI from a clean copy of the tracked files.

    python release/build.py dist [--url https://github.com/OWNER/NAME]

PyPI shows the README without the repository around it, so its links to files become links into the
repository at the tag of this version. Without --url they become plain text, and pictures go.

The sdist has everything that the wheel is built from, and no tests, which need models and tools
that `make` fetches. The wheel is built twice, from the checkout and from the sdist, and must be the
same.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pages import for_pypi  # the script's own folder is on the path

REPOSITORY = Path(__file__).parent.parent


def main() -> None:
    """Build and check both packages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--url", help="address of the repository, for links")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="gemma3-export-release-") as folder:
        source = Path(folder, "source")
        copy_tracked_files(source)
        prepare(source, arguments.url)
        run(sys.executable, "-m", "build", "--outdir", arguments.output, source)  # wheel from sdist
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, source)
        (direct,) = Path(folder).glob("*.whl")
        (wheel,) = arguments.output.glob("*.whl")
        if contents(direct) != contents(wheel):
            differing = sorted(dict(contents(direct) ^ contents(wheel)))
            sys.exit(f"the sdist builds another wheel than the checkout: {', '.join(differing)}")
    packages = sorted(arguments.output.iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *packages)
    for package in packages:
        print(f"{package} {package.stat().st_size / 1e6:.1f} MB")


def run(*command: object) -> None:
    """Run a command that must succeed."""
    done = subprocess.run([str(word) for word in command], check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def copy_tracked_files(target: Path) -> None:
    """Copy what git tracks, in its present state, so that no build output is packaged."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        file = REPOSITORY / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / name, follow_symlinks=False)


def prepare(source: Path, url: str | None) -> None:
    """Write the README and the URLs that PyPI shows."""
    version = re.search(
        r'^__version__ = "(.*)"$', (source / "gemma3_export/__init__.py").read_text("utf-8"), re.M
    )
    assert version is not None
    readme = source / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(for_pypi(text, url, f"v{version[1]}"), encoding="utf-8")
    if url:
        with (source / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write(
                f'\n[project.urls]\nRepository = "{url}"\n'
                f'Documentation = "{url}/tree/v{version[1]}/docs"\nIssues = "{url}/issues"\n'
            )


def contents(wheel: Path) -> set[tuple[str, str]]:
    """Return name and hash of every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            (name, hashlib.sha256(archive.read(name)).hexdigest()) for name in archive.namelist()
        }


if __name__ == "__main__":
    main()
