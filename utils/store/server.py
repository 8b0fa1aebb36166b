"""A Chroma server as the store: its address, and a client with timeouts and retries, which Chroma's client lacks.

Chroma's own HTTP client is patched, instead of wrapping our calls: its constructor sends requests before a caller can
set a timeout, it creates further clients, and dozens of calls in four rooms would need a wrapper.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.errors import UserError
from utils.log import LOG

if TYPE_CHECKING:
    import chromadb

WAIT_S = 120  # time that a server may be unavailable during a run: long enough for a restart
TIMEOUT_S, CONNECT_TIMEOUT_S = 60, 5  # for one request
MAX_REQUEST_BYTES = 36 * 2**20  # Chroma rejects 40 MiB
NUMBER_BYTES = 24  # of a float as text, the format for a server without base64
_AWAY = (429, 502, 503, 504)  # status codes of a busy or unavailable server, or of its proxy


class Server(NamedTuple):
    """A Chroma server. The environment variable `headers_env` ("": none) contains its HTTP headers as JSON."""

    url: str
    headers_env: str = ""

    def __str__(self) -> str:
        return self.url

    @property
    def label(self) -> str:
        """The address in a form that a file name can contain."""
        return re.sub(r"[^\w.-]", "_", self.url.partition("://")[2])


Place = Path | Server  # the folder of an embedded Chroma, or a server


@functools.cache  # only the first call checks; later in a run the client waits for the server
def choose(path: str, url: str, headers_env: str) -> Place:
    """The server at `url`, which must answer now; the folder `path` if `url` is "". Raises UserError."""
    if not url:
        return Path(path)
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        remedy = "a secret belongs in a header (CHROMA_SERVER_HEADERS_ENV)"
        raise UserError(f"CHROMA_SERVER_URL must be http(s)://host:port, without user, ? and #; {remedy}")
    server = Server(url.rstrip("/"), headers_env)
    _check(server)
    return server


def connect(server: Server) -> chromadb.ClientAPI:
    """A client that waits up to WAIT_S for an unavailable server. It can repeat any request, because we set the ids."""
    import chromadb
    from chromadb.config import Settings

    _patch_client()
    headers = read_headers(server)
    settings = Settings(_env_file=None, anonymized_telemetry=False)  # type: ignore[call-arg]
    is_https = server.url.startswith("https:")
    try:
        return chromadb.HttpClient(host=server.url, ssl=is_https, headers=headers, settings=settings)
    except Exception as error:  # Chroma raises a ValueError; its context has the cause
        cause: BaseException | None = error
        while cause and not isinstance(cause, UserError):
            cause = cause.__context__
        raise cause or UserError(f"{server}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def read_headers(server: Server) -> dict[str, str]:
    """The HTTP headers in the environment variable. Raises UserError, which never shows the variable's content."""
    name = server.headers_env
    if not name:
        return {}
    try:
        headers = json.loads(os.environ[name])
    except KeyError:
        raise UserError(f"CHROMA_SERVER_HEADERS_ENV names {name}, which is not set in the environment") from None
    except ValueError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise UserError(f"the environment variable {name} must be a JSON object whose values are strings") from None
    return headers


def request_slices(metadata: list[dict[str, Any]], dimension: int, most: int) -> list[slice]:
    """Split records into slices for requests of at most `most` records and MAX_REQUEST_BYTES each."""
    slices, start, size = [], 0, 0
    for i, one in enumerate(metadata):
        bytes_ = len(json.dumps(one)) + NUMBER_BYTES * dimension + 50  # the id takes 36 of the 50
        if i > start and (i - start == most or size + bytes_ > MAX_REQUEST_BYTES):
            slices.append(slice(start, i))
            start, size = i, 0
        size += bytes_
    return [*slices, slice(start, len(metadata))] if metadata else []


def _check(server: Server) -> None:
    """Send one request without retries: at the start of a run, an unavailable server is an error."""
    import requests

    url, headers = f"{server.url}/api/v2/heartbeat", read_headers(server)
    try:
        # A no-op auth keeps ~/.netrc credentials out. Chroma's client does not follow redirects.
        answer = requests.get(url, headers=headers, timeout=CONNECT_TIMEOUT_S, auth=lambda r: r, allow_redirects=False)
        problem = str(answer.status_code) if answer.status_code in _AWAY else ""
    except (requests.RequestException, UnicodeError) as error:
        problem = type(error).__name__
    if problem:
        raise UserError(f"no Chroma server answers at {server} ({problem}); start it, or correct CHROMA_SERVER_URL")
    if answer.status_code in (401, 403):
        raise UserError(f"{server} refuses access ({answer.status_code}); set CHROMA_SERVER_HEADERS_ENV")
    if not answer.ok or "heartbeat" not in answer.text:
        raise UserError(f"{server} is not a Chroma server ({answer.status_code}); correct CHROMA_SERVER_URL")


@functools.cache
def _patch_client() -> None:
    """Add timeouts and retries to every HTTP client that Chroma creates in this process."""
    import httpx
    from chromadb.api.fastapi import FastAPI

    plain: Any = FastAPI.__init__

    def init(self: Any, system: Any) -> None:
        plain(self, system)
        self._session.timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._session.request = _with_retries(self._session.request, self._api_url.removesuffix("/api/v2"))

    FastAPI.__init__ = init  # type: ignore[method-assign]


def _with_retries(request: Callable[..., Any], url: str) -> Callable[..., Any]:
    import httpx

    def send(*args: Any, **kwargs: Any) -> Any:
        until, pause_s = 0.0, 0.25
        while True:
            try:
                response = request(*args, **kwargs)
                problem = f"answers {response.status_code} {response.reason_phrase}"
                if response.status_code not in _AWAY:
                    if response.is_success or "json" in response.headers.get("Content-Type", ""):
                        return response
                    raise UserError(f"a proxy before the Chroma server at {url} {problem}; correct that, and run again")
            except httpx.TransportError as error:
                problem = type(error).__name__
            if not until:
                until = time.monotonic() + WAIT_S
                LOG.warning("the Chroma server at %s is unavailable (%s); waiting up to %s s", url, problem, WAIT_S)
            if time.monotonic() + pause_s > until:
                raise UserError(f"the Chroma server at {url} was unavailable for {WAIT_S} s ({problem}); run again")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5)

    return send
