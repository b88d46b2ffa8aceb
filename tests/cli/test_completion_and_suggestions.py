"""Shell completion, suggestions for mistyped names, and options that would change nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import REPOSITORY, run, run_ok, run_rejected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_completes_this_program(shell):
    script = run_ok("completion", shell).stdout
    assert f"_GEMMA3_EXPORT_COMPLETE={shell}_complete" in script
    assert "gemma3-export" in script


def test_bash_completes_commands_and_options_with_the_script(tmp_path):
    """A real bash sources the script and calls the function that it registers."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    program = tmp_path / "gemma3-export"
    program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "from gemma3_export.cli import command_line; '
        'command_line(prog_name=\'gemma3-export\')" "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    (tmp_path / "script.bash").write_text(run_ok("completion", "bash").stdout, encoding="utf-8")

    def complete(*words: str) -> set[str]:
        listed = " ".join(f"'{word}'" for word in words)
        code = (
            f"source '{tmp_path}/script.bash'; COMP_WORDS=({listed}); "
            f"COMP_CWORD={len(words) - 1}; "
            "name=$(complete -p gemma3-export | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
            'COMPREPLY=(); $name gemma3-export; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [bash, "--norc", "-c", code],
            env=environment,
            cwd=Path(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        return set(done.stdout.split())

    assert complete("gemma3-export", "gen") == {"generate"}
    assert {"--temperature", "--top-k"} <= complete("gemma3-export", "generate", "--t")
    assert complete("gemma3-export", "completion", "z") == {"zsh"}


@pytest.mark.parametrize(
    ("typed", "meant"), [("generat", "generate"), ("TO_HF", "to-hf"), ("verfy", "verify")]
)
def test_a_mistyped_command_is_answered_with_the_nearest_one(typed, meant):
    assert f"no such command '{typed}'; did you mean {meant}?" in run_rejected(typed)


def test_a_name_that_is_near_no_command_lists_them():
    assert "choose among onnx, torchscript" in run_rejected("xyzzy\x1b[31m")
    assert "\x1b" not in run_rejected("xyzzy\x1b[31m")


def test_a_mistyped_option_is_answered_with_the_nearest_one(ort_bundle):
    error = run_rejected("generate", ort_bundle, "--promt", "x")
    assert "--promt" in error
    assert "--prompt" in error.replace("--promt", "")


def test_a_seed_without_sampling_is_said_to_do_nothing(ort_bundle):
    arguments = ("generate", ort_bundle, "--prompt", "the sea", "--max-new-tokens", 2)
    assert "--seed has no effect" in run_ok(*arguments, "--seed", 7).stderr
    assert "--seed" not in run_ok(*arguments, "--seed", 7, "--top-k", 4).stderr
    assert "--seed" not in run_ok(*arguments).stderr
    assert run(*arguments, "--seed", 7, "--temperature", 0).stderr.count("--seed has no effect")
