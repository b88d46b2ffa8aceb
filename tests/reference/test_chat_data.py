"""Rows become tokens and marks of what is learned, as transformers and TRL have them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma3_export.errors import InputError
from gemma3_export.reference.training import documents as documents_module
from gemma3_export.reference.training import preparation
from gemma3_export.reference.training.documents import HubDataset, LocalFiles
from gemma3_export.reference.training.encoding import Encoder
from gemma3_export.reference.training.preparation import prepare_tokens, train_bpe
from gemma3_export.reference.training.rows import Example
from gemma3_export.reference.training.token_data import (
    BEGINS_DOCUMENT,
    IS_LEARNED,
    META,
    TokenData,
    open_token_data,
)
from gemma3_export.tokenizer import Tokenizer, TokenizerSettings, load_tokenizer
from tests.support.chat_templates import WEATHER, write_tokenizer
from tests.support.command_line import error_line, run, run_ok
from tests.support.exported_bundles import edit_json
from tests.support.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_gemma_tokenizer
from tests.support.tokenizer_corpus import TEXTS, official_tokenizer_json

transformers = pytest.importorskip("transformers")

Row = dict[str, Any]
Document = tuple[list[int], list[int]]  # token ids, and 1 for those that are learned


def message(role: str, content: Any, **other: Any) -> Row:
    return {"role": role, "content": content, **other}


CONVERSATIONS: list[Row] = [
    {"messages": [message("user", "Grüß Gott"), message("assistant", "the sea 海\n\n")]},
    {
        "messages": [
            message("system", "short!"),
            message("user", "one  two"),
            message("assistant", " three ", reasoning_content="hm"),
            message("user", "and?"),
            message("assistant", "four"),
        ],
        "id": 7,
        "source": None,
    },
    {"messages": [message("assistant", "it speaks first"), message("user", "yes")]},
]
PLAIN: list[Row] = [
    {"prompt": "the sea is", "completion": " wide and grey"},
    {"prompt": "", "completion": "alone"},
    {"prompt": "no space at the", "completion": "join"},
]
ASKED: list[Row] = [
    {
        "prompt": [message("user", "where?")],
        "completion": [message("assistant", "there"), message("user", "sure?")],
    },
    {"prompt": [message("user", "b")], "completion": [message("assistant", "c")]},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        name: write_tokenizer(tmp_path_factory.mktemp(name), name)
        for name in ("marked", "chatml", "functiongemma")
    }
    made["gemma"] = tmp_path_factory.mktemp("gemma")
    tiny_gemma_tokenizer(400).save(made["gemma"])
    return made


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def prepare(path: Path, tokenizer: Tokenizer, output: Path, **options: Any) -> TokenData:
    prepare_tokens(LocalFiles([path]), tokenizer, output, **{"validation_fraction": 0, **options})
    return open_token_data(output)


def documents(data: TokenData, split: str = "train") -> Iterator[Document]:
    """Yield the documents of a token folder."""
    tokens, marks = data.split(split)
    assert tokens is not None
    assert marks is not None
    starts = np.flatnonzero(marks & BEGINS_DOCUMENT)
    for ids, bits in zip(np.split(tokens, starts[1:]), np.split(marks, starts[1:]), strict=True):
        yield ids.tolist(), (bits & IS_LEARNED).tolist()


def without_first(document: Document) -> Document:
    """Drop the mark of the first token, which nothing predicts."""
    return document[0], [0, *document[1][1:]]


# What is learned


def test_messages_equal_the_ids_and_the_mask_of_transformers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "chats.jsonl", CONVERSATIONS)
    data = prepare(rows, load_tokenizer(folders["marked"]), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(folders["marked"])
    expected = []
    for row in CONVERSATIONS:
        made = theirs.apply_chat_template(row["messages"], return_assistant_tokens_mask=True)
        expected.append((made["input_ids"], made["assistant_masks"]))
    found = list(documents(data))
    assert found == expected
    assert data.meta.loss_on == "answers"
    assert data.meta.learned_tokens == {
        "train": sum(sum(mask) for _, mask in found),
        "validation": 0,
    }
    assert data.meta.documents["train"] == 3


# Gemma's own format, with the answers marked up to the end of their turn.
MARKED_GEMMA = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set speaker = 'model' if message.role == 'assistant' else message.role -%}
    {{- '<start_of_turn>' + speaker + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content | trim + '<end_of_turn>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content | trim + '<end_of_turn>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
"""


def test_the_official_tokenizer_gives_the_masks_of_transformers_with_and_without_marks() -> None:
    words = np.random.default_rng(0)
    chats = []
    for _ in range(60):
        roles = ("user", "assistant") * int(words.integers(1, 4))
        texts = ["x" + "".join(words.choice(TEXTS, 2)) for _ in roles]
        chats.append([message(role, text) for role, text in zip(roles, texts, strict=True)])
    path = official_tokenizer_json()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<bos>")
    theirs.chat_template = MARKED_GEMMA
    expected = []
    for chat in chats:
        made = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True)
        expected.append((made["input_ids"], made["assistant_masks"]))
    plain = load_tokenizer(path)
    marked = plain.with_settings(TokenizerSettings(templates={"default": MARKED_GEMMA}))
    for tokenizer in (plain, marked):
        encoder = Encoder(tokenizer, loss_on="answers", parse_special_tokens=False)
        found = encoder.encode([Example(where="", messages=chat) for chat in chats])
        assert [
            (encoded.token_ids, [mark & IS_LEARNED for mark in encoded.marks]) for encoded in found
        ] == expected


def test_the_end_of_the_turn_is_learned_and_the_prompt_is_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    rows = write_jsonl(tmp_path / "chats.jsonl", CONVERSATIONS[:2])
    data = prepare(rows, tokenizer, tmp_path / "out")
    texts = []
    for ids, learned in documents(data):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids  # the template ends conversations, not <eos>
        kept = [token for token, mark in zip(ids, learned, strict=True) if mark]
        texts.append(tokenizer.decode(kept, skip_special_tokens=False))
    assert texts == ["the sea 海<end_of_turn>", "three<end_of_turn>four<end_of_turn>"]


@pytest.mark.parametrize("kind", ["gemma", "byte level"])
def test_prompt_and_completion_equal_what_trl_makes_of_them(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "gemma":
        folder = folders["gemma"]
    else:
        folder = tmp_path / "tokenizer"
        tiny_byte_level_tokenizer().save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rows = PLAIN[:2]
    data = prepare(
        write_jsonl(tmp_path / "pairs.jsonl", rows), load_tokenizer(folder), tmp_path / "out"
    )
    expected = []
    for row in rows:
        prompt = theirs(row["prompt"])["input_ids"]
        whole = theirs(row["prompt"] + row["completion"] + theirs.eos_token)["input_ids"]
        assert whole[: len(prompt)] == prompt  # or TRL would warn
        mask = [0] * len(prompt) + [1] * (len(whole) - len(prompt))
        expected.append(without_first((whole, mask)) if not prompt else (whole, mask))
    assert [
        without_first(found) if not row["prompt"] else found
        for found, row in zip(documents(data), rows, strict=True)
    ] == expected


def test_a_token_never_spans_prompt_and_completion(tmp_path: Path) -> None:
    tokenizer = train_bpe_on("the sea the sea the sea is wide " * 50)
    together = tokenizer.encode_ordinary("the sea")
    row = {"prompt": "the s", "completion": "ea"}
    prompt = tokenizer.encode_ordinary("the s")
    assert together[: len(prompt)] != prompt
    data = prepare(write_jsonl(tmp_path / "pairs.jsonl", [row]), tokenizer, tmp_path / "out")
    ((ids, learned),) = documents(data)
    completion = [*tokenizer.encode_ordinary("ea"), tokenizer.eos_token_id]
    assert ids == [tokenizer.bos_token_id, *prompt, *completion]
    assert learned == [0] * (len(prompt) + 1) + [1] * len(completion)


def train_bpe_on(text: str) -> Tokenizer:
    return train_bpe([documents_module.Document(text=text)], 270)


@pytest.mark.parametrize("name", ["marked", "chatml", "gemma"])
def test_everything_after_prompt_messages_is_learned_as_in_trl(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
    rows = write_jsonl(tmp_path / "asked.jsonl", ASKED)
    data = prepare(rows, load_tokenizer(folders[name]), tmp_path / "out")
    expected = []
    for row in ASKED:
        whole = theirs.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        prompt = theirs.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert whole[: len(prompt)] == prompt
        expected.append((whole, [0] * len(prompt) + [1] * (len(whole) - len(prompt))))
    assert list(documents(data)) == expected


def test_tools_and_template_variables_reach_the_template(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    called = {"function": {"name": "get_weather", "arguments": {"city": "Graz"}}}
    messages = [
        message("user", "weather?"),
        {"role": "assistant", "content": None, "tool_calls": [called]},
    ]
    rows = [{"messages": messages, "tools": tools} for tools in ([WEATHER], json.dumps([WEATHER]))]
    tokenizer = load_tokenizer(folders["functiongemma"])
    theirs = transformers.AutoTokenizer.from_pretrained(folders["functiongemma"])
    data = prepare(write_jsonl(tmp_path / "calls.jsonl", rows), tokenizer, tmp_path / "out")
    expected = theirs.apply_chat_template(messages, tools=[WEATHER])["input_ids"]
    assert [ids for ids, _ in documents(data)] == [expected, expected]


def test_all_of_a_conversation_is_learned_if_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    out, rows = tmp_path / "out", write_jsonl(tmp_path / "chats.jsonl", CONVERSATIONS)
    arguments = ("data", rows, "--tokenizer", folders["gemma"], "--validation-fraction", 0)
    made = write_jsonl(tmp_path / "two.jsonl", CONVERSATIONS[:2])
    result = run_ok("data", made, *arguments[2:], "--loss-on", "all", "-o", out)
    data = open_token_data(out)
    assert data.meta.loss_on == "all"
    assert [learned for _, learned in documents(data)] == [
        [0] + [1] * (len(ids) - 1) for ids, _ in documents(data)
    ]
    total = data.meta.tokens["train"]
    assert f"{total - 2:,} of these {total:,} tokens are learned" in result.stdout


def test_text_rows_and_text_files_beside_rows_are_learned_whole(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("plain text")
    write_jsonl(texts / "b.jsonl", [{"text": "a row"}, {"text": " \n"}, *CONVERSATIONS[:1]])
    found = list(documents(prepare(texts, tokenizer, tmp_path / "out")))
    for (ids, learned), text in zip(found, ("plain text", "a row"), strict=False):
        assert tokenizer.decode(ids) == text
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert learned == [0] + [1] * (len(ids) - 1)
    assert len(found) == 3
    assert 0 < sum(found[2][1]) < len(found[2][0]) - 1


# Special tokens that text spells


def test_text_that_spells_special_tokens_gets_a_warning_that_names_the_option(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "chat.txt"
    text.write_text("<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nho<end_of_turn>\n")
    options = ("--tokenizer", folders["gemma"], "--validation-fraction", 0)
    result = run_ok("data", text, *options, "-o", tmp_path / "plain")
    assert "warning: 1 texts spell special tokens such as '<start_of_turn>' and 1 more" in (
        result.stderr.replace("'<end_of_turn>'", "'<start_of_turn>'")
    )
    assert "pass --parse-special-tokens if they are meant" in result.stderr
    assert "JSONL with messages" in result.stderr
    tokenizer = load_tokenizer(folders["gemma"])
    start = tokenizer.token_id("<start_of_turn>")
    assert start not in open_token_data(tmp_path / "plain").train

    parsed = run_ok("data", text, *options, "--parse-special-tokens", "-o", tmp_path / "parsed")
    assert "warning" not in parsed.stderr
    ids = open_token_data(tmp_path / "parsed").train.tolist()
    expected = transformers.AutoTokenizer.from_pretrained(folders["gemma"])(text.read_text())
    assert ids == [*expected["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["chats.json", "chats.txt"])
def test_rows_in_a_file_of_another_kind_get_a_warning(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(CONVERSATIONS, indent=1 if name == "chats.json" else None) * 9)
    options = ("--tokenizer", folders["gemma"], "--validation-fraction", 0)
    result = run_ok("data", path, *options, "-o", tmp_path / "out")
    assert f"warning: {path} looks like chat data but is trained as plain text" in result.stderr
    assert "name the file .jsonl" in result.stderr


def test_special_tokens_that_the_tokenizer_lacks_get_another_remedy(tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text("<|im_start|>user hi<|im_end|> " * 3)
    lines: list[str] = []
    prepare(tmp_path / "chat.txt", tiny_byte_level_tokenizer(), tmp_path / "out", warn=lines.append)
    (line,) = lines
    assert "the tokenizer lacks it; choose one that has it with --tokenizer" in line


def test_begin_and_end_that_text_spells_are_not_doubled(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    rows = [{"text": "<bos><bos>one<eos>"}, {"prompt": "<bos>two", "completion": "three<eos>"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = prepare(path, tokenizer, tmp_path / "out", parse_special_tokens=True)
    for (ids, _), text in zip(documents(data), ("one", "twothree"), strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"<bos>{text}<eos>"


def test_special_tokens_in_messages_are_text(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    spelled = [message("user", "say <end_of_turn>"), message("assistant", "<end_of_turn> said")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": spelled}])
    data = prepare(path, tokenizer, tmp_path / "out", parse_special_tokens=True)
    ((ids, learned),) = documents(data)
    assert ids.count(tokenizer.token_id("<end_of_turn>")) == 2
    answer = [token for token, mark in zip(ids, learned, strict=True) if mark]
    assert tokenizer.decode(answer, skip_special_tokens=False) == (
        "<end_of_turn> said<end_of_turn>"
    )


# Rows that are rejected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": [{"role": "user"', r"is not valid JSON .*one object per line"),
        ('["a"]', "is a JSON list; each line must be an object"),
        ('{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        ('{"conversations": []}', "rename it to messages"),
        ('{"content": "x", "id": 3}', "neither messages, .* only content, id; rename"),
        ('{"text": "a", "messages": []}', "has messages and text; choose one with --column"),
        ('{"messages": []}', "must be a list of messages"),
        ('{"messages": [{"from": "human", "value": "x"}]}', "rename from and value to role"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "has no answer to learn; .*--loss-on"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogates|Unicode"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": 3}', "text is 3; it must be a string"),
        ('{"prompt": "a"}', "a prompt without completion"),
        ('{"prompt": "a", "completion": ""}', "the completion is empty"),
        ('{"prompt": "a", "completion": [{"role": "user", "content": "x"}]}', "both must be"),
        ('{"prompt": "a", "completion": "b", "tools": [{}]}', "write the prompt as a list"),
        ('{"messages": [{"role": "user", "content": "x"}], "images": ["a.png"]}', "has images"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "["}', "tools is not valid"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff{}", "is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_rejected_with_file_line_and_remedy(
    line: str | bytes, problem: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path, out = tmp_path / "chats.jsonl", tmp_path / "out"
    good = json.dumps(CONVERSATIONS[0]).encode()
    data = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + data + b"\n" + good + b"\n")
    found = error_line("data", path, "--tokenizer", folders["gemma"], "-o", out)
    assert found.startswith(f"error: {path}:3")
    assert re.search(problem, found), found
    assert not out.exists()


def test_a_column_can_be_chosen_among_several(folders: dict[str, Path], tmp_path: Path) -> None:
    row = {**CONVERSATIONS[0], "text": "its text", "body": "another text"}
    tokenizer = load_tokenizer(folders["gemma"])
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    for column, expected in (("text", "its text"), ("body", "another text")):
        out = tmp_path / column
        prepare_tokens(LocalFiles([path], column=column), tokenizer, out, validation_fraction=0)
        assert tokenizer.decode(open_token_data(out).train.tolist()) == expected
    with pytest.raises(InputError, match=r"rows.jsonl:1 has no 'story', only body, messages, text"):
        prepare_tokens(LocalFiles([path], column="story"), tokenizer, tmp_path / "no")


def test_conversations_need_a_tokenizer_that_has_a_format_for_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS[:1])
    with pytest.raises(InputError, match=r"rows.jsonl:1: this tokenizer has no chat template"):
        prepare(path, tiny_byte_level_tokenizer(), tmp_path / "out")


def test_a_loss_option_without_rows_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    result = run_rejected_usage("data", tmp_path / "a.txt", "--loss-on", "all")
    assert "--loss-on would have no effect" in result


def run_rejected_usage(*arguments: object) -> str:
    result = run(*arguments, "-o", "never")
    assert result.exit_code == 2
    return result.stderr


# The folder


def test_examples_stay_whole_in_their_split(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"messages": [message("user", f"q {n}"), message("assistant", f"answer {n}")]}
        for n in range(40)
    ]
    tokenizer = load_tokenizer(folders["gemma"])
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = prepare(path, tokenizer, tmp_path / "out", validation_fraction=0.2)
    found = [list(documents(data, split)) for split in ("train", "validation")]
    assert [len(part) for part in found] == [32, 8]
    texts = {tokenizer.decode(ids) for part in found for ids, _ in part}
    assert len(texts) == 40
    assert data.meta.learned_tokens == {
        split: sum(sum(learned) for _, learned in part)
        for split, part in zip(("train", "validation"), found, strict=True)
    }


def test_an_interrupted_preparation_of_rows_resumes_to_identical_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    rows = [{"text": f"<bos> {n}"} if n % 3 else CONVERSATIONS[n % 2] for n in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines: list[list[str]] = [[], []]
    prepare(path, tokenizer, tmp_path / "whole", validation_fraction=0.2, warn=lines[0].append)
    record, calls = preparation._record, iter(range(3))
    monkeypatch.setattr(preparation, "BATCH_PIECES", 5)

    def dying(files, *rest):
        if next(calls, None) is None:
            for file in files.values():
                file.file.write(b"never recorded")
                file.file.flush()
            raise KeyboardInterrupt
        record(files, *rest)

    monkeypatch.setattr(preparation, "_record", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(path, tokenizer, tmp_path / "parts", validation_fraction=0.2)
    monkeypatch.setattr(preparation, "_record", record)
    with pytest.raises(InputError, match="used other options or another chat template"):
        prepare(path, tokenizer, tmp_path / "parts", validation_fraction=0.2, loss_on="all")
    prepare(path, tokenizer, tmp_path / "parts", validation_fraction=0.2, warn=lines[1].append)
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "parts").iterdir())
    assert {"train.marks.bin", "validation.marks.bin"} <= set(names)
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert lines[0] == lines[1] != []


def test_folders_of_text_keep_the_first_format(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 20)
    data = prepare(tmp_path / "a.txt", load_tokenizer(folders["gemma"]), tmp_path / "out")
    meta = json.loads((tmp_path / "out" / META).read_text())
    assert meta["format_version"] == 1
    assert not {"loss_on", "learned_tokens"} & meta.keys()
    assert data.train_marks is None
    assert not list((tmp_path / "out").glob("*.marks.bin"))


@pytest.mark.parametrize("damage", ["short", "unknown", "count", "version", "later", "splits"])
def test_damaged_marks_are_rejected(damage: str, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS[:2])
    prepare(rows, load_tokenizer(folders["gemma"]), out)
    file = out / "train.marks.bin"
    marks = bytearray(file.read_bytes())
    expected = {
        "short": r"has \d+ bytes, but",
        "unknown": "marks that have no meaning",
        "count": "tokens as learned, but",
        "version": "format version 1 has no learned_tokens|damaged",
        "later": r"format version 3 .* reads 1 and 2",
        "splits": "learned_tokens must have the keys train and validation",
    }[damage]
    if damage == "short":
        del marks[-1]
    elif damage == "unknown":
        marks[5] |= 4
    elif damage == "count":
        marks[marks.index(0)] |= IS_LEARNED
    elif damage == "version":
        edit_json(out / META, format_version=1)
    elif damage == "later":
        edit_json(out / META, format_version=3)
    else:
        edit_json(out / META, learned_tokens={"train": 1})
    file.write_bytes(marks)
    with pytest.raises(InputError, match=expected):
        open_token_data(out)


class FakeColumns(list[Row]):
    """Rows as the library ``datasets`` gives them, as far as we use it."""

    _fingerprint = "f"

    @property
    def column_names(self) -> list[str]:
        return sorted({key for row in self for key in row})


def test_a_dataset_with_messages_is_read_like_jsonl(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str) -> dict[str, FakeColumns]:
            return {
                "train": FakeColumns(CONVERSATIONS[:1]),
                "validation": FakeColumns(CONVERSATIONS[1:2]),
            }

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    tokenizer = load_tokenizer(folders["gemma"])
    prepare_tokens(HubDataset("a/b", column="messages"), tokenizer, tmp_path / "hub")
    rows = write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS[:2])
    expected = list(documents(prepare(rows, tokenizer, tmp_path / "local")))
    data = open_token_data(tmp_path / "hub")
    assert [*documents(data), *documents(data, "validation")] == expected
