"""utils/processes.py: what a child process gives back, and how its death is told."""

from __future__ import annotations

import os

import pytest

from utils.processes import Child, DiedError, Progress


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
    child._process.kill()
    child._process.join()
    assert not child.is_alive()
    with pytest.raises(DiedError):
        child.call(count, 1)
