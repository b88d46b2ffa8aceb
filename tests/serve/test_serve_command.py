"""`gemma3-export serve`: options, its process, its end on a signal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from gemma3_export.cli import serve_command
from tests.support.chat_templates import chat_bundle
from tests.support.command_line import error_line, finish, run_rejected, start


def test_it_serves_until_sigterm_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gemma3_export.cli import main\nfrom gemma3_export.serve import server\n"
        "run = server.serve\n"
        "def checked(*arguments):\n"
        "    code = run(*arguments)\n    assert 'torch' not in sys.modules\n    return code\n"
        "server.serve = checked\nmain()"
    )
    bundle = chat_bundle("functiongemma")
    process = start("serve", bundle, "--port", 0, "--threads", 1, code=code)
    assert process.stderr is not None
    listening = json.loads(process.stderr.readline())
    assert listening["event"] == "listening"
    assert listening["url"].startswith("http://127.0.0.1:")
    with httpx.Client(base_url=listening["url"], trust_env=False) as client:
        assert client.get("/ready").status_code == 200
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert answer.json()["model"] == bundle.name
    process.send_signal(signal.SIGTERM)
    _, log = finish(process)
    assert process.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["status"] for line in lines if line["event"] == "request"] == [200]
    assert [line["requests"] for line in lines if line["event"] == "draining"] == [0]


def test_another_address_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve_command.KEY_VARIABLE, raising=False)
    bundle = chat_bundle("functiongemma")
    assert "GEMMA3_API_KEY" in error_line("serve", bundle, "--host", "0.0.0.0")


def test_the_key_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve_command.KEY_VARIABLE, raising=False)
    empty = tmp_path / "key"
    empty.write_text("\n")
    bundle = chat_bundle("functiongemma")
    assert "is empty" in error_line("serve", bundle, "--api-key-file", empty)
    empty.write_text("secret\n")
    both = run_rejected("serve", bundle, "--api-key-file", empty, "--api-key", "other")
    assert "exclude each other" in both


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_line("serve", chat_bundle("functiongemma"), "--port", port)
    assert str(port) in line
    assert "--port" in line


def test_a_folder_without_a_bundle_is_rejected(tmp_path: Path) -> None:
    assert str(tmp_path) in error_line("serve", tmp_path)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_command, "PACKAGES", ("not_installed",))
    line = error_line("serve", "DIR", code=3)
    assert 'pip install "gemma3-export[serve]"' in line


def test_importing_the_command_imports_no_web_framework() -> None:
    code = (
        "import sys, gemma3_export.cli.serve_command\n"
        "assert not {'fastapi', 'uvicorn', 'prometheus_client', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
