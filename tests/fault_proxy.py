"""A proxy before an HTTP server that misbehaves as networks and storage do: refuses, delays, tears, goes away."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("unavailable", "slow down", "late", "torn", "reset", "answer lost")
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class FaultProxy:
    """Forwards to ``endpoint``; a share ``rate`` of the requests comes to grief, in ways drawn from ``seed``.

    Attributes:
        endpoint: where it listens.
        rate: may be changed at any time.
        faults: how often each kind happened.
        num_requests: all of them.
    """

    def __init__(self, endpoint: str, rate: float = 0.0, seed: int = 0) -> None:
        self.rate, self.faults, self.num_requests = rate, Counter[str](), 0
        self._chance, self._lock = random.Random(seed), threading.Lock()
        self._target = urlsplit(endpoint).netloc
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, at the same port as before."""
        proxy = self

        class Handler(_Handler):
            owner = proxy

        server = _Server(("127.0.0.1", self._port), Handler)
        self._server, self._port = server, server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Go away: connections are refused from now on, as by a server that was killed."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def away(self) -> bool:
        """Whether it is stopped."""
        return self._server is None

    def draw(self, method: str) -> str | None:
        """Return what befalls a request."""
        with self._lock:
            self.num_requests += 1
            if self._chance.random() >= self.rate:
                return None
            kind = self._chance.choice(KINDS if method == "GET" else [kind for kind in KINDS if kind != "torn"])
            self.faults[kind] += 1
            return kind

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection(self._target, timeout=60)
        try:
            own = ("transfer-encoding", "content-length", "expect", "connection")
            kept = {name: value for name, value in headers.items() if name.lower() not in own}
            connection.request(method, path, body, {**kept, "Content-Length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, address: object) -> None:
        """Say nothing of clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self._body()
        if self.owner.away:
            return self._reset()
        kind = self.owner.draw(self.command)
        if kind in ("unavailable", "slow down"):
            return self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN if kind == "slow down" else b"")
        if kind == "reset":
            return self._reset()
        if kind == "late":
            time.sleep(0.5)
        status, headers, content = self.owner.forward(self.command, self.path, dict(self.headers), body)
        if kind == "answer lost":
            return self._reset()
        self._answer(status, headers, content, torn=kind == "torn")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 - names that http.server asks for

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: list, content: bytes, *, torn: bool = False) -> None:
        self.send_response_only(status)
        length = {name.lower(): value for name, value in headers}.get("content-length", str(len(content)))
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if torn else content)
        if torn:
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Say nothing."""
