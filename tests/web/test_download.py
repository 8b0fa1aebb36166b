"""utils/web/download.py against a server that does everything wrong, and lists with all kinds of URLs."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import email.utils
import os
import pickle
import re
import socket
import time
import urllib.parse

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.faults.fault_server import FAULTS, STORED, FaultServer, photo
from utils.errors import REASONS, ImageError, UserError, is_temporary
from utils.images.decode import decode
from utils.web import download, urls
from utils.web.download import DownloadLimits, fetch

LIMITS = DownloadLimits(timeout_s=1.0, attempts=2, max_bytes=3_000_000, allow_local=True, respect_noai=True)


@pytest.fixture(scope="module")
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that would have been waited before retries."""
    waited: list[float] = []
    monkeypatch.setattr(download, "sleep", waited.append)
    return waited


def outcome(url: str, limits: DownloadLimits = LIMITS) -> str:
    try:
        with fetch(url, limits) as file:
            decode(file, 100_000_000)
            return STORED
    except ImageError as error:
        return error.reason


def test_every_fault_has_its_outcome_and_ends_in_time():
    limits = dataclasses.replace(LIMITS, timeout_s=2)  # time for a busy machine to do what is no fault
    start = time.monotonic()
    with FaultServer() as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        ended = pool.map(lambda name: outcome(server.url(name), limits), FAULTS)
        assert dict(zip(FAULTS, ended)) == FAULTS
    assert time.monotonic() - start < 25


def test_attempts_share_the_time_that_is_promised(server, waits):
    """At most attempts x (timeout + 30 s): each attempt ends at its deadline, each wait is 30 s or less."""
    limits = dataclasses.replace(LIMITS, timeout_s=0.3)
    start = time.monotonic()
    for name in ("slow_headers", "slow_body", "endless_continue", "silent"):
        assert outcome(server.url(name), limits) == "timeout"
    assert time.monotonic() - start < 4 * (2 * 0.3 + 0.3)
    assert len(waits) == 4 and max(waits) <= 30


def test_only_what_can_heal_is_tried_again(server):
    tries = {"forbidden": 1, "gone": 1, "not_found": 1, "noai": 1, "html_as_jpeg": 1, "redirect_nowhere": 1}
    tries |= {"retry_after_86400": 1, "declared_too_large": 1, "gzip_bomb": 1, "not_gzip": 1}
    tries |= {"always_500": 3, "always_429": 3, "reset": 3, "length_too_long": 3, "silent": 3}
    server.hits.clear()
    for name in tries:
        outcome(server.url(name), dataclasses.replace(LIMITS, attempts=3, timeout_s=0.2))
    assert dict(server.hits) == tries


def test_a_number_of_attempts_that_is_not_whole_ends_too(server, waits):
    server.hits.clear()
    outcome(server.url("always_500"), dataclasses.replace(LIMITS, attempts=1.5))
    assert server.hits["always_500"] == 2


def test_retry_after_is_waited_for_and_backoff_grows_with_jitter(server, waits):
    server.hits.clear()
    assert outcome(server.url("retry_after_2")) == STORED
    assert waits == [2]
    waits.clear()
    outcome(server.url("always_500"), dataclasses.replace(LIMITS, attempts=4))
    assert [low <= wait <= 3 * low for low, wait in zip((0.25, 0.5, 1.0), waits)] == [True] * 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5", 5), (" 12 ", 12), ("", 0), ("soon", 0), ("-3", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("9" * 5000, 0)],
)
def test_retry_after_is_seconds_or_a_date(server, waits, value, seconds):
    server.retry_after = value
    assert outcome(server.url("retry_after")) == "http_status"
    (waited,) = waits
    assert waited == seconds if seconds else 0.25 <= waited <= 0.75


def test_a_server_that_wants_a_longer_wait_is_left_alone(server, waits):
    for value in ("120", "9" * 40, email.utils.formatdate(time.time() + 100, usegmt=True)):
        server.retry_after = value
        assert outcome(server.url("retry_after")) == "rate_limited"
    assert not waits
    server.retry_after = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert outcome(server.url("retry_after")) == "http_status"
    assert 15 < waits[0] <= 20


def test_details_say_what_happened(server):
    details = {
        "gone": "http_status: 410 Gone",
        "always_500": "http_status: 500 Internal Server Error",
        "retry_after_86400": "rate_limited: 429 Too Many Requests, asked to wait 86400 s",
        "reset": "connection: Connection reset by peer",
        "length_too_long": "1000 more expected",
        "redirect_to_file": "bad_redirect: to 'file:///etc/hosts'",
        "silent": "timeout: not complete after 0.4 s",
        "brotli_unasked": "bad_image: content encoding",
    }
    for name, detail in details.items():
        with pytest.raises(ImageError) as error:
            fetch(server.url(name), dataclasses.replace(LIMITS, timeout_s=0.4))
        assert detail in str(error.value) or os.name == "nt"
        assert is_temporary(error.value.reason, error.value.detail) == (
            name in ("always_500", "reset", "silent", "length_too_long", "retry_after_86400")
        )


def test_noai_is_fetched_where_it_is_not_respected(server):
    assert outcome(server.url("noai"), dataclasses.replace(LIMITS, respect_noai=False)) == STORED


def test_a_large_body_goes_to_disk_and_a_body_at_the_limit_passes(server):
    size = len(photo())
    assert outcome(server.url("ok"), dataclasses.replace(LIMITS, max_bytes=size)) == STORED
    assert outcome(server.url("ok"), dataclasses.replace(LIMITS, max_bytes=size - 1)) == "too_large"
    assert outcome(server.url("in_chunks"), dataclasses.replace(LIMITS, max_bytes=size - 1)) == "too_large"


def test_many_threads_at_once(server):
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        outcomes = list(pool.map(outcome, [server.url("ok"), server.url("gone")] * 64))
    assert outcomes == [STORED, "http_status"] * 64


def test_limits_travel_to_another_process():
    assert pickle.loads(pickle.dumps(LIMITS)) == LIMITS


def test_whatever_head_comes_the_outcome_is_a_reason(server):
    limits = dataclasses.replace(LIMITS, attempts=1, timeout_s=0.3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        outcomes = set(pool.map(outcome, [server.url("mutated")] * 300, [limits] * 300))
    assert {STORED, "connection", "http_status", "bad_redirect"} <= outcomes <= {STORED, *REASONS}


# --- what a list may hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "requested"),
    [
        ("{}/ok", "/ok"),
        ("  {}/ok\n", "/ok"),
        ("{}/a b.jpg", "/a%20b.jpg"),
        ("{}/a%20b.jpg", "/a%20b.jpg"),
        ("{}/50%.jpg?x=%zz&y=%41", "/50%.jpg?x=%zz&y=%41"),
        ("{}/%7Edmb/%c3%a9%C3%A9/[1];v=1?sig=%7Ex%2F+[2]", "/%7Edmb/%c3%a9%C3%A9/[1];v=1?sig=%7Ex%2F+[2]"),
        ("{}//key//a", "//key//a"),
        ("{}/a/%2e%2E/b/./c/..", "/b/"),
        ("{}//a/../b?c/../d", "//b?c/../d"),
        ('{}/`{{}}"<>\x7f?`{{}}\'"<>\x7f', "/%60%7B%7D%22%3C%3E%7F?`{}%27%22%3C%3E%7F"),
        ("{}/köln/猫.jpg?q=ü", "/k%C3%B6ln/%E7%8C%AB.jpg?q=%C3%BC"),
        ("{}/ok#fragment?not a query", "/ok"),
        ("{}?size=1", "/?size=1"),
        ("{}\\ok", "/ok"),
        ("{}/o\tk", "/ok"),
        ("{}/a|b^c[d]?e|f^g", "/a%7Cb%5Ec[d]?e|f^g"),
    ],
)
def test_urls_are_requested_as_a_browser_would(server, written, requested):
    base = server.url("")[:-1]
    for start in (base, base.replace("http", "HTTP"), base.replace("//", "/"), base.replace("//", "\\\\")):
        outcome(written.format(start), LIMITS)
        assert server.requests[-1].split(" ")[1] == requested


@pytest.mark.parametrize(
    ("host", "requested"),  # as Chromium's URL() gives them
    [
        *[("BÜCHER.example:80", "xn--bcher-kva.example"), ("例え.テスト", "xn--r8jz45g.xn--zckzah")],
        *[("i❤.ws", "xn--i-7iq.ws"), ("💩.la:8080", "xn--ls8h.la:8080"), ("ＷＷＷ.ⓒⓞⓜ", "www.com"), ("a。b", "a.b")],
        *[("a%41.example", "aa.example"), ("a_b.example.", "a_b.example."), ("faß.de", "xn--fa-hia.de")],
        *[("0x7f.1", "127.0.0.1"), ("127.1.", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("[::0:1]", "[::1]")],
        *[("u:p@h", "u:p@h"), ("a@b@h", "a%40b@h"), ("h:", "h"), ("h:0443", "h:443")],
    ],
)  # fmt: skip
def test_hosts_are_asked_for_as_a_browser_would(host, requested):
    assert urls.http_url(f"http://{host}/") == f"http://{requested}/"


@pytest.mark.parametrize(
    ("location", "requested"),
    [
        *[("/caf\xe9", "/caf%E9"), ("/caf\xc3\xa9?\xe7", "/caf%C3%A9?%E7"), ("/caf\xc3\xa9", "/caf%C3%A9")],
        *[("ok", "/ok"), ("?q", "/redirect_to_location?q"), ("../x//y", "/x//y"), ("//{}//x", "//x")],
        *[("\\\\{}\\x", "/x"), ("http:x/%7e", "/x/%7e"), ("HTTP://{}/a b", "/a%20b"), ("/x#y", "/x"), ("/a:b", "/a:b")],
    ],
)  # fmt: skip
def test_redirects_lead_where_a_browser_would_go(server, location, requested):
    server.location = location.format(server.url("").split("/")[2])
    server.requests.clear()
    outcome(server.url("redirect_to_location"))
    assert server.requests[1].split(" ")[1] == requested


@pytest.mark.parametrize(
    "url",
    [
        *("", "   ", "http://", "http://#x", "http://?x", "http://user@/", "http://:80/", "//host/x.jpg", "http://h:0/"),
        *("http://h:65536/", "http://h:-1/", "http://h:x/", "http://[::1/", "http://[zz]/", "http://a b/", "http://*.x/"),
        *("http://.x/", "http://x..y/", "http://\ud800/", "http://\x00/", "http://" + "a" * 64 + ".com/"),
        *("http://h/" + "x" * 70_000, "ftp://h/x", "javascript:alert(1)", "gopher://h", "mailto:x@y", "blob:http://h/x"),
        *("data:", "data:image/png", "data:;base64,A", "file://server/x.jpg", "file://[::1", "localhost:80/x"),
    ],
)  # fmt: skip
def test_what_cannot_be_requested_is_a_bad_url(url):
    assert outcome(url) == "bad_url"
    assert not urls.is_local(url) or url.startswith("file:")


@given(
    st.text(max_size=60)
    | st.text(max_size=40).map("http://127.0.0.1:1/".__add__)
    | st.text(max_size=40).map("data:".__add__)
)
@settings(max_examples=100, deadline=None)
def test_whatever_text_comes_the_error_is_an_image_error(text):
    assume(not re.match(r"\s*https?:[/\\]*[^/\\]*[^/\\0-9.:]", text, re.IGNORECASE))  # asks no name server
    outcome(text, dataclasses.replace(LIMITS, attempts=1, allow_local=False))
    outcome(text, dataclasses.replace(LIMITS, attempts=1))
    urls.is_local(text)


@pytest.mark.parametrize(
    "url",
    [
        *("http://localhost/x", "http://127.0.0.1:80/x", "HTTP://[::1]/x", "http://192.168.1.1/", "http://10.1/"),
        *("file:///x.jpg", "./photos/x.jpg", "../x.jpg", "/x.jpg", "C:\\photos\\x.jpg", "http://a.localhost/", "http://0x7f.1/x"),
    ],
)  # fmt: skip
def test_local_names_are_known_without_asking_anyone(url):
    assert urls.is_local(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://photos.example/x",
        "https://8.8.8.8/",
        "data:,x",
        "www.example.com/a.jpg",
        "photos/x.jpg",
        "localhost:80/x.jpg",
        "//localhost/x.jpg",
        "http://169.254.169.254/",
        "http://b\u00fccher.example/",
        "http://10.example/",
    ],
)
def test_others_are_not_local(url):
    assert not urls.is_local(url)


def test_data_urls(server):
    encoded = base64.b64encode(photo("PNG")).decode()
    shut = dataclasses.replace(LIMITS, allow_local=False)
    assert outcome(f"data:image/png;base64,{encoded}", shut) == STORED
    assert outcome(f"DATA:;base64,{urllib.parse.quote(encoded).rstrip('=')}", shut) == STORED
    assert outcome("data:image/png," + urllib.parse.quote_from_bytes(photo("PNG")), shut) == STORED
    assert outcome(f"data:image/png; base64 ,{encoded}", shut) == STORED
    assert outcome("data:,hello", shut) == "not_an_image"
    assert outcome(f"data:;base64,{encoded}", dataclasses.replace(shut, max_bytes=100)) == "too_large"


def test_files_in_and_below_a_named_folder_need_no_permission_and_no_others(tmp_path):
    inside, beside = tmp_path / "photos/deep/a.png", tmp_path / "photos of others/a.png"
    for path in (inside, beside):
        path.parent.mkdir(parents=True)
        path.write_bytes(photo())
    limits = dataclasses.replace(LIMITS, allow_local=False, folders=(str(tmp_path / "photos"),))
    assert [outcome(url, limits) for url in (str(inside), inside.as_uri())] == [STORED, STORED]
    for url in (str(beside), f"{tmp_path}/photos/../photos of others/a.png", beside.as_uri()):
        assert outcome(url, limits) == "blocked_address"
    listed = {"in": str(inside), "beside": str(beside), "gone": str(tmp_path / "photos/x.png"), "web": "http://x/a.png"}
    assert urls.find_files(listed, limits.folders) == {"in": inside}
    assert urls.find_files(listed, None) == {"in": inside, "beside": beside}


def test_files_are_read_where_local_is_allowed(tmp_path, monkeypatch):
    (tmp_path / "ä b.jpg").write_bytes(photo())
    monkeypatch.chdir(tmp_path)
    shut = dataclasses.replace(LIMITS, allow_local=False)
    for url in ("ä b.jpg", "./ä b.jpg", str(tmp_path / "ä b.jpg"), (tmp_path / "ä b.jpg").as_uri()):
        assert outcome(url) == STORED
        assert outcome(url, shut) == ("bad_url" if url == "ä b.jpg" else "blocked_address")
        assert outcome(url, dataclasses.replace(LIMITS, max_bytes=10)) == "too_large"
    assert outcome("./missing.jpg") == "bad_url"
    assert outcome(str(tmp_path)) == "bad_url"
    assert outcome("/nul\0.jpg") == "bad_url"


@pytest.mark.parametrize(
    "url", ["www.example.com/a.jpg", "missing.jpg", "localhost:80/a.jpg", "//h/a.jpg", "nul\0.jpg", "a" * 300, "photos"]
)
def test_what_has_no_scheme_and_is_no_file_is_said_to_have_no_scheme(url, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for allow_local in (True, False):
        with pytest.raises(ImageError) as error:
            fetch(url, dataclasses.replace(LIMITS, allow_local=allow_local))
        assert str(error.value) == "bad_url: no scheme"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_list_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert outcome(str(tmp_path / "pipe.jpg")) == "bad_url"


# --- faults of this machine -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(name: str, limit: int):
    resource = pytest.importorskip("resource")
    kind = getattr(resource, name)
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_full_folder_for_temporary_files_is_no_fault_of_the_image(server):
    with limited("RLIMIT_FSIZE", 1_000_000), pytest.raises(UserError, match="set TMPDIR to another folder"):
        fetch(server.url("large"), LIMITS)
    assert outcome(server.url("ok")) == STORED


def test_too_many_open_files_are_no_fault_of_the_image(server):
    with limited("RLIMIT_NOFILE", 200), contextlib.ExitStack() as opened:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                opened.enter_context(open(os.devnull))
        for url in (server.url("ok"), "http://photos.invalid/x.jpg"):
            with pytest.raises(UserError, match=r"ulimit -n.* DOWNLOAD_WORKERS"):
                fetch(url, LIMITS)


def test_no_memory_is_no_fault_of_the_image(server, monkeypatch):
    def fail(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match="no memory"):
        fetch(server.url("ok"), LIMITS)
