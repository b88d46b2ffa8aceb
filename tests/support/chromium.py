"""Open a page in headless Chromium, where there is one, with a script that uses it."""

from __future__ import annotations

import queue
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

__all__ = ["HELPERS", "require_chromium", "result_of_page"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# JavaScript that both chat pages of this project can be driven with.
HELPERS = """
const until = (...states) => new Promise((resolve) => {
  const check = () => {
    if (!states.includes(document.body.dataset.state)) return;
    observer.disconnect();
    resolve();
  };
  const observer = new MutationObserver(check);
  observer.observe(document.body, { attributes: true });
  check();
});
const element = (id) => document.getElementById(id);
"""


def require_chromium() -> str:
    """Return the program; skip the test without one."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("this test needs Chromium")
    return browser


def result_of_page(
    address: str, results: queue.Queue[dict[str, Any]], profile: Path, timeout_s: float
) -> dict[str, Any]:
    """Open ``address``, and return what the page's script posts to its server.

    Args:
        address: the page.
        results: filled by the server.
        profile: an empty folder for Chromium.
        timeout_s: how long to wait for the result.
    """
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [require_chromium(), *options, address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return results.get(timeout=timeout_s)
    finally:
        process.terminate()
        process.wait()
