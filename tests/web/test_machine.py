"""utils/web/machine.py: when a failure is this machine's fault, and when it never is."""

from __future__ import annotations

import dataclasses
import errno
import socket

import pytest

from utils.errors import ImageError, UserError
from utils.web import machine
from utils.web.download import DownloadLimits, fetch
from utils.web.machine import Suspects

LIMITS = DownloadLimits(timeout_s=1.0, attempts=1, max_bytes=1_000_000, allow_local=False, respect_noai=True)
NO_ANSWER = ImageError("connection", "no name server answered: Temporary failure in name resolution")


@pytest.fixture
def quick_to_suspect(monkeypatch):
    monkeypatch.setattr(machine, "MIN_SUSPECTS", 3)
    monkeypatch.setattr(machine, "MIN_SUSPECTS_S", 0)
    monkeypatch.setattr(machine, "_has_route", lambda _: True)  # also where the tests run without a network


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "no name server answered: Temporary failure"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "no route: Network is unreachable"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
    ],
)
def test_what_a_machine_without_network_would_see_is_named(monkeypatch, error, detail):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(ImageError) as failed:
        fetch("http://photos.example/x.jpg", LIMITS)
    assert str(failed.value) == f"connection: {detail}"


@pytest.mark.parametrize(("address", "prefix"), [("8.8.8.8", "no route: "), ("10.1.2.3", "")])
def test_a_host_of_ones_own_network_that_is_off_is_no_sign_of_a_network_that_is_down(monkeypatch, address, prefix):
    def fail(*_):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr(socket, "socket", type("Socket", (socket.socket,), {"connect": fail}))
    with pytest.raises(ImageError) as failed:
        fetch(f"http://{address}/x.jpg", dataclasses.replace(LIMITS, allow_local=True))
    assert str(failed.value) == f"connection: {prefix}No route to host"


def test_a_network_that_is_down_ends_the_run_after_failures_in_a_row(quick_to_suspect, monkeypatch):
    def no_answer(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_answer)
    suspects = Suspects[int]()
    assert suspects.add(0, None) == [0]
    assert suspects.add(1, NO_ANSWER) == suspects.add(2, NO_ANSWER) == []
    with pytest.raises(UserError, match=r"^3 downloads in a row failed: .*(no name server answers|no route)"):
        suspects.add(3, NO_ANSWER)


def test_dead_hosts_never_end_the_run_while_a_name_server_answers(quick_to_suspect, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    suspects = Suspects[int]()
    passed = [suspects.add(number, NO_ANSWER) for number in range(6)]
    assert passed == [[], [], [0, 1, 2], [], [], [3, 4, 5]]


def test_anything_else_in_between_acquits_the_machine(quick_to_suspect):
    suspects = Suspects[int]()
    assert suspects.add(0, NO_ANSWER) == suspects.add(1, NO_ANSWER) == []
    assert suspects.add(2, ImageError("connection", "Connection refused")) == [0, 1, 2]
    assert suspects.add(3, NO_ANSWER) == suspects.add(4, NO_ANSWER) == []
    assert suspects.add(5, None) == [3, 4, 5]
    assert suspects.add(6, NO_ANSWER) == []
    assert suspects.release() == [6]  # too few to say


def test_failures_in_a_row_are_counted_on_where_results_are_awaited_in_blocks(quick_to_suspect, monkeypatch):
    monkeypatch.setattr(machine, "machine_fault", lambda: "no name server answers")
    suspects = Suspects[int]()
    assert suspects.add(0, NO_ANSWER) == suspects.add(1, NO_ANSWER) == []
    assert suspects.release() == [0, 1]
    with pytest.raises(UserError, match="3 downloads in a row failed"):
        suspects.add(2, NO_ANSWER)


def test_decoders_without_memory_end_the_run_only_where_the_machine_has_none(quick_to_suspect, monkeypatch):
    error = ImageError("bad_image", "JPEG: not enough memory")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    suspects = Suspects[int]()
    assert [suspects.add(number, error) for number in range(3)] == [[], [], [0, 1, 2]]
    monkeypatch.setattr(machine, "DECODER_BYTES", 1 << 60)
    assert suspects.add(3, error) == suspects.add(4, error) == []
    with pytest.raises(UserError, match="3 downloads in a row failed: no memory is left"):
        suspects.add(5, error)
