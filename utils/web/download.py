"""The bytes behind a URL: complete, within the limits, from where it is allowed, or an ImageError that says why not."""

from __future__ import annotations

import io
import random
import stat
import tempfile
import time
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from typing import BinaryIO, cast

import requests
import urllib3.exceptions

from utils.errors import ImageError
from utils.web import network, responses, urls
from utils.web.network import behind_proxy
from utils.web.responses import AgainError
from utils.web.urls import is_local

__all__ = ["DownloadLimits", "behind_proxy", "fetch", "is_local"]

_MAX_REDIRECTS = 5
_BACKOFF_S = 0.5  # before the second attempt; doubles, with jitter, so that retries do not come in waves
_IN_MEMORY_BYTES = 1_000_000  # of a body; beyond, it goes to a temporary file


@dataclass(frozen=True)
class DownloadLimits:
    """What one download may take. `timeout_s` is the total of an attempt, from the connection to the last byte."""

    timeout_s: float
    attempts: int
    max_bytes: int
    allow_local: bool
    respect_noai: bool


def fetch(url: str, limits: DownloadLimits) -> BinaryIO:
    """The body at an http(s), data: or file: URL or a plain path, open at its start; the caller closes it.

    Raises ImageError, and nothing else for anything that a list or a server can hold.
    """
    scheme = urls.scheme_of(url)
    if scheme == "data":
        return io.BytesIO(urls.data_bytes(url, limits.max_bytes))
    if scheme in ("", "file"):
        return _open_local(url, limits)
    if scheme not in ("http", "https"):
        raise ImageError("bad_url", f"{scheme}: is not requested")
    return _fetch_http(urls.http_url(url), limits)


def _open_local(url: str, limits: DownloadLimits) -> BinaryIO:
    path = urls.local_path(url)
    if not limits.allow_local:
        raise ImageError("blocked_address", "a file of this machine")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could hang
            raise ImageError("bad_url", "not a regular file")
        if status.st_size > limits.max_bytes:
            raise ImageError("too_large", f"{status.st_size} bytes")
        return path.open("rb")
    except OSError as error:
        raise ImageError("bad_url", error.strerror or str(error)) from None
    except ValueError as error:  # a NUL, a lone surrogate
        raise ImageError("bad_url", str(error)) from None


def _fetch_http(url: str, limits: DownloadLimits) -> BinaryIO:
    for number in range(1, limits.attempts + 1):
        try:
            return _attempt(url, limits)
        except AgainError as again:
            if number == limits.attempts:
                raise again.error from None
            backoff = _BACKOFF_S * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            _wait(max(again.wait_s, backoff))
    raise AssertionError("attempts must be positive")


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def _attempt(url: str, limits: DownloadLimits) -> BinaryIO:
    """One try, redirects included, within the deadline. Raises AgainError or ImageError."""
    attempt = network.Attempt(time.monotonic() + limits.timeout_s, limits.allow_local)
    body = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES))
    try:
        with _follow(url, attempt) as response:
            responses.check_status(response)
            if limits.respect_noai:
                responses.check_robots(response)
            for chunk in responses.chunks(response, attempt, limits.max_bytes):
                body.write(chunk)
        body.seek(0)
        return body
    except BaseException as error:
        body.close()
        if isinstance(error, (OSError, ValueError, HTTPException, urllib3.exceptions.HTTPError, zlib.error)):
            raise _translated(error, attempt, limits.timeout_s) from None
        raise


def _translated(error: Exception, attempt: network.Attempt, timeout_s: float) -> Exception:
    """What the libraries raised (requests' errors are OSErrors), as an outcome."""
    root = _root(error)
    text = getattr(root, "strerror", None) or str(root).strip() or type(root).__name__
    text = "".join(
        character if character.isprintable() else "?" for character in text[:300]
    )  # a server may have its say
    if isinstance(root, TimeoutError) or time.monotonic() >= attempt.deadline:
        return AgainError(ImageError("timeout", f"not complete after {timeout_s:g} s"))
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return ImageError("bad_image", f"content encoding: {text}")
    if isinstance(error, (requests.exceptions.InvalidProxyURL, requests.exceptions.InvalidSchema)):
        return ImageError("connection", f"proxy: {text}")  # a SOCKS proxy needs PySocks
    if isinstance(error, (UnicodeError, requests.exceptions.InvalidURL)):  # a name that DNS cannot hold
        return ImageError("bad_url", text)
    return AgainError(ImageError("connection", text))


def _root(error: BaseException) -> BaseException:
    """The error inside: those around it only repeat it, with addresses of objects."""
    inner = [error for error in (getattr(error, "reason", None), *error.args) if isinstance(error, BaseException)]
    return _root(inner[0]) if inner else error


def _follow(url: str, attempt: network.Attempt) -> requests.Response:
    """The response at the end of the redirects; the caller closes it."""
    network.forget_cookies()
    for _ in range(_MAX_REDIRECTS + 1):
        response = network.get(url, attempt)
        if response.status_code not in (301, 302, 303, 307, 308):
            return response
        response.close()
        url = responses.target(url, response)
    raise ImageError("bad_redirect", f"more than {_MAX_REDIRECTS} redirects")
