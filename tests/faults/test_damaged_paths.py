"""Names and places that are not what they should be: FIFOs, long names, bytes, read-only places."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import gemma3_export
from gemma3_export.bundle import Bundle
from gemma3_export.bundle.inspection import read_proofs
from gemma3_export.config import load_config
from gemma3_export.errors import InputError
from gemma3_export.files import (
    check_regular,
    is_file,
    open_regular,
    read_bytes,
    read_text,
    to_path,
)
from gemma3_export.gguf_file import open_gguf
from gemma3_export.parity.transformers_runtime import TransformersRuntime
from gemma3_export.reference.training.documents import LocalFiles
from gemma3_export.reference.training.model_folder import export_hf_folder
from gemma3_export.reference.training.preparation import prepare_tokens
from gemma3_export.reference.training.runs import resume_training, train
from gemma3_export.reference.training.token_data import open_token_data
from gemma3_export.reference.weights import open_weights
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.staging import check_writable, staged_directory, write_text_atomically
from gemma3_export.testing import assert_parity
from gemma3_export.tokenizer import Tokenizer, load_tokenizer
from tests.support.command_line import error_line, finish, run, run_ok, start
from tests.support.exported_bundles import edit_json
from tests.support.tiny_models import tiny_config, write_hf_folder
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

LONG = "n" * 300
LATIN = os.fsdecode(b"caf\xe9.txt")


@pytest.fixture
def copied_bundle(ort_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ort_bundle, tmp_path / "bundle"))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody can write, not even root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no read-only file system can be mounted: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# Things that are not regular files


def make_fifo(path: Path) -> str:
    os.mkfifo(path)
    return "is a FIFO"


def make_socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return "is a socket"


def make_device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "is a device"


def make_folder(path: Path) -> str:
    path.mkdir()
    return "is a folder"


def make_dangling(path: Path) -> str:
    path.symlink_to("nowhere")
    return "does not exist"


def make_loop(path: Path) -> str:
    path.symlink_to(path.name)
    return "cannot be read: Too many levels of symbolic links"


MAKERS = (make_fifo, make_socket, make_device, make_folder, make_dangling, make_loop)
READERS: tuple[Callable[[Path], object], ...] = (
    open_regular,
    check_regular,
    lambda path: read_bytes(path, limit_bytes=9),
    lambda path: read_text(path, limit_bytes=9),
)


@pytest.mark.parametrize("make", MAKERS)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], str]) -> None:
    path = tmp_path / "x.txt"
    complaint = make(path)
    for read in READERS:
        with pytest.raises(InputError, match=complaint):
            read(path)
    if make is not make_loop:
        assert not is_file(path)


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device, make_dangling, make_loop])
def test_text_in_a_data_folder_is_regular(tmp_path: Path, make: Callable[[Path], str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("Good text. " * 100)
    complaint = make(tmp_path / "in" / "bad.txt")
    line = error_line("data", tmp_path / "in", "-o", tmp_path / "out")
    assert "bad.txt" in line
    assert complaint in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device])
def test_inputs_of_every_command_are_regular(
    copied_bundle: Path, tmp_path: Path, make: Callable[[Path], str]
) -> None:
    path = tmp_path / "x"
    complaint = make(path)
    for arguments in (
        ("data", path, "-o", tmp_path / "out"),
        ("data", "--tokenizer", path, "-o", tmp_path / "out"),
        ("onnx", "--random-weights", "1", "--config", path, "-o", tmp_path / "out"),
        ("to-hf", "--weights", "demo", "--tokenizer", path, "-o", tmp_path / "out"),
        ("onnx", "--weights", "demo", "--dtype", "int4", "--calibration", path, "-o", "out"),
    ):
        if make is not make_fifo or "--calibration" not in arguments:  # a pipe is fine there
            line = error_line(*arguments)
            assert complaint in line, line
    for suffix in (".safetensors", ".gguf", ".pt"):
        weights = tmp_path / f"x{suffix}"
        make(weights)
        line = error_line("to-hf", "--weights", weights, "-o", tmp_path / "out")
        assert complaint in line
    for name in ("config.json", "parity.json", "tokenizer.json", "manifest.json"):
        file = copied_bundle / name
        data = file.read_bytes()
        file.unlink()
        make(file)
        assert name in error_line("inspect", copied_bundle) or name == "manifest.json"
        assert "bundle" in error_line("generate", copied_bundle, "--prompt", "a")
        file.unlink()
        file.write_bytes(data)
    assert run("inspect", copied_bundle).exit_code == 0


def test_a_prompt_may_come_from_a_pipe(ort_bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "nobody writes")
    line = error_line("generate", ort_bundle, "--prompt-file", tmp_path / "nobody writes")
    assert "prompt 1 is empty" in line
    done = subprocess.run(
        ["bash", "-c", 'exec 9< <(printf hello); "$@" --prompt-file /dev/fd/9', "bash"]
        + [os.fspath(part) for part in (sys.executable, "-m", "gemma3_export", "generate")]
        + [str(ort_bundle), "--max-new-tokens", "2", "--json"],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        check=True,
        pass_fds=(),
    )
    assert json.loads(done.stdout)["prompt"] == "hello"


def test_a_prompt_file_that_never_ends_is_cut_short(ort_bundle: Path) -> None:
    assert "is a device" in error_line("generate", ort_bundle, "--prompt-file", "/dev/zero")


def test_what_the_system_refuses_is_one_line(
    ort_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "x"
    for error, code, complaint in (
        (PermissionError(errno.EACCES, "Permission denied", str(place)), 2, f"cannot use {place}"),
        (OSError(errno.EIO, "Input/output error", str(place)), 1, "Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write the output: No space"),
        (MemoryError(), 1, "out of memory"),
    ):

        def refuse(bundle: Bundle, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(Bundle, "check_quickly", refuse)
        assert complaint in error_line("inspect", ort_bundle, code=code)


def test_a_file_that_cannot_be_examined_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path, **options: object) -> None:  # root is never denied
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", deny)
    with pytest.raises(InputError, match=r"manifest\.json cannot be read: Permission denied"):
        Bundle(tmp_path)


# Names


def test_names_that_no_file_has_are_rejected_as_given(tmp_path: Path) -> None:
    for value, complaint in (
        (LONG, "a name of 300 bytes"),
        (f"{tmp_path}/{'é' * 128}/x", "a name of 256 bytes"),
        ("a\0b", "is not a path"),
        ("", "is not a path"),
        (LATIN, r"b'caf\\xe9.txt' has a name that is not UTF-8; rename it"),
        (5, "is 5; it must be a string or a Path"),
        (None, "is None; it must be"),
        (b"x", "it must be a string or a Path"),
    ):
        with pytest.raises(InputError, match=complaint):
            to_path(value)
    assert to_path(LATIN, any_bytes=True).name == LATIN
    assert to_path("é" * 127) == Path("é" * 127)


@pytest.mark.parametrize("name", [LONG, LATIN], ids=["long", "not UTF-8"])
def test_commands_reject_such_names_before_any_work(name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    for arguments in (
        ("generate", name, "--prompt", "a"),
        ("generate", "x", "--prompt", "a", "--draft-model", name),
        ("verify", name),
        ("verify", "x", "--report", name),
        ("verify", "x", "--html", name),
        ("inspect", name),
        ("bench", name),
        ("bench", "x", "--report", name),
        ("onnx", "--weights", "demo", "-o", output),
        ("onnx", "--weights", name, "-o", "x"),
        ("onnx", "--weights", "demo", "--tokenizer", name, "-o", "x"),
        ("onnx", "--weights", "demo", "--config", name, "-o", "x"),
        ("torchscript", "--weights", "demo", "-o", output),
        ("pt2", "--weights", "demo", "-o", output),
        ("to-hf", "--weights", "demo", "-o", output),
        ("to-hf", "--weights", name, "-o", "x"),
        ("data", "-o", output),
        ("data", "--tokenizer", name, "-o", "x"),
        ("train", name, "--size", "demo", "-o", "x"),
        ("train", "x", "--size", "demo", "-o", output),
        ("train", "--resume", name),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        last = result.stderr.splitlines()[-1]
        assert "a name of 300 bytes" in last or "is not UTF-8" in last, (arguments, last)
    assert not list(tmp_path.iterdir())


def test_text_with_a_name_that_is_not_utf8_is_tokenized(tmp_path: Path) -> None:
    for folder, name in (("a", LATIN), ("b", "cafe.txt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("Good text, and more of it. " * 50)
        prepare_tokens(
            LocalFiles([tmp_path / folder / name]),
            tiny_gemma_tokenizer(400),
            tmp_path / f"{folder}-tokens",
            validation_fraction=0,
        )
    one, other = (tmp_path / f"{folder}-tokens" / "train.bin" for folder in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert LocalFiles([tmp_path / "a"]).description["files"] == 1


def test_a_folder_without_permission_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "good.txt").write_text("Good text.")
    scan = os.scandir

    def deny(path: Any) -> Any:  # root is never denied
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(InputError, match=r"in/closed cannot be read: Permission denied"):
        LocalFiles([tmp_path / "in"])


def test_long_names_in_files_are_rejected(copied_bundle: Path, tmp_path: Path) -> None:
    config = tiny_config()
    write_hf_folder(tmp_path / "hf", config)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": f"{LONG}.safetensors"}}
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    line = error_line("to-hf", "--weights", tmp_path / "hf", "-o", tmp_path / "out")
    assert "1 of 1 shards in model.safetensors.index.json are missing: nnn" in line

    manifest = json.loads((copied_bundle / "manifest.json").read_text())
    files = manifest["files"] | {LONG: {"sha256": "0" * 64, "size_bytes": 1}}
    edit_json(copied_bundle / "manifest.json", files=files)
    for command in (("inspect",), ("verify",), ("generate", "--prompt", "a")):
        line = error_line(command[0], copied_bundle, *command[1:])
        assert "manifest.json is damaged: the file 'nnn" in line
        assert "a name of 300 bytes" in line


def test_a_large_manifest_and_a_deep_report_are_rejected(copied_bundle: Path) -> None:
    (copied_bundle / "parity.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError, match="levels of nesting"):
        read_proofs(copied_bundle)
    deep = '{"onnx": ' + '{"a": ' * 500 + "1" + "}" * 501
    (copied_bundle / "parity.json").write_text(deep)
    with pytest.raises(InputError, match="more than 64 levels of nesting; export the bundle again"):
        read_proofs(copied_bundle)
    manifest = json.loads((copied_bundle / "manifest.json").read_text())
    manifest["versions"] |= {f"package {number}": "1" for number in range(2_000_000)}
    (copied_bundle / "manifest.json").write_text(json.dumps(manifest))
    assert (copied_bundle / "manifest.json").stat().st_size > 43e6 * 0.9
    assert "manifest.json is larger than 16 MiB" in error_line("inspect", copied_bundle)


# Strings where paths are expected


def test_strings_are_paths_in_the_whole_api(
    ort_bundle: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    place = str(ort_bundle)
    config = Bundle(place).config
    assert Bundle(ort_bundle).config == config
    assert gemma3_export.load(place, threads=1).config == config
    assert gemma3_export.open_runtime(place, threads=1).config == config
    assert gemma3_export.open_runtime(place, "reference", threads=1).config == config
    assert OnnxRuntime(place, threads=1).config == config
    assert Tokenizer.from_folder(place).vocab_size == load_tokenizer(place).vocab_size
    assert Tokenizer.from_file(f"{place}/tokenizer.json").vocab_size == config.vocab_size
    assert load_config(place) == load_config(f"{place}/config.json") == config
    assert open_weights(str(tiny_folder)).config == load_config(str(tiny_folder))
    assert TransformersRuntime(str(tiny_folder)).config == load_config(tiny_folder)
    export_hf_folder(open_weights(str(tiny_folder)), str(tmp_path / "hf"))
    assert load_config(str(tmp_path / "hf")) == load_config(tiny_folder)
    with staged_directory(str(tmp_path / "staged")) as folder:
        (folder / "x").touch()
    (tmp_path / "text.txt").write_text("Some text of a document, and more. " * 100)
    source = LocalFiles([str(tmp_path / "text.txt")])
    tokenizer = tiny_gemma_tokenizer(400)
    prepare_tokens(source, tokenizer, str(tmp_path / "tokens"), validation_fraction=0)
    assert open_token_data(str(tmp_path / "tokens")).train.size


def test_parity_is_asserted_with_strings(ort_bundle: Path, tmp_path: Path) -> None:
    report = assert_parity(str(ort_bundle), reports=str(tmp_path / "reports"))
    assert report.passed
    assert len(list((tmp_path / "reports").iterdir())) == 3


def test_other_types_are_rejected_as_paths(tmp_path: Path) -> None:
    calls: tuple[Callable[[Any], object], ...] = (
        Bundle,
        gemma3_export.load,
        gemma3_export.open_runtime,
        OnnxRuntime,
        Tokenizer.from_file,
        Tokenizer.from_folder,
        load_tokenizer,
        load_config,
        open_gguf,
        open_token_data,
        resume_training,
        TransformersRuntime,
        lambda value: LocalFiles([value]),
        lambda value: gemma3_export.verify(value),
        lambda value: assert_parity(value),
        lambda value: gemma3_export.open_weights(config_path=value, random_seed=1),
        lambda value: gemma3_export.export_onnx(str(tmp_path), value),
        lambda value: train(value, tmp_path / "run", None),  # type: ignore[arg-type]
        lambda value: train(tmp_path, value, None),  # type: ignore[arg-type]
    )
    for call in calls:
        for value in (5, b"x", ["x"]):
            with pytest.raises(InputError):
                call(value)
    with pytest.raises(InputError, match="it must be a string or a Path"):
        assert_parity(tmp_path, reports=5)  # type: ignore[arg-type]


# Places of reports


REPORTS = ("--report", "--junit", "--html")


def started_proof(*arguments: object, **options: object) -> None:
    raise AssertionError("the place of the report must be checked before the proof")


@pytest.mark.parametrize("option", REPORTS)
def test_the_place_of_a_report_is_checked_before_the_proof(
    ort_bundle: Path,
    read_only: Path,
    tmp_path: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gemma3_export.api.verification.verify", started_proof)
    (tmp_path / "file").write_text("kept")
    for place, complaint in (
        (read_only / "r", "Read-only file system"),
        (read_only / "new" / "r", "Read-only file system"),
        (tmp_path / "file" / "r", "Not a directory|not a directory|exists"),
        (tmp_path, "is not a regular file"),
        ("/dev/full", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        ("/proc/nothing", "cannot write"),
    ):
        line = error_line("verify", ort_bundle, option, place)
        assert any(words in line for words in complaint.split("|")), line
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "read-only"]


def test_the_places_of_a_benchmark_and_of_a_fixture_are_checked_too(
    ort_bundle: Path, read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma3_export.bench.run.run_benchmark", started_proof)
    for option in ("--report", "--plot"):
        assert "Read-only" in error_line("bench", ort_bundle, option, read_only / "r")
    monkeypatch.setattr("gemma3_export.api.verification.verify", started_proof)
    with pytest.raises(InputError, match="Read-only"):
        assert_parity(ort_bundle, reports=read_only)


def test_two_reports_need_two_files(ort_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").touch()
    for names in (("a", "a"), ("a", "b")):
        result = run(
            *("verify", ort_bundle, "--report", tmp_path / names[0]),
            *("--html", tmp_path / names[1]),
        )
        assert result.exit_code == 2
        assert "needs a file of its own" in result.stderr


def test_a_check_of_a_place_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folders" / "report.json")
    assert not list(tmp_path.iterdir())
    name = "r" * 250 + ".json"
    check_writable(tmp_path / name)
    write_text_atomically(tmp_path / name, "text")
    check_writable(tmp_path / name)
    assert (tmp_path / name).read_text() == "text"


# Streams and the working folder


def test_a_full_or_closed_stdout_is_one_line() -> None:
    for redirection, arguments in (
        (">/dev/full", "--help"),
        (">/dev/full", "doctor --device cpu"),
        (">/dev/full", "doctor --device cpu --json"),
        (">&-", "--help"),
        (">&-", "doctor --device cpu"),
        ("<&- >/dev/full", "inspect --help"),
    ):
        code, out, complaint = in_shell(f'"$@" {arguments} {redirection}')
        assert code == 1, complaint
        assert out == ""
        assert complaint.startswith("error: cannot write the output: "), complaint
        assert complaint.count("\n") == 1


def test_a_closed_stderr_or_stdin_is_not_missed() -> None:
    code, out, _ = in_shell('"$@" doctor --device cpu --json 2>&-')
    assert code == 0
    assert json.loads(out)["usable"] is True
    code, out, _ = in_shell('"$@" doctor --device cpu --json <&- 2>&-')
    assert code == 0
    assert json.loads(out)["usable"] is True
    code, out, _ = in_shell('"$@" nothing >/dev/full 2>/dev/full')
    assert code in (1, 2)


def test_a_closed_stdin_is_an_empty_prompt(ort_bundle: Path) -> None:
    code, out, complaint = in_shell(f'"$@" generate "{ort_bundle}" --prompt - <&-')
    assert (code, out) == (2, "")
    assert complaint.startswith("error: prompt 1 is empty")


def test_no_output_file_takes_the_place_of_a_closed_stream(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A file that got the number of a closed stream would receive its messages."""
    code, _, complaint = in_shell(
        f'"$@" to-hf --weights "{tiny_folder}" -o "{tmp_path}/hf" <&- >&- 2>&-'
    )
    assert (code, complaint) == (1, "")  # the summary could not be printed
    run_ok("to-hf", "--weights", tiny_folder, "-o", tmp_path / "other")
    for file in sorted((tmp_path / "other").iterdir()):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()


def test_a_deleted_working_folder_is_one_line(ort_bundle: Path) -> None:
    code = (
        "import os, tempfile\nfrom gemma3_export.cli import main\n"
        "gone = tempfile.mkdtemp()\nos.chdir(gone)\nos.rmdir(gone)\nmain()\n"
    )
    for arguments in (
        ("inspect", ort_bundle),
        ("onnx", "--weights", "demo", "-o", "out"),
        ("train", "tokens", "--size", "demo", "-o", "run"),
        ("data", "-o", "tokens"),
        ("verify", ort_bundle, "--report", "r.json"),
        ("doctor", "--device", "cpu"),
    ):
        process = start(*arguments, code=code)
        out, complaint = finish(process)
        assert process.returncode == 2
        assert out == b""
        assert complaint.startswith(b"error: the current folder has been deleted; ")
        assert complaint.count(b"\n") == 1


def in_shell(line: str) -> tuple[int, str, str]:
    """Run a line of shell in which ``"$@"`` is the command line."""
    program = [sys.executable, "-m", "gemma3_export"]
    done = subprocess.run(
        ["bash", "-c", line, "bash", *program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    return done.returncode, done.stdout, done.stderr


def test_reading_a_small_file_takes_little_memory_whatever_the_limit(tmp_path: Path) -> None:
    """Python allocates as many bytes as a read asks for, here 4 GB for a text of 3 bytes."""
    path, data = tmp_path / "text", os.urandom(3_000_000)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        assert read_bytes(path, limit_bytes=2**32) == data
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", [5_000_000, 4_999_999])
def test_a_pipe_is_read_to_its_end_or_rejected_at_the_limit(limit: int) -> None:
    data = os.urandom(5_000_000)  # more than the first request
    reader, writer = os.pipe()
    thread = Thread(target=_write, args=(writer, data))
    thread.start()
    try:
        with nullcontext() if limit == len(data) else pytest.raises(InputError, match="is larger"):
            path = Path(f"/dev/fd/{reader}")
            assert read_bytes(path, limit_bytes=limit, or_pipe=True) == data
    finally:
        os.close(reader)
        thread.join()


def _write(writer: int, data: bytes) -> None:
    with suppress(BrokenPipeError), open(writer, "wb") as pipe:
        pipe.write(data)
