"""What the head of an answer means, and its body within the limits."""

from __future__ import annotations

import email.utils
import http.client
import re
import time
import urllib.parse
from collections.abc import Iterator

import requests

from utils.errors import ImageError
from utils.web import urls
from utils.web.network import Attempt

_MAX_RETRY_AFTER_S = 30  # a server that asks for more is left alone until another run
_CHUNK_BYTES = 65_536
_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


class AgainError(Exception):
    """An attempt that failed in a way that may heal: the error it comes to, and how long the server asked to wait."""

    def __init__(self, error: ImageError, wait_s: float = 0) -> None:
        super().__init__(error)
        self.error, self.wait_s = error, wait_s


def target(url: str, response: requests.Response) -> str:
    """Where a redirect leads. Raises ImageError("bad_redirect")."""
    location = response.headers.get("Location", "")
    if not location:
        raise ImageError("bad_redirect", f"{response.status_code} without a Location")
    try:
        joined = urllib.parse.urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
        if urls.scheme_of(joined) not in ("http", "https"):
            raise ValueError("not http or https")
        return urls.http_url(joined)
    except (ValueError, ImageError) as error:
        raise ImageError("bad_redirect", f"to {location[:200]!a}: {getattr(error, 'detail', error)}") from None


def check_status(response: requests.Response) -> None:
    """Raises ImageError or, where it may heal, AgainError unless the status is a success."""
    status = response.status_code
    if 200 <= status < 300:
        return
    error = ImageError("http_status", f"{status} {http.client.responses.get(status, '')}".strip())
    if status == 429:
        error = ImageError("rate_limited", error.detail)
    elif not 500 <= status < 600:
        raise error
    wait_s = _retry_after_s(response.headers.get("Retry-After", ""))
    if wait_s > _MAX_RETRY_AFTER_S:
        raise ImageError("rate_limited", f"{error.detail}, asked to wait {wait_s:.0f} s")
    raise AgainError(error, wait_s)


def _retry_after_s(value: str) -> float:
    """Seconds from now that a Retry-After header (seconds or a date) asks for; 0 if it makes no sense."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return 0.0


def check_robots(response: requests.Response) -> None:
    """Raises ImageError("opted_out") for X-Robots-Tag noai or noimageai, addressed to all or to us."""
    for line in response.raw.headers.getlist("X-Robots-Tag"):
        agent = "*"
        for directive in line.lower().split(","):
            name, colon, rest = directive.partition(":")
            if colon and name.strip() not in _VALUED_DIRECTIVES:
                agent, directive = name.strip(), rest
            if directive.strip() in ("noai", "noimageai") and agent in ("*", "retrieval_ann"):
                raise ImageError("opted_out", f"X-Robots-Tag: {line[:200]!a}")


def chunks(response: requests.Response, attempt: Attempt, max_bytes: int) -> Iterator[bytes]:
    """The decoded body, piece by piece. Raises ImageError("too_large") on what is declared or on what comes."""
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared[:19]) > max_bytes:
        raise ImageError("too_large", f"{declared[:19]} bytes declared")
    size = 0
    for chunk in response.iter_content(_CHUNK_BYTES):
        attempt.remaining_s()  # a fast endless stream never waits, so no read of it times out
        size += len(chunk)
        if size > max_bytes:
            raise ImageError("too_large", f"more than {max_bytes} bytes")
        yield chunk
