"""Which addresses may be reached, and HTTP requests over connections that obey.

The address of the connected socket decides, on every request: a name can resolve to a public address when it is checked
and to a private one when it is used.
"""

from __future__ import annotations

import functools
import io
import ipaddress
import os
import socket
import threading
import time
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy

from utils.errors import ImageError

USER_AGENT = f"retrieval_ann (image-similarity annotation) python-requests/{requests.__version__}"
_PRIVATE = [
    ipaddress.ip_network(network)
    for network in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8"),
        *("::1/128", "fc00::/7", "fec0::/10"),
    )
]
# Cloud metadata services outside the link-local range, and special-purpose networks that Python calls global.
# Source: IANA special-purpose address registries.
_FORBIDDEN = [
    ipaddress.ip_network(network)
    for network in ("100.100.100.200/32", "fd00:ec2::254/128", "192.0.0.0/24", "192.88.99.0/24", "2001::/23")
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all unicast addresses that IANA has given out
_thread = threading.local()  # .session: requests' sessions are not thread-safe; .attempt: the rules of this request


# --- addresses --------------------------------------------------------------------------------------------------------
@functools.lru_cache(10_000)
def scope(address: str) -> str:
    """Classify an IP address as "public", "private" (this machine or its network) or "forbidden" (link-local,
    multicast, reserved ...). An IPv4 address inside an IPv6 one (mapped, 6to4, NAT64) counts as the IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner:
            return scope(str(inner))
    if any(ip in network for network in _FORBIDDEN if network.version == ip.version):
        return "forbidden"
    if any(ip in network for network in _PRIVATE if network.version == ip.version):
        return "private"
    public = ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_unspecified)
    return "public" if public and (ip.version == 4 or ip in _GLOBAL_V6) else "forbidden"


def literal_scope(host: str) -> str | None:
    """The scope of localhost, or of an address in any spelling that browsers accept; None if DNS must be asked."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith((".localhost", ".localdomain")):
        return "private"
    try:
        return scope(host if ":" in host else socket.inet_ntoa(socket.inet_aton(host)))  # also 127.1, 0x7f000001, ...
    except (OSError, ValueError):
        return None


@dataclass
class Attempt:
    """The rules for the requests of one attempt: the deadline, and whether private addresses may be reached.

    Private addresses stay blocked once this attempt has reached a public server: no redirect leads back inside.
    """

    deadline: float  # time.monotonic()
    allow_private: bool

    def remaining_s(self) -> float:
        """Seconds left. Raises TimeoutError if there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    def admit(self, address: str, connected: bool) -> None:
        """Raises ImageError("blocked_address") unless this IP address may be reached."""
        reach = scope(address)
        if reach == "forbidden" or (reach == "private" and not self.allow_private):
            raise ImageError("blocked_address", f"{address} is not a public address")
        self.allow_private &= not (connected and reach == "public")


# --- requests ---------------------------------------------------------------------------------------------------------
def behind_proxy() -> bool:
    """Whether the environment names a proxy; the proxy then checks resolved addresses."""
    return any(getproxies().get(scheme) for scheme in ("http", "https", "all"))


def get(url: str, attempt: Attempt) -> requests.Response:
    """One GET, redirects not followed, body not yet read; the caller closes the response.

    Raises ImageError("blocked_address"), requests' exceptions, and OSError (DNS, refused, TimeoutError).
    """
    host, proxies = urlsplit(url).hostname or "", get_environ_proxies(url)
    reach = literal_scope(host)
    if reach == "forbidden" or (reach == "private" and not attempt.allow_private):
        raise ImageError("blocked_address", f"{host} is not a public address")
    if select_proxy(url, proxies):
        attempt.allow_private = reach == "private"  # the address behind a proxy is unknown: count it as public
    request = requests.Request("GET", url, headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5"})
    _thread.attempt = attempt
    verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
    return _session().send(
        _session().prepare_request(request),
        stream=True,
        allow_redirects=False,
        timeout=attempt.remaining_s(),
        proxies=proxies,
        verify=verify,
    )


def forget_cookies() -> None:
    """Cookies last for one image's redirects; no site can follow a run from image to image."""
    _session().cookies.clear()


def _session() -> _Session:
    if not hasattr(_thread, "session"):
        _thread.session = _Session()
    return _thread.session


class _Session(requests.Session):
    """Asks for no content encoding and leaves redirects alone (requests would read their bodies whole)."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False  # it would also send the credentials in ~/.netrc
        self.headers["Accept-Encoding"] = "identity"  # images are compressed already
        adapter = _Adapter(pool_connections=2, pool_maxsize=1)  # few sockets stay open: macOS allows a process 256
        self.mount("http://", adapter)
        self.mount("https://", adapter)

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _Adapter(HTTPAdapter):
    """requests' adapter over guarded connections."""

    def get_connection_with_tls_context(self, request: Any, verify: Any, proxies: Any = None, cert: Any = None) -> Any:
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies=proxies, cert=cert)
        if not issubclass(pool.ConnectionCls, _Timed):
            # The user chose the proxy, wherever it is; it checks the addresses behind it.
            rules = _Timed if select_proxy(request.url, proxies) else _Checked
            pool.ConnectionCls = _with_rules(rules, pool.ConnectionCls)
        return pool


@functools.cache
def _with_rules(rules: type, connection: type) -> type:
    return type(f"{rules.__name__}{connection.__name__}", (rules, connection), {})


# --- connections ------------------------------------------------------------------------------------------------------
class _TimedFile(io.RawIOBase):
    """A socket's file whose reads share the attempt's deadline: a timeout per read would restart with each byte that a
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


class _TimedResponse(HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_TimedFile(self.fp, sock))


class _Timed:
    """Connections of urllib3 whose connecting, status line, headers and body all keep the attempt's deadline."""

    response_class = _TimedResponse
    sock: Any
    _dns_host: str
    port: int
    socket_options: Any

    def _admit(self, address: str, connected: bool) -> None:
        """Raises ImageError unless this connection may reach an IP address. A connection to a proxy may reach any."""

    def _new_conn(self) -> socket.socket:
        """Connect to the first address that answers. Raises ImageError, OSError.

        The system's name look-up cannot be interrupted; only its own limit (seconds) bounds it.
        """
        if hasattr(self, "_socks_options"):  # PySocks connects by itself
            return super()._new_conn()  # type: ignore[misc]
        found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        failure: Exception = OSError("the name has no address")
        for index, info in enumerate(found):
            try:  # a dead address leaves time for the others
                return self._connect(info, _thread.attempt.remaining_s() / (len(found) - index))
            except (OSError, ImageError) as error:
                failure = failure if isinstance(failure, ImageError) else error  # a blocked address explains more
        raise failure

    def _connect(self, info: tuple[Any, ...], timeout_s: float) -> socket.socket:
        family, kind, protocol, _, address = info
        self._admit(address[0], connected=False)  # send not even a SYN
        sock = socket.socket(family, kind, protocol)
        try:
            for option in self.socket_options or []:
                sock.setsockopt(*option)
            sock.settimeout(timeout_s)
            sock.connect(address)
            self._admit(sock.getpeername()[0], connected=True)
            sock.settimeout(_thread.attempt.remaining_s())  # for the TLS handshake
        except BaseException:
            sock.close()
            raise
        return sock


class _Checked(_Timed):
    """Connections that also reach only addresses that the attempt admits, kept-alive ones included."""

    def _admit(self, address: str, connected: bool) -> None:
        _thread.attempt.admit(address, connected)

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:  # kept alive from an earlier request with other rules
            self._admit(self.sock.getpeername()[0], connected=True)
        super().request(*args, **kwargs)  # type: ignore[misc]
