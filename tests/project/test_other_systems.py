"""The package imports and writes its output where Windows or macOS lacks what Linux has.

The test runs in processes that look like the other system to the package: `sys.platform` names it,
modules and constants that it lacks are gone, and renaming and deleting files follow its rules. The
libraries are loaded before, so they see Linux. The workflow `systems` runs on the real systems.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Arguments: the system, a folder to work in.
DISGUISE = """
import ctypes, errno, fcntl, importlib, os, pkgutil, signal, sys, types
from pathlib import Path

FOREIGN = ("torch", "ray", "triton_python_backend_utils")
parent, incomplete = Path(sys.argv[2]), set()  # modules that need one of these
sys.modules["torch"] = None  # slow, and mypy checks what needs it for all systems

def import_all():
    import gemma3_export
    for module in pkgutil.walk_packages(gemma3_export.__path__, "gemma3_export.", onerror=skip):
        if module.name not in incomplete and not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                assert error.name.partition(".")[0] in FOREIGN, error
                incomplete.add(module.name)

def skip(name):
    assert name in incomplete, name

import_all()  # loads the libraries
for name in [name for name in sys.modules if name.partition(".")[0] == "gemma3_export"]:
    del sys.modules[name]

system = sys.argv[1]
sys.platform = system
del os.posix_fallocate
load = ctypes.CDLL
def load_library(name, *arguments, **options):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    return load(name, *arguments, **options)
ctypes.CDLL = load_library
if system == "win32":
    def lock(descriptor, mode, size):
        where = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, size, where)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=lock, LK_NBLCK=2)
    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        sys.modules[name] = None
    for owner, names in (
        (os, "O_NONBLOCK O_CLOEXEC set_blocking getloadavg sysconf sched_getaffinity"),
        (signal, "SIGHUP SIGSTOP SIGCONT SIGKILL"),
    ):
        for name in names.split():
            delattr(owner, name)
    os.O_BINARY = 0

    def open_files():
        for entry in os.scandir("/proc/self/fd"):
            try:
                yield os.readlink(entry.path)
            except OSError:
                pass

    def only_closed(function, message):
        def wrapped(path, *arguments, **options):
            full = os.path.abspath(path)
            if any(name == full or name.startswith(f"{full}/") for name in open_files()):
                raise PermissionError(errno.EACCES, message, full)
            return function(path, *arguments, **options)
        return wrapped

    os.unlink = only_closed(os.unlink, "used by another process")
    rename = only_closed(os.rename, "used by another process")
    def rename_to_nothing(source, target):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", str(target))
        rename(source, target)
    os.rename = rename_to_nothing
import_all()
from gemma3_export import staging
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.files import read_bytes
"""
STAGING = """
MANIFEST = '{"format_version": 1, "files": {"model.onnx": {}}}'
def write(text, **options):
    with staging.staged_directory(target, **options) as place:
        (place / "manifest.json").write_text(MANIFEST)
        (place / "model.onnx").write_text(text)

target = folder / "out"
write("first")
write("second", force=True)
assert (target / "model.onnx").read_text() == "second"
empty = target = folder / "empty"
empty.mkdir()
write("third")
assert (empty / "model.onnx").read_text() == "third"
staging.write_text_atomically(folder / "text", "a\\r\\nb\\n")
staging.write_text_atomically(folder / "text", "a\\nb\\n")
assert read_bytes(folder / "text", limit_bytes=9) == b"a\\nb\\n"
assert sorted(path.name for path in folder.iterdir()) == ["empty", "out", "text"]
"""
TWO_PROCESSES = """
target = folder / "out"
with staging.sole_writer(target, "working"):
    child = os.fork()
    if child == 0:
        try:
            with staging.sole_writer(target, "working"):
                os._exit(1)
        except InputError as error:
            os._exit(3 if f"is working (process {os.getppid()})" in str(error) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
with staging.sole_writer(target, "working"):
    pass
assert list(folder.iterdir()) == []
"""
SPACE = """
staging.check_disk_space(folder / "file", 1)
try:
    staging.check_disk_space(folder / "file", 2**60)
except OSError as error:
    assert error.errno == errno.ENOSPC
else:
    raise AssertionError
assert list(folder.iterdir()) == []
"""
SIGNALS = """
from gemma3_export.signals import Terminated, install_signal_handlers, uninterrupted
install_signal_handlers()
done = False
try:
    with uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        done = True
except Terminated:
    assert done
else:
    raise AssertionError
"""
BENCHMARK = """
from gemma3_export.bench.run import BenchmarkOptions, run_benchmark
try:
    run_benchmark("no bundle", BenchmarkOptions())
except UnavailableError as error:
    assert "on Windows" in str(error)
except InputError:
    assert system != "win32"
"""


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_output_is_written_without_what_only_linux_has(system: str, tmp_path: Path) -> None:
    parts = {
        "staging": STAGING,
        "two processes": TWO_PROCESSES,
        "space": SPACE,
        "signals": SIGNALS,
        "benchmark": BENCHMARK,
    }
    code = DISGUISE
    for name, part in parts.items():
        code += f"\nfolder = parent / {name!r}\nfolder.mkdir()\n{part}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('done')", system, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
