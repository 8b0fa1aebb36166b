"""Distinguish faults of this machine (no network, no name server, no memory) from faults of hosts and images."""

from __future__ import annotations

import errno
import re
import socket
import sys
import time
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from urllib3.exceptions import ProxyError

from utils.errors import ImageError, UserError
from utils.web.guard import behind_proxy, proxy_of

T = TypeVar("T")
MIN_SUSPECTS, MIN_SUSPECTS_S = 50, 10  # the machine is checked after this many failures in a row and seconds
_SUSPECT = re.compile(
    r"connection: (no name server answered|no route|proxy not reached)|bad_image: (\w+: not enough memory|MemoryError)"
)
DECODER_BYTES = 300_000_000  # memory to decode an image of 100 megapixels
_NO_ROUTE = {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL}
_NO_ANSWER = {socket.EAI_AGAIN, socket.EAI_FAIL}
if sys.platform != "linux":  # elsewhere, a silent name server and an unknown name cause the same error
    _NO_ANSWER.add(socket.EAI_NONAME)


def fault_of(error: BaseException) -> str:
    """The resource that this machine ran out of, and the remedy; "" if a download's error has another cause."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many open files; raise the limit (ulimit -n), or lower DOWNLOAD_WORKERS"
    if isinstance(error, MemoryError) or number in (errno.ENOMEM, errno.ENOBUFS):
        return "no memory is left for downloads; lower DOWNLOAD_WORKERS"
    return ""


def symptom(error: BaseException) -> str:
    """Describe an error that a machine without network gets for every host; "" for any other error."""
    if isinstance(error, ProxyError):
        return "proxy not reached"
    if isinstance(error, socket.gaierror):
        return "no name server answered" if error.errno in _NO_ANSWER else ""
    return "no route" if isinstance(error, OSError) and error.errno in _NO_ROUTE else ""


def machine_fault() -> str:
    """Why this machine cannot fetch any image, and the remedy; "" if it can. Tests memory, a route and one name."""
    try:
        bytearray(DECODER_BYTES)
        if behind_proxy():
            proxy = urlsplit(proxy_of("https://example.com/") or proxy_of("http://example.com/"))
            socket.create_connection((proxy.hostname or "", proxy.port or 80), timeout=5).close()
        elif not any(map(_has_route, ("1.1.1.1", "2606:4700:4700::1111"))):
            return "this machine has no route to the internet; connect it, and run this again"
        else:
            socket.getaddrinfo("example.com", 80)
    except MemoryError:
        return "no memory is left for them; lower DOWNLOAD_WORKERS or MAX_IMAGE_PIXELS"
    except OSError as error:
        if behind_proxy():
            return f"the proxy does not answer ({error.strerror or error}); start it, or fix HTTP_PROXY and HTTPS_PROXY"
        return "no name server answers; check the network, and run this again" if symptom(error) else ""
    return ""


def _has_route(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 53))  # sends nothing
        return True
    except OSError:
        return False


class Suspects(Generic[T]):
    """Holds back failures that may be this machine's fault, until another result or machine_fault() decides.

    A list with dead hosts never ends a run: any other result shows that the machine works, and so may machine_fault().
    """

    def __init__(self) -> None:
        self._held: list[T] = []
        self._n_in_a_row, self._since = 0, 0.0  # since: time.monotonic() of the first failure

    def add(self, result: T, error: ImageError | None) -> list[T]:
        """Add a result; return all results that are not or no longer suspect. Raises UserError for a machine fault."""
        self._held.append(result)
        if error is None or not _SUSPECT.match(str(error)):
            self._n_in_a_row = 0
            return self._drain()
        if not self._n_in_a_row:
            self._since = time.monotonic()
        self._n_in_a_row += 1
        is_time = time.monotonic() - self._since >= MIN_SUSPECTS_S
        return self.release() if is_time and self._n_in_a_row >= MIN_SUSPECTS else []

    def release(self) -> list[T]:
        """Return all results held, for when no other result will follow. Raises UserError as add() does."""
        if self._n_in_a_row >= MIN_SUSPECTS:
            if fault := machine_fault():
                raise UserError(f"{self._n_in_a_row} downloads in a row failed: {fault}")
            self._n_in_a_row = 0
        return self._drain()

    def _drain(self) -> list[T]:
        held, self._held = self._held, []
        return held
