"""Serve a bundle over HTTP: send a prompt, get its continuation.

    python examples/service/serve.py gemma-3-270m
    curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "The sea is"}'

The server accepts local connections only. To listen on another address, set GEMMA3_API_KEY to a
key, which clients send as `Authorization: Bearer KEY`. Requests run one at a time. A few more may
wait; the rest get status 429. This is a starting point: no TLS, no batching and no streaming.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

import gemma3_export
from gemma3_export import Gemma3ExportError, InputError

KEY_VARIABLE = "GEMMA3_API_KEY"
MAX_BODY_BYTES = 1_000_000
MAX_NEW_TOKENS = 1024
MAX_SECONDS = 120
MAX_WAITING = 8
READ_TIMEOUT_S = 30  # drops clients that connect and send nothing
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
KNOWN = ("prompt", "max_new_tokens", "allow_control_tokens", *SAMPLING)


class Engine:
    """A loaded bundle that serves one request at a time.

    Raises:
        InputError: If the bundle has no tokenizer.
    """

    def __init__(self, model: gemma3_export.Model) -> None:
        if model.tokenizer is None:
            raise InputError(f"{model.bundle.path} has no tokenizer; export it with --tokenizer")
        self.model = model
        self.places = threading.Semaphore(MAX_WAITING)
        self.turn = threading.Lock()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the continuation of one prompt.

        Raises:
            InputError: If a field is unknown or its value is invalid.
        """
        rest = dict(asked)
        prompt, new_tokens = rest.pop("prompt", None), rest.pop("max_new_tokens", 128)
        if not isinstance(prompt, str):
            raise InputError("prompt must be a string")
        if type(new_tokens) is not int or not 1 <= new_tokens <= MAX_NEW_TOKENS:
            raise InputError(f"max_new_tokens must be from 1 to {MAX_NEW_TOKENS}")
        # Clients' text is plain text unless they ask: spelled control tokens could end its turn.
        allows_control = rest.pop("allow_control_tokens", False)
        if unknown := sorted(set(rest) - set(SAMPLING)):
            raise InputError(f"{unknown[0]} is unknown; choose among {', '.join(KNOWN)}")
        with self.turn:
            deadline = time.monotonic() + MAX_SECONDS
            (done,) = self.model.start(
                [prompt],
                max_new_tokens=new_tokens,
                allow_control_tokens=allows_control,
                cancel=lambda: time.monotonic() > deadline,
                **rest,
            ).collect()
        return {
            "text": done.text,
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.prompt_tokens,
            "new_tokens": len(done.token_ids),
        }


class Server(ThreadingHTTPServer):
    """An HTTP server for one engine."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], engine: Engine, key: str | None) -> None:
        super().__init__(address, Handler)
        self.engine = engine
        self.key = key


class Handler(BaseHTTPRequestHandler):
    """The handler of ``GET /health`` and ``POST /generate``."""

    server: Server
    timeout = READ_TIMEOUT_S

    def do_GET(self) -> None:
        """Report that the server is up, and on which device."""
        if self.path == "/health":
            self.reply(200, {"status": "ok", **self.server.engine.model.runtime.info.to_json()})
        else:
            self.reply(404, {"error": "not found; use GET /health or POST /generate"})

    def do_POST(self) -> None:
        """Generate text for a prompt, or explain why not."""
        engine = self.server.engine
        if (refusal := self.refusal()) is not None:
            self.close_connection = True  # the body has not been read
            self.reply(*refusal)
        elif not engine.places.acquire(blocking=False):
            self.close_connection = True
            self.reply(429, {"error": "too many requests are waiting; try again later"})
        else:
            # Release the place before replying: a client may send its next request as soon as it
            # has the reply.
            try:
                status, answer = self.outcome()
            finally:
                engine.places.release()
            self.reply(status, answer)

    def outcome(self) -> tuple[int, dict[str, Any]]:
        """Run the request and return the status and body to reply with."""
        try:
            return 200, self.server.engine.answer(self.body())
        except InputError as error:
            return 400, {"error": str(error)}
        except Gemma3ExportError as error:
            self.log_error("%s", error)
            return 500, {"error": "generation failed; see the server log"}

    def refusal(self) -> tuple[int, dict[str, Any]] | None:
        """Return the status and body of a request rejected by its headers, else None."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        key, length = self.server.key, self.headers.get("Content-Length", "")
        if self.path != "/generate":
            return 404, {"error": "not found; use GET /health or POST /generate"}
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            return 401, {"error": "send the key as `Authorization: Bearer KEY`"}
        # Browsers do not let a page of another site send this type without a preflight request.
        if self.headers.get_content_type() != "application/json":
            return 415, {"error": "send application/json"}
        if not (length.isascii() and length.isdigit()):
            return 411, {"error": "send Content-Length"}
        if int(length) > MAX_BODY_BYTES:
            return 413, {"error": f"send at most {MAX_BODY_BYTES:,} bytes"}
        return None

    def body(self) -> dict[str, Any]:
        """Return the JSON object in the request body.

        Raises:
            InputError: If the body is not a JSON object.
        """
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        except (ValueError, RecursionError) as error:
            raise InputError(f"the body is not valid JSON: {error}") from error
        if not isinstance(asked, dict):
            raise InputError('the body must be an object, such as {"prompt": "The sea is"}')
        return asked

    def reply(self, status: int, answer: dict[str, Any]) -> None:
        """Send ``answer`` as JSON."""
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def require_key(host: str, key: str | None) -> None:
    """Require a key when ``host`` is reachable from other machines.

    Raises:
        InputError: If there is no key.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and not key:
        raise InputError(f"--host {host} is reachable from elsewhere; set {KEY_VARIABLE} to a key")


@click.command()
@click.argument("bundle_path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--warm-up/--no-warm-up", default=True, show_default=True)
def main(bundle_path: Path, host: str, port: int, device: str, warm_up: bool) -> None:
    """Serve the bundle in DIR until interrupted."""
    key = os.environ.get(KEY_VARIABLE)
    try:
        require_key(host, key)
        engine = Engine(gemma3_export.load(bundle_path, device=device, warm_up=warm_up))
        server = Server((host, port), engine, key)
    except Gemma3ExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"error: cannot listen on {host}:{port}: {error}; try another --port", err=True)
        sys.exit(InputError.exit_code)
    click.echo(f"listening on http://{host}:{server.server_port}", err=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("stopped", err=True)


if __name__ == "__main__":
    main()
