"""Draw groups (main images with their neighbors) in blocks, ahead of making their directories.

Draws depend on the outcomes of earlier groups, but not on their timing. A block is drawn as if all pending groups will
succeed, and at most AHEAD blocks are pending. So 64 connections, one connection, and a run that was killed and resumed
make the same directories.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from utils.annotation.neighbors import Neighbors

BLOCK = 32  # groups drawn at a time: one matrix product for all, 32 x N x 4 bytes
AHEAD = 4  # pending blocks: one slow host must not stop the others


@dataclass(frozen=True)
class DrawnGroup:
    """A main image and its neighbors, as rows of the collection."""

    main: int
    neighbors: Neighbors

    @property
    def rows(self) -> list[int]:
        return [self.main, *self.neighbors.rows]


class Groups:
    """Draws groups whose main image is in no other group. The neighbors of a failed group can be drawn again.

    draw: returns an iterator of rows in the order to try; called again after its end if a group failed meanwhile.
    allowed: (N,) bool, updated in place: rows that may become main images now.
    repeats: draw every row, even if it is not allowed or was shown, because the user named it.
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
        self._may_be_main = allowed.copy()
        self._tried: set[int] = set()
        self._n_shown = np.zeros(len(allowed), np.int32)  # groups that show a row, and 1 for a main image that failed
        self._gave_back = False

    def take(self, n: int) -> list[DrawnGroup]:
        """Draw up to n groups: fewer if they show each other's main image, none if no row is left."""
        mains = self._take_rows(1 if self._repeats else min(n, BLOCK))
        groups = []
        for main, neighbors in zip(mains, self._find(mains) if mains else []):
            if self._n_shown[main] and not self._repeats:
                continue  # a group of this block shows it
            group = DrawnGroup(main, neighbors)
            self._tried.add(main)
            self._count(group.rows, 1)
            groups.append(group)
        return groups

    def fail(self, group: DrawnGroup) -> None:
        """Note that the main image could not be loaded: it is not tried again, and its neighbors become available."""
        self._count(group.neighbors.rows, -1)
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

    def _count(self, rows: list[int], change: int) -> None:
        self._n_shown[rows] += change
        self._allowed[rows] = self._may_be_main[rows] & (self._n_shown[rows] == 0)


def make_groups(groups: Groups, n: int, start: Callable[[DrawnGroup], Callable[[], bool]]) -> Iterator[DrawnGroup]:
    """Make n groups, or as many as can be drawn. Yields each group that succeeds.

    `start` begins a group and returns a function that completes it and returns whether it succeeded. These functions
    are called in the order of drawing.
    """
    pending: collections.deque[list[tuple[DrawnGroup, Callable[[], bool]]]] = collections.deque()
    n_made = 0
    while True:
        n_missing = n - n_made - sum(map(len, pending))
        if block := groups.take(n_missing) if n_missing > 0 and len(pending) < AHEAD else []:
            pending.append([(group, start(group)) for group in block])
            continue
        if not pending:
            return
        for group, complete in pending.popleft():
            if complete():
                n_made += 1
                yield group
            else:
                groups.fail(group)
