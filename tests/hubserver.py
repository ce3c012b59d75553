"""A small Hugging Face hub on this machine, for tests and demonstrations without a network.

It serves, from directories, the routes that ``huggingface_hub`` uses to download a model, with the
headers and error codes of the real hub, and can misbehave on demand. With ``HF_ENDPOINT`` set to
:attr:`HubServer.url` any program that uses ``huggingface_hub`` talks to it::

    python tests/hubserver.py openai-community/gpt2=python/nnsight_go/models/landmarks
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

LARGE = (".safetensors", ".bin")
"""Endings of files that the hub keeps in LFS."""


@dataclass
class Repo:
    """A model of the hub. ``token``: what a visitor must send; ``gated``: whether those without it
    learn that the model exists."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch, tag or commit."""
        for name, files in self.revisions.items():
            if revision in (name, commit(files)):
                return commit(files), files
        return None


@dataclass(frozen=True)
class Request:
    """What a visitor asked for."""

    method: str
    path: str
    authorization: str | None
    range: str | None


def commit(files: Mapping[str, bytes]) -> str:
    """The commit hash of some files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def read(directory: Path) -> dict[str, bytes]:
    """The files of a directory and those below it, by their paths in it."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class HubServer:
    """The server; runs between ``with`` and the end of its block, on a port of its own.

    Attributes: ``repos`` by id; ``requests`` in order of arrival; ``cut`` for files whose body breaks
    off after so many bytes, so many times; ``short`` for files served whole, but shorter than announced; ``fail`` for
    parts of paths that get an HTTP status instead of an answer. All may be changed at any time.
    """

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cut: dict[str, tuple[int, int]] = {}
        self.short: dict[str, int] = {}
        self.fail: dict[str, int] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """What to set ``HF_ENDPOINT`` to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        revision: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Puts a revision of a model on the hub and gives its commit hash."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.token, repo.gated = token, gated
        repo.revisions[revision] = read(files) if isinstance(files, Path) else dict(files)
        return commit(repo.revisions[revision])

    def asked(self, text: str) -> list[Request]:
        """The requests whose path contains a text."""
        return [r for r in self.requests if text in r.path]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the hub off the network. Doing it twice is fine."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Stays silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.hub.requests.append(
            Request(self.command, path, self.headers.get("authorization"), self.headers.get("range"))
        )
        for part, status in self.hub.fail.items():
            if part in path:
                return self._error(status, "", "out of order")
        if m := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^?]+))?", path):
            return self._api(*m.groups())
        if m := re.fullmatch(r"/(.+?)/resolve/(.+)", path):
            return self._resolve(*m.groups())
        return self._error(404, "", "no such page")

    def _repo(self, repo_id: str, must_login: bool) -> Repo | None:
        """A model the visitor may see, or an answer that says why not. Of a gated one everybody may see
        the description."""
        repo = self.hub.repos.get(repo_id)
        sent = self.headers.get("authorization")
        if repo is None:
            self._error(404 if sent else 401, "RepoNotFound", "Repository not found")
        elif repo.token is None or sent == f"Bearer {repo.token}" or (repo.gated and not must_login):
            return repo
        elif repo.gated:
            self._error(403 if sent else 401, "GatedRepo", "Access to this model is restricted")
        elif sent:
            self._error(404, "RepoNotFound", "Repository not found")
        else:
            self._error(401, "RepoNotFound", "Repository not found")
        return None

    def _api(self, repo_id: str, kind: str | None, revision: str | None) -> None:
        repo = self._repo(repo_id, must_login=False)
        if repo is None:
            return
        found = repo.find(revision or "main")
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = found
        if kind == "tree":
            return self._json([_entry(name, content) for name, content in files.items()])
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "siblings": siblings})

    def _resolve(self, repo_id: str, rest: str) -> None:
        repo = self._repo(repo_id, must_login=True)
        if repo is None:
            return
        for revision in [*repo.revisions, *(commit(f) for f in repo.revisions.values())]:  # a branch may hold a slash
            if rest.startswith(revision + "/") and (found := repo.find(revision)):
                sha, files = found
                name = rest[len(revision) + 1 :]
                break
        else:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if name not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        return self._file(name, files[name], sha)

    def _file(self, name: str, content: bytes, sha: str) -> None:
        headers = {"ETag": f'"{_etag(name, content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        body, status = content, 200
        if m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or ""):
            start = int(m.group(1))
            body, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and name in self.hub.short:
            body = body[: self.hub.short[name]]
        after, times = self.hub.cut.get(name, (0, 0))
        if self.command == "HEAD" or times == 0:
            return self._send(status, headers, body)
        self.hub.cut[name] = (after, times - 1)
        return self._send(status, headers, body, after)

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code} if code else {}
        self._send(
            status, {**extra, "X-Error-Message": message, **(headers or {})}, json.dumps({"error": message}).encode()
        )

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None:
            body = body[:cut]
            self.close_connection = True
        self.wfile.write(body)


def _etag(name: str, content: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _etag(name, content), "size": len(content), "pointerSize": 134}
    return entry


def main() -> None:
    """Serves ``id=directory`` pairs until interrupted."""
    hub = HubServer()
    for pair in sys.argv[1:]:
        repo_id, _, directory = pair.partition("=")
        hub.add(repo_id, Path(directory))
    with hub:
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
