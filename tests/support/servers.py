"""Loopback servers for the tests and the demo: one for photos, one that plays the Hugging Face hub.

Both pick a free port, answer from threads of their own, count what they are asked, and stop with their `with` block.
"""

from __future__ import annotations

import hashlib
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # an open connection of a client must not block the exit
    request_queue_size = 128  # connections that come at once; one more would wait a second to be tried again

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect; print all other errors."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """An HTTP server on a free loopback port. `url` is its root; `requests` counts "METHOD /path"."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                with outer._lock:
                    outer.requests[f"{self.command} {self.path}"] += 1
                outer.answer(self)

            do_HEAD = do_GET  # noqa: N815 (the base class names it)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = _Threads(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def __enter__(self):  # -> Self, which typing has from Python 3.11 on
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class PhotoServer(Server):
    """Serves files from memory: name -> bytes. Names may be added and removed while it runs."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__()
        self.files = files

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        body = self.files.get(name)
        if body is None:
            send(request, 404, b"no such photo")
        else:
            send(request, 200, body, {"Content-Type": TYPES.get(Path(name).suffix, "application/octet-stream")})


class FakeHub(Server):
    """Enough of the Hugging Face hub to download from it (HF_ENDPOINT): one file per name, whatever the repository.

    mode: "normal"; "refuse" (503 to everything); "hang" (accepts, never answers); "stall" (sends half, then nothing);
    "cut" (closes halfway, and at once when asked for the rest).
    """

    COMMIT = "0" * 40  # the hub's clients insist on a commit

    def __init__(self, files: Mapping[str, Path], mode: str = "normal") -> None:
        super().__init__()
        self.files = files
        self.mode = mode
        self._etags = {name: hashlib.sha256(str(path).encode()).hexdigest() for name, path in files.items()}

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables that send the hub's clients here, with a separate cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.mode == "hang":
            self._wait()
            request.close_connection = True
            return
        if self.mode == "refuse":
            send(request, 503, b"")
            return
        found = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/([^/?]+)", request.path)
        if not found or found[1] not in self.files:
            send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.COMMIT})
        else:
            self._send_file(request, found[1])

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        """Send the requested file or range, up to the point where the mode ends it."""
        path = self.files[name]
        size = path.stat().st_size
        start, last = _range(request.headers.get("Range"), size)
        request.send_response(200 if (start, last) == (0, size - 1) else 206)
        request.send_header("Content-Length", str(last + 1 - start))
        request.send_header("Content-Range", f"bytes {start}-{last}/{size}")
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("ETag", f'"{self._etags[name]}"')
        request.send_header("X-Repo-Commit", self.COMMIT)
        request.end_headers()
        if request.command == "HEAD":
            return
        end = last + 1 if self.mode == "normal" else min(last + 1, size // 2)
        with path.open("rb") as file:
            if end > start:
                request.wfile.flush()
                request.connection.sendfile(file, start, end - start)
        if end <= last:
            if self.mode == "stall":
                self._wait()
            request.close_connection = True

    def _wait(self) -> None:
        """Until the server stops."""
        self._closing.wait()


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """A whole answer, without its body to a HEAD."""
    request.send_response(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def _range(header: str | None, size: int) -> tuple[int, int]:
    """First and last byte that a Range header asks for; the whole file without one."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    if not found:
        return 0, size - 1
    return int(found[1]), min(int(found[2] or size - 1), size - 1)


def closed_port() -> int:
    """A port that refuses connections, unless another process takes it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
