"""``chat``: turns, commands, and a real terminal, with and without prompt_toolkit."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

import gemma3_export
from gemma3_export.api.exporting import export_onnx
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.tokenizer import load_tokenizer
from tests.support.command_line import REPOSITORY, TIMEOUT_S, finish, run, run_ok, start
from tests.support.exported_bundles import made_once
from tests.support.tiny_models import tiny_config

LIMIT = 60_000  # tokens: no answer of this length ends before Ctrl-C does
STREAMING = r"([^\s\x1b])\1{19}"  # the model repeats itself
PATIENCE_S = 2  # after a key
CTRL_C, CTRL_D, UP, ALT_ENTER = b"\x03", b"\x04", b"\x1b[A", b"\x1b\r"
PLAIN = "import sys; sys.modules['prompt_toolkit'] = None\n"
MAIN = "from gemma3_export.cli import main\nmain()"
needs_toolkit = pytest.mark.skipif(
    find_spec("prompt_toolkit") is None, reason="prompt_toolkit is not installed"
)
EDITORS = [pytest.param(PLAIN, id="input"), pytest.param("", id="toolkit", marks=needs_toolkit)]


@pytest.fixture(scope="module")
def endless(tiny_folder: Path) -> Path:
    """Return a bundle whose answers do not end, and whose context is long."""

    def make(path: Path) -> None:
        config = tiny_config(
            num_hidden_layers=1,
            layer_types=("full_attention",),
            vocab_size=400,
            max_position_embeddings=2 * LIMIT,
        )
        tokenizer = load_tokenizer(tiny_folder)
        export_onnx(RandomSource(config, 11), path, tokenizer=tokenizer, verify=False)

    return made_once("chat-endless", make)


class Terminal:
    """A terminal in which the command line runs, and what it shows."""

    def __init__(self, arguments: tuple[object, ...], prologue: str) -> None:
        self._end, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", prologue + MAIN, *map(str, arguments)],
            cwd=REPOSITORY,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            preexec_fn=lambda: os.login_tty(inner),
            pass_fds=(inner,),
        )
        os.close(inner)
        self.shown = ""
        self.read = 0  # characters of it that a test has waited for

    def type(self, keys: str | bytes) -> None:
        os.write(self._end, keys.encode() if isinstance(keys, str) else keys)

    def press_until(self, key: bytes, pattern: str) -> None:
        """Press a key, and again whenever nothing happens, until ``pattern`` is shown.

        Python's readline loses a Ctrl-C between showing the prompt and waiting for a key.
        """
        limit = time.monotonic() + TIMEOUT_S
        while re.search(pattern, self.shown[self.read :]) is None:
            assert time.monotonic() < limit, self.shown
            self.type(key)
            while select.select([self._end], [], [], PATIENCE_S)[0]:
                assert self._receive(), self.shown
        self.wait_for(pattern)

    def wait_for(self, pattern: str) -> str:
        """Return what is shown up to the end of the next match of ``pattern``."""
        limit = time.monotonic() + TIMEOUT_S
        while (found := re.search(pattern, self.shown[self.read :])) is None:
            assert time.monotonic() < limit, self.shown
            assert self._receive(), self.shown
        start, self.read = self.read, self.read + found.end()
        return self.shown[start : self.read]

    def wait_for_exit(self) -> int:
        while self._receive():
            pass
        return self.process.wait(TIMEOUT_S)

    def _receive(self) -> bool:
        ready, _, _ = select.select([self._end], [], [], TIMEOUT_S)
        assert ready, self.shown
        try:
            data = os.read(self._end, 65536)
        except OSError:  # the other side was closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@contextmanager
def terminal(*arguments: object, prologue: str) -> Iterator[Terminal]:
    opened = Terminal(arguments, prologue)
    try:
        yield opened
    finally:
        with suppress(ProcessLookupError):
            opened.close()


def reused_and_total(stats: str) -> tuple[int, int]:
    (numbers,) = re.findall(r"prompt (\d+) tokens(?: \((\d+) reused\))?", stats)
    return int(numbers[1] or 0), int(numbers[0])


@pytest.mark.parametrize("prologue", EDITORS)
def test_in_a_terminal_ctrl_c_ends_the_answer_and_not_the_program(endless, tmp_path, prologue):
    saved = tmp_path / "said.jsonl"
    with terminal("chat", endless, "--max-new-tokens", LIMIT, prologue=prologue) as screen:
        screen.wait_for(">>>")
        screen.type("hello\r")
        screen.wait_for(STREAMING)  # text before the end
        assert "generated" not in screen.shown
        screen.type(CTRL_C)
        first = screen.wait_for(r"generated (\d+) tokens.*")
        screen.wait_for(">>>")
        screen.type("/set max_new_tokens 7\r")
        screen.wait_for("max_new_tokens = 7")
        screen.wait_for(">>>")
        screen.type(UP + UP + b"\r")  # the message before the command
        second = screen.wait_for(r"generated 7 tokens")
        screen.wait_for(">>>")
        screen.type(f"/save {saved}\r")
        screen.wait_for("saved 4 messages")
        screen.wait_for(">>>")
        screen.type("/reset\r")
        screen.wait_for("starts over")
        screen.wait_for(">>>")
        screen.type("hello\r")
        third = screen.wait_for(r"generated 7 tokens")
        screen.wait_for(">>>")
        screen.press_until(CTRL_C, r"Ctrl-D leaves")
        screen.wait_for(">>>")
        screen.type(CTRL_D)
        assert screen.wait_for_exit() == 0, screen.shown
    (generated,) = map(int, re.findall(r"generated ([\d,]+) tokens", first))
    assert 0 < generated < LIMIT
    said = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant"]
    assert said[0] == said[2] == {"role": "user", "content": "hello"}
    # The interrupted answer is part of what the model sees until the reset. Of the cache, at least
    # the first prompt is used again; the answer's text may be other tokens than were generated.
    model = gemma3_export.load(endless, threads=1)
    assert said[3]["content"] == model.generate(said[:3], max_new_tokens=7).text
    reused, total = reused_and_total(second)
    assert total == len(model.encode(said[:3]))
    assert reused >= reused_and_total(first)[1]
    assert reused_and_total(third)[1] == len(model.encode(said[:1]))


@pytest.mark.parametrize("prologue", EDITORS)
def test_in_a_terminal_a_message_may_have_several_lines(endless, tmp_path, prologue):
    saved = tmp_path / "said.jsonl"
    with terminal("generate", endless, "--max-new-tokens", 3, prologue=prologue) as screen:
        screen.wait_for(">>>")
        screen.type('"""one\r')
        screen.wait_for(r"\.\.\.")
        screen.type('/two"""\r')
        screen.wait_for("generated 3 tokens")
        screen.wait_for(">>>")
        expected = ["one\n/two"]
        if not prologue:
            screen.type(b"three" + ALT_ENTER + b"four\r")
            screen.wait_for("generated 3 tokens")
            screen.wait_for(">>>")
            screen.type(b"\x1b[200~five\nsix\x1b[201~\r")  # a paste
            screen.wait_for("generated 3 tokens")
            screen.wait_for(">>>")
            expected += ["three\nfour", "five\nsix"]
        screen.type("/nosuch\r")  # an error does not end the program
        screen.wait_for("unknown command /nosuch")
        screen.wait_for(">>>")
        screen.type(f"/save {saved}\r")
        screen.wait_for("saved")
        screen.wait_for(">>>")
        screen.type("/quit\r")
        assert screen.wait_for_exit() == 0, screen.shown
    said = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in said[::2]] == expected


@pytest.mark.parametrize("prologue", EDITORS)
def test_a_terminated_conversation_exits_with_143(endless, prologue):
    with terminal("chat", endless, "--max-new-tokens", LIMIT, prologue=prologue) as screen:
        screen.wait_for(">>>")
        screen.type("hello\r")
        screen.wait_for(STREAMING)
        screen.process.send_signal(signal.SIGTERM)
        assert screen.wait_for_exit() == 143, screen.shown


def test_without_prompt_toolkit_a_hint_says_how_to_get_it(endless):
    with terminal("chat", endless, prologue=PLAIN) as screen:
        assert 'pip install "gemma3-export[chat]"' in screen.wait_for(">>>")


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    from gemma3_export.cli.conversation import Conversation

    shown = Conversation(None, is_interactive=True)._shown("a\x1b[2J\x9bb\n\tü👩‍🔬\x7f")  # type: ignore[arg-type]
    assert shown == "a\\x1b[2J\\x9bb\n\tü👩‍🔬\\x7f"


def talk(bundle: Path, *lines: str, options: tuple[object, ...] = ()):
    return run_ok("chat", bundle, "--max-new-tokens", 6, *options, stdin="\n".join(lines) + "\n")


def test_each_line_of_a_pipe_is_a_turn_of_one_conversation(ort_bundle):
    result = talk(
        ort_bundle, "Who wrote Faust?", "", "And when?", options=("--system", "Be brief.")
    )
    chat = gemma3_export.load(ort_bundle).chat("Be brief.", max_new_tokens=6)
    answers = [chat.send(text).text for text in ("Who wrote Faust?", "And when?")]
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
    reused = [reused_and_total(line)[0] for line in result.stderr.splitlines() if "prompt" in line]
    assert reused[0] == 0 < reused[1]


def test_the_system_message_can_be_set_and_removed(ort_bundle, tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    result = talk(
        *(ort_bundle, "One", "/system Be brief.", "/system", "Two", f"/save {first}"),
        *("/system -", "/system", "Three", f"/save {second}"),
    )
    assert "Be brief.\n" in result.stderr
    assert "there is no system message\n" in result.stderr
    said = json.loads(first.read_text(encoding="utf-8"))["messages"]
    assert said[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two"},
    ]
    assert (
        said[2]["content"]
        == gemma3_export.load(ort_bundle).generate(said[:2], max_new_tokens=6).text
    )
    said = json.loads(second.read_text(encoding="utf-8"))["messages"]
    assert said[0] == {"role": "user", "content": "Three"}


def test_settings_change_the_sampling_of_the_turns_that_follow(ort_bundle):
    lines = ("Hello", "/reset", "/set temperature 1.5", "/set top-k 9", "/set seed 7", "Hello")
    result = talk(ort_bundle, *lines, "/reset", "/set temperature off", "/set top_k off", "Hello")
    model = gemma3_export.load(ort_bundle)
    message = [{"role": "user", "content": "Hello"}]
    greedy = model.generate(message, max_new_tokens=6).text
    sampled = model.generate(message, max_new_tokens=6, temperature=1.5, top_k=9, seed=7).text
    assert greedy != sampled
    assert result.stdout == f"{greedy}\n{sampled}\n{greedy}\n"
    assert "temperature = 1.5\ntop_k = 9\nseed = 7\n" in result.stderr


def test_a_saved_conversation_is_training_data(ort_bundle, tmp_path):
    saved = tmp_path / "said.jsonl"
    talk(ort_bundle, "Hello", f"/save {saved}", "More", f"/save {saved}")  # its own may be replaced
    assert len(json.loads(saved.read_text(encoding="utf-8"))["messages"]) == 4
    result = run_ok(
        "data",
        saved,
        "--tokenizer",
        ort_bundle,
        "--validation-fraction",
        0,
        "-o",
        tmp_path / "tokens",
    )
    assert "1" in result.output
    other = tmp_path / "other.txt"
    other.write_text("mine", encoding="utf-8")
    refused = run("chat", ort_bundle, "--max-new-tokens", 2, stdin=f"Hello\n/save {other}\n")
    assert refused.exit_code == 2
    assert "exists; choose another name" in refused.stderr
    assert other.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "did you mean /reset?"),
        ("/home/me is my folder", "To send it as a message, begin with //"),
        ("/reset now", "/reset takes nothing after it"),
        ("/save", "/save needs the name of a file"),
        ("/save x.jsonl", "nothing has been said yet"),
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature hot", "temperature is 'hot'; it must be a number, or off"),
        ("/set temperature -1", "temperature is -1"),
        ("/set top_k 1 2", "/set takes a name and a value"),
        ("/set max_new_tokens off", "max_new_tokens is None"),
        ('"""open', 'the message that begins with """ does not end with it'),
        ("word " * 400, "shorten the prompt"),
    ],
)
def test_an_error_in_a_pipe_ends_with_code_2_and_one_line(ort_bundle, line, message):
    result = run("chat", ort_bundle, "--max-new-tokens", 2, stdin=f"{line}\nnever answered\n")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]


def test_a_message_may_begin_with_a_slash(ort_bundle, tmp_path):
    saved = tmp_path / "said.jsonl"
    talk(ort_bundle, "//etc", '"""/etc"""', f"/save {saved}")
    said = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in said[::2]] == ["/etc", "/etc"]


def test_text_that_is_not_utf8_is_rejected(ort_bundle):
    result = run("chat", ort_bundle, stdin=b"caf\xe9\n")
    assert result.exit_code == 2
    assert "standard input is not UTF-8" in result.stderr


def test_an_interrupted_pipe_exits_with_130(endless):
    process = start("chat", endless, "--max-new-tokens", LIMIT, stdin=subprocess.PIPE)
    process.stdin.write(b"hello\nand more\n")
    process.stdin.flush()
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process)
    assert process.returncode == 130, errors


def test_a_bundle_without_a_tokenizer_cannot_chat(one_layer, tmp_path):
    path = tmp_path / "bundle"
    run_ok("onnx", "--random-weights", 1, "--config", one_layer, "--no-verify", "-o", path)
    result = run("chat", path, stdin="Hello\n")
    assert result.exit_code == 2
    assert "has no tokenizer with a chat template" in result.stderr
