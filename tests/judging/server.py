"""A chat-completions server in a thread, which answers as it is told and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """One answer of the server. ``text`` None: a completion without content; ``body`` stands for all of it."""

    text: str | None = "A"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    hang_up: bool = False  # close the connection instead
    silent: bool = False  # accept the request and never answer
    endless: bytes | None = None  # the body is this again and again, with a pause of so many seconds
    pause: float = 0.0
    drips: bool = False  # headers without end, byte by byte

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        usage = {"prompt_tokens": 100, "completion_tokens": 1}
        return json.dumps({"choices": [{"message": {"content": self.text}}], "usage": usage}).encode()


@dataclass
class ChatServer:
    """``answer`` gets the request's JSON and its number, from 0."""

    url: str
    answer: Callable[[dict[str, Any], int], Said]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sent: int = 0  # bytes of endless bodies


@contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], Said]) -> Iterator[ChatServer]:
    lock, closing = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                n = len(served.requests)
                served.requests.append(request)
                served.headers.append(dict(self.headers))
                served.paths.append(self.path)
                said = served.answer(request, n)
            if said.silent:
                closing.wait()
            if said.silent or said.hang_up:
                self.close_connection = True
                return
            if said.drips:
                return self.go_on(b"H", 0.1)
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if said.endless is not None:
                return self.go_on(said.endless, said.pause)
            self.wfile.write(said.content())

        def go_on(self, part: bytes, pause: float) -> None:
            self.close_connection = True
            try:
                while not closing.wait(pause):
                    self.wfile.write(part)
                    served.sent += len(part)
            except OSError:
                return

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = ChatServer(f"http://127.0.0.1:{server.server_port}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
