"""Main images and their nearest: drawn in blocks, ahead of the directories that are being made of them.

What is drawn depends on what came of the groups before, never on when it came: a block is drawn as if those in hand
were already made, and AHEAD blocks at most are in hand. So 64 connections, a single one, and a run that was killed
and resumed all come to the same directories.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from utils.annotation.neighbors import Neighbors

BLOCK = 32  # groups drawn at a time: one matrix product for all, 32 x N x 4 bytes
AHEAD = 4  # blocks in hand, so that one slow host does not stop the others


@dataclass(frozen=True)
class Group:
    """A main image and its nearest, as rows of the collection."""

    main: int
    neighbors: Neighbors

    @property
    def rows(self) -> list[int]:
        return [self.main, *self.neighbors.rows]


class Groups:
    """Draws groups whose main image is in no other group. A group that fails gives its neighbors back.

    draw: begins to yield rows in the order to be tried; called again when it ended and rows came back meanwhile.
    allowed: (N,) bool, kept up to date: which rows may become main images now.
    repeats: `draw` alone decides, though a row is not allowed or was shown (the user asked for exactly these).
    """

    def __init__(
        self,
        draw: Callable[[], Iterator[int]],
        find: Callable[[Sequence[int]], list[Neighbors]],
        allowed: np.ndarray,
        repeats: bool = False,
    ) -> None:
        self._draw, self._find, self._allowed, self._repeats = draw, find, allowed, repeats
        self._drawing = draw()
        self._untried = allowed.copy()
        self._tried: set[int] = set()
        self._n_shown = np.zeros(len(allowed), np.int32)  # groups that show a row
        self._gave_back = False

    def take(self, n: int) -> list[Group]:
        """Up to n groups; fewer if some show each other's main image; none if no row is left."""
        mains = self._take_rows(1 if self._repeats else min(n, BLOCK))
        groups = []
        for main, neighbors in zip(mains, self._find(mains) if mains else []):
            if self._n_shown[main] and not self._repeats:
                continue  # a group of this very block shows it
            group = Group(main, neighbors)
            self._tried.add(main)
            self._untried[main] = False
            self._count(group, 1)
            groups.append(group)
        return groups

    def fail(self, group: Group) -> None:
        """The main image cannot be shown: it is not tried again, and its neighbors are not shown by it."""
        self._count(group, -1)
        self._gave_back = True

    def _take_rows(self, n: int) -> list[int]:
        rows: list[int] = []
        while len(rows) < n:
            row = next(self._drawing, None)
            if row is not None:
                if row not in self._tried and row not in rows and (self._repeats or self._allowed[row]):
                    rows.append(row)
            elif self._gave_back:
                self._drawing, self._gave_back = self._draw(), False
            else:
                break
        return rows

    def _count(self, group: Group, change: int) -> None:
        rows = np.asarray(group.rows)
        self._n_shown[rows] += change
        self._allowed[rows] = self._untried[rows] & (self._n_shown[rows] == 0)


def make_groups(groups: Groups, n: int, start: Callable[[Group], Callable[[], bool]]) -> int:
    """Make n groups, or as many as there are. Returns how many.

    `start` begins with one and returns a function that completes it and says whether it could be made; these are called
    in the order of drawing.
    """
    in_hand: collections.deque[list[tuple[Group, Callable[[], bool]]]] = collections.deque()
    n_made = 0
    while True:
        n_missing = n - n_made - sum(map(len, in_hand))
        block = groups.take(n_missing) if n_missing > 0 and len(in_hand) < AHEAD else []
        if block:
            in_hand.append([(group, start(group)) for group in block])
        elif in_hand:
            for group, complete in in_hand.popleft():
                if complete():
                    n_made += 1
                else:
                    groups.fail(group)
        else:
            return n_made
