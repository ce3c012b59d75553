"""A server of the remote protocol in this process, which fails as a test tells it to."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import http.server
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zstandard

from nnsight_go import LanguageModel, NnsightError, OpError, _ffi, errors
from nnsight_go.remote import file

KEY = "a key that nobody may see"


@dataclasses.dataclass
class Job:
    """One that was submitted."""

    id: str
    request: bytes
    state: str = "QUEUED"
    response: bytes = b""
    error: dict[str, Any] | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def about(self) -> dict[str, Any]:
        out = {"id": self.id, "model": "m", "state": self.state, "position": 2, "created": "2026-01-01T00:00:00Z"}
        return out | ({"error": self.error} if self.error else {})


# What a test does to a request before it is answered: gives status, headers and body; None goes on as usual.
Fault = Callable[["Handler"], "tuple[int, dict[str, str], bytes] | None"]


class Server:
    """Performs requests by a model that is here.

    Attributes:
        faults: the first of them is done to the next request of its method, and is gone then.
        hold: jobs stay queued until it is set.
        seen: method and path of each request.
        resends: how often a job was submitted that was known.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.jobs: dict[str, Job] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: dict[str, collections.deque[Fault]] = collections.defaultdict(collections.deque)
        self.hold = threading.Event()
        self.hold.set()
        self.seen: list[tuple[str, str]] = []
        self.connections = 0
        self.resends = 0
        self.lock = threading.Lock()
        server = self

        class Bound(Handler):
            owner = server

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._http.daemon_threads = True
        self.host = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def submit(self, mark: str, request: bytes) -> Job:
        with self.lock:
            id = hashlib.sha256(mark.encode()).hexdigest()[:32]
            if id in self.jobs:
                self.resends += 1
                return self.jobs[id]
            job = self.jobs[id] = Job(id, request)
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def _run(self, job: Job) -> None:
        self.hold.wait()
        if job.state == "CANCELLED":
            return
        job.state = "RUNNING"
        try:
            request = self._filled(job.request)
            job.response = bytes(
                _ffi.call_for_array(_ffi.lib().nng_model_perform, self.model._native._handle, request, len(request))
            )
            job.state = "COMPLETED"
        except NnsightError as error:
            code = "OpError" if isinstance(error, OpError) else type(error).__name__
            fields = {name: getattr(error, name) for name in errors._FIELDS}
            job.error = {"code": code, "message": error.message, **{k: v for k, v in fields.items() if v is not None}}
            job.state = "ERROR"
        job.done.set()

    def _filled(self, request: bytes) -> bytes:
        """The request with uploaded tensors in it, since a performer of this process knows none."""
        of = file.File(bytearray(request))
        body = msgspec.json.decode(of.bytes("request"))
        tensors: dict[str, Any] = {name: of[name] for name in of._entries if name != "request"}
        for step in body["steps"]:
            for constant in step["constants"]:
                if hash := constant.pop("hash", None):
                    tensors[hash] = file.File(bytearray(self.uploads[hash]))["tensor"]
                    constant["tensor"] = hash
        return file.encode(tensors | {"request": msgspec.json.encode(body)})


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    owner: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "zstd":
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 30)
        return data

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        headers = headers or {}
        if "zstd" in self.headers.get("Accept-Encoding", "") and len(body) > 1000:
            body, headers["Content-Encoding"] = zstandard.ZstdCompressor().compress(body), "zstd"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, status: int, body: Any) -> None:
        self.answer(status, json.dumps(body).encode())

    def fault(self, status: int, message: str) -> None:
        self.json(status, {"error": {"code": "RemoteError", "message": message}})

    def handle_one(self) -> None:
        self.query = {k: v[0] for k, v in urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query).items()}
        self.route = urllib.parse.urlparse(self.path).path
        self.owner.seen.append((self.command, self.path))
        self.given = self.body()
        if self.owner.faults[self.command]:
            done = self.owner.faults[self.command].popleft()(self)
            if done is not None:
                if done[0]:
                    self.answer(done[0], done[2], done[1])
                return
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.fault(401, "no such key")
        parts = self.route.strip("/").split("/")
        getattr(self, f"{self.command.lower()}_{parts[1]}")(*parts[2:])

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_one

    def post_jobs(self) -> None:
        job = self.owner.submit(self.headers["Idempotency-Key"], self.given)
        job.done.wait(float(self.query.get("wait", 0)))
        self.result(job)

    def result(self, job: Job) -> None:
        if job.state == "COMPLETED":
            self.answer(200, job.response, {"Nnsight-Job": job.id, "Content-Type": file.MEDIA})
        elif job.state == "ERROR":
            self.json(422, {"error": job.error, "id": job.id})
        elif job.state == "CANCELLED":
            self.json(409, {"error": {"code": "CancelledError", "message": "the job was cancelled"}})
        else:
            self.json(202, job.about())

    def get_jobs(self, id: str, what: str = "") -> None:
        job = self.owner.jobs.get(id)
        if job is None:
            return self.fault(404, f"there is no job {id}")
        if what != "result":
            return self.json(200, job.about())
        job.done.wait(float(self.query.get("wait", 0)))
        self.result(job)

    def delete_jobs(self, id: str) -> None:
        job = self.owner.jobs[id]
        if not job.done.is_set():
            job.state = "CANCELLED"
            job.done.set()
        self.json(200, job.about())

    def get_models(self, *name: str) -> None:
        if not name:
            return self.json(200, {"models": [{"name": "m", "architecture": "G", "dtype": "float32", "workers": 1}]})
        self.json(200, self.owner.model._native.description)

    def head_tensors(self, hash: str) -> None:
        self.answer(204 if hash in self.owner.uploads else 404)

    def put_tensors(self, hash: str) -> None:
        self.owner.uploads[hash] = self.given
        self.answer(204)


# ---- what tests do to requests ----


def status(code: int, body: Any = None, **headers: str) -> Fault:
    """Answers with a status."""
    data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    return lambda handler: (code, {k.replace("_", "-"): v for k, v in headers.items()}, data)


def drop(handler: Handler) -> tuple[int, dict[str, str], bytes]:
    """Closes the connection without an answer."""
    handler.close_connection = True
    return 0, {}, b""


def half(handler: Handler) -> tuple[int, dict[str, str], bytes]:
    """Promises more than it sends, then closes the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"abc")
    handler.close_connection = True
    return 0, {}, b""


def accepted_then_dropped(handler: Handler) -> tuple[int, dict[str, str], bytes]:
    """Takes the job, and closes the connection without saying so."""
    handler.owner.submit(handler.headers["Idempotency-Key"], handler.given)
    return drop(handler)


def slow(seconds: float) -> Fault:
    """Takes its time, then goes on as usual."""

    def wait(_: Handler) -> None:
        time.sleep(seconds)

    return wait


def serving(model: LanguageModel) -> Iterator[Server]:
    """For a fixture."""
    with Server(model) as server:
        yield server
