"""Every message on the page of troubleshooting is one that the program prints."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from gemma3_export.staging import sole_writer
from tests.support.command_line import run
from tests.support.exported_bundles import exported_bundle

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/troubleshooting.md"
PLACEHOLDER = re.compile(r"\b[A-Z]{4,}\b(?!_)")
# The command that prints each message, by the message's first words without a placeholder.
COMMANDS = {
    "ONNX Runtime is not installed": "generate BUNDLE --prompt sea",
    "this needs": "verify BUNDLE",
    "CUDA was requested": "generate BUNDLE --prompt sea --device cuda",
    "the Hub cannot be reached": "onnx --size 270m -o OUT",
    "has no model.safetensors": "onnx --weights EMPTY -o OUT",
    "is not a gemma3-export bundle": "inspect EMPTY",
    "has no tokenizer with a chat": "chat WITHOUT_TOKENIZER",
    "exists and already has": "onnx --weights demo -o BUNDLE",
    "exists and was not created": "onnx --weights demo -o FOREIGN --force",
    "another process is writing": "onnx --weights demo -o LOCKED",
    "differs from its manifest": "inspect DAMAGED --check",
    "prompt tokens and": "bench BUNDLE --prompt-tokens 500",
    "has no torchscript graph": "generate BUNDLE --prompt sea --runtime torchscript",
    "no such command": "generte BUNDLE",
}
# Takes an export; tests/exporters raises it.
IN_SOURCE = {"the weights diverge too far": "gemma3_export/api/verification.py"}
MISSING_PACKAGE = {"ONNX Runtime is not installed": "onnxruntime", "this needs": "torch"}


def messages() -> list[str]:
    return re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def fixed_parts(message: str) -> list[str]:
    return [part.strip() for part in PLACEHOLDER.split(message) if part.strip()]


def key_of(message: str) -> str:
    (key,) = [key for key in COMMANDS | IN_SOURCE if key in message]
    return key


def test_every_message_has_a_check():
    assert sorted(map(key_of, messages())) == sorted(COMMANDS | IN_SOURCE)


@pytest.fixture
def places(ort_bundle: Path, tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name.lower() for name in ("EMPTY", "FOREIGN", "LOCKED", "OUT")}
    for name in ("EMPTY", "FOREIGN"):
        folders[name].mkdir()
    (folders["FOREIGN"] / "thesis.txt").write_text("years of work")
    return {"BUNDLE": ort_bundle, **folders}


@pytest.mark.parametrize("message", messages())
def test_the_message_is_printed(message, places, tmp_path, monkeypatch):
    key = key_of(message)
    if key in IN_SOURCE:
        assert key in (REPOSITORY / IN_SOURCE[key]).read_text(encoding="utf-8")
        return
    if key in MISSING_PACKAGE:
        monkeypatch.setitem(sys.modules, MISSING_PACKAGE[key], None)
    command = COMMANDS[key]
    if "DAMAGED" in command:
        places["DAMAGED"] = shutil.copytree(places["BUNDLE"], tmp_path / "damaged")
        with (places["DAMAGED"] / "tokenizer.json").open("ab") as file:
            file.write(b"\n")
    if "WITHOUT_TOKENIZER" in command:
        places["WITHOUT_TOKENIZER"] = exported_bundle("ort")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    words = [places.get(word, word) for word in command.split()]
    if "LOCKED" in command:
        with sole_writer(places["LOCKED"], f"writing {places['LOCKED']}"):
            result = run(*words)
    else:
        result = run(*words)
    assert result.exit_code in (2, 3), result.output
    for part in fixed_parts(message):
        assert part in result.output
