"""Connections of urllib3 that obey an attempt: they go where it allows and wait until its end.

The address of the connected socket is what counts, on every request: a name can resolve to a public address when it is
checked and to a private one when it is used.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

from utils.errors import ImageError
from utils.web.addresses import scope

current = threading.local()  # .attempt: what this thread's connections have to obey just now


@dataclass
class Attempt:
    """The rules for the requests of one attempt: until when, and whether private addresses are open to it.

    `allow_private` turns False for good with the first public server: none of them redirects to a private one.
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
        """Raises ImageError("blocked_address") unless an IP address may be connected, or talked, to."""
        reach = scope(address)
        if reach == "never" or (reach == "private" and not self.allow_private):
            raise ImageError("blocked_address", f"{address} is not a public address")
        self.allow_private &= not (connected and reach == "public")


class _TimedFile(io.RawIOBase):
    """A socket's file whose every read may last only as long as the attempt: a timeout per read would start anew with
    each byte that a server drips."""

    def __init__(self, file: io.BufferedReader, sock: socket.socket) -> None:
        self._file, self._sock = file.detach(), sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(current.attempt.remaining_s())
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _TimedResponse(HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_TimedFile(self.fp, sock))


class Timed:
    """Connections whose connecting, status line, headers and body all keep the attempt's deadline."""

    response_class = _TimedResponse
    sock: Any
    _dns_host: str
    port: int
    socket_options: Any

    def _admit(self, address: str, connected: bool) -> None:
        """Raises ImageError unless this connection may go to an IP address. This one goes to a proxy: anywhere."""

    def _new_conn(self) -> socket.socket:
        """Connect to the first address that answers. Raises ImageError, OSError.

        The system's name look-up cannot be interrupted; its own limit (seconds) is all that bounds it.
        """
        if hasattr(self, "_socks_options"):  # PySocks connects by itself
            return super()._new_conn()  # type: ignore[misc]
        found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        failure: Exception = OSError("the name has no address")
        for index, info in enumerate(found):
            try:  # a dead address leaves time for the others
                return self._connect(info, current.attempt.remaining_s() / (len(found) - index))
            except (OSError, ImageError) as error:
                failure = failure if isinstance(failure, ImageError) else error  # a blocked address tells more
        raise failure

    def _connect(self, info: tuple[Any, ...], timeout_s: float) -> socket.socket:
        family, kind, protocol, _, address = info
        self._admit(address[0], connected=False)  # do not even knock
        sock = socket.socket(family, kind, protocol)
        try:
            for option in self.socket_options or []:
                sock.setsockopt(*option)
            sock.settimeout(timeout_s)
            sock.connect(address)
            self._admit(sock.getpeername()[0], connected=True)
            sock.settimeout(current.attempt.remaining_s())  # for the TLS handshake
        except BaseException:
            sock.close()
            raise
        return sock


class Checked(Timed):
    """Connections that also talk only to addresses that the attempt admits, however they came to be connected."""

    def _admit(self, address: str, connected: bool) -> None:
        current.attempt.admit(address, connected)

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:  # kept alive from an earlier request, whose rules were not these
            self._admit(self.sock.getpeername()[0], connected=True)
        super().request(*args, **kwargs)  # type: ignore[misc]
