"""utils/annotation/groups.py: draws depend on the outcomes of earlier groups, never on their timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from utils.annotation.groups import AHEAD, BLOCK, DrawnGroup, Groups, make_groups
from utils.annotation.neighbors import Neighbors

N = 400


def ring(mains: Sequence[int]) -> list[Neighbors]:
    """The two neighbors on each side, on a ring of N."""
    return [Neighbors([(main + step) % N for step in (1, -1, 2, -2)], [1.0] * 4, 0) for main in mains]


def in_order(allowed: np.ndarray, rows: Sequence[int]) -> Callable[[], Iterator[int]]:
    return lambda: (row for row in rows if allowed[row])


def exactly(rows: Sequence[int]) -> Callable[[], Iterator[int]]:
    return lambda: iter(rows)


def make(n: int, failing: set[int], rows: Sequence[int] = range(N), repeats: bool = False) -> list[int]:
    allowed = np.ones(N, bool)
    made: list[int] = []
    started: list[int] = []

    def start(group: DrawnGroup) -> Callable[[], bool]:
        started.append(group.main)
        assert len(started) - len(made) <= AHEAD * BLOCK + len(failing)

        def complete() -> bool:
            if group.main not in failing:
                made.append(group.main)
            return group.main not in failing

        return complete

    groups = Groups(exactly(rows) if repeats else in_order(allowed, rows), ring, allowed, repeats)
    assert [group.main for group in make_groups(groups, n, start)] == made
    assert len(started) == len(set(started)), "none is tried twice"
    return made


def test_a_main_image_is_in_no_other_group():
    assert make(5, set()) == [0, 3, 6, 9, 12]


def test_no_more_are_made_than_asked_for():
    assert len(make(BLOCK + 1, set())) == BLOCK + 1


def test_a_group_that_fails_gives_its_neighbors_back():
    assert make(3, set(), [0, 1, 200]) == [0, 200]
    assert make(3, {0}, [0, 1, 200]) == [200, 1]


def test_all_that_can_be_made_are_made_whatever_fails():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        failing = set(np.flatnonzero(rng.random(N) < share).tolist())
        made = make(N, failing, rng.permutation(N).tolist())
        shown = {row for main in made for row in [main, *ring([main])[0].rows]}
        assert set(range(N)) <= shown | failing, "a row that is left could have been a main image"


def test_none_allowed():
    assert make(3, set(range(N))) == []


def test_rows_that_the_user_named_may_have_been_shown():
    assert make(4, set(), [5, 6, 7, 6, 8], repeats=True) == [5, 6, 7, 8]


@pytest.mark.parametrize("n", [1, BLOCK, 100])
def test_the_first_groups_are_the_same_however_many_are_asked_for(n):
    assert make(n, set()) == make(120, set())[:n]
