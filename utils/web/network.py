"""One HTTP request at a time, over connections that reach only where they may and end when their time is up."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy

from utils.errors import ImageError
from utils.web.addresses import literal_scope
from utils.web.connections import Attempt, Checked, Timed, current

USER_AGENT = f"retrieval_ann (image-similarity annotation) python-requests/{requests.__version__}"
_thread = threading.local()  # .session: requests' are not made to be shared


def behind_proxy() -> bool:
    """Whether proxies of the environment apply; resolved addresses are then the proxy's to check."""
    return any(getproxies().get(scheme) for scheme in ("http", "https", "all"))


def get(url: str, attempt: Attempt) -> requests.Response:
    """One GET, no redirect followed, body not yet read; the caller closes it.

    Raises ImageError("blocked_address"), what requests raises, and OSError (DNS, refused, TimeoutError).
    """
    host, proxies = urlsplit(url).hostname or "", get_environ_proxies(url)
    reach = literal_scope(host)
    if reach == "never" or (reach == "private" and not attempt.allow_private):
        raise ImageError("blocked_address", f"{host} is not a public address")
    if select_proxy(url, proxies):
        attempt.allow_private = reach == "private"  # where a proxy goes is not seen: taken for public
    request = requests.Request("GET", url, headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5"})
    current.attempt = attempt
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
    """Cookies live as long as one image's redirects; no site follows the run from image to image."""
    _session().cookies.clear()


def _session() -> _Session:
    if not hasattr(_thread, "session"):
        _thread.session = _Session()
    return _thread.session


class _Session(requests.Session):
    """Decodes only what comes encoded unasked, and leaves redirects alone (requests would read their bodies whole)."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False  # it would also send the credentials in ~/.netrc
        self.headers["Accept-Encoding"] = "identity"  # images are compressed already
        adapter = _Adapter(pool_connections=2, pool_maxsize=1)  # few sockets stay open: macOS grants 256 to a process
        self.mount("http://", adapter)
        self.mount("https://", adapter)

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _Adapter(HTTPAdapter):
    """requests' own, with connections that obey the thread's attempt."""

    def get_connection_with_tls_context(self, request: Any, verify: Any, proxies: Any = None, cert: Any = None) -> Any:
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies=proxies, cert=cert)
        if not issubclass(pool.ConnectionCls, Timed):
            # A proxy is the user's choice wherever it is; the addresses behind it are the proxy's to check.
            rules = Timed if select_proxy(request.url, proxies) else Checked
            pool.ConnectionCls = _with_rules(rules, pool.ConnectionCls)
        return pool


@functools.cache
def _with_rules(rules: type, connection: type) -> type:
    return type(f"{rules.__name__}{connection.__name__}", (rules, connection), {})
