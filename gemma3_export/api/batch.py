"""Generate for every row of a file, and continue where an earlier run ended.

    from gemma3_export import BatchOptions, GenerateOptions, load, run_batch

    model = load("gemma-3-270m-it")
    run_batch(model, "in.jsonl", "out.jsonl", GenerateOptions(max_new_tokens=64))

A row starts as soon as another has ended, the longest first, and results are written in the order
of the input. A row's result depends on the row, the options and the seed, and (up to rounding) not
on the rows that run beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np

from gemma3_export.api.batch_files import check_packages, file_format, open_rows
from gemma3_export.api.batch_results import BatchHeader, UnfinishedResults
from gemma3_export.api.checks import check_flags, check_integers, check_texts
from gemma3_export.api.completion_json import calls_to_json, result_to_json
from gemma3_export.api.model import Model
from gemma3_export.api.model_runtimes import MIN_SHARED_TOKENS
from gemma3_export.api.options import GenerateOptions
from gemma3_export.api.prompts import resolve_stops
from gemma3_export.errors import InputError
from gemma3_export.files import is_file, open_regular, to_path
from gemma3_export.limits import shown
from gemma3_export.progress import Progress, ignore_progress
from gemma3_export.runtimes.generation.generate import generate_each
from gemma3_export.runtimes.generation.loop import GenerationLoop
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.scheduler import ScheduledRequest
from gemma3_export.staging import sole_writer
from gemma3_export.tokenizer import ChatMessage, Tokenizer
from gemma3_export.tokenizer.json_rows import (
    MESSAGES,
    Line,
    checked_messages,
    checked_text,
    choose_column,
    given_columns,
    read_lines,
    template_columns,
)

__all__ = ["ON_ERROR", "BatchOptions", "BatchSummary", "OnError", "run_batch"]

OnError = Literal["stop", "record"]
ON_ERROR: tuple[OnError, ...] = get_args(OnError)
# Options that change the speed and, up to rounding, no result.
SPEED_OPTIONS = ("prompt_lookup", "draft_model", "prefix_cache_bytes", "prefill_chunk")
ANSWERING = ("assistant", "model")
SEED_BITS = 53  # whole numbers that every JSON parser reads exactly


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """Options of :func:`run_batch`.

    Args:
        batch_size: how many rows to generate at once; another starts as soon as one has ended.
        column: the column of the prompt; None is the one of messages, prompt and text that a row
            has.
        chat: make each prompt that is a text a user message.
        system: a system message before those.
        on_error: whether a row that is malformed or does not fit ends the run before anything is
            generated, or is written as an object with ``error``.
        force: replace an output that exists.
        restart: discard the finished rows of an earlier run.

    Raises:
        InputError: a value is out of range.
    """

    batch_size: int = 8
    column: str | None = None
    chat: bool = False
    system: str | None = None
    on_error: OnError = "stop"
    force: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        check_integers(self, 1, "batch_size")
        check_texts(self, "column", "system")
        check_flags(self, "chat", "force", "restart")
        if self.on_error not in ON_ERROR:
            raise InputError(
                f"on_error is {shown(self.on_error)}; it must be {' or '.join(ON_ERROR)}"
            )
        if self.system is not None and not self.chat:
            raise InputError("system needs chat, which makes each prompt a user message")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """What a run did.

    Attributes:
        rows: rows of the input.
        earlier: of these, finished by an earlier run.
        failed: of these, written as an error, by this run or an earlier one.
        new_tokens: tokens that this run generated.
    """

    rows: int
    earlier: int
    failed: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the input that can be generated; its tokens are encoded again when it is."""

    index: int
    line: int  # offset of its line, in bytes
    size: int  # of its line, in bytes
    checksum: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """A row, ready for the model."""

    token_ids: list[int]
    is_chat: bool
    has_tools: bool
    id: Any


def run_batch(
    model: Model,
    source: Path | str,
    target: Path | str,
    options: GenerateOptions | None = None,
    batch: BatchOptions | None = None,
    *,
    progress: Progress = ignore_progress,
) -> BatchSummary:
    """Generate for each row of ``source``, and write one result per row to ``target``.

    A row has ``messages``, ``prompt`` (a text, or messages) or ``text``, and may have ``tools``,
    ``chat_template_kwargs`` and ``id``. If the run is interrupted, the finished rows stay beside
    the target, and the next call with the same input, bundle and options continues with the rest.

    With a seed, row i has a seed of its own, which its result reports: generating its prompt
    alone with that seed gives the same result.

    Args:
        model: the model.
        source: a JSONL, CSV or Parquet file; the ending of its name decides.
        target: the output, in one of the same formats; it appears when it is complete.
        options: how to sample, when to stop, and so on. Text prompts may spell control tokens as
            ``allow_control_tokens`` says.
        batch: how to read the rows and write the results.
        progress: called with the number of finished rows.

    Raises:
        InputError: a row is malformed or does not fit, and ``batch.on_error`` is ``stop``; a table
            is damaged; the target exists; or the finished rows of an earlier run are of another
            one.
        UnavailableError: a file is Parquet, and pyarrow is missing.
        Gemma3ExportError: writing failed.
    """
    options, batch = options or GenerateOptions(), batch or BatchOptions()
    if options.tool_choice is not None:
        raise InputError("tool_choice is not supported in batches, whose rows have their own tools")
    source, target = to_path(source, "the input"), to_path(target, "the output").absolute()
    reader = _Reader(model, options, batch)
    resolve_stops(options, model.tokenizer, model.config.vocab_size)
    _check_target(source, target, force=batch.force)
    check_packages(source, target)
    with open_regular(source) as given, sole_writer(target, f"writing {target}") as place:
        header = _header(model, given, options, batch)
        with open_rows(given, source, place, batch.column) as file:
            rows, failures = reader.plan(file, source, progress)
            with UnfinishedResults(
                place,
                target,
                header,
                is_seed_given=options.seed is not None,
                rows=len(rows) + len(failures),
                restart=batch.restart,
            ) as results:
                earlier = len(results)
                for index, error in failures.items():
                    if index not in results:
                        results.add(index, error)
                run = _Run(model, options, batch, reader, results, progress)
                left = [row for row in rows if row.index not in results]
                new_tokens = run.generate(file, source, left)
                _check_target(source, target, force=batch.force)
                results.publish()
    return BatchSummary(
        rows=len(rows) + len(failures),
        earlier=earlier,
        failed=len(failures),
        new_tokens=new_tokens,
    )


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    if not (target.exists() or target.is_symlink()):
        return
    if source.exists() and target.exists() and source.samefile(target):
        raise InputError(f"{target} is the input; choose another output")
    if not is_file(target):
        raise InputError(f"{target} exists and is not a regular file; choose another output")
    if not force:
        raise InputError(f"{target} exists; pass --force to replace it, or choose another output")


def _header(
    model: Model, file: BufferedReader, options: GenerateOptions, batch: BatchOptions
) -> BatchHeader:
    """Return what decides the results."""
    hashes = {name: record.sha256 for name, record in model.bundle.manifest.files.items()}
    used = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name not in (*SPEED_OPTIONS, "seed")
    }
    used |= {"column": batch.column, "chat": batch.chat, "system": batch.system}
    used["runtime"] = model.options.runtime
    return BatchHeader(
        input_sha256=hashlib.file_digest(file, "sha256").hexdigest(),
        bundle_sha256=hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        options=json.loads(json.dumps(used, default=_plain)),  # as the file will give it back
        seed=None if options.is_greedy else options.sampling().seed,
    )


def _plain(value: Any) -> Any:
    """Return a mapping, a set, or a number of numpy as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    return dict(value) if hasattr(value, "keys") else sorted(value, key=str)


def row_seed(seed: int, index: int) -> int:
    """Return the seed of row ``index``, which does not depend on the other rows."""
    words = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
    high, low = map(int, words)
    return (high << 32 | low) & ((1 << SEED_BITS) - 1)


class _Prefixes:
    """Notices whether prompts share a prefix, without keeping the prompts.

    Args:
        sizes: lengths of prefixes to compare.
    """

    def __init__(self, sizes: set[int]) -> None:
        self._sizes = sorted(sizes)
        self._seen: set[int] = set()
        self.samples: list[list[int]] = []  # twice the longest prefix that two prompts share

    def add(self, token_ids: Sequence[int]) -> None:
        """Compare a prompt with the earlier ones."""
        for size in self._sizes:
            prefix = list(token_ids[:size])
            key = hash((size, *prefix))
            is_longest = not self.samples or size > len(self.samples[0])
            if len(prefix) == size and key in self._seen and is_longest:
                self.samples = [prefix, prefix]
            self._seen.add(key)


class _Reader:
    """Reads rows as the model takes them.

    Raises:
        InputError: the bundle has no tokenizer.
    """

    def __init__(self, model: Model, options: GenerateOptions, batch: BatchOptions) -> None:
        if model.tokenizer is None:
            raise InputError(
                f"{model.bundle.path} has no tokenizer, so it takes no text; export it again with "
                "--tokenizer"
            )
        self.tokenizer: Tokenizer = model.tokenizer
        self._model, self._options, self._batch = model, options, batch
        self.prefixes = _Prefixes({MIN_SHARED_TOKENS, options.own_prefill_chunk})

    def plan(
        self, file: IO[bytes], path: Path, progress: Progress
    ) -> tuple[list[_Row], dict[int, dict[str, Any]]]:
        """Read all rows once; return those to generate, and the errors of the others by index.

        Raises:
            InputError: there is no row; or one is in error, and errors are not recorded.
        """
        rows, failures = [], {}
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        unit = ":" if file_format(path) == "jsonl" else " row "
        for index, line in enumerate(read_lines(file, path, unit)):
            progress("reading rows", line.offset, size)
            try:
                request = self.request(line)
            except InputError as error:
                if self._batch.on_error == "stop":
                    raise
                failures[index] = {"id": _id_of(line), "error": str(error)}
                failures[index] = {k: v for k, v in failures[index].items() if v is not None}
            else:
                rows.append(
                    _Row(
                        index,
                        line.offset,
                        len(line.data),
                        zlib.crc32(line.data),
                        len(request.token_ids),
                    )
                )
                self.prefixes.add(request.token_ids)
        if not rows and not failures:
            how = "; write one JSON object per line" if unit == ":" else ""
            raise InputError(f"{path} has no rows{how}")
        return rows, failures

    def again(self, file: IO[bytes], path: Path, row: _Row) -> _Request:
        """Read a planned row again.

        Raises:
            InputError: the file has changed since.
        """
        file.seek(row.line)
        data = file.read(row.size)
        if zlib.crc32(data) != row.checksum:
            raise InputError(f"{path} was changed while it was being read; run the command again")
        return self.request(Line(f"row {row.index}", row.line, data))

    def request(self, line: Line) -> _Request:
        """Return a row as the model takes it.

        Raises:
            InputError: it is malformed, empty, or longer than the model's context.
        """
        where = line.where
        given = given_columns(line.parse(), where)
        column = choose_column(given, where, self._batch.column)
        value, template = given[column], template_columns(given, where)
        options = self._options
        prompt: str | list[ChatMessage]
        if column == MESSAGES or isinstance(value, list):
            prompt = checked_messages(value, f"{where}: {column}")
            if prompt[-1]["role"] in ANSWERING:
                raise InputError(
                    f"{where}: the conversation ends with an answer, so there is none to generate; "
                    "remove the last message"
                )
        else:
            prompt = checked_text(value, where, column)
            if not prompt.strip():
                raise InputError(f"{where}: {column} is empty; write a prompt, or remove the row")
            if self._batch.chat:
                tools = template.get("tools", options.tools)
                opening = self.tokenizer.chat.opening(self._batch.system, tools)
                prompt = [*opening, ChatMessage(role="user", content=prompt)]
            elif template:
                raise InputError(
                    f"{where} has {' and '.join(template)} for a chat template, but its prompt is "
                    "plain text; write the prompt as a list of messages, or pass --chat"
                )
        is_chat = not isinstance(prompt, str)
        if is_chat:
            options = replace(
                options,
                tools=template.get("tools", options.tools),
                template_variables={
                    **(options.template_variables or {}),
                    **template.get("variables", {}),
                },
            )
        try:
            token_ids = self._model.encode(prompt, options)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        limit = self._model.config.max_position_embeddings
        if len(token_ids) > limit:
            raise InputError(
                f"{where} has {len(token_ids):,} tokens, more than the model's context of "
                f"{limit:,}; shorten the prompt"
            )
        return _Request(
            token_ids=token_ids,
            is_chat=is_chat,
            has_tools=is_chat and bool(options.tools),
            id=_checked_id(given.get("id"), where),
        )


def _id_of(line: Line) -> Any:
    """Return the ``id`` of a row in error, None if it has none or cannot be read or written."""
    try:
        return _checked_id(line.parse().get("id"), line.where)
    except InputError:
        return None


def _checked_id(value: Any, where: str) -> Any:
    """Return the ``id`` of a row if results can have it.

    Raises:
        InputError: it has a number that JSON lacks, such as the infinity that 1e400 is read as.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: id cannot be written: {error}; correct the row") from error
    return value


@dataclass(frozen=True, slots=True)
class _Run:
    """Generates the rows that have no result yet."""

    model: Model
    options: GenerateOptions
    batch: BatchOptions
    reader: _Reader
    results: UnfinishedResults
    progress: Progress

    def generate(self, file: IO[bytes], path: Path, rows: Sequence[_Row]) -> int:
        """Generate ``rows`` and add their results; return the number of new tokens.

        The longest come first: if memory does not suffice, that shows at once.
        """
        done = total = len(self.results)
        total += len(rows)
        new_tokens = 0
        if not rows:
            return 0
        self.progress("generating rows", done, total)
        order = sorted(rows, key=lambda row: (-row.tokens, row.index))
        context = self.model.config.max_position_embeddings
        loop = self.model.new_loop(
            self.reader.prefixes.samples,
            self.options,
            rows=min(self.batch.batch_size, len(rows)),
            row_tokens=min(order[0].tokens + self.options.max_new_tokens, context),
        )
        running: dict[int, _Request] = {}
        for event in generate_each(loop, self._prepared(order, running, loop, file, path)):
            if isinstance(event, Completion):
                request = running.pop(event.request)
                self.results.add(event.request, self._result(event, request))
                new_tokens += len(event.tokens)
                done += 1
                self.progress("generating rows", done, total)
                if done % self.batch.batch_size == 0 or done == total:
                    self.results.flush_to_disk()
        return new_tokens

    def _prepared(
        self,
        rows: Sequence[_Row],
        running: dict[int, _Request],
        loop: GenerationLoop,
        file: IO[bytes],
        path: Path,
    ) -> Iterator[ScheduledRequest]:
        """Yield the rows as requests, and remember them by index while they run."""
        seed = self.results.header.seed
        for row in rows:
            request = running[row.index] = self.reader.again(file, path, row)
            yield self.model.prepare(
                request.token_ids,
                self._options_for(request),
                loop.runtime,
                index=row.index,
                capacity=loop.cache.capacity,
                seed=None if seed is None else row_seed(seed, row.index),
            )

    def _options_for(self, request: _Request) -> GenerateOptions:
        """Return the options of a row; conversations also end where an answer does."""
        if not request.is_chat or self.options.ignore_eos:
            return self.options
        ends = self.reader.tokenizer.chat.end_token_ids
        return replace(self.options, stop_tokens=(*self.options.stop_token_names, *ends))

    def _result(self, completion: Completion, request: _Request) -> dict[str, Any]:
        named = {} if request.id is None else {"id": request.id}
        tokenizer = self.reader.tokenizer
        result = named | result_to_json(completion, tokenizer)
        if request.has_tools:
            result |= calls_to_json(completion, tokenizer)
        return result
