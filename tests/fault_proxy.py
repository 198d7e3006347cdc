"""Proxy requests between an S3 client and an S3 server, and make a share of them fail in one of seven ways.

    with FaultProxy(s3_server.endpoint_url, share=0.2, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        ...
    assert proxy.faults[Fault.STALLED] > 0

The proxy decides separately for each request, even if one connection carries several. It forwards the client's `Host` header
unchanged, because the request's signature covers it.

"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Fault(StrEnum):
    """A way in which a request can fail."""

    THROTTLED = "throttled"
    """503 SlowDown; the server does not see the request."""
    SERVER_ERROR = "server_error"
    """500 InternalError; the server does not see the request."""
    RESET_BEFORE = "reset_before"
    """The connection is reset; the server does not see the request."""
    RESET_AFTER = "reset_after"
    """The server executes the request, then the connection is reset before any answer."""
    STALLED = "stalled"
    """The server executes the request, then the response pauses half-way for `stall_s`, or at its start if it has no body."""
    TRUNCATED = "truncated"
    """The server executes the request, then the connection closes half-way through the body, or the status line if none follows."""
    WRONG_BYTES = "wrong_bytes"
    """One bit of the object flips in transit. Listings and errors stay intact, because S3 does not protect their bytes."""


@dataclass(frozen=True)
class Asked:
    """The properties of a request by which a test can select it."""

    method: str
    path: str
    """Path and query, percent-encoded."""

    @property
    def carries_object(self) -> bool:
        """Whether the body of the request or of its response is object data."""
        path, _, query = self.path.partition("?")
        return "/" in path.strip("/") and (self.method == "PUT" or (self.method == "GET" and "uploadId" not in query))


class FaultProxy:
    """Listen on loopback while the block runs. Counts can be read at any time."""

    def __init__(
        self,
        upstream_url: str,
        *,
        share: float = 0.2,
        seed: int = 0,
        kinds: Collection[Fault] = tuple(Fault),
        at_most: int | None = None,
        only: Callable[[Asked], bool] = lambda _: True,
        stall_s: float = 600,
    ) -> None:
        """Make `share` (0 to 1) of the requests that `only` selects fail, at most `at_most` of them.

        Each fault is one of the `kinds` that apply to the request: wrong bytes need object data. The same seed causes the same
        faults in the same sequence of requests.

        """
        self.requests = 0
        """All requests, including those that failed."""
        self.faults: Counter[Fault] = Counter()
        self._upstream = urlsplit(upstream_url).netloc
        self._share = share
        self._kinds = tuple(kinds)
        self._at_most = at_most
        self._only = only
        self._stall_s = stall_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def draw(self, asked: Asked) -> Fault | None:
        """Count the request and its fault. Return the fault, or None if the request succeeds."""
        with self._lock:
            self.requests += 1
            kinds = [kind for kind in self._kinds if kind != Fault.WRONG_BYTES or asked.carries_object]
            # call `only` for every request, so that a test can use it to record them
            picked = self._only(asked)
            spent = self._at_most is not None and self.faults.total() >= self._at_most
            if not kinds or not picked or spent or self._random.random() >= self._share:
                return None
            fault = self._random.choice(kinds)
            self.faults[fault] += 1
            return fault

    def forward(self, asked: Asked, headers: list[tuple[str, str]], body: bytes) -> Answer:
        upstream = HTTPConnection(self._upstream, timeout=60)
        try:
            upstream.putrequest(asked.method, asked.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            return Answer(response.status, response.reason, response.getheaders(), response.read())
        finally:
            upstream.close()

    def damaged(self, body: bytes) -> bytes:
        """Return `body` with one random bit flipped."""
        if not body:
            return body
        with self._lock:
            bit = self._random.randrange(8 * len(body))
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)

    def stall(self) -> None:
        self._stopped.wait(self._stall_s)


@dataclass(frozen=True)
class Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


_ERRORS = {
    Fault.THROTTLED: (503, "SlowDown", "Please reduce your request rate."),
    Fault.SERVER_ERROR: (500, "InternalError", "We encountered an internal error. Please try again."),
}


def _error(fault: Fault) -> Answer:
    status, code, message = _ERRORS[fault]
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    return Answer(status, code, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)


class _Server(ThreadingHTTPServer):
    # do not wait for threads at exit: a killed client leaves its connections open
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Send an answer in one segment; otherwise the tests wait for delayed acknowledgements.
    wbufsize = -1
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):
            # The client gave up or was killed, or we reset the connection and the base class flushes a closed file.
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        # flush the interim response, which botocore otherwise waits a second for
        self.wfile.flush()
        return going_on

    def respond(self) -> None:
        asked = Asked(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.draw(asked)
        if fault in _ERRORS:
            self._send(_error(fault))
            return
        if fault == Fault.RESET_BEFORE:
            self._reset()
            return
        if fault == Fault.WRONG_BYTES and self.command == "PUT":
            body = self.proxy.damaged(body)
        # The proxy has read the whole body, so it need not wait for the server's 100 Continue.
        kept = [(name, value) for name, value in self.headers.items() if name.lower() not in ("expect", "connection")]
        answer = self.proxy.forward(asked, [*kept, ("Connection", "close")], body)
        match fault:
            case Fault.RESET_AFTER:
                self._reset()
            case Fault.STALLED | Fault.TRUNCATED:
                self._send_half(answer, stall=fault == Fault.STALLED)
            case Fault.WRONG_BYTES if self.command == "GET" and answer.status in (200, 206):
                self._send(replace(answer, body=self.proxy.damaged(answer.body)))
            case _:
                self._send(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, answer: Answer) -> None:
        self._send_head(answer)
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _send_head(self, answer: Answer) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        # the response to a HEAD request announces a length but has no body
        length = {name.lower(): value for name, value in answer.headers}.get("content-length", str(len(answer.body)))
        if answer.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()

    def _send_half(self, answer: Answer, *, stall: bool) -> None:
        if answer.body and self.command != "HEAD":
            self._send_head(answer)
            self.wfile.write(answer.body[: len(answer.body) // 2])
        elif not stall:
            # Truncate the status line, not the headers, because clients accept incomplete headers.
            self.wfile.write(b"HTTP/1.1")
        self.wfile.flush()
        if stall:
            self.proxy.stall()
        self.close_connection = True

    def _reset(self) -> None:
        self.close_connection = True
        # Closing with linger 0 sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile.close()
        self.rfile.close()
        self.connection.close()
