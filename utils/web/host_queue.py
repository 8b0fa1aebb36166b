"""What to fetch next, so that one slow host never holds up the others."""

from __future__ import annotations

import collections
import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class HostQueue(Generic[T]):
    """Jobs by host; the next one is of the host with the fewest in flight, the longest waiting first.

    At most `per_host` of a host are in flight at once (0: no limit). Each call costs O(log hosts).
    """

    def __init__(self, per_host: int) -> None:
        self._limit = per_host or float("inf")
        self._waiting: dict[Hashable, collections.deque[T]] = {}
        self._in_flight: collections.Counter[Hashable] = collections.Counter()
        self._heap: list[tuple[int, int, Hashable]] = []  # (in flight when pushed, turn, host), one per waiting host
        self._turn = itertools.count()
        self._parked: set[Hashable] = set()  # hosts that wait, and are at the limit
        self._size = 0

    def __len__(self) -> int:
        """Jobs that wait."""
        return self._size

    def put(self, host: Hashable, job: T) -> None:
        if host not in self._waiting:
            self._waiting[host] = collections.deque()
            self._push(host)
        self._waiting[host].append(job)
        self._size += 1

    def take(self) -> T | None:
        """The next job, counted as in flight until done() is called for its host; None if none may start now."""
        while self._heap:
            counted, _, host = heapq.heappop(self._heap)
            if counted != self._in_flight[host]:  # changed since it was pushed
                self._push(host)
                continue
            if counted >= self._limit:
                self._parked.add(host)
                continue
            job = self._waiting[host].popleft()
            self._in_flight[host] += 1
            self._size -= 1
            if self._waiting[host]:
                self._push(host)
            else:
                del self._waiting[host]
            return job
        return None

    def done(self, host: Hashable) -> None:
        """A job of this host is no longer in flight."""
        self._in_flight[host] -= 1
        if not self._in_flight[host]:
            del self._in_flight[host]
        if host in self._parked:
            self._parked.remove(host)
            self._push(host)

    def _push(self, host: Hashable) -> None:
        heapq.heappush(self._heap, (self._in_flight[host], next(self._turn), host))
