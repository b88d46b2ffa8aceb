"""The page at /, in headless Chromium where there is one."""

from __future__ import annotations

import json
import queue
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from gemma3_export import Model
from gemma3_export.serve.app import PAGES, PLAYGROUND
from tests.serve.conftest import Running, running
from tests.support.chromium import HELPERS, require_chromium, result_of_page

TIMEOUT_S = 120  # a safety net
PROMPT = "Where is the sea?"
KEY = "the key"
# Runs in the page, which talks to the server on its own.
DRIVE = (
    HELPERS
    + """
const ask = (text, tokens) => {
  element("temperature").value = 0;
  element("max_tokens").value = tokens;
  element("input").value = text;
  element("form").requestSubmit();
};
const texts = (kind) => [...document.querySelectorAll(kind)].map((item) =>
  [...item.querySelectorAll("span")].map((piece) => piece.textContent).join(""));
const result = { violations: [] };
document.addEventListener("securitypolicyviolation", (event) =>
  result.violations.push(event.violatedDirective));
await until("ready", "locked");
result.locked = document.body.dataset.state === "locked";
if (result.locked) {
  element("key").value = KEY;
  element("key_save").click();
  await until("ready");
}
result.model = element("model").textContent;
ask(PROMPT, 12);
await until("ready");
result.status = element("status").textContent;
document.querySelector(".token").click();
result.alternatives = element("alternatives").rows.length;
ask(PROMPT, 400);
const stopper = new MutationObserver(() => {
  if (document.querySelectorAll(".assistant")[1]?.querySelector("span")) element("stop").click();
});
stopper.observe(element("log"), { childList: true, subtree: true });
await until("ready");
stopper.disconnect();
result.stopped = element("status").textContent;
result.answers = texts(".assistant");
element("top_p").value = 7;
ask(PROMPT, 5);
await until("ready");
result.failure = document.querySelector(".failure").textContent;
element("theme").click();
result.theme = document.documentElement.dataset.theme;
await fetch("result", { method: "POST", body: JSON.stringify(result) });
"""
)


def drive(served: Running, profile: Path) -> dict[str, Any]:
    """Open the page with a script that uses it; return what the script saw."""
    require_chromium()
    results: queue.Queue[dict[str, Any]] = queue.Queue()
    page = (PLAYGROUND / "index.html").read_text(encoding="utf-8")
    page += '<script type="module" src="health/drive.js"></script>'
    script = DRIVE.replace("PROMPT", json.dumps(PROMPT)).replace("= KEY", f"= {json.dumps(KEY)}")

    async def send_page(request: Request) -> Response:
        return Response(page, media_type="text/html")

    async def send_script(request: Request) -> Response:
        return Response(script, media_type="text/javascript")

    async def take(request: Request) -> Response:
        results.put(json.loads(await request.body()))
        return Response()

    routes: Any = served.server._app._app
    routes.add_route("/driven", send_page)
    routes.add_route("/health/drive.js", send_script)
    routes.add_route("/result", take, methods=["POST"])
    return result_of_page(f"{served.url}/driven", results, profile, TIMEOUT_S)


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, KEY])
def test_it_chats_stops_and_shows_alternatives(
    model: Model, tmp_path: Path, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("/driven", "/health/drive.js", "/result")
    monkeypatch.setattr("gemma3_export.serve.gate.PUBLIC", (*PAGES, "/health", *own))
    with running(model, key=key) as served:
        shown = drive(served, tmp_path / "profile")
    assert shown["violations"] == []
    assert shown["locked"] == (key is not None)
    assert shown["model"] == "tiny-it"
    expected = model.generate([{"role": "user", "content": PROMPT}], max_new_tokens=12)
    assert shown["answers"][0] == expected.text
    assert re.fullmatch(r"12 tokens, [\d.]+ tokens/s", shown["status"])
    assert shown["alternatives"] == 5
    assert shown["stopped"].endswith("stopped")
    assert shown["failure"].startswith("top_p is 7")
    assert shown["theme"] == "dark"


def test_its_files_load_nothing_from_elsewhere(served: Running) -> None:
    with served.http as client:
        for path in PAGES:
            answer = client.get(path)
            assert answer.status_code == 200
            assert not re.search(r"https?://|//\w", answer.text.replace("// ", "")), path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
