"""Full disks, size limits and signals: the right exit code, and no partial output."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma3_export.exporters import bundle_writer
from gemma3_export.exporters.onnx.external_data import HashingWriter
from tests.support.command_line import RANDOM_EXPORT, error_line, finish, start

LIMITED_EXPORT = """
import resource
from gemma3_export.cli import main
from tests.support.shared_traces import share_traces
share_traces()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main()
"""


INTERRUPTIBLE_EXPORT = """
import sys, time
from gemma3_export.exporters.onnx.external_data import HashingWriter
write = HashingWriter.write
def write_and_wait(self, data):
    write(self, data)
    self.file.flush()
    print("writing", flush=True)
    while True:  # short sleeps: a signal that arrives just before a sleep waits for its end
        time.sleep(0.01)
HashingWriter.write = write_and_wait
from gemma3_export.cli import main
from tests.support.shared_traces import share_traces
share_traces()
main()
"""


INTERRUPTIBLE_GENERATION = """
import sys
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
step, steps = OnnxRuntime.step, []
def step_and_wait(self, ids, cache, **options):
    steps.append(ids)
    if len(steps) == 4:
        print("stepping", file=sys.stderr, flush=True)
        sys.stdin.readline()  # the signal arrives before the line
    return step(self, ids, cache, **options)
OnnxRuntime.step = step_and_wait
from gemma3_export.cli import main
main()
"""


def test_a_disk_that_fills_up_leaves_no_output(one_layer, output, monkeypatch):
    write = HashingWriter.write

    def write_until_full(self, data):
        if self.position > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(HashingWriter, "write", write_until_full)
    message = error_line(*RANDOM_EXPORT, one_layer, "-o", output, code=1)
    assert "No space left" in message


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 80 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system_leaves_no_output(one_layer, small_disk, monkeypatch):
    arguments = (*RANDOM_EXPORT, one_layer, "-o", small_disk / "out")
    assert "GB free" in error_line(*arguments, code=1)  # seen before anything is written
    monkeypatch.setattr(bundle_writer, "require_space", lambda *_: None)
    assert "No space left" in error_line(*arguments, code=1)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("command", ["onnx", "torchscript", "pt2"])
def test_a_file_size_limit_leaves_no_output(one_layer, output, command):
    process = start(
        *(command, *RANDOM_EXPORT[1:], one_layer, "-o", output, "--no-verify"),
        code=LIMITED_EXPORT,
    )
    _, complaint = finish(process)
    assert process.returncode == 1, complaint
    assert b"no partial output is left: [Errno 27] File too large" in complaint


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_writing_weights_leaves_no_output(one_layer, output, number, code):
    process = start(*RANDOM_EXPORT, one_layer, "-o", output, code=INTERRUPTIBLE_EXPORT)
    assert process.stdout.readline() == b"writing\n"
    assert any(output.parent.rglob("model.onnx_data"))
    process.send_signal(number)
    process.send_signal(number)  # an impatient second one changes nothing
    _, complaint = finish(process)
    assert process.returncode == code
    assert b"Traceback" not in complaint


def test_interrupted_generation_keeps_the_tokens_so_far(ort_bundle):
    process = start(
        *("generate", ort_bundle, "--prompt", "hello", "--json", "--prompt-lookup", 0),
        *("--max-new-tokens", 200),
        code=INTERRUPTIBLE_GENERATION,
        stdin=subprocess.PIPE,
    )
    lines = iter(process.stderr.readline, b"")
    assert b"stepping\n" in lines
    process.send_signal(signal.SIGINT)
    out, complaint = finish(process, b"\n")
    assert process.returncode == 130
    completion = json.loads(out)
    assert completion["finish_reason"] == "cancelled"
    assert 0 < len(completion["token_ids"]) < 200
    assert b"Traceback" not in complaint
