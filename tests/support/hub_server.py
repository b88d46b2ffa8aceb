"""A local server that speaks the protocol of the Hugging Face Hub, for its real client.

``org/tiny`` is a repository to download from. All others are made by the client: repositories,
branches, Git LFS objects and commits, as the Hub stores them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "x" * 34
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # of a new repository
LARGE_BYTES = 200_000  # text files above are stored in LFS whatever their name


@dataclass
class Repository:
    """A repository that the client made: snapshots of its files by commit."""

    private: bool
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    in_lfs: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.snapshots)}".encode()).hexdigest()
        self.snapshots[oid] = files
        self.branches[branch] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.snapshots[self.branches.get(revision, revision)]

    def edit(self, name: str, data: bytes, branch: str = "main") -> None:
        """Change a file, as on the website."""
        self.commit(branch, self.files(branch) | {name: data})

    def has(self, revision: str) -> bool:
        return revision in self.branches or revision in self.snapshots


class Hub(ThreadingHTTPServer):
    """The server; its attributes change its responses.

    Attributes:
        files: of ``org/tiny``.
        gated: ``org/tiny`` needs TOKEN.
        status: the HTTP status of all responses.
        truncated: downloads of weights end early.
        owners: whose repositories may be written.
        puts_left: how many LFS objects arrive before connections break; None is no limit.
        drops: a name that commits lose, as with a .gitignore.
        repositories: those that the client made.
        objects: LFS objects by their SHA-256.
        requests: method, path and token of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.revisions = {"main", "v2", COMMIT}
        self.gated = False
        self.status = 200
        self.truncated = False
        self.owners = {"me"}
        self.puts_left: int | None = None
        self.drops: str | None = None
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients break connections, and so does this server."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.noted_path()
        if self.server.status != 200:
            return self.answer(self.server.status, b"{}")
        for repo_id, repository in self.server.repositories.items():
            if path.startswith(f"/api/models/{repo_id}"):
                rest = path.removeprefix(f"/api/models/{repo_id}").strip("/")
                return self.describe_uploaded(repo_id, repository, rest)
            if path.startswith(f"/{repo_id}/resolve/"):
                revision, name = path.removeprefix(f"/{repo_id}/resolve/").split("/", 1)
                files = repository.files(revision) if repository.has(revision) else {}
                commit = repository.branches.get(revision, revision)
                return self.send_file(files.get(name), commit)
        if "org/tiny" not in path:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        token = self.headers.get("Authorization")
        if self.server.gated and token != f"Bearer {TOKEN}" and "/resolve/" in path:
            return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/org/tiny"):
            return self.describe(path.removeprefix("/api/models/org/tiny").strip("/"))
        revision, name = path.removeprefix("/org/tiny/resolve/").split("/", 1)
        known = self.server.files if revision in self.server.revisions else {}
        short = self.server.truncated and name.endswith("safetensors") and self.command == "GET"
        return self.send_file(known.get(name), COMMIT, is_short=short)

    def send_file(self, data: bytes | None, commit: str, *, is_short: bool = False) -> None:
        if data is None:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        return self.answer(200, data[: len(data) // 2] if is_short else data, headers, len(data))

    def describe(self, path: str) -> None:
        parts = path.split("/") if path else ["revision", "main"]
        if parts[1] not in self.server.revisions:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.server.files
        if parts[0] == "tree":
            found: Any = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            found = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "private": False}
        return self.answer_json(found, {"X-Repo-Commit": COMMIT})

    def describe_uploaded(self, repo_id: str, repository: Repository, path: str) -> None:
        kind, _, revision = path.partition("/")
        if revision and not repository.has(revision):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = repository.files(revision or "main")
        if kind != "tree":
            return self.answer_json(
                {
                    "id": repo_id,
                    "sha": repository.branches["main"],
                    "private": repository.private,
                    "siblings": [{"rfilename": name} for name in files],
                }
            )
        listed = []
        for name, data in files.items():
            item: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
            item["oid"] = git_oid(data)
            if name in repository.in_lfs:
                sha256 = hashlib.sha256(data).hexdigest()
                item["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
            listed.append(item)
        return self.answer_json(listed)

    def do_PUT(self) -> None:
        path = self.noted_path()
        data = self.read_body()
        with self.server.lock:
            if self.server.puts_left == 0:
                self.close_connection = True
                self.connection.close()
                return
            if self.server.puts_left is not None:
                self.server.puts_left -= 1
            self.server.objects[path.rpartition("/")[2]] = data
        self.answer(200, b"")

    def do_POST(self) -> None:
        path = self.noted_path()
        body = self.read_body()
        if self.server.status != 200:
            return self.answer(self.server.status, b"{}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b'{"error": "Invalid credentials"}')
        if path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        with self.server.lock:
            for repo_id, repository in self.server.repositories.items():
                if path == f"/{repo_id}.git/info/lfs/objects/batch":
                    return self.lfs_batch(json.loads(body))
                if path.startswith(f"/api/models/{repo_id}/"):
                    action, branch = path.removeprefix(f"/api/models/{repo_id}/").split("/", 1)
                    return self.change(repo_id, repository, action, branch, body)
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def create(self, wanted: dict[str, Any]) -> None:
        owner, name = wanted["organization"], wanted["name"]
        repo_id, url = f"{owner}/{name}", f"{self.server.endpoint}/{owner}/{name}"
        if owner not in self.server.owners:
            return self.answer(403, b'{"error": "You do not have the rights"}')
        if repo_id in self.server.repositories:
            return self.answer_json({"url": url}, status=409)
        is_private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories[repo_id] = Repository(is_private)
        return self.answer_json({"url": url})

    def change(
        self, repo_id: str, repository: Repository, action: str, branch: str, body: bytes
    ) -> None:
        if action == "branch":
            if branch in repository.branches:
                return self.answer(409, b"{}")
            repository.branches[branch] = repository.branches["main"]
            return self.answer_json({})
        if not repository.has(branch):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            return self.answer_json({"files": self.upload_modes(repository, branch, body)})
        assert action == "commit"
        return self.commit(repo_id, repository, branch, body)

    def upload_modes(self, repository: Repository, branch: str, body: bytes) -> list[Any]:
        files = repository.files(branch)
        attributes = files.get(".gitattributes", b"").decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        found = []
        for item in json.loads(body)["files"]:
            name = item["path"]
            is_named = any(fnmatch(PurePosixPath(name).name, pattern) for pattern in patterns)
            is_lfs = is_named or item["size"] > LARGE_BYTES or name.endswith((".onnx", "_data"))
            found.append(
                {
                    "path": name,
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": name == self.server.drops,
                    "oid": None if is_lfs or name not in files else git_oid(files[name]),
                }
            )
        return found

    def lfs_batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            if item["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(item)
        return self.answer_json({"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.files(branch))
        for line in body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                repository.messages.append(value["summary"])
            elif step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                data = self.server.objects.get(value["oid"])
                if data is None or hashlib.sha256(data).hexdigest() != value["oid"]:
                    return self.answer(400, b'{"error": "the LFS object did not arrive"}')
                files[value["path"]] = data
                repository.in_lfs.add(value["path"])
            else:
                assert step["key"] == "deletedFile"
                del files[value["path"]]
        oid = repository.commit(branch, files)
        url = f"{self.server.endpoint}/{repo_id}/commit/{oid}"
        return self.answer_json({"success": True, "commitOid": oid, "commitUrl": url})

    def noted_path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        return path

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer_json(
        self, found: Any, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        types = {"Content-Type": "application/json"}
        self.answer(status, json.dumps(found).encode(), types | (headers or {}))

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            if length is not None and length != len(body):
                self.close_connection = True


def git_oid(data: bytes) -> str:
    """Return the id under which Git stores a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve a Hub, and let the client in this process use it, without a token."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's retries
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
