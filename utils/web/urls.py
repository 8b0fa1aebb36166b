"""Read the url field of a list as browsers do: http(s), data: and file: URLs, and plain paths."""

from __future__ import annotations

import base64
import re
import urllib.parse
from pathlib import Path
from urllib.request import url2pathname

import requests

from utils.errors import ImageError
from utils.web.guard import literal_scope

_MAX_LENGTH = 65_536  # of an http(s) URL; servers stop at 8 to 16 thousand
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: "C:" is a drive
_NAMED_HOST = re.compile(r"https?://(?:[a-z0-9_-]+\.)+([a-z]{2,})(?::[0-9]+)?(?:[/?#]|$)", re.IGNORECASE)
_NO_HOST = re.compile(r"[\x00-\x20#%/<>?@\\^|\x7f]")  # Source: WHATWG URL, forbidden host code points
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def scheme_of(url: str) -> str:
    """ "http", "https", "data", ... in lower case; "" for a plain path."""
    match = _SCHEME.match(_trim(url))
    return match[1].lower() if match else ""


def http_url(url: str) -> str:
    """The http(s) URL to request: ASCII, escaped, without fragment. Raises ImageError("bad_url")."""
    cleaned = _trim(url)
    if len(cleaned) > _MAX_LENGTH:
        raise ImageError("bad_url", f"{len(cleaned)} characters long")
    scheme, _, rest = cleaned.partition("#")[0].partition(":")
    rest, question, query = rest.partition("?")
    whole = f"{scheme.lower()}://" + rest.replace("\\", "/").lstrip("/") + question + query
    try:
        if urllib.parse.urlsplit(whole).port == 0:  # one out of range raises
            raise ValueError("port 0")
        prepared = requests.Request("GET", _STRAY_PERCENT.sub("%25", whole)).prepare().url or ""
        if not host_of(prepared) or _NO_HOST.search(host_of(prepared)):
            raise ValueError(f"{host_of(prepared)!r} is no host")
    except (requests.RequestException, ValueError) as error:  # UnicodeError is a ValueError
        raise ImageError("bad_url", str(error)) from None
    return prepared


def is_local(url: str) -> bool:
    """Whether a URL names this machine or a private network: file://, a plain path, localhost, a loopback or private
    address. Asks no name server. Addresses that are always refused (link-local ...) are not local."""
    if (named := _NAMED_HOST.match(url)) and named[1].lower() not in ("localhost", "localdomain"):
        return False  # nearly every URL of a list; a hundred times faster
    scheme = scheme_of(url)
    if scheme not in ("http", "https"):
        return scheme == "file" or (scheme == "" and bool(url.strip()) and not url.startswith("//"))
    try:
        return literal_scope(host_of(http_url(url))) == "private"
    except ImageError:
        return False


def host_of(url: str) -> str:
    """The host of a URL that http_url returned."""
    return urllib.parse.urlsplit(url).hostname or ""


def queue_host(url: str) -> str:
    """The host used for fair scheduling; "" if no host is contacted."""
    try:
        return host_of(url)
    except ValueError:
        return ""


def local_path(url: str) -> Path:
    """The path of a file: URL or of a plain path. Raises ImageError("bad_url")."""
    if scheme_of(url) != "file":
        if url.startswith("//") or not url.strip():
            raise ImageError("bad_url", "no scheme" if url.strip() else "empty")
        return Path(url)
    try:
        parts = urllib.parse.urlsplit(_trim(url))
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"a file: URL that names a host, {parts.netloc}")
        return Path(url2pathname(parts.path))
    except (ValueError, OSError) as error:
        raise ImageError("bad_url", str(error)) from None


def data_bytes(url: str, max_bytes: int) -> bytes:
    """The bytes inside a data: URL. Raises ImageError("bad_url" or "too_large")."""
    head, comma, data = _trim(url).partition(",")
    if not comma:
        raise ImageError("bad_url", "a data: URL without a comma")
    if len(data) > 4 * max_bytes:  # more than base64 or escapes need
        raise ImageError("too_large", f"more than {max_bytes} bytes")
    raw = urllib.parse.unquote_to_bytes(data.partition("#")[0])
    try:
        if head.lower().rstrip().endswith(";base64"):
            raw = base64.b64decode(re.sub(rb"\s", b"", raw) + b"==", validate=False)
    except ValueError as error:
        raise ImageError("bad_url", f"not base64: {error}") from None
    if len(raw) > max_bytes:
        raise ImageError("too_large", f"more than {max_bytes} bytes")
    return raw


def _trim(url: str) -> str:
    """Without surrounding blanks and control characters, tabs and newlines: browsers drop them."""
    return url.strip("".join(map(chr, range(33)))).translate({9: None, 10: None, 13: None})
