"""A web server that does everything wrong: one path per fault, each with its expected outcome.

    with FaultServer() as server:
        server.url("slow_body")    # http://127.0.0.1:PORT/slow_body
        FAULTS["slow_body"]        # "timeout"

Outcomes hold for DOWNLOAD_ALLOW_LOCAL, two attempts and otherwise the defaults of config.py, or less time and bytes.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import os
import random
import socket
import socketserver
import ssl
import struct
import threading
import time
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CERTIFICATE = Path(__file__).with_name("test_server.pem")  # self-signed, with its key; for these tests only
STORED = "stored"
FAULTS: dict[str, str] = {}  # name -> reason of the failure, or STORED
_HANDLERS: dict[str, Callable[[Visit], None]] = {}
_DRIP_S = 0.05  # between the bytes of a slow answer: never a gap that a timeout per read would notice
_BOMB_BYTES = 60_000_000  # unpacked; above DOWNLOAD_MAX_BYTES


class FaultServer:
    """Serves on a free port of the loopback interface until the block ends, over HTTPS with `tls`.

    It is also a proxy to itself: it answers requests and CONNECT for any host.
    """

    def __init__(self, tls: bool = False) -> None:
        self.tls = tls

    def __enter__(self) -> FaultServer:
        png_bomb_file(), gzip_bomb_body()  # made before any clock runs
        self.hits: Counter[str] = Counter()  # requests by name
        self.requests: list[str] = []  # whole request heads, as they came
        self.location, self.retry_after = "", ""  # what /redirect_to_location and /retry_after answer with
        self._stop = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, name: str) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/{name}"


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128
    owner: FaultServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is about."""


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        owner: FaultServer = self.server.owner  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            sock = _secured(self.request) if owner.tls else self.request
            head = _read_head(sock)
            if head.startswith("CONNECT"):
                owner.requests.append(head)
                sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                sock = _secured(sock)
                head = _read_head(sock)
            owner.requests.append(head)
            name = urllib.parse.urlsplit(head.split(" ")[1]).path.strip("/")
            owner.hits[name] += 1
            _HANDLERS.get(name, _not_found)(Visit(sock, owner, owner.hits[name]))
            sock.close()


def _read_head(sock: socket.socket) -> str:
    sock.settimeout(10)
    head = b""
    while b"\r\n\r\n" not in head:
        data = sock.recv(4096)
        if not data:
            raise ConnectionError
        head += data
    return head.decode("latin-1")


def _secured(sock: socket.socket) -> socket.socket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context.wrap_socket(sock, server_side=True)


class Visit:
    """One request being answered."""

    def __init__(self, sock: socket.socket, server: FaultServer, number: int) -> None:
        self.sock, self.server, self.number = sock, server, number  # number: the how manieth for this name

    def answer(self, body: bytes = b"", status: str = "200 OK", **headers: str | int) -> None:
        """A proper answer, unless `headers` say otherwise; Content_Length="" leaves it out."""
        fields: dict[str, str | int] = {"Content_Type": "image/jpeg", "Content_Length": len(body), **headers}
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value != ""]
        self.sock.sendall(
            "\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode("latin-1") + body
        )

    def drip(self, data: bytes) -> None:
        """Send one byte at a time, until the client or the server stops."""
        for byte in data:
            if self.server._stop.wait(_DRIP_S):
                return
            self.sock.sendall(bytes([byte]))


def fault(outcome: str) -> Callable[[Callable[[Visit], None]], Callable[[Visit], None]]:
    """Serve the decorated function under its name."""

    def register(function: Callable[[Visit], None]) -> Callable[[Visit], None]:
        FAULTS[function.__name__] = outcome
        _HANDLERS[function.__name__] = function
        return function

    return register


@functools.cache
def photo(format: str = "JPEG", size: tuple[int, int] = (96, 64)) -> bytes:
    """A gradient, as a file of the format."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    """A 1-bit gray PNG with these compressed rows, which may be invalid."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@functools.cache
def png_bomb_file() -> bytes:
    """All 144 million pixels are there, in 18 KB."""
    return png(12_000, 12_000, zlib.compress(bytes(1501 * 12_000), 9))


@functools.cache
def gzip_bomb_body() -> bytes:
    return gzip.compress(bytes(1_000_000), 9) * (_BOMB_BYTES // 1_000_000)


def _forever(block: bytes, visit: Visit) -> Iterator[bytes]:
    while not visit.server._stop.is_set():
        yield block


# --- what works -------------------------------------------------------------------------------------------------------


@fault(STORED)
def ok(visit: Visit) -> None:
    visit.answer(photo())


@fault(STORED)
def one_pixel(visit: Visit) -> None:
    visit.answer(photo("PNG", (1, 1)), Content_Type="image/png")


@fault(STORED)
def packed(visit: Visit) -> None:
    visit.answer(gzip.compress(photo()), Content_Encoding="gzip")


@fault(STORED)
def without_length(visit: Visit) -> None:
    visit.answer(photo(), Content_Length="")


@fault(STORED)
def in_chunks(visit: Visit) -> None:
    pieces = [photo()[start : start + 100] for start in range(0, len(photo()), 100)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    visit.answer(body, Content_Length="", Transfer_Encoding="chunked")


@fault(STORED)
def redirect_once(visit: Visit) -> None:
    visit.answer(b"moved", "301 Moved Permanently", Location="/ok?a b#fragment")


@fault(STORED)
def fails_once(visit: Visit) -> None:
    if visit.number == 1:
        visit.answer(b"oops", "500 Internal Server Error")
    else:
        visit.answer(photo())


@fault(STORED)
def retry_after_2(visit: Visit) -> None:
    if visit.number == 1:
        visit.answer(b"later", "429 Too Many Requests", Retry_After=2)
    else:
        visit.answer(photo())


@fault(STORED)
def noai_for_others(visit: Visit) -> None:
    visit.answer(photo(), X_Robots_Tag="otherbot: noindex, noai")


# --- what browsers and curl read, and http.client alone does not ------------------------------------------------------


def _answer_after(visit: Visit, head: bytes) -> None:
    """A whole answer whose head begins with `head`; the connection stays open, so that its length must be known."""
    fields = b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(photo())
    visit.sock.sendall(head + fields + photo())
    visit.server._stop.wait(3600)


@fault(STORED)
def early_hints(visit: Visit) -> None:
    interim = b"HTTP/1.1 102 Processing\r\n\r\n" + b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" * 3
    _answer_after(visit, interim + b"HTTP/1.1 200 OK\r\n")


@fault(STORED)
def many_headers(visit: Visit) -> None:
    _answer_after(visit, b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(998)))


@fault(STORED)
def long_headers(visit: Visit) -> None:
    _answer_after(visit, b"HTTP/1.1 200 OK\r\n" + b"Set-Cookie: a=%b\r\n" % (b"z" * 60_000) * 4)


@fault(STORED)
def odd_headers(visit: Visit) -> None:
    odd = b" folded, but nothing before it\r\nX-Caf\xe9: 1\r\nX-Caf\xc3\xa9: 1\r\nX-Blank : 1\r\nno colon here\r\n"
    odd += b": no name\r\nX-Folded: a\r\n\tb\r\nX-Bare: newline\n"
    _answer_after(visit, b"HTTP/1.1 200 OK\r\n" + odd)


@fault(STORED)
def blank_before_colon(visit: Visit) -> None:
    visit.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length : %d\r\n\r\n" % len(photo()) + photo())
    visit.server._stop.wait(3600)


@fault(STORED)
def redirect_20(visit: Visit) -> None:
    if visit.number <= 20:
        visit.answer(b"", "302 Found", Location="redirect_20")
    else:
        visit.answer(photo())


@fault(STORED)
def redirect_said_twice(visit: Visit) -> None:
    visit.sock.sendall(b"HTTP/1.1 302 Found\r\nLocation: /ok\r\nLocation: /ok\r\nContent-Length: 0\r\n\r\n")


@fault(STORED)
def says_http_2(visit: Visit) -> None:
    _answer_after(visit, b"HTTP/2 200\n\r\r\n")


@fault(STORED)
def needs_cookie(visit: Visit) -> None:
    if "Cookie: seen=1" in visit.server.requests[-1]:
        visit.answer(photo())
    else:
        visit.answer(b"", "302 Found", Location="/needs_cookie", Set_Cookie="seen=1; path=/")


# --- statuses and redirects -------------------------------------------------------------------------------------------


def _not_found(visit: Visit) -> None:
    visit.answer(b"<html>not found</html>", "404 Not Found", Content_Type="text/html")


FAULTS["not_found"] = "http_status"


@fault("http_status")
def forbidden(visit: Visit) -> None:
    visit.answer(photo(), "403 Forbidden")


@fault("http_status")
def gone(visit: Visit) -> None:
    visit.answer(b"", "410 Gone")


@fault("http_status")
def always_500(visit: Visit) -> None:
    visit.answer(b"oops", "500 Internal Server Error")


@fault("rate_limited")
def always_429(visit: Visit) -> None:
    visit.answer(b"", "429 Too Many Requests")


@fault("rate_limited")
def retry_after_86400(visit: Visit) -> None:
    visit.answer(b"tomorrow", "429 Too Many Requests", Retry_After=86_400)


@fault("bad_redirect")
def redirect_loop(visit: Visit) -> None:
    visit.answer(b"", "301 Moved Permanently", Location="/redirect_loop")


@fault("bad_redirect")
def redirect_nowhere(visit: Visit) -> None:
    visit.answer(b"", "302 Found")


@fault("bad_redirect")
def redirect_to_file(visit: Visit) -> None:
    visit.answer(b"", "302 Found", Location="file:///etc/hosts")


@fault("bad_redirect")
def redirect_to_nonsense(visit: Visit) -> None:
    visit.answer(b"", "302 Found", Location="http://[::1/")


@fault("blocked_address")
def redirect_to_metadata(visit: Visit) -> None:
    visit.answer(b"", "302 Found", Location="http://169.254.169.254/latest/meta-data/")


@fault("blocked_address")
def redirect_to_unspecified(visit: Visit) -> None:
    visit.answer(b"", "302 Found", Location=f"http://0.0.0.0:{visit.server.port}/ok")


@fault("opted_out")
def noai(visit: Visit) -> None:
    visit.answer(photo(), X_Robots_Tag="noindex, noai")


@fault("opted_out")
def noimageai(visit: Visit) -> None:
    visit.answer(photo(), X_Robots_Tag="retrieval_ann: noimageai")


# --- time and size ----------------------------------------------------------------------------------------------------


@fault("timeout")
def silent(visit: Visit) -> None:
    visit.server._stop.wait(3600)


@fault("timeout")
def slow_headers(visit: Visit) -> None:
    visit.drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"z" * 60_000)


@fault("timeout")
def slow_redirect_body(visit: Visit) -> None:
    visit.answer(b"", "302 Found", Location="/slow_body", Content_Length=100_000)
    visit.drip(bytes(60_000))


@fault("timeout")
def slow_body(visit: Visit) -> None:
    visit.answer(photo(), Content_Length=1_000_000)
    visit.drip(bytes(60_000))


@fault("timeout")
def endless_continue(visit: Visit) -> None:
    for block in _forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, visit):
        visit.sock.sendall(block)
        time.sleep(0.001)  # endless, but without taking a core from the others


@fault("too_large")
def endless_body(visit: Visit) -> None:
    visit.answer(photo(), Content_Length="")
    for block in _forever(bytes(65_536), visit):
        visit.sock.sendall(block)


@fault("too_large")
def declared_too_large(visit: Visit) -> None:
    visit.answer(photo(), Content_Length=10**12)


@fault("too_large")
def gzip_bomb(visit: Visit) -> None:
    visit.answer(gzip_bomb_body(), Content_Encoding="gzip")


@fault("too_many_pixels")
def huge_png_header(visit: Visit) -> None:
    visit.answer(png(50_000, 50_000, zlib.compress(bytes(100))), Content_Type="image/png")


@fault("too_many_pixels")
def png_bomb(visit: Visit) -> None:
    visit.answer(png_bomb_file(), Content_Type="image/png")


# --- connections that break -------------------------------------------------------------------------------------------


@fault("connection")
def reset(visit: Visit) -> None:
    visit.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0))
    visit.sock.close()


@fault("connection")
def reset_in_body(visit: Visit) -> None:
    visit.answer(photo()[:300], Content_Length=len(photo()))
    reset(visit)


@fault("connection")
def hangs_up(visit: Visit) -> None:
    """No answer at all."""


@fault("connection")
def length_too_long(visit: Visit) -> None:
    visit.answer(photo(), Content_Length=len(photo()) + 1000)


@fault("connection")
def no_http(visit: Visit) -> None:
    visit.sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(100))


@fault("connection")
def too_many_headers(visit: Visit) -> None:
    visit.sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(10_000)))


@fault("connection")
def too_long_headers(visit: Visit) -> None:
    visit.sock.sendall(b"HTTP/1.1 200 OK\r\nX-Long: " + b"z" * 300_000)


@fault("http_status")
def switches_protocols(visit: Visit) -> None:
    visit.sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n")


@fault("connection")
def two_lengths(visit: Visit) -> None:
    visit.answer(photo(), Content_Length="5, 6")


@fault("connection")
def chunk_cut_off(visit: Visit) -> None:
    visit.answer(b"1000\r\n" + photo()[:200], Content_Length="", Transfer_Encoding="chunked")


# --- bodies that are no images ----------------------------------------------------------------------------------------


@fault("truncated")
def length_too_short(visit: Visit) -> None:
    visit.answer(photo(), Content_Length=len(photo()) // 2)


@fault("truncated")
def truncated_jpeg(visit: Visit) -> None:
    visit.answer(photo()[:-200])


@fault("bad_image")
def not_gzip(visit: Visit) -> None:
    visit.answer(photo(), Content_Encoding="gzip")


@fault("bad_image")
def brotli_unasked(visit: Visit) -> None:
    visit.answer(photo(), Content_Encoding="br")


@fault("bad_image")
def zstd_unasked(visit: Visit) -> None:
    visit.answer(photo(), Content_Encoding="gzip, zstd")


@fault("bad_image")
def garbled_png(visit: Visit) -> None:
    data = bytearray(photo("PNG"))
    data[60:70] = bytes(10)
    visit.answer(bytes(data), Content_Type="image/png")


@fault("not_an_image")
def empty(visit: Visit) -> None:
    visit.answer(b"")


@fault("not_an_image")
def no_content(visit: Visit) -> None:
    visit.answer(b"", "204 No Content", Content_Length="")


@fault("not_an_image")
def html_as_jpeg(visit: Visit) -> None:
    visit.answer(b"<!DOCTYPE html><html><body>not here</body></html>")


@fault("not_an_image")
def svg(visit: Visit) -> None:
    visit.answer(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', Content_Type="image/svg+xml")


@fault("not_an_image")
def pdf(visit: Visit) -> None:
    visit.answer(b"%PDF-1.7\n%%EOF\n", Content_Type="application/pdf")


@fault("not_an_image")
def photoshop(visit: Visit) -> None:
    visit.answer(b"8BPS\0\1" + bytes(100), Content_Type="image/vnd.adobe.photoshop")


# --- anything else ----------------------------------------------------------------------------------------------------


def _mutated(visit: Visit) -> None:
    """A proper answer with something odd in its head, another one each time."""
    rng = random.Random(visit.number)
    fields = ["Location: /ok", "Retry-After: 1", "Content-Encoding: gzip, br", "Transfer-Encoding: chunked"]
    fields += ["Set-Cookie: a=b; domain=.x", "X-Robots-Tag: ,;: noai", "Content-Range: bytes 0-1/9", "Refresh: 0"]
    lines = [f"HTTP/1.1 {rng.choice([200, 200, 301, 307, 401, 407, 503, 99, 1000])} Odd"]
    lines += [f"Content-Length: {rng.choice([len(photo()), -1, 0, 10**30])}", *rng.sample(fields, 2)]
    head = bytearray("\r\n".join(lines).encode())
    for _ in range(rng.randrange(4)):
        head[rng.randrange(len(head))] = rng.randrange(256)
    visit.sock.sendall(bytes(head) + b"\r\n\r\n" + photo())


def _redirect_to_location(visit: Visit) -> None:
    visit.answer(b"", "302 Found", Location=visit.server.location)


def _large(visit: Visit) -> None:
    visit.answer(photo() + bytes(2_000_000))


def _retry_after(visit: Visit) -> None:
    visit.answer(b"later", "503 Service Unavailable", Retry_After=visit.server.retry_after)


# Not in FAULTS: their outcomes vary.
_HANDLERS |= {
    "mutated": _mutated,
    "large": _large,
    "redirect_to_location": _redirect_to_location,
    "retry_after": _retry_after,
}
