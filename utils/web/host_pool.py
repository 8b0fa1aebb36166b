"""Threads that work for hosts, in fair turns; one that hangs does not keep a script from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from utils.web.host_queue import HostQueue

T = TypeVar("T")


class HostPool(Generic[T]):
    """n_threads daemon threads; at most `per_host` of them (0: any number) work for one host at once."""

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
        """Begin nothing more. What has begun is not waited for."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._take()) is not None:
            host, work, future = job
            try:
                future.set_result(work())
            except BaseException as error:  # it belongs to whoever waits for the result
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
