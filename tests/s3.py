"""A real S3 server on this machine, from the package moto, and faults on the way to it."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Way:
    """A proxy in front of the server. ``fault(method, path, number)`` says what becomes of a request.

    None passes it on, "cut" closes the connection without an answer, "half" closes it after half of the answer, "hang"
    answers after ten seconds, a number is the status of an error, a pair of status and code an error as S3 writes it.
    """

    def __init__(self, host: str, port: int) -> None:
        self.server, self.fault = (host, port), None
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        way = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or the body of each answer waits 40 ms for the receipt of its head

            def log_message(self, format: str, *args: Any) -> None: ...

            def answer(self) -> None:
                way.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        self.front = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.front.daemon_threads = True
        threading.Thread(target=self.front.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.front.server_address[1]}"

    fault: Callable[[str, str, int], Any] | None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests.append((request.command, request.path))
            number = len(self.requests)
        fault = self.fault(request.command, request.path, number) if self.fault else None
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if fault == "cut":
            request.close_connection = True
            return
        if fault == "hang":
            time.sleep(10)
            return
        if fault is not None and fault != "half":
            status, code = fault if isinstance(fault, tuple) else (fault, "InternalError")
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>refused by the test</Message></Error>"
            request.send_response(status)
            request.send_header("Content-Length", str(len(text)))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(text.encode())
            return
        link = http.client.HTTPConnection(*self.server, timeout=30)
        link.request(request.command, request.path, body, dict(request.headers.items()))
        reply = link.getresponse()
        data = reply.read()
        request.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server", "content-length"):
                request.send_header(name, value)
        length = reply.getheader("Content-Length") if request.command == "HEAD" else str(len(data))
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data[: len(data) // 2] if fault == "half" else data)
        if fault == "half":
            request.close_connection = True
        link.close()

    @contextmanager
    def faulty(self, fault: Callable[[str, str, int], Any]) -> Iterator[None]:
        """Requests meet ``fault`` in this block."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None
