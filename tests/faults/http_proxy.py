"""An HTTP proxy between the service and its object storage, which can be told to be a bad server.

Where proxy.py breaks connections, this one knows requests: it answers some itself, as an S3 that is overloaded does,
and damages what others bring.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self, cast

ERRORS = ((503, "SlowDown"), (503, "ServiceUnavailable"), (500, "InternalError"))
OF_ONE_CONNECTION = frozenset({"connection", "transfer-encoding", "content-length"})


class HttpProxy:
    """Passes requests on from 127.0.0.1:`port` to a server's port there, in threads of its own.

    What a method says holds for requests to come, until `heal`. A `part` is one of the requests' paths.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="http-proxy", daemon=True)
        self.port = self._server.server_port
        self.tries: dict[str, list[float]] = defaultdict(list)  # when each try of one request of boto3's arrived
        self.num_errors = self.num_damaged = 0  # so far
        self.heal()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # ------------------------------------------------------------ what the server does

    def heal(self) -> None:
        """Pass everything on as it is."""
        self._error_ratio, self._random = 0.0, random.Random()
        self._damage: dict[str, tuple[str, int | None]] = {}

    def fail(self, ratio: float, seed: int) -> None:
        """Answer so many of all requests, 0..1, with an error of the server's own."""
        self._error_ratio, self._random = ratio, random.Random(seed)

    def flip(self, part: str, times: int | None = 1) -> None:
        """Flip a bit in the middle of what a GET brings; so many `times`, or always if that is None."""
        self._damage[part] = ("flip", times)

    def truncate(self, part: str, times: int | None = 1) -> None:
        """Break the connection in the middle of what a GET brings."""
        self._damage[part] = ("truncate", times)

    def shorten(self, part: str, times: int | None = 1) -> None:
        """Leave out the second half of what a GET brings, and tell the length of the first as if that were all."""
        self._damage[part] = ("shorten", times)

    # ------------------------------------------------------------ one request

    def error_for(self, invocation: str | None) -> tuple[int, str] | None:
        """The error that a request is answered with, if it is one of those."""
        with self._lock:
            if invocation is not None:
                self.tries[invocation].append(time.monotonic())
            if self._random.random() >= self._error_ratio:
                return None
            self.num_errors += 1
            return self._random.choice(ERRORS)

    def damage_for(self, path: str) -> str | None:
        """What happens to the body that a GET of this path brings."""
        with self._lock:
            part = next((part for part in self._damage if part in path), None)
            if part is None:
                return None
            damage, times = self._damage[part]
            if times == 1:
                del self._damage[part]
            elif times is not None:
                self._damage[part] = (damage, times - 1)
            self.num_damaged += 1
            return damage


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: HttpProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _pass_on(self) -> None:
        proxy = cast("_Server", self.server).proxy
        sent = self.rfile.read(int(self.headers.get("content-length") or 0))
        error = proxy.error_for(self.headers.get("amz-sdk-invocation-id"))
        if error is not None:
            status, code = error
            told = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Reduce your rate.</Message></Error>"
            self._answer(status, code, {"content-type": "application/xml"}, told.encode())
            return
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream_port, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(sent)
            answer = upstream.getresponse()
            told = {name: value for name, value in answer.getheaders() if name.lower() not in OF_ONE_CONNECTION}
            length = answer.getheader("content-length") if self.command == "HEAD" else None
            self._answer(answer.status, answer.reason, told, answer.read(), length)
        finally:
            upstream.close()

    def _answer(
        self, status: int, reason: str, headers: dict[str, str], body: bytes, length: str | None = None
    ) -> None:
        damage = None
        if self.command == "GET" and status in (200, 206) and len(body) > 1:
            damage = cast("_Server", self.server).proxy.damage_for(self.path)
        half = len(body) // 2
        if damage == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        if damage == "shorten":
            body = body[:half]
        self.send_response_only(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:half] if damage == "truncate" else body)
        self.close_connection |= damage == "truncate"
