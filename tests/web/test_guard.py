"""utils/web/guard.py: the addresses that a request may reach, the proxy that it uses, and its time limit."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import socket
import socketserver
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.fault_server import CERTIFICATE, FaultServer
from utils.errors import ImageError, UserError
from utils.web.download import DownloadLimits, fetch
from utils.web.guard import behind_proxy, literal_scope, scope
from utils.web.machine import machine_fault

PUBLIC_IP = "93.184.215.14"  # no test connects to it: patched_net stands in between
OPEN = DownloadLimits(timeout_s=1.0, attempts=1, max_bytes=1_000_000, allow_local=True, respect_noai=True)
SHUT = DownloadLimits(timeout_s=1.0, attempts=1, max_bytes=1_000_000, allow_local=False, respect_noai=True)


@pytest.fixture(scope="module")
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture(scope="module")
def tls_server():
    with FaultServer(tls=True) as running:
        yield running


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def names(monkeypatch):
    """Names that resolve as a test says: names["photos.example"] = [[answers to the first look-up], [second], ...]."""
    table: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in table:
            return real(host, port, *args, **kwargs)
        answers = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return table


@pytest.fixture
def faked_public(monkeypatch):
    """PUBLIC_IP is answered by this machine, and says so or not: faked_public(peer)."""

    def fake(peer: str | None) -> None:
        class Socket(socket.socket):
            asked = ""

            def connect(self, address):
                self.asked = address[0]
                if self.asked == PUBLIC_IP and peer is None:
                    raise ConnectionRefusedError(111, "Connection refused")
                super().connect(("127.0.0.1", address[1]))

            def getpeername(self):
                return (peer if self.asked == PUBLIC_IP else self.asked, 80)

        monkeypatch.setattr(socket, "socket", Socket)

    return fake


def reason(url: str, limits: DownloadLimits = SHUT) -> str:
    try:
        fetch(url, limits).close()
    except ImageError as error:
        return error.reason
    return "fetched"


# --- addresses --------------------------------------------------------------------------------------------------------


FORBIDDEN = (
    *("169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:169.254.169.254"),
    *("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "0.0.0.0", "0.1.2.3"),
    *("::", "224.0.0.1", "ff02::1", "240.0.0.1", "255.255.255.255"),
    *("198.18.0.1", "203.0.113.1", "2001:db8::1", "2001::1", "4000::1"),
    *("::7f00:1", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "64:ff9b:1::1"),
)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *[(address, "public") for address in ("8.8.8.8", PUBLIC_IP, "2606:2800:21f:cb07::1", "64:ff9b::808:808")],
        *[(address, "private") for address in ("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1")],
        *[(address, "private") for address in ("100.64.0.1", "::1", "fd12::1", "fec0::1", "::ffff:127.0.0.1")],
        *[(address, "private") for address in ("64:ff9b::7f00:1", "2002:7f00:1::")],
        *[
            (address, "forbidden")
            for address in ("169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:169.254.169.254")
        ],
        *[
            (address, "forbidden")
            for address in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "0.0.0.0", "0.1.2.3")
        ],
    ],
)
def test_addresses_are_public_private_or_forbidden(address, expected):
    assert scope(address) == expected


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "a.localhost", "127.1", "2130706433", "0x7f000001", "::1"])
def test_this_machine_is_known_in_every_spelling(host):
    assert literal_scope(host) == "private"


def test_a_name_has_no_scope_of_its_own():
    assert literal_scope("photos.example") is None


# --- what may be connected to -----------------------------------------------------------------------------------------


def test_local_addresses_are_refused_unless_allowed(server):
    hits = server.hits["ok"]
    assert reason(server.url("ok")) == "blocked_address"
    assert server.hits["ok"] == hits
    assert reason(server.url("ok"), OPEN) == "fetched"


def test_a_name_that_resolves_to_a_local_address_is_refused_unless_allowed(server, names):
    names["photos.example"] = [["127.0.0.1"]]
    url = f"http://photos.example:{server.port}/ok"
    assert reason(url) == "blocked_address"
    assert reason(url, OPEN) == "fetched"


def test_link_local_is_refused_though_local_is_allowed(names):
    names["metadata.example"] = [["169.254.169.254"]]
    for host in ("169.254.169.254", "metadata.example", "[fe80::1]", "0.0.0.0", "224.0.0.1", "2852039166"):
        assert reason(f"http://{host}/", OPEN) == "blocked_address", host


def test_a_resolver_that_answers_public_first_and_private_second_is_refused(server, names, faked_public):
    hits = server.hits["ok"]
    faked_public(None)
    names["rebind.example"] = [[PUBLIC_IP], ["127.0.0.1"]]
    url = f"http://rebind.example:{server.port}/ok"
    assert [reason(url), reason(url)] == ["connection", "blocked_address"]
    names["both.example"] = [[PUBLIC_IP, "127.0.0.1"]]
    assert reason(f"http://both.example:{server.port}/ok") == "blocked_address"
    assert server.hits["ok"] == hits
    assert reason(f"http://both.example:{server.port}/ok", OPEN) == "fetched"  # the list itself names it


def test_the_address_of_the_connected_socket_decides_before_a_byte_is_sent(server, names, faked_public):
    requests = len(server.requests)
    faked_public("127.0.0.1")
    names["photos.example"] = [[PUBLIC_IP]]
    assert reason(f"http://photos.example:{server.port}/ok") == "blocked_address"
    assert len(server.requests) == requests


def test_a_public_server_cannot_redirect_to_a_local_one_even_if_local_is_allowed(names, faked_public):
    with FaultServer() as server:
        faked_public(PUBLIC_IP)
        names["photos.example"] = [[PUBLIC_IP]]
        url = f"http://photos.example:{server.port}/redirect_once"
        assert reason(url, OPEN) == "fetched"  # public to public
        hits = server.hits["ok"]
        url = f"http://photos.example:{server.port}/redirect_to_location"
        server.location = f"http://127.0.0.1:{server.port}/ok"
        assert reason(url, OPEN) == "blocked_address"
        names["inside.example"] = [["127.0.0.1"]]
        server.location = f"http://inside.example:{server.port}/ok"
        assert reason(url, OPEN) == "blocked_address"
        assert server.hits["ok"] == hits


def test_a_connection_kept_open_obeys_the_rules_of_the_next_request(names):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        connections = set()

        def do_GET(self):
            self.connections.add(self.client_address)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        names["photos.example"] = [["127.0.0.1"]]
        url = f"http://photos.example:{server.server_address[1]}/"
        assert [reason(url, OPEN), reason(url, OPEN), reason(url, SHUT)] == ["fetched", "fetched", "blocked_address"]
        assert len(Handler.connections) == 1
        server.shutdown()


# --- proxies, certificates, credentials -------------------------------------------------------------------------------


def test_a_loopback_proxy_works_though_local_addresses_are_refused(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@127.0.0.1:{server.port}")
    assert behind_proxy()
    assert reason("http://photos.example/ok") == "fetched"
    assert (
        "http://photos.example/ok" in server.requests[-1]
        and "proxy-authorization: basic" in server.requests[-1].lower()
    )
    for url in ("http://127.0.0.1/ok", "http://169.254.169.254/ok", "http://localhost/ok"):
        assert reason(url) == "blocked_address"
    monkeypatch.setenv("NO_PROXY", "photos.example")
    assert reason("http://photos.example/ok") == "connection"  # asked of DNS, where it does not exist


def test_all_proxy_works_and_https_goes_through_its_tunnel(server, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    assert reason("https://photos.example/ok") == "fetched"
    assert server.requests[-2].startswith("CONNECT photos.example:443")
    assert reason("https://photos.example/slow_body") == "timeout"


def relay(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)


def test_an_https_proxy_works_with_the_certificates_of_the_user(tls_server, monkeypatch):
    """TLS inside TLS: urllib3's socket of such a tunnel has no peer address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    class Tunnel(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with context.wrap_socket(self.request, server_side=True) as client, contextlib.suppress(OSError):
                while not client.recv(65_536).endswith(b"\r\n\r\n"):
                    pass
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                with socket.create_connection(("127.0.0.1", tls_server.port)) as target:
                    threading.Thread(target=relay, args=(client, target), daemon=True).start()
                    relay(target, client)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        proxy.daemon_threads, proxy.block_on_close = True, False
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"https://127.0.0.1:{proxy.server_address[1]}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
        assert reason("https://photos.example/ok") == "fetched"
        proxy.shutdown()


def test_a_redirect_behind_a_proxy_to_a_local_literal_is_refused(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.port}")
    server.location = "http://127.0.0.1/ok"
    assert reason("http://photos.example/redirect_to_location", OPEN) == "blocked_address"


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://", "gopher://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_this_machines_fault(monkeypatch, proxy):
    if proxy.startswith("socks") and importlib.util.find_spec("socks"):
        pytest.skip("PySocks is there")
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match="ALL_PROXY cannot be used"):
        fetch("http://photos.example/ok", SHUT)


def test_a_proxy_that_refuses_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "127.0.0.1:1")
    with pytest.raises(ImageError, match="connection: proxy not reached: Connection refused"):
        fetch("http://photos.example/ok", SHUT)
    assert "does not answer" in machine_fault()


def test_no_proxy_no_talk_of_one():
    assert not behind_proxy()


def test_an_unknown_certificate_fails_and_a_ca_bundle_heals_it(tls_server, monkeypatch):
    with pytest.raises(ImageError, match=r"tls: .*certificate"):
        fetch(tls_server.url("ok"), OPEN)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    assert reason(tls_server.url("ok"), OPEN) == "fetched"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE) + ".missing")
    with pytest.raises(UserError, match="REQUESTS_CA_BUNDLE"):
        fetch(tls_server.url("ok"), OPEN)


def test_tls_keeps_the_same_deadline(server, tls_server, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        never_shakes_hands = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        urls = [tls_server.url("slow_headers"), tls_server.url("slow_body"), never_shakes_hands]
        assert list(pool.map(reason, urls, [OPEN] * 3)) == ["timeout"] * 3
    assert time.monotonic() - start < 3


def test_credentials_come_from_the_url_only(server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert reason(server.url("ok"), OPEN) == "fetched"
    assert "Authorization" not in server.requests[-1]
    assert reason(server.url("ok").replace("//", "//user:p%40ss@"), OPEN) == "fetched"
    assert "Authorization: Basic dXNlcjpwQHNz" in server.requests[-1]  # user:p@ss


def test_the_user_agent_is_honest(server):
    assert reason(server.url("ok"), OPEN) == "fetched"
    assert "User-Agent: retrieval_ann (image-similarity annotation) python-urllib3/" in server.requests[-1]
