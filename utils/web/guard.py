"""HTTP requests that reach only allowed IP addresses.

Every request checks the address of the connected socket: a host name can resolve to a public address when it is checked
and to a private one when it is used.
"""

from __future__ import annotations

import base64
import functools
import io
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import urllib3
from certifi import where
from requests.utils import get_auth_from_url, get_environ_proxies, prepend_scheme_if_needed, select_proxy
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, make_headers
from urllib3.util.ssl_ import create_urllib3_context

from utils.errors import ImageError, UserError

USER_AGENT = f"retrieval_ann (image-similarity annotation) python-urllib3/{urllib3.__version__}"
# Forbidden: cloud metadata services outside the link-local range, and special-purpose networks that Python calls
# global. Source: IANA special-purpose address registries.
_NETWORKS = {
    "forbidden": "100.100.100.200/32 fd00:ec2::254/128 192.0.0.0/24 192.88.99.0/24 2001::/23",
    "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 127.0.0.0/8 ::1/128 fc00::/7 fec0::/10",
}
_SCOPES = [(ipaddress.ip_network(network), name) for name, all_ in _NETWORKS.items() for network in all_.split()]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all unicast addresses that IANA has allocated
_MAX_HEADERS, _MAX_HEADER_BYTES = 1_000, 262_144  # limits for one response
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # Source: RFC 9110
_FRAMING = {"connection", "content-length", "keep-alive", "proxy-connection", "transfer-encoding"}
_PROXY_VARIABLES = [
    change(f"{scheme}_proxy") for scheme in ("http", "https", "all") for change in (str.lower, str.upper)
]
_thread = threading.local()  # .managers: connection pools; of this request, .attempt: its rules, .target: its target


# --- addresses --------------------------------------------------------------------------------------------------------
@functools.lru_cache(10_000)
def scope(address: str) -> str:
    """Classify an IP address as "public", "private" (this machine or its network) or "forbidden" (link-local,
    multicast, reserved ...). An IPv6 address that contains an IPv4 address (mapped, 6to4, NAT64) counts as that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        if inner := ip.ipv4_mapped or ip.sixtofour or nat64:
            return scope(str(inner))
    for network, name in _SCOPES:
        if ip in network:
            return name
    public = ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_unspecified)
    return "public" if public and (ip.version == 4 or ip in _GLOBAL_V6) else "forbidden"


def literal_scope(host: str) -> str | None:
    """The scope of localhost or of an IP address in any spelling that browsers accept; None if the host needs DNS."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith((".localhost", ".localdomain")):
        return "private"
    try:
        return scope(host if ":" in host else socket.inet_ntoa(socket.inet_aton(host)))  # also 127.1, 0x7f000001, ...
    except (OSError, ValueError):
        return None


@dataclass
class Attempt:
    """The rules for the requests of one attempt: the deadline, and whether private addresses are allowed.

    Private addresses stay blocked once the attempt has reached a public server, so that no redirect leads back into
    the private network.
    """

    deadline: float  # time.monotonic()
    allow_private: bool
    last_scope: str = ""  # of the address tried last
    wait_s: float = 0  # wait before the next attempt that the server asks for
    has_proxy: bool = False  # the user's proxy may have any address, and checks the addresses behind it

    def remaining_s(self) -> float:
        """Seconds until the deadline. Raises TimeoutError if it has passed."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    def admit(self, address: str, connected: bool) -> None:
        """Check an IP address before or, if `connected`, after connecting. Raises ImageError("blocked_address")."""
        if self.has_proxy:
            return
        self.last_scope = scope(address)
        if self.last_scope == "forbidden" or (self.last_scope == "private" and not self.allow_private):
            raise ImageError("blocked_address", f"{address} is not a public address")
        self.allow_private &= not (connected and self.last_scope == "public")


# --- requests ---------------------------------------------------------------------------------------------------------
def behind_proxy() -> bool:
    """Whether the environment names a proxy. If so, the proxy checks the addresses that names resolve to."""
    proxies = _proxies(tuple(map(os.environ.get, _PROXY_VARIABLES)))
    return any(proxies.get(scheme) for scheme in ("http", "https", "all"))


@functools.lru_cache(1)
def _proxies(_environment: tuple[str | None, ...]) -> dict[str, str]:
    """Cached until the environment changes: reading it takes as long as the rest of a small download."""
    return getproxies()


def get(url: str, attempt: Attempt, cookies: CookieJar) -> BaseHTTPResponse:
    """Send a GET request for a URL that urls.http_url() returned. Redirects are not followed.

    The body of the response is not read yet, and the caller closes the response. Raises ImageError("blocked_address"),
    urllib3's exceptions, OSError (DNS, refused, TimeoutError), and UserError if REQUESTS_CA_BUNDLE cannot be used.
    """
    parts, proxy = urlsplit(url), proxy_of(url)
    host = parts.hostname or ""
    host_scope = literal_scope(host)
    if host_scope == "forbidden" or (host_scope == "private" and not attempt.allow_private):
        raise ImageError("blocked_address", f"{host} is not a public address")
    attempt.has_proxy = bool(proxy)
    if proxy:
        attempt.allow_private = host_scope == "private"  # the address behind a proxy is unknown and counts as public
    target = url[len(f"{parts.scheme}://{parts.netloc}") :]
    forwarded = parts.scheme == "http" and proxy.startswith("http")  # an HTTP proxy needs the whole URL
    _thread.attempt = attempt
    _thread.target = f"http://{parts.netloc.rpartition('@')[2]}{target}" if forwarded else target
    pool: Any = _manager(proxy).connection_from_host(host, parts.port, parts.scheme)
    if not issubclass(pool.ConnectionCls, _Guarded):
        pool.ConnectionCls = _guarded(pool.ConnectionCls)
    response = pool.urlopen(
        *("GET", "http://forwarded/" if forwarded else "/"),  # _Guarded.request sends _thread.target instead
        headers=_headers(url, cookies),
        retries=False,
        redirect=False,
        assert_same_host=False,
        preload_content=False,
        timeout=attempt.remaining_s(),
    )
    if "Set-Cookie" in response.headers:
        cookies.extract_cookies(response, urllib.request.Request(url))
    return response


def proxy_of(url: str) -> str:
    proxy = select_proxy(url, get_environ_proxies(url)) if behind_proxy() else ""
    return prepend_scheme_if_needed(proxy, "http") if proxy else ""


def _headers(url: str, cookies: CookieJar) -> dict[str, str]:
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    parts = urlsplit(url)
    if "@" in parts.netloc:  # credentials come from the URL alone, never from ~/.netrc
        user_and_password = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(user_and_password.encode()).decode()
    if len(cookies):
        request = urllib.request.Request(url)
        cookies.add_cookie_header(request)
        headers |= dict(request.header_items())
    return headers


def _manager(proxy: str) -> PoolManager:
    """This thread's connection pools, direct or through a proxy. Few connections are kept: macOS allows 256 files."""
    managers = _thread.__dict__.setdefault("managers", {})
    key = proxy, os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or where()
    if key not in managers:
        options: dict[str, Any] = {"num_pools": 2, "maxsize": 1, "ssl_context": _tls_context(key[1])}
        managers[key] = _proxy_manager(proxy, options) if proxy else PoolManager(**options)
    return managers[key]


def _proxy_manager(proxy: str, options: dict[str, Any]) -> PoolManager:
    try:
        if not urlsplit(proxy).hostname:
            raise ValueError("it names no host")
        if proxy.startswith("socks"):
            from urllib3.contrib.socks import SOCKSProxyManager

            return SOCKSProxyManager(proxy, **options)
        user, password = get_auth_from_url(proxy)
        headers = make_headers(proxy_basic_auth=f"{user}:{password}") if user else None
        return ProxyManager(proxy, proxy_headers=headers, proxy_ssl_context=options["ssl_context"], **options)
    except (ImportError, ValueError) as error:  # LocationValueError is a ValueError
        reason = "pip install PySocks" if isinstance(error, ImportError) else str(error)
        raise UserError(f"the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used: {reason}") from None


@functools.cache
def _tls_context(bundle: str) -> ssl.SSLContext:
    """The TLS context, shared by all threads because reading the certificates takes 10 ms. Raises UserError."""
    context = create_urllib3_context()
    try:
        context.load_verify_locations(**{"capath" if Path(bundle).is_dir() else "cafile": bundle})
    except (FileNotFoundError, PermissionError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise UserError(f"the CA bundle {bundle} cannot be read: {reason}; fix REQUESTS_CA_BUNDLE") from None
    return context


@functools.cache
def _guarded(connection: type) -> type:
    return type(f"_Guarded{connection.__name__}", (_Guarded, connection), {})


# --- connections ------------------------------------------------------------------------------------------------------
class _TimedFile(io.RawIOBase):
    """A socket's file whose reads share the attempt's deadline. A timeout per read would restart with each byte that a
    slow server sends."""

    def __init__(self, file: io.BufferedReader, sock: socket.socket) -> None:
        self._file, self._sock = file.detach(), sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_thread.attempt.remaining_s())
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Response(HTTPResponse):
    """A response whose status line and headers are parsed as browsers and curl parse them."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_TimedFile(self.fp, sock))

    def begin(self) -> None:
        status = 100
        while 100 <= status < 200 and status != 101:  # interim responses, such as early hints
            version, status, reason = self._read_status()  # type: ignore[attr-defined]
            headers = _read_headers(self.fp)
        # http.client determines the body's length; its own parser gets only the headers needed for this.
        framing = [f"{name}: {value}\r\n" for name, value in headers.items() if name.lower() in _FRAMING]
        version = version if version == "HTTP/1.0" else "HTTP/1.1"  # some write HTTP/2 on an HTTP/1.1 connection
        source, head = self.fp, f"{version} {status} {reason.strip()}\r\n{''.join(framing)}\r\n"
        self.fp = io.BytesIO(head.encode("latin-1"))
        try:
            super().begin()
        finally:
            self.fp = source
        self.headers = self.msg = headers


def _read_headers(file: Any) -> HTTPMessage:
    """Read the headers up to the empty line, as latin-1. A line without a colon is dropped, and so is a line whose name
    is not a token. Raises HTTPException for too many headers or bytes."""
    fields: list[str] = []
    size = 0
    while (line := file.readline(_MAX_HEADER_BYTES + 1)) not in (b"\r\n", b"\n", b""):
        size += len(line)
        if size > _MAX_HEADER_BYTES or len(fields) == _MAX_HEADERS:
            raise HTTPException(f"more than {_MAX_HEADERS} headers, or {_MAX_HEADER_BYTES} bytes of them")
        text = line.decode("latin-1").rstrip("\r\n")
        if text[:1] in (" ", "\t") and fields:  # a continuation line
            fields[-1] += " " + text.strip()
        else:
            fields.append(text)
    message = HTTPMessage()
    for field in fields:
        name, colon, value = field.partition(":")
        if colon and _TOKEN.fullmatch(name.strip()):
            message[name.strip()] = value.strip()
    return message


class _Guarded:
    """A urllib3 connection that reaches only addresses that the attempt admits, even if it was kept alive. Connecting,
    status line, headers and body all share the attempt's deadline."""

    response_class = _Response
    sock: Any
    _dns_host: str
    port: int
    socket_options: Any

    def request(self, method: str, _url: str, *args: Any, **kwargs: Any) -> None:
        """Send the target byte for byte: urllib3 would change escapes that the URL's signature covers."""
        if self.sock is not None and not _thread.attempt.has_proxy:  # kept alive, perhaps under other rules
            _thread.attempt.admit(self.sock.getpeername()[0], connected=True)
        super().request(method, _thread.target, *args, **kwargs)  # type: ignore[misc]

    def _new_conn(self) -> socket.socket:
        """Connect to the first address that answers. Raises ImageError, OSError.

        The system's name lookup cannot be interrupted; it ends by its own limit of some seconds.
        """
        if hasattr(self, "_socks_options"):  # PySocks connects by itself
            return super()._new_conn()  # type: ignore[misc]
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            socket.socket().close()  # raises EMFILE if too many open files made the lookup fail
            raise
        failure: Exception = OSError("the name has no address")
        for index, info in enumerate(found):
            try:  # a dead address must leave time for the others
                return self._connect(info, _thread.attempt.remaining_s() / (len(found) - index))
            except (OSError, ImageError) as error:
                failure = failure if isinstance(failure, ImageError) else error  # "blocked" is the better reason
        raise failure

    def _connect(self, info: tuple[Any, ...], timeout_s: float) -> socket.socket:
        family, kind, protocol, _, address = info
        _thread.attempt.admit(address[0], connected=False)  # before even a SYN is sent
        sock = socket.socket(family, kind, protocol)
        try:
            for option in self.socket_options or []:
                sock.setsockopt(*option)
            sock.settimeout(timeout_s)
            sock.connect(address)
            _thread.attempt.admit(sock.getpeername()[0], connected=True)
            sock.settimeout(_thread.attempt.remaining_s())  # for the TLS handshake
        except BaseException:
            sock.close()
            raise
        return sock
