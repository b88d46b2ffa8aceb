"""Build llama-server and convert weights for it.

    python -m benchmarks.serving.llama_server model.gguf

The source is that of the package llama-cpp-python, in the version with which the peer
``llama.cpp`` is measured, and it is built as that peer is. cmake and a C++ compiler must be
installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import click

from benchmarks.environments import run
from benchmarks.peers import PEERS
from gemma3_export.bench.peers import DEFAULT_FOLDER
from gemma3_export.errors import Gemma3ExportError, InputError, UnavailableError
from gemma3_export.staging import staged_directory

__all__ = ["MODEL", "PROGRAM", "set_up", "version_of"]

PROGRAM, MODEL = "llama-server", "model.gguf"
PACKAGE = "llama_cpp_python"
QUANTIZE = "llama-quantize"
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # it would be downloaded
)


def set_up(weights: Path, folder: Path, *, pip_arguments: str = "") -> None:
    """Build llama-server and write its model, unless both exist.

    Args:
        weights: a GGUF file; its matrices are converted to Q8_0.
        folder: receives ``llama-server`` and ``model.gguf``.
        pip_arguments: more arguments for pip, which downloads the source.

    Raises:
        InputError: ``weights`` is not a file.
        UnavailableError: a program is missing, or failed; its output says why.
    """
    if (folder / PROGRAM).exists() and (folder / MODEL).exists():
        return
    if not weights.is_file():
        raise InputError(f"{weights} is not a file; give a GGUF file")
    if missing := [name for name in ("cmake", "c++") if shutil.which(name) is None]:
        raise UnavailableError(
            f"building llama-server needs {' and '.join(missing)}; on Debian and Ubuntu: "
            "apt install cmake g++"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llama-") as temporary,
        staged_directory(folder) as staging,
    ):
        source = download(Path(temporary), pip_arguments)
        build(source, Path(temporary) / "build", staging)
        quantize = [str(staging / QUANTIZE), "--allow-requantize", str(weights.absolute())]
        run([*quantize, str(staging / MODEL), "Q8_0"], f"converting {weights} to Q8_0")


def download(folder: Path, pip_arguments: str) -> Path:
    """Download the source of llama.cpp, and return its folder."""
    pins = PEERS["llama.cpp"].requirements.read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in pins if line.startswith(PACKAGE)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", *pip_arguments.split()]
    wanted = ["--no-deps", "--no-binary", PACKAGE, "--dest", str(folder), pin]
    run([*pip, *wanted], f"downloading the source of {pin}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def build(source: Path, folder: Path, target: Path) -> None:
    """Build llama-server and the program that quantizes, and copy both to ``target``."""
    variables = {k: v for k, v in PEERS["llama.cpp"].build if k in ("CFLAGS", "CXXFLAGS")}
    run(["cmake", "-S", str(source), "-B", str(folder), *CMAKE], "configuring llama.cpp", variables)
    jobs = ["--parallel", str(os.cpu_count() or 1)]
    for program in (PROGRAM, QUANTIZE):
        command = ["cmake", "--build", str(folder), "--target", program, *jobs]
        run(command, f"building {program}", variables)
        shutil.copy2(folder / "bin" / program, target / program)


def version_of(program: Path) -> str:
    """Return what llama-server says about its version.

    Raises:
        InputError: it cannot be run.
    """
    try:
        done = subprocess.run(
            [str(program.absolute()), "--version"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"{program} cannot be run: {error}; build it with "
            "`python -m benchmarks.serving.llama_server`"
        ) from error
    lines = (done.stdout + done.stderr).splitlines()
    return next((line for line in lines if line.startswith("version")), lines[0] if lines else "")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("weights", type=click.Path(path_type=Path), metavar="FILE.gguf")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    default=DEFAULT_FOLDER / PROGRAM,
    show_default=True,
    help="Folder for llama-server and its model.",
)
@click.option("--pip-args", default="", help="More arguments for pip, such as an index.")
def main(weights: Path, folder: Path, pip_args: str) -> None:
    """Build llama-server, and convert a GGUF file to Q8_0 for it (slow: ten minutes)."""
    try:
        set_up(weights, folder, pip_arguments=pip_args)
    except Gemma3ExportError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
