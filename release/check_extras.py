"""Install the wheel with each extra into a new environment, and run commands there.

    python release/check_extras.py dist [--pip-args "..."]

In each environment, the commands that it is for must succeed, and each of the others must exit with
3 and name the extra that it needs. The first environment exports the bundle that the others use.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
IMPORT_SECONDS = 0.5
IMPORT = """
import sys, time
started = time.perf_counter()
import gemma3_export
seconds = time.perf_counter() - started
assert not {"torch", "onnxruntime"} & set(sys.modules)
print(seconds)
"""
EXPORT = "onnx --weights demo -o {bundle}"
DATA = "data {text} -o {work}/data --validation-fraction 0.4"
BATCH = "batch {bundle} {rows} {work}/answers.jsonl --max-new-tokens 4"
GENERATE = "generate {bundle} --prompt sea --max-new-tokens 4"
NEEDS_RUNTIME = {GENERATE: "cpu", BATCH: "cpu", "bench {bundle} --prompt-tokens 4": "cpu"}
NEEDS_EXPORT = {
    "onnx --weights demo -o {work}/none": "export",
    "torchscript --weights demo -o {work}/none": "export",
    "pt2 --weights demo -o {work}/none": "export",
    "to-hf --weights demo -o {work}/none": "export",
    "verify {bundle}": "export",
}
NEEDS_SERVER = {"serve {bundle}": "serve"}
NEEDS_TRAINING = {"train {work} -o {work}/none": "train"}
NEEDS_TIKTOKEN = {"data {text} -o {work}/none --tokenizer tiktoken:gpt2": "tiktoken"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What is installed, which commands work, and which name an extra instead."""

    extras: str
    works: tuple[str, ...]
    names: dict[str, str]
    imports: tuple[str, ...] = ()


ENVIRONMENTS = (
    Environment(
        extras="cpu,export",
        works=("--version", EXPORT, "torchscript --weights demo -o {work}/ts", GENERATE, DATA),
        names=NEEDS_TIKTOKEN,
    ),
    Environment(
        extras="",
        works=("--help", "inspect {bundle}", "completion bash", DATA),
        names=NEEDS_RUNTIME | NEEDS_EXPORT | NEEDS_TRAINING | NEEDS_TIKTOKEN,
    ),
    Environment(
        extras="cpu",
        works=(GENERATE, "doctor --device cpu", BATCH),
        names=NEEDS_EXPORT | NEEDS_TRAINING | NEEDS_TIKTOKEN | NEEDS_SERVER,
    ),
    Environment(
        extras="cpu,serve",
        works=("serve --help",),
        names=NEEDS_EXPORT,
        imports=("gemma3_export.serve.server",),
    ),
    Environment(
        extras="chat,cpu", works=(GENERATE,), names=NEEDS_EXPORT, imports=("prompt_toolkit",)
    ),
    Environment(extras="tiktoken", works=("--help",), names=NEEDS_RUNTIME, imports=("tiktoken",)),
    Environment(
        extras="train",
        works=(DATA, "train {work}/data -o {work}/run --size demo --steps 2 --context-length 32"),
        names=NEEDS_RUNTIME,
    ),
)


def main() -> None:
    """Check all environments, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("packages", type=Path, help="folder of the wheel")
    parser.add_argument("--pip-args", default="", help="more arguments for pip")
    arguments = parser.parse_args()
    (wheel,) = arguments.packages.glob("*.whl")
    with tempfile.TemporaryDirectory(prefix="gemma3-export-extras-") as name:
        folder = Path(name)
        lines = [f"the sea is blue and the rest is silence {number}\n" for number in range(3000)]
        (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
        (folder / "rows.jsonl").write_text('{"prompt": "The sea"}\n', encoding="utf-8")
        for environment in ENVIRONMENTS:
            check(environment, wheel.resolve(), folder, shlex.split(arguments.pip_args))


def check(environment: Environment, wheel: Path, folder: Path, pip_args: list[str]) -> None:
    """Install one environment and run its commands."""
    home = folder / (environment.extras or "base")
    work = home / "work"
    venv.create(home, with_pip=True)
    scripts = home / ("Scripts" if sys.platform == "win32" else "bin")
    extras = f"[{environment.extras}]" if environment.extras else ""
    pip = [scripts / "python", "-m", "pip", "install", "--quiet", *pip_args]
    run([*pip, "-c", REPOSITORY / "constraints.txt", f"{wheel}{extras}"], home)
    work.mkdir()
    seconds = min(float(run([scripts / "python", "-c", IMPORT], work)) for _ in range(3))
    if seconds > IMPORT_SECONDS:
        sys.exit(f"{home.name}: import gemma3_export takes {seconds:.2f} s")
    for module in environment.imports:
        run([scripts / "python", "-c", f"import {module}"], work)
    places = {
        "bundle": folder / "bundle",
        "rows": folder / "rows.jsonl",
        "text": folder / "text.txt",
        "work": work,
    }
    for line in environment.works:
        run([scripts / "gemma3-export", *words(line, places)], work)
    for line, extra in environment.names.items():
        error = run([scripts / "gemma3-export", *words(line, places)], work, code=3)
        if f"gemma3-export[{extra}" not in error:
            sys.exit(f"{home.name}: {line} should name the extra {extra}; it printed:\n{error}")
    print(
        f"{home.name}: import {seconds:.2f} s; {len(environment.works)} commands work, "
        f"{len(environment.names)} name their extra",
        flush=True,
    )


def words(line: str, places: dict[str, Path]) -> list[str]:
    """Return the words of a command, with paths filled in."""
    return [word.format(**places) for word in line.split()]


def run(command: list[Path | str], folder: Path, code: int = 0) -> str:
    """Run a command that must exit with ``code``; return what it printed."""
    # Python must find the installed package, not the one in a checkout.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != code:
        sys.exit(
            f"{' '.join(map(str, command))} exited with {done.returncode} instead of {code}:\n"
            f"{done.stdout}{done.stderr}"
        )
    return done.stdout + (done.stderr if code else "")


if __name__ == "__main__":
    main()
