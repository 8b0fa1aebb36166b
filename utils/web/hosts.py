"""Fair scheduling among hosts: a slow host never delays the others."""

from __future__ import annotations

import collections
import heapq
import itertools
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class HostQueue(Generic[T]):
    """Waiting jobs. Next is a job of the host with the fewest jobs in flight or, if equal, of the longest waiting host.

    At most `per_host` jobs of a host are in flight at once (0: no limit). Each call costs O(log hosts).
    """

    def __init__(self, per_host: int) -> None:
        self._limit = per_host or float("inf")
        self._waiting: dict[Hashable, collections.deque[T]] = {}
        self._in_flight: collections.Counter[Hashable] = collections.Counter()
        # (in flight when pushed, turn, host), one per waiting host below the limit
        self._heap: list[tuple[int, int, Hashable]] = []
        self._turn = itertools.count()
        self._size = 0

    def __len__(self) -> int:
        """Number of waiting jobs."""
        return self._size

    def put(self, host: Hashable, job: T) -> None:
        if host not in self._waiting:
            self._waiting[host] = collections.deque()
            self._line_up(host)
        self._waiting[host].append(job)
        self._size += 1

    def take(self) -> T | None:
        """The next job, counted as in flight until done() is called for its host; None if none may start now."""
        while self._heap:
            counted, _, host = heapq.heappop(self._heap)
            if counted != self._in_flight[host]:  # it has fewer now than when it was pushed
                self._line_up(host)
                continue
            job = self._waiting[host].popleft()
            self._in_flight[host] += 1
            self._size -= 1
            if not self._waiting[host]:
                del self._waiting[host]
            self._line_up(host)
            return job
        return None

    def done(self, host: Hashable) -> None:
        """Note that a job of this host is no longer in flight."""
        self._in_flight[host] -= 1
        if not self._in_flight[host]:
            del self._in_flight[host]
        if self._in_flight[host] == self._limit - 1:
            self._line_up(host)

    def _line_up(self, host: Hashable) -> None:
        if host in self._waiting and self._in_flight[host] < self._limit:
            heapq.heappush(self._heap, (self._in_flight[host], next(self._turn), host))


class HostPool(Generic[T]):
    """Up to `n_threads` daemon threads that run jobs from a HostQueue, at most `per_host` (0: no limit) for one host.

    Not a ThreadPoolExecutor, because the interpreter joins its threads at exit: one silent server delayed the exit of a
    script by 30 s (two attempts of 15 s).
    """

    def __init__(self, n_threads: int, per_host: int) -> None:
        self._waiting: HostQueue[tuple[str, Callable[[], T], Future[T]]] = HostQueue(per_host)
        self._changed = threading.Condition()
        self._is_open = True
        self._n_threads, self._threads = n_threads, 0

    def submit(self, host: str, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._changed:
            self._waiting.put(host, (host, work, future))
            if self._threads < self._n_threads:
                self._threads += 1
                threading.Thread(target=self._run, daemon=True).start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Start no more jobs. Does not wait for running jobs."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._take()) is not None:
            host, work, future = job
            try:
                future.set_result(work())
            except BaseException as error:  # for the caller of future.result()
                future.set_exception(error)
            with self._changed:
                self._waiting.done(host)
                self._changed.notify()

    def _take(self) -> tuple[str, Callable[[], T], Future[T]] | None:
        with self._changed:
            while self._is_open:
                if job := self._waiting.take():
                    return job
                self._changed.wait()
        return None
