"""A server over HTTP: ``docs/remote-protocol.md``, "HTTP".

Connections stay open, and all threads of the process share them. What can be done again without harm is, where the
way to the server fails or it has too much to do; a job is submitted once, however often it is sent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import httpx2
import torch

from .. import positions
from ..config import CONFIG
from ..errors import CancelledError, InputError, NnsightError, RemoteError, from_fault
from ..positions import here
from . import file
from .progress import Display

if TYPE_CHECKING:
    from ..proxy import Proxy
    from .jobs import Job

# Bodies of more bytes than this are compressed.
COMPRESS_BYTES = 64 * 1024

# How often something is tried, and how long it waits before the second time, in seconds; then twice as long.
TRIES, PAUSE = 5, 0.25

# The longest that is waited because a server says so, in seconds.
MOST_PAUSE = 30.0

# For how long one request waits for a result, in seconds: with nobody to see it, and where it is shown how it goes.
WAIT, SHOWN_WAIT = 25.0, 1.0

# What a server sees of who asks, and the names of this machine.
AGENT = "nnsight-go"
HERE = frozenset(("localhost", "127.0.0.1", "::1"))

_AGAIN = frozenset((429, 502, 503, 504))  # answers of a server that may say something else soon

FINAL = frozenset(("COMPLETED", "ERROR", "CANCELLED"))

_client_lock = threading.Lock()


@functools.cache
def _client(host: str, process: int) -> httpx2.Client:
    """The connections of a process to a server."""
    return httpx2.Client(limits=httpx2.Limits(max_connections=64, max_keepalive_connections=64))


@functools.lru_cache(maxsize=256)
def _url(address: str) -> httpx2.URL:
    return httpx2.URL(address)


class Answered:
    """What a server said."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytearray) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> dict[str, Any]:
        """The body, a JSON object.

        Raises:
            RemoteError: it is none.
        """
        try:
            found = json.loads(self.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise file.malformed(f"{bytes(self.body[:100])!r} is no JSON object")
        return found


class Server:
    """A server, and the key that it knows the user by.

    Args:
        host: ``https://...``; None for ``CONFIG.API.HOST``.

    Raises:
        InputError: there is none, or it is no address.
    """

    def __init__(self, host: str | None = None, key: str | None = None) -> None:
        host = host or CONFIG.API.HOST
        if not host:
            raise InputError(
                "no server is known to run it on",
                hint='Give one, remote="https://...", or set CONFIG.API.HOST or NNSIGHT_GO_HOST; '
                'remote="local" tries a remote trace out in this process.',
                **positions.fields(here()),
            )
        self.host = host.rstrip("/")
        try:
            where = _url(self.host)
        except httpx2.InvalidURL:
            where = httpx2.URL()
        if where.scheme not in ("http", "https") or not where.host:
            raise InputError(
                f"{host!r} is no address of a server",
                hint='Addresses look like "https://host" or "http://127.0.0.1:8000".',
                **positions.fields(here()),
            )
        self._key = key
        self._is_here = where.host in HERE

    def __repr__(self) -> str:
        return f"<Server {self.host}>"

    @property
    def _own_key(self) -> str:
        return self._key or CONFIG.API.APIKEY or ""

    # ---- one request ----

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        wait: float = 0.0,
        tries: int = TRIES,
        accept: frozenset[int] = frozenset(),
    ) -> Answered:
        """Sends a request that may be sent again, until it is answered.

        Args:
            method: of HTTP.
            path: with query.
            body: a file of tensors.
            headers: more of them.
            wait: for how long the server may take beside.
            tries: how often it is sent at most.
            accept: answers that are errors to others.

        Raises:
            RemoteError: the server cannot be reached or refuses; or what its answer says.
        """
        compress = not self._is_here if (wanted := CONFIG.API.COMPRESS) is None else wanted
        sent = {"Accept-Encoding": "zstd" if compress else "identity", "User-Agent": AGENT, **(headers or {})}
        if self._own_key:
            sent["Authorization"] = f"Bearer {self._own_key}"
        if body is not None:
            sent["Content-Type"] = file.MEDIA
            if compress and len(body) > COMPRESS_BYTES:
                body = _compressed(body)
                sent["Content-Encoding"] = "zstd"
        pause = PAUSE
        for left in reversed(range(tries)):
            told = None
            try:
                answer = self._once(method, path, body, sent, wait)
            except httpx2.TransportError as error:
                if not left or isinstance(error, httpx2.UnsupportedProtocol):
                    self._unreachable(error)
            else:
                if answer.status < 300 or answer.status in accept:
                    return answer
                if answer.status not in _AGAIN or not left:
                    self._refused(answer, body)
                with contextlib.suppress(ValueError):
                    told = min(float(answer.headers.get("retry-after", "")), MOST_PAUSE)
            time.sleep(told if told is not None else pause * (0.5 + random.random()))
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], wait: float) -> Answered:
        with _client_lock:
            client = _client(self.host, os.getpid())
        # What client.stream does, without merging addresses, headers and cookies, which takes as long again.
        timeout = {"connect": 10.0, "read": 60.0 + wait, "write": 60.0, "pool": 60.0}
        request = httpx2.Request(
            method, _url(self.host + path), headers=headers, content=body, extensions={"timeout": timeout}
        )
        with contextlib.closing(client.send(request, stream=True)) as response:
            data = bytearray()
            for chunk in response.iter_raw():
                data += chunk
            coding = response.headers.get("content-encoding", "identity")
            return Answered(response.status_code, response.headers, _plain(data, coding))

    def _unreachable(self, error: Exception) -> NoReturn:
        raise RemoteError(
            f"the server {self.host} cannot be reached: {self._hidden(str(error)) or type(error).__name__}",
            hint="Is it running, and is the address right?",
            **positions.fields(here()),
        ) from None

    def _refused(self, answer: Answered, body: bytes | None) -> NoReturn:
        raise self.error(answer, body)

    def error(self, answer: Answered, body: bytes | None = None) -> NnsightError:
        """The error that an answer tells of."""
        try:
            fault = json.loads(answer.body)["error"]
            error = from_fault({k: self._hidden(v) if isinstance(v, str) else v for k, v in fault.items()})
        except (ValueError, LookupError, TypeError, AttributeError):
            text = self._hidden(bytes(answer.body[:200]).decode(errors="replace").strip())
            error = RemoteError(f"the server {self.host} answered {answer.status}{': ' if text else ''}{text}")
        if error.file is None:
            for name, value in positions.fields(here()).items():
                setattr(error, name, value)
        if answer.status == 401 and not error.hint:
            error.hint = "Set your key: CONFIG.set_default_api_key(key), or NNSIGHT_GO_API_KEY."
        elif answer.status == 413 and not error.hint:
            size = "" if body is None else f" The request has {len(body)} bytes."
            error.hint = f"Use fewer or smaller tensors from outside.{size}"
        return error

    def _hidden(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._own_key, "...") if self._own_key else text

    # ---- jobs ----

    @property
    def where(self) -> object:
        """Its address, and as whom it is asked."""
        return self.host, self._own_key

    @property
    def uploads(self) -> Callable[[str, torch.Tensor], None]:
        """Takes a large tensor's hash and itself, and has it there."""
        return self._upload

    def _upload(self, hash: str, tensor: torch.Tensor) -> None:
        if self.ask("HEAD", f"/v1/tensors/{hash}", accept=frozenset((404,))).status == 404:
            self.ask("PUT", f"/v1/tensors/{hash}", file.encode({"tensor": tensor}))

    def perform(self, request: bytes) -> bytearray:
        """Has a request done, waits, and gives the response."""
        with Display() as display:
            wait = SHOWN_WAIT if display.shown else WAIT
            id, mark = "", secrets.token_hex(16)
            try:
                answer = self._submit(request, mark, wait)
                if answer.status == 200:
                    return answer.body
                id = answer.json()["id"]
                return self.wait(id, None, answer, display)
            except KeyboardInterrupt:
                with contextlib.suppress(NnsightError, LookupError):
                    self.cancel(id or self._submit(request, mark, 0.0, tries=1).json()["id"])
                raise

    def submit(self, request: bytes, adopt: Sequence[Proxy], device: torch.device) -> Job:
        """Leaves a request with the server; these proxies become its values, on a device, once they are there."""
        from .jobs import Job

        id = self._submit(request, secrets.token_hex(16), 0.0).json()["id"]
        return Job._submitted(str(id), self, adopt, device)

    def _submit(self, request: bytes, mark: str, wait: float, tries: int = TRIES) -> Answered:
        path = f"/v1/jobs?wait={wait:g}" if wait else "/v1/jobs"
        return self.ask("POST", path, request, {"Idempotency-Key": mark}, wait, tries)

    def wait(
        self, id: str, timeout: float | None = None, answer: Answered | None = None, display: Display | None = None
    ) -> bytearray:
        """Waits for a job, and gives the response.

        Args:
            id: of the job.
            timeout: for how many seconds at most.
            answer: what has been said of it already.
            display: shows how it goes.

        Raises:
            TimeoutError: it has not ended by then.
            CancelledError: it was cancelled.
            RemoteError: it has expired, or there is no such job.
        """
        end = None if timeout is None else time.monotonic() + timeout
        for wait in self._waits(end, display):
            if answer is not None and answer.status == 200:
                return answer.body
            if answer is not None and display is not None:
                display.update(answer.json())
            answer = self.ask("GET", f"/v1/jobs/{id}/result?wait={wait:g}", wait=wait, accept=frozenset((409,)))
            if answer.status == 409:
                raise self.cancelled(id, answer)
            if answer.status == 200:
                return answer.body
        raise TimeoutError(f"the job {id} has not ended in {timeout:g} s")

    def _waits(self, end: float | None, display: Display | None) -> Iterator[float]:
        """For how long each request may wait, until there is no time left."""
        most = SHOWN_WAIT if display is not None and display.shown else WAIT
        while end is None:
            yield most
        while (left := end - time.monotonic()) > 0:
            yield min(left, most)
        yield 0.0

    def cancelled(self, id: str, answer: Answered) -> NnsightError:
        """The error of a job that was cancelled."""
        error = self.error(answer)
        return error if isinstance(error, CancelledError) else CancelledError(f"the job {id} was cancelled")

    def about(self, id: str) -> dict[str, Any]:
        """What is known of a job."""
        return self.ask("GET", f"/v1/jobs/{id}").json()

    def cancel(self, id: str) -> dict[str, Any]:
        """Cancels a job that has not ended."""
        return self.ask("DELETE", f"/v1/jobs/{id}", tries=2).json()

    def models(self) -> list[dict[str, Any]]:
        """The models that it has."""
        found = self.ask("GET", "/v1/models", tries=2).json().get("models")
        return [m for m in found if isinstance(m, dict)] if isinstance(found, list) else []

    def describe(self, name: str) -> dict[str, Any]:
        """The description of a model: ``docs/architecture.md``, "Model description"."""
        return self.ask("GET", f"/v1/models/{name}").json()


def _compressed(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress(data)


def _plain(data: bytearray, coding: str) -> bytearray:
    if coding in ("", "identity"):
        return data
    if coding != "zstd":
        raise file.malformed(f"it is compressed by {coding}, which was not asked for")
    import zstandard

    out = bytearray()
    try:
        for chunk in zstandard.ZstdDecompressor().read_to_iter(bytes(data)):
            out += chunk
    except zstandard.ZstdError as error:
        raise file.malformed(f"it cannot be decompressed: {error}") from None
    return out
