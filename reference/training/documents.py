"""Read training text from local files, Hugging Face datasets, or Python's standard library.

A source yields the same documents on every iteration. It splits long documents into pieces, so
that no text has to fit in memory as tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from gemma3_export.errors import InputError, UnavailableError
from gemma3_export.files import check_regular, open_regular, read_text, to_path
from gemma3_export.reference.training.rows import (
    MESSAGES,
    PROMPT,
    TEXT,
    Example,
    Split,
    parse_row,
    read_rows,
)

__all__ = [
    "TINY_STORIES",
    "Document",
    "DocumentSource",
    "HubDataset",
    "LocalFiles",
    "PythonLibrary",
]

TINY_STORIES = "roneneldan/TinyStories"
PIECE_CHARACTERS = 2**14
MAX_FILE_BYTES = 2**32  # a file is held in memory
ROWS_SUFFIXES = (".jsonl", ".ndjson")
# The beginning of a file with rows, or with a list of them.
ROWS_HEAD = re.compile(rb'\s*\[?\s*\{\s*"(messages|conversations|prompt|completion)"\s*:')
TEXT_SUFFIXES = frozenset(
    {
        *(
            ".c",
            ".cpp",
            ".css",
            ".go",
            ".h",
            ".html",
            ".java",
            ".js",
            ".json",
            ".jsonl",
            ".md",
            ".ndjson",
        ),
        *(".py", ".rs", ".rst", ".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"),
    }
)
# Excluded from the standard library: tests, data tables, and installed packages.
_SKIPPED_FOLDERS = frozenset(
    {
        *("__pycache__", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3"),
        *("pydoc_data", "site-packages", "dist-packages", "test", "tests", "turtledemo"),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document, or a piece of a long one."""

    text: str
    is_start: bool = True  # the first piece of its document
    is_end: bool = True  # the last piece of its document
    split: Split | None = None  # set if the source has a validation split of its own


class DocumentSource(Protocol):
    """Documents in a fixed order."""

    @property
    def has_rows(self) -> bool:
        """Return True if there are rows, which are trained on one by one, and not only text."""

    @property
    def description(self) -> dict[str, Any]:
        """Return JSON that identifies the documents: sources with equal descriptions are equal."""

    @property
    def size_bytes(self) -> int | None:
        """Return the approximate size of the text for progress bars, or None if unknown."""

    @property
    def warnings(self) -> Sequence[str]:
        """Return lines for the user about what is probably not meant."""

    def __iter__(self) -> Iterator[Document | Example]:
        """Iterate over the documents from the first one."""


class LocalFiles:
    """UTF-8 text files, JSONL files of rows, and folders of them.

    In a folder, only files with the suffix of a text format count, in sorted order.

    Args:
        paths: files and folders.
        column: the column of the rows to train on; None takes the one that they have.

    Raises:
        InputError: a path does not exist, a file is not a regular file or not readable, a given
            file is empty, or no text was found.
    """

    def __init__(self, paths: Sequence[Path | str], *, column: str | None = None) -> None:
        self.column = column
        given = [to_path(path, "the text", any_bytes=True) for path in paths]
        self.files = [file for path in given for file in _files_of(path)]
        sizes = [check_regular(file) for file in self.files]
        if not any(sizes):
            shown = ", ".join(map(str, paths))
            raise InputError(
                f"no text in {shown}; give files, or folders with non-empty "
                f"{', '.join(sorted(TEXT_SUFFIXES)[:6])} ... files"
            )
        self.size_bytes: int | None = sum(sizes)
        self.has_rows = any(map(_has_rows, self.files))

    @property
    def warnings(self) -> list[str]:
        """Return a line for each file that looks like rows of chat data but is read as text."""
        return [
            f"{file} looks like chat data but is trained as plain text; write one object per line, "
            "and name the file .jsonl"
            for file in self.files
            if not _has_rows(file) and _starts_with_rows(file)
        ]

    @property
    def description(self) -> dict[str, Any]:
        """Return a hash of the file names, sizes and modification times, and the column."""
        digest = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            digest.update(os.fsencode(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0"))
        about = {"kind": "files", "files": len(self.files), "listing_sha256": digest.hexdigest()}
        return about if self.column is None else about | {"column": self.column}

    def __iter__(self) -> Iterator[Document | Example]:
        for file in self.files:
            if not _has_rows(file):
                yield from _read_documents([file], _read_utf8)
                continue
            for where, row in read_rows(file):
                yield from _documents_of(parse_row(row, where, self.column))


class PythonLibrary:
    """The documentation topics and sources of Python's standard library, always available."""

    has_rows = False
    warnings: Sequence[str] = ()

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        self.files = sorted(_python_files(root), key=lambda file: file.relative_to(root).as_posix())
        self.size_bytes: int | None = sum(file.stat().st_size for file in self.files)
        if not self.files:
            raise UnavailableError(
                f"this Python has no standard library sources in {root}; give text files instead"
            )

    @property
    def description(self) -> dict[str, Any]:
        """Return the Python version, which determines the text."""
        version = ".".join(map(str, sys.version_info[:3]))
        return {"kind": "python-library", "python": version, "files": len(self.files)}

    def __iter__(self) -> Iterator[Document]:
        from pydoc_data.topics import topics

        for _, text in sorted(topics.items()):
            yield from _pieces(text.strip() + "\n")
        yield from _read_documents(self.files, _read_python)


class HubDataset:
    """A Hugging Face dataset; its validation split, if any, is used for validation.

    Args:
        name: repository id.
        column: ``messages``, ``prompt`` (with ``completion``), or the name of a text column.
        limit: maximum number of rows per split; None takes all of them.

    Raises:
        UnavailableError: ``datasets`` is not installed, or the dataset cannot be loaded.
        InputError: the dataset has no train split or no such column.
    """

    size_bytes: int | None = None
    warnings: Sequence[str] = ()

    def __init__(
        self, name: str = TINY_STORIES, *, column: str = TEXT, limit: int | None = None
    ) -> None:
        self.name, self.column, self.limit = name, column, limit
        self.has_rows = column in (MESSAGES, PROMPT)
        self._splits = _load_dataset(name)
        if "train" not in self._splits:
            raise InputError(f"dataset {name} has no split 'train', only {[*self._splits]}")
        columns = self._splits["train"].column_names
        if column not in columns:
            raise InputError(f"dataset {name} has no column {column!r}, only {columns}")

    @property
    def description(self) -> dict[str, Any]:
        """Return the name, the options, and the fingerprints that ``datasets`` computes."""
        prints = {split: data._fingerprint for split, data in self._splits.items()}
        return {
            "kind": "dataset",
            "name": self.name,
            "column": self.column,
            "limit": self.limit,
            "fingerprints": prints,
        }

    def __iter__(self) -> Iterator[Document | Example]:
        has_validation = "validation" in self._splits
        yield from self._documents("train", "train" if has_validation else None)
        if has_validation:
            yield from self._documents("validation", "validation")

    def _documents(self, name: str, split: Split | None) -> Iterator[Document | Example]:
        for index, row in enumerate(self._splits[name]):
            if self.limit is not None and index >= self.limit:
                return
            where = f"{self.name}, row {index} of {name}"
            yield from _documents_of(parse_row(row, where, self.column, split), split)


def _documents_of(found: Example | str, split: Split | None = None) -> Iterator[Document | Example]:
    if isinstance(found, Example):
        yield found
        return
    for piece in _pieces(found):
        yield replace(piece, split=split)


def _load_dataset(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            f"dataset {name} needs the package datasets; run: "
            'pip install "gemma3-export[train]", or give text files'
        ) from error
    try:
        return dict(datasets.load_dataset(name))
    # It can fail with any exception of the network, cache and dataset libraries.
    except Exception as error:
        raise UnavailableError(
            f"dataset {name} cannot be loaded ({type(error).__name__}: {str(error)[:200]}); "
            "check its name and the network, or give text files"
        ) from error


def _files_of(path: Path) -> Iterable[Path]:
    if path.is_dir():
        walk = os.walk(path, onerror=_reject_folder)
        found = (Path(top) / name for top, _, names in walk for name in names)
        return sorted(file for file in found if file.suffix.lower() in TEXT_SUFFIXES)
    if check_regular(path) == 0:
        raise InputError(f"{path} is empty; give a file that contains text")
    return [path]


def _reject_folder(error: OSError) -> None:
    """Report a folder that cannot be read, which ``os.walk`` would leave out."""
    raise InputError(
        f"{error.filename} cannot be read: {error.strerror}; give it permissions or leave it out"
    )


def _has_rows(file: Path) -> bool:
    return file.suffix.lower() in ROWS_SUFFIXES


def _starts_with_rows(file: Path) -> bool:
    with open_regular(file) as opened:
        return ROWS_HEAD.match(opened.read(2**10)) is not None


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
    text = read_text(file, limit_bytes=MAX_FILE_BYTES)
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text


def _read_python(file: Path) -> str:
    with tokenize.open(file) as opened:  # honors the coding line
        return opened.read()


def _pieces(text: str) -> Iterator[Document]:
    """Split ``text`` into pieces, at line ends where possible; yield nothing for blank text."""
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
