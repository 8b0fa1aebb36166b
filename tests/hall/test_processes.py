"""utils/processes.py: the results of a child process, and how its death is reported."""

from __future__ import annotations

import gc
import os
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest

from utils.errors import ImageError
from utils.processes import Child, DiedError, Progress, Workers


def count(n: int, progress: Progress) -> int:
    for number in range(n):
        progress(number)
    return n


def fail(_progress: Progress) -> None:
    raise ValueError("planted")


def die(_progress: Progress) -> None:
    os._exit(7)


def test_a_child_started_ahead_does_its_task_and_tells_its_progress():
    child, told = Child("json", "decimal"), list[int]()
    assert child.is_alive()
    assert child.call(count, 3, progress=told.append) == 3
    assert told == [0, 1, 2]
    assert not child.is_alive()


def test_what_a_task_raises_is_raised_and_a_death_has_its_exit_code():
    with pytest.raises(ValueError, match="planted"):
        Child().call(fail)
    with pytest.raises(DiedError, match="7"):
        Child().call(die)


def test_a_child_that_died_before_its_task_is_a_death_too():
    child = Child()
    child.kill()
    assert not child.is_alive()
    with pytest.raises(DiedError):
        child.call(count, 1)


def double(value: int) -> int:
    return 2 * value


def refuse() -> None:
    raise ImageError("bad_image", "odd")


def sleep(marker: str) -> None:
    open(marker, "x").close()
    time.sleep(600)


def test_workers_run_tasks_of_many_threads_and_raise_what_these_raise():
    with Workers(2, 60) as workers, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda value: workers.run(double, value), range(40))) == [2 * n for n in range(40)]
        with pytest.raises(ImageError, match="bad_image: odd"):
            workers.run(refuse)
        assert len({workers.run(os.getpid) for _ in range(9)} | {os.getpid()}) <= 3


def test_a_process_that_dies_or_hangs_costs_its_task_alone(tmp_path):
    with Workers(1, 60) as workers:
        with pytest.raises(DiedError, match="3"):
            workers.run(os._exit, 3)
        assert workers.run(double, 4) == 8
        workers.timeout_s = 0.01
        with pytest.raises(DiedError):
            workers.run(sleep, str(tmp_path / "marker"))


def break_off() -> None:
    """End within the message that has the result: its length, and not all of its bytes."""
    pipe = next(one for one in gc.get_objects() if isinstance(one, Connection) and one.writable and one.readable)
    os.write(pipe.fileno(), struct.pack("!i", 100) + b"not all")
    os._exit(5)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends messages whole")
def test_a_process_that_dies_within_a_message_costs_its_task_alone():
    with Workers(1, 60) as workers:
        with pytest.raises(DiedError, match="5"):
            workers.run(break_off)
        assert workers.run(double, 4) == 8


def test_a_process_whose_pipe_is_broken_costs_one_task(monkeypatch):
    """On Windows, poll() raises BrokenPipeError if the process died before."""
    with Workers(1, 60) as workers:
        assert workers.run(double, 4) == 8
        next(iter(workers._started)).kill()
        with monkeypatch.context() as patch, pytest.raises(DiedError):
            patch.setattr(Connection, "poll", lambda *_: open("pipe/ended"))
            workers.run(double, 4)
        assert workers.run(double, 4) == 8


def test_leaving_ends_the_tasks_that_run(tmp_path):
    marker, ended = tmp_path / "marker", []
    workers = Workers(1, 600)

    def run() -> None:
        with pytest.raises(DiedError):
            workers.run(sleep, str(marker))
        ended.append(True)

    with workers:
        thread = threading.Thread(target=run)
        thread.start()
        while not marker.exists():
            time.sleep(0.001)
    thread.join(30)
    assert ended
    with pytest.raises(DiedError):
        workers.run(double, 1)
