"""The chat page of examples/browser, in headless Chromium where there is one."""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import gemma3_export
from tests.support.chromium import HELPERS, require_chromium, result_of_page
from tests.support.command_line import run_ok

PAGE = Path(__file__).parents[2] / "examples" / "browser"
LIBRARY = PAGE / "node_modules" / "@huggingface" / "transformers"
TIMEOUT_S = 300  # a safety net
PROMPT = "The old man looked at the sea and"
NEW_TOKENS = 96  # past the demo model's window of 64
# Runs in the page, again after the reload that the service worker needs.
DRIVE = (
    HELPERS
    + """
const ask = (text, tokens) => {
  element("temperature").value = 0;
  element("maximum").value = tokens;
  element("input").value = text;
  element("form").requestSubmit();
};
const texts = (kind) => [...document.querySelectorAll(kind)].map((item) => item.textContent);
const result = {};
await until("ready", "failed");
if (document.body.dataset.state === "ready") {
  result.loaded = element("status").textContent;
  ask(PROMPT, NEW_TOKENS);
  await until("ready", "failed");
  result.status = element("status").textContent;
  ask(PROMPT, 900);
  new MutationObserver(() => element("stop").click())
    .observe(element("log"), { childList: true, subtree: true });
  await until("ready", "failed");
  result.stopped = element("status").textContent;
}
result.answers = texts(".assistant");
result.failures = texts(".failure");
result.isolated = self.crossOriginIsolated;
await fetch("/result", { method: "POST", body: JSON.stringify(result) });
"""
)


def test_the_page_loads_the_version_that_npm_installs() -> None:
    package = json.loads((PAGE / "package.json").read_text(encoding="utf-8"))
    (pinned,) = package["dependencies"].values()
    script = (PAGE / "chat.js").read_text(encoding="utf-8")
    assert re.findall(r'const VERSION = "(.+)"', script) == [pinned]


def test_the_command_that_the_page_names_exists() -> None:
    script = (PAGE / "chat.js").read_text(encoding="utf-8")
    commands = re.findall(r"gemma3-export onnx (.+?)(?: -o \$\{name\})", script)
    assert commands
    for command in commands:
        words = command.replace("${dtype}", "int8").split()
        run_ok("onnx", *words, "--help")
        assert set(words) & {"--for", "--size"} == {"--for", "--size"}


@contextmanager
def served(model: Path | None, script: str) -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """Serve the page with ``script`` added; yield its address and the results it posts."""
    results: queue.Queue[dict[str, Any]] = queue.Queue()
    extra = b'<script type="module" src="drive.js"></script>'

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            if path.startswith("/model/"):
                root = PAGE / "absent" if model is None else model
                return str(root / path.removeprefix("/model/"))
            return super().translate_path(path)

        def do_GET(self) -> None:
            if self.path == "/":
                self._send((PAGE / "index.html").read_bytes() + extra, "text/html")
            elif self.path == "/drive.js":
                self._send(script.encode(), "text/javascript")
            else:
                super().do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(b"", "text/plain")
            results.put(json.loads(body))

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    def handle(*arguments: Any) -> Handler:
        return Handler(*arguments, directory=str(PAGE))

    server = ThreadingHTTPServer(("127.0.0.1", 0), handle)
    server.handle_error = lambda request, client: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", results
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_page(model: Path | None, profile: Path) -> dict[str, Any]:
    """Return what the page shows in headless Chromium; skip without one."""
    require_chromium()
    script = DRIVE.replace("PROMPT", json.dumps(PROMPT)).replace("NEW_TOKENS", str(NEW_TOKENS))
    with served(model, script) as (address, results):
        return result_of_page(address, results, profile, TIMEOUT_S)


@pytest.mark.slow
def test_the_page_generates_past_the_window_what_this_runtime_generates(tmp_path: Path) -> None:
    if not LIBRARY.is_dir():
        pytest.skip(
            f"this test needs transformers.js; run: npm install --ignore-scripts --prefix {PAGE}"
        )
    model = tmp_path / "model"
    gemma3_export.export_onnx("demo", model, target="web", dtype=("fp32", "int8"), verify=False)
    shown = run_page(model, tmp_path / "profile")
    assert shown["failures"] == []
    assert shown["isolated"]
    assert shown["loaded"].startswith("Ready, on ")
    ours = gemma3_export.load(model, variant="int8", device="cpu", threads=1)
    expected = ours.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert len(expected.token_ids) > 64
    whole, cut = shown["answers"]
    assert whole.strip() == expected.text.strip()
    assert shown["status"].startswith(f"{len(expected.token_ids)} tokens, ")
    assert shown["stopped"].endswith("stopped")
    assert whole.strip().startswith(cut.strip())
    assert len(cut) < len(whole)


@pytest.mark.slow
def test_the_page_says_how_to_make_a_missing_model(tmp_path: Path) -> None:
    shown = run_page(None, tmp_path / "profile")
    (failure,) = shown["failures"]
    assert "gemma3-export onnx --size 270m-it --for web -o model" in failure
    assert shown["answers"] == []
