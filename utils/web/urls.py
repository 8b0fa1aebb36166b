"""Parse an item's url as browsers do: http(s), data: and file: URLs, and plain paths."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import re
import socket
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.request import url2pathname

import idna

from utils.errors import ImageError
from utils.web.guard import literal_scope

_MAX_LENGTH = 65_536  # characters of an http(s) URL; servers accept 8 to 16 thousand
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?![0-9]+(?:/|$))")  # not a drive (C:) or a port (localhost:80)
_PATH_LIKE = re.compile(r"(?:[A-Za-z]:|\.\.?)[\\/]|\\|/(?!/)")  # C:\ ./ ../ \ /
_NAMED_HOST = re.compile(r"https?://(?:[a-z0-9_-]+\.)+([a-z]{2,})(?::[0-9]+)?(?:[/?#]|$)", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
# The code points that are escaped in each part of a URL, and those that no host contains. Source: WHATWG URL.
_IN_PATH = re.compile(r"""[^\x21$%&'()*+,\-./0-9:;=@A-Z\[\\\]_a-z~]""")  # Chromium escapes |, too
_IN_QUERY = re.compile(r"""[\x00-\x20"#<>'\x7f-\U0010ffff]""")
_IN_USERINFO = re.compile(r"[^!$%&'()*+,\-.0-9A-Z_a-z~:]")
_ANY_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_NO_HOST = re.compile(r"[\x00-\x20#%/:<>?@\[\\\]^|\x7f*]|^$")  # * is ours: a wildcard is not a host


def scheme_of(url: str) -> str:
    """ "http", "https", "data", ... in lower case; "" for a plain path."""
    match = _SCHEME.match(_trim(url))
    return match[1].lower() if match else ""


def http_url(url: str) -> str:
    """The http(s) URL to request: valid characters stay byte for byte, others are escaped, the fragment is removed.

    Raises ImageError("bad_url"). Source: WHATWG URL, which browsers follow.
    """
    cleaned = _trim(url)
    if len(cleaned) > _MAX_LENGTH:
        raise ImageError("bad_url", f"{len(cleaned)} characters long")
    scheme, _, rest = cleaned.partition("#")[0].partition(":")
    rest, question, query = rest.partition("?")
    authority, _, path = rest.replace("\\", "/").lstrip("/").partition("/")
    userinfo, at, host_and_port = authority.rpartition("@")
    try:
        host = _host_and_port(host_and_port, _PORTS[scheme.lower()])
    except ValueError as error:  # or idna's UnicodeError, a ValueError
        raise ImageError("bad_url", str(error)) from None
    path = _escaped(_IN_PATH, _without_dots("/" + path))
    return (
        f"{scheme.lower()}://{_escaped(_IN_USERINFO, userinfo)}{at}{host}{path}{question}{_escaped(_IN_QUERY, query)}"
    )


def resolve(base: str, location: str) -> str:
    """Resolve a redirect's `location`, which may be relative, against `base`, a URL from http_url()."""
    location = _trim(location)
    scheme, _, rest = base.partition("://")
    if location.lower().startswith(f"{scheme}:") and not re.match(r"[/\\]{2}", location[len(scheme) + 1 :]):
        location = location[len(scheme) + 1 :]  # the same scheme, and relative
    if _ANY_SCHEME.match(location):
        return location
    authority, _, path = rest.partition("/")
    path = path.partition("?")[0]
    if location[:1] in ("/", "\\"):
        return f"{scheme}:{location}" if location[1:2] in ("/", "\\") else f"{scheme}://{authority}{location}"
    if location[:1] in ("#", ""):
        return base
    if location[0] == "?":
        return f"{scheme}://{authority}/{path}{location}"
    return f"{scheme}://{authority}/{path[: path.rfind('/') + 1]}{location}"


def _host_and_port(text: str, default: int) -> str:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{0,9}))?", text)
    if not match:
        raise ValueError(f"{text[:200]!r} is not a host")
    port = int(match[2] or default)
    if not 0 < port < 65_536:
        raise ValueError(f"port {port}")
    return _ascii_host(match[1]) + (f":{port}" if port != default else "")


def _ascii_host(host: str) -> str:
    """Convert a host name to ASCII, and an IP address to its usual spelling. Raises ValueError.

    Source: WHATWG URL. UTS 46 without transitional rules allows emoji, as browsers do; IDNA 2008 does not.
    """
    if host.startswith("["):
        return f"[{ipaddress.IPv6Address(host[1:-1].replace('%', '/'))}]"  # no zone
    host = urllib.parse.unquote(host)
    host = host.lower() if host.isascii() else idna.uts46_remap(host, std3_rules=False, transitional=False)
    if not all(idna.valid_contextj(host, at) for at, letter in enumerate(host) if letter in "\u200c\u200d"):
        raise ValueError(f"{host[:200]!a} has a zero-width joiner where none is allowed")
    labels = [label if label.isascii() else "xn--" + label.encode("punycode").decode() for label in host.split(".")]
    host = ".".join(labels)
    if labels[-1] == "":
        labels.pop()
    if _NO_HOST.search(host) or not all(0 < len(label) < 64 for label in labels) or len(host) > 254:
        raise ValueError(f"{host[:200]!r} is not a host")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        try:
            return socket.inet_ntoa(socket.inet_aton(".".join(labels)))  # also 127.1, 0x7f000001, ...
        except OSError:
            raise ValueError(f"{host!r} is not an address") from None
    return host


def _without_dots(path: str) -> str:
    """Resolve the . and .. segments of a path, which may be escaped. All other segments stay, even empty ones, because
    an object store's key may begin with a slash."""
    kept, dots = list[str](), ""
    for segment in path.split("/")[1:]:
        dots = segment.lower().replace("%2e", ".")
        if dots == "..":
            del kept[-1:]
        elif dots != ".":
            kept.append(segment)
    if dots in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


def _escaped(pattern: re.Pattern[str], text: str) -> str:
    def escape(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "replace"))

    return pattern.sub(escape, text)


def is_local(url: str) -> bool:
    """Whether a URL names this machine or a private network: a file: URL, a path, localhost, a loopback or private
    address. Sends no DNS query. Addresses that are always refused (link-local ...) are not local."""
    if (named := _NAMED_HOST.match(url)) and named[1].lower() not in ("localhost", "localdomain"):
        return False  # a hundred times faster for nearly every URL of a list
    if scheme_of(url) not in ("http", "https"):
        return names_path(url)
    try:
        return literal_scope(queue_host(http_url(url))) == "private"
    except ImageError:
        return False


def queue_host(url: str) -> str:
    """The host used for fair scheduling; "" if no host is contacted."""
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except ValueError:
        return ""


def names_path(url: str) -> bool:
    """Whether a URL is a file: URL, or looks like a path: absolute, with ./ or ../, or with a drive letter."""
    return scheme_of(url) == "file" or bool(scheme_of(url) == "" and _PATH_LIKE.match(url))


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


def is_file(url: str) -> bool:
    """Whether a URL names a file on this machine, which is read in place and not cached."""
    return scheme_of(url) in ("", "file")


def is_below(path: Path, folders: Iterable[str]) -> bool:
    """Whether a path is in or below one of `folders` (absolute paths). Links are not followed."""
    whole = Path(os.path.normpath(path.absolute()))
    return any(whole.is_relative_to(folder) for folder in folders)


def find_files(urls: Mapping[str, str], folders: Sequence[str] | None) -> dict[str, Path]:
    """Return id -> path of the local files in `urls` (id -> url) that are in or below `folders` (None: anywhere)."""
    found = {}
    for id_, url in urls.items():
        with contextlib.suppress(ImageError, OSError, ValueError):
            if is_file(url) and (path := local_path(url)).is_file() and (folders is None or is_below(path, folders)):
                found[id_] = path
    return found


def data_bytes(url: str, max_bytes: int) -> bytes:
    """Decode the bytes in a data: URL. Raises ImageError("bad_url" or "too_large")."""
    head, comma, data = _trim(url).partition(",")
    if not comma:
        raise ImageError("bad_url", "a data: URL without a comma")
    raw = urllib.parse.unquote_to_bytes(data.partition("#")[0])
    try:
        if re.search("; *base64 *$", head, re.IGNORECASE):
            raw = base64.b64decode(re.sub(rb"\s", b"", raw) + b"==", validate=False)
    except ValueError as error:
        raise ImageError("bad_url", f"not base64: {error}") from None
    if len(raw) > max_bytes:
        raise ImageError("too_large", f"more than {max_bytes} bytes")
    return raw


def _trim(url: str) -> str:
    """Remove surrounding blanks and control characters, and all tabs and newlines, as browsers do."""
    return url.strip("".join(map(chr, range(33)))).translate({9: None, 10: None, 13: None})
