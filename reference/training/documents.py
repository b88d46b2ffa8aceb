"""Where training text comes from: local files, Hugging Face datasets, or Python itself.

A source is iterated for documents and can be iterated again with the same result; long documents
come in pieces, so that no text has to fit in memory as tokens.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from gemma3_export.errors import InputError, UnavailableError

__all__ = [
    "TINY_STORIES",
    "Document",
    "DocumentSource",
    "HubDataset",
    "LocalFiles",
    "PythonLibrary",
    "Split",
]

Split = Literal["train", "validation"]

TINY_STORIES = "roneneldan/TinyStories"
PIECE_CHARACTERS = 2**14
TEXT_SUFFIXES = frozenset(
    {
        *(".c", ".cpp", ".css", ".go", ".h", ".html", ".java", ".js", ".json", ".jsonl", ".md"),
        *(".py", ".rs", ".rst", ".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"),
    }
)
# Left out of Python's library: tests, tables that are no text to learn from, and what is installed.
_SKIPPED_FOLDERS = frozenset(
    {
        *("__pycache__", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3"),
        *("pydoc_data", "site-packages", "dist-packages", "test", "tests", "turtledemo"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text, or a piece of one."""

    text: str
    is_start: bool = True  # nothing of the same document came before
    is_end: bool = True  # nothing of it follows
    split: Split | None = None  # set when the source has its own validation part


class DocumentSource(Protocol):
    """Texts in a fixed order."""

    @property
    def description(self) -> dict[str, Any]:
        """What the texts are, in JSON; two equal descriptions yield equal documents."""

    @property
    def size_bytes(self) -> int | None:
        """About how much text there is, for progress bars, when it is known."""

    def __iter__(self) -> Iterator[Document]:
        """The documents, from the first."""


class LocalFiles:
    """UTF-8 text files, and folders of them.

    Of a folder, the files with the suffix of a text format are taken, in sorted order.

    Raises:
        InputError: a path does not exist, a named file is empty, or there is no text at all.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [file for path in paths for file in _files_of(path)]
        sizes = [file.stat().st_size for file in self.files]
        if not any(sizes):
            shown = ", ".join(map(str, paths))
            raise InputError(
                f"{shown} holds no text; give files or folders with "
                f"{', '.join(sorted(TEXT_SUFFIXES)[:6])} ... files that are not empty"
            )
        self.size_bytes: int | None = sum(sizes)

    @property
    def description(self) -> dict[str, Any]:
        """File names, sizes and times of change stand for the texts."""
        digest = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return {"kind": "files", "files": len(self.files), "listing_sha256": digest.hexdigest()}

    def __iter__(self) -> Iterator[Document]:
        return _read_documents(self.files, _read_utf8)


class PythonLibrary:
    """The standard library's documentation topics and sources: text that is always there."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        self.files = sorted(_python_files(root), key=lambda file: file.relative_to(root).as_posix())
        self.size_bytes: int | None = sum(file.stat().st_size for file in self.files)
        if not self.files:
            raise UnavailableError(
                f"this Python has no sources of its library below {root}; give text files instead"
            )

    @property
    def description(self) -> dict[str, Any]:
        """The version of Python says it all."""
        version = ".".join(map(str, sys.version_info[:3]))
        return {"kind": "python-library", "python": version, "files": len(self.files)}

    def __iter__(self) -> Iterator[Document]:
        from pydoc_data.topics import topics

        for _, text in sorted(topics.items()):
            yield from _pieces(text.strip() + "\n")
        yield from _read_documents(self.files, _read_python)


class HubDataset:
    """A Hugging Face dataset; its validation split, if any, stays the validation part.

    Raises:
        UnavailableError: ``datasets`` is not installed, or the Hub cannot be reached.
        InputError: the dataset has no such column.
    """

    size_bytes: int | None = None

    def __init__(
        self, name: str = TINY_STORIES, *, column: str = "text", limit: int | None = None
    ) -> None:
        self.name, self.column, self.limit = name, column, limit
        self._splits = _load_dataset(name)
        if "train" not in self._splits:
            raise InputError(f"the dataset {name} has no split 'train', only {[*self._splits]}")
        columns = self._splits["train"].column_names
        if column not in columns:
            raise InputError(f"the dataset {name} has no column {column!r}, only {columns}")

    @property
    def description(self) -> dict[str, Any]:
        """Name and fingerprints as ``datasets`` gives them."""
        prints = {split: data._fingerprint for split, data in self._splits.items()}
        return {
            "kind": "dataset",
            "name": self.name,
            "column": self.column,
            "limit": self.limit,
            "fingerprints": prints,
        }

    def __iter__(self) -> Iterator[Document]:
        has_validation = "validation" in self._splits
        yield from self._documents("train", "train" if has_validation else None)
        if has_validation:
            yield from self._documents("validation", "validation")

    def _documents(self, name: str, split: Split | None) -> Iterator[Document]:
        for index, row in enumerate(self._splits[name]):
            if self.limit is not None and index >= self.limit:
                return
            for piece in _pieces(row[self.column]):
                yield Document(
                    text=piece.text, is_start=piece.is_start, is_end=piece.is_end, split=split
                )


def _load_dataset(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            f"the dataset {name} needs the package datasets; run: "
            'pip install "gemma3-export[train]", or give text files'
        ) from error
    try:
        return dict(datasets.load_dataset(name))
    # It fails in as many ways as there are networks, caches and dataset formats.
    except Exception as error:
        raise UnavailableError(
            f"the dataset {name} cannot be loaded ({type(error).__name__}: {str(error)[:200]}); "
            "check its name and the network, or give text files"
        ) from error


def _files_of(path: Path) -> Iterable[Path]:
    if path.is_dir():
        found = (Path(top) / name for top, _, names in os.walk(path) for name in names)
        return sorted(file for file in found if file.suffix.lower() in TEXT_SUFFIXES)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give text files or folders of them")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; give a file with text in it")
    return [path]


def _python_files(root: Path) -> Iterator[Path]:
    for top, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(top) / name for name in names if name.endswith(".py"))


def _read_documents(files: Sequence[Path], read: Callable[[Path], str]) -> Iterator[Document]:
    for file in files:
        try:
            text = read(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
        yield from _pieces(text)


def _read_utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it or "
            "leave it out"
        ) from error


def _read_python(file: Path) -> str:
    with tokenize.open(file) as opened:  # honours the coding line
        return opened.read()


def _pieces(text: str) -> Iterator[Document]:
    """``text`` in pieces that end with a line, where that is possible; nothing for blank text."""
    if not text.strip():
        return
    start = 0
    while start < len(text):
        stop = min(start + PIECE_CHARACTERS, len(text))
        if stop < len(text):
            line_end = text.rfind("\n", start, stop) + 1
            stop = line_end if line_end > start else stop
        yield Document(text=text[start:stop], is_start=start == 0, is_end=stop == len(text))
        start = stop
