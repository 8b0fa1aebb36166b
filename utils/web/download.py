"""Download all bytes behind a URL, within the limits, or raise an ImageError that names the cause."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import random
import ssl
import stat
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.cookiejar import CookieJar
from time import monotonic, sleep
from typing import BinaryIO, cast

import urllib3.exceptions
from urllib3 import BaseHTTPResponse, HTTPResponse
from urllib3.util import Retry

from utils.errors import ImageError, UserError, is_temporary
from utils.web import guard, machine, urls

_MAX_REDIRECTS = 20  # the limit of browsers
_BACKOFF_S = 0.5  # wait before the second attempt; it doubles each time, with jitter to avoid waves of retries
_MAX_WAIT_S = 30  # if a server asks for a longer wait, only another run tries again
_CHUNK_BYTES = 65_536
_IN_MEMORY_BYTES = 1_000_000  # a larger body goes to a temporary file
_TRANSLATED = (OSError, MemoryError, ValueError, http.client.HTTPException, urllib3.exceptions.HTTPError, zlib.error)
_ENCODINGS = {"br": "br (Brotli)", "zstd": "zstd (Zstandard)", "compress": "compress", "x-compress": "x-compress"}
_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


@dataclass(frozen=True)
class DownloadLimits:
    """Limits of one download. `timeout_s` covers a whole attempt, from the connection to the last byte.

    Files in and below `folders` (absolute paths) need no `allow_local`.
    """

    timeout_s: float
    attempts: int
    max_bytes: int
    allow_local: bool
    respect_noai: bool
    folders: tuple[str, ...] = ()


def fetch(url: str, limits: DownloadLimits) -> BinaryIO:
    """Return the body of an http(s), data: or file: URL or of a plain path as an open file; the caller closes it.

    Raises ImageError for any fault of the URL or the server, and UserError for a fault of this machine.
    """
    scheme = urls.scheme_of(url)
    if scheme == "data":
        return io.BytesIO(urls.data_bytes(url, limits.max_bytes))
    if scheme in ("", "file"):
        return _open_local(url, limits)
    if scheme not in ("http", "https"):
        raise ImageError("bad_url", f"{scheme}: URLs are not supported")
    return _fetch_http(urls.http_url(url), limits)


def _open_local(url: str, limits: DownloadLimits) -> BinaryIO:
    path = urls.local_path(url)
    if not urls.names_path(url) and not (limits.allow_local and os.path.isfile(path)):  # noqa: PTH113 (it never raises)
        raise ImageError("bad_url", "no scheme")
    if not limits.allow_local and not urls.is_below(path, limits.folders):
        raise ImageError("blocked_address", "a file on this machine")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could hang
            raise ImageError("bad_url", "not a regular file")
        if status.st_size > limits.max_bytes:
            raise ImageError("too_large", f"{status.st_size} bytes")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL or a lone surrogate
        raise ImageError("bad_url", getattr(error, "strerror", None) or str(error)) from None


def _fetch_http(url: str, limits: DownloadLimits) -> BinaryIO:
    number = 1
    while True:
        attempt = guard.Attempt(monotonic() + limits.timeout_s, limits.allow_local)
        try:
            return _try(url, limits, attempt)
        except ImageError as error:
            is_last = number >= limits.attempts or attempt.wait_s > _MAX_WAIT_S
            if is_last or not is_temporary(error.reason, error.detail):
                raise
        sleep(max(attempt.wait_s, _BACKOFF_S * 2 ** (number - 1) * random.uniform(0.5, 1.5)))
        number += 1


def _try(url: str, limits: DownloadLimits, attempt: guard.Attempt) -> BinaryIO:
    """Make one attempt, including redirects, within the deadline."""
    body = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES))
    try:
        with _follow(url, attempt) as response:
            _check_status(response, attempt)
            _check_encoding(response)
            if limits.respect_noai:
                _check_robots(response)
            for chunk in _chunks(response, attempt, limits.max_bytes):
                with _disk_errors():
                    body.write(chunk)
        with _disk_errors():
            body.seek(0)
        return body
    except BaseException as error:
        with contextlib.suppress(OSError):
            body.close()
        if isinstance(error, _TRANSLATED):
            raise _translated(error, attempt, limits.timeout_s) from None
        raise


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "the folder for temporary files"
        raise UserError(f"{folder}: {error.strerror}; free space there, or set TMPDIR to another folder") from None


def _translated(error: Exception, attempt: guard.Attempt, timeout_s: float) -> ImageError | UserError:
    """Translate an exception of a library."""
    root = _root(error)
    text = getattr(root, "verify_message", None) or getattr(root, "strerror", None) or str(root) or type(root).__name__
    text = "".join(c if c.isprintable() else "?" for c in text.strip()[:300])  # it may quote the server's answer
    if fault := machine.fault_of(root):
        return UserError(fault)
    if isinstance(root, TimeoutError) or monotonic() >= attempt.deadline:
        return ImageError("timeout", f"not complete after {timeout_s:g} s")
    if isinstance(root, ssl.SSLCertVerificationError):
        return ImageError("tls", text)
    if isinstance(error, urllib3.exceptions.DecodeError):
        return ImageError("bad_image", f"content encoding: {text}")
    if isinstance(error, UnicodeError):  # DNS does not allow this host name
        return ImageError("bad_url", text)
    symptom = machine.symptom(error) or machine.symptom(root)
    if attempt.last_scope == "private":  # a host in the local network may be switched off
        symptom = ""
    return ImageError("connection", f"{symptom}: {text}" if symptom else text)


def _root(error: BaseException) -> BaseException:
    """The innermost error. The outer errors only repeat it and add addresses of objects."""
    inner = [error for error in (getattr(error, "reason", None), *error.args) if isinstance(error, BaseException)]
    return _root(inner[0]) if inner else error


# --- responses --------------------------------------------------------------------------------------------------------
def _follow(url: str, attempt: guard.Attempt) -> BaseHTTPResponse:
    """Follow redirects and return the last response; the caller closes it."""
    cookies = CookieJar()  # for one image's redirects only, so that no site can track a run
    for _ in range(_MAX_REDIRECTS + 1):
        response = guard.get(url, attempt, cookies)
        if response.status not in (301, 302, 303, 307, 308):
            return response
        response.close()
        url = _redirect_target(url, response)
    raise ImageError("bad_redirect", f"more than {_MAX_REDIRECTS} redirects")


def _redirect_target(url: str, response: BaseHTTPResponse) -> str:
    location = (*response.headers.getlist("Location"), "")[0].encode("latin-1")  # the original bytes
    if not location:
        raise ImageError("bad_redirect", f"{response.status} without a Location")
    try:
        text = location.decode()
    except UnicodeDecodeError:
        text = "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in location)
    try:
        target = urls.resolve(url, text)
        if urls.scheme_of(target) not in ("http", "https"):
            raise ValueError("not http or https")
        return urls.http_url(target)
    except (ValueError, ImageError) as error:
        raise ImageError("bad_redirect", f"to {text[:200]!a}: {getattr(error, 'detail', error)}") from None


def _check_status(response: BaseHTTPResponse, attempt: guard.Attempt) -> None:
    """Raises ImageError unless the status is 2xx. Sets `attempt.wait_s` to the wait that the server asks for."""
    status = response.status
    if 200 <= status < 300:
        return
    detail = f"{status} {http.client.responses.get(status, '')}".strip()
    if status == 429 or 500 <= status < 600:
        with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
            retry_after = response.headers.get("Retry-After", "0")
            attempt.wait_s = Retry(retry_after_max=10**9).parse_retry_after(retry_after)
        if attempt.wait_s > _MAX_WAIT_S:
            raise ImageError("rate_limited", f"{detail}, asked to wait {attempt.wait_s:.0f} s")
    raise ImageError("rate_limited" if status == 429 else "http_status", detail)


def _check_encoding(response: BaseHTTPResponse) -> None:
    """Raises ImageError("bad_image") for a content encoding that was not requested and cannot be decoded."""
    for name in response.headers.get("Content-Encoding", "").lower().split(","):
        if name.strip() in _ENCODINGS and name.strip() not in HTTPResponse.CONTENT_DECODERS:
            raise ImageError("bad_image", f"content encoding {_ENCODINGS[name.strip()]}, which was not requested")


def _check_robots(response: BaseHTTPResponse) -> None:
    """Raises ImageError("opted_out") for X-Robots-Tag noai or noimageai, if it is for all agents or for this one."""
    for line in response.headers.getlist("X-Robots-Tag"):
        agent = "*"
        for directive in line.lower().split(","):
            name, colon, rest = directive.partition(":")
            if colon and name.strip() not in _VALUED_DIRECTIVES:
                agent, directive = name.strip(), rest
            if directive.strip() in ("noai", "noimageai") and agent in ("*", "retrieval_ann"):
                raise ImageError("opted_out", f"X-Robots-Tag: {line[:200]!a}")


def _chunks(response: BaseHTTPResponse, attempt: guard.Attempt, max_bytes: int) -> Iterator[bytes]:
    """Yield the decoded body in chunks. Raises ImageError("too_large") if its declared or actual size is too large."""
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared[:19]) > max_bytes:
        raise ImageError("too_large", f"{declared[:19]} bytes declared")
    size = 0
    for chunk in response.stream(_CHUNK_BYTES):
        attempt.remaining_s()  # the reads of a fast endless stream never time out
        size += len(chunk)
        if size > max_bytes:
            raise ImageError("too_large", f"more than {max_bytes} bytes")
        yield chunk
