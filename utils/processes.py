"""Child processes. Ctrl-C and SIGTERM often reach a whole process group; here the parent decides for its children."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_HAS_MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows, which sends children no SIGTERM either
CONTEXT: Any = multiprocessing.get_context("spawn")  # a client of Chroma's does not survive a fork
_LAST_S = 10  # for a child to end when its parent has been interrupted
_WATCH_S = 1

Progress = Callable[[int], Any]


class DiedError(Exception):
    """A child process died before it returned or raised; the argument is its exit code."""


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A process started in the block has both signals blocked until it calls ignore()."""
    if not _HAS_MASKS:
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing would start it in the block, and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(*numbers: signal.Signals) -> None:
    """Called first in a child: ignore these signals, and unblock the others."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    if _HAS_MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


class Child:
    """A process for one task. Started ahead of it, it imports `modules` meanwhile."""

    def __init__(self, *modules: str) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run, args=(theirs, modules), daemon=True)
        with shielded():
            self._process.start()
        theirs.close()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def call(
        self,
        task: Callable[..., Any],
        *args: Any,
        progress: Progress = lambda n: None,
        watch: Callable[[], Any] = lambda: None,
    ) -> Any:
        """The result of `task(*args, progress)`. Raises what the task raises, and DiedError.

        `watch` is called every second; if it raises, the process is killed.
        """
        try:
            with contextlib.suppress(OSError):  # it died: its end of file follows
                self._pipe.send((task, args))
            while True:
                while not self._pipe.poll(_WATCH_S):
                    _watch(self._process, watch)
                kind, value = self._pipe.recv()
                if kind == "result":
                    return value
                if kind == "error":
                    raise value
                progress(value)
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise DiedError(self._process.exitcode) from None
        finally:
            self._process.join(timeout=None if self._process.exitcode is not None else _LAST_S)
            self._process.kill()


def _watch(child: Any, watch: Callable[[], Any]) -> None:
    try:
        watch()
    except Exception:
        child.kill()
        raise


def _run(pipe: Connection, modules: tuple[str, ...]) -> None:
    ignore(*_STOPPING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for name in modules:
        importlib.import_module(name)
    with contextlib.suppress(EOFError):  # there was no task
        task, args = pipe.recv()
        try:
            pipe.send(("result", task(*args, lambda n: pipe.send(("progress", n)))))
        except Exception as error:
            pipe.send(("error", error))


class Workers:
    """Up to `n` processes, started when needed, that run tasks for the threads of this one.

    A process that dies, or needs more than `timeout_s` for a task, costs that task alone. Use it as a context.
    """

    def __init__(self, n: int, timeout_s: float) -> None:
        self.timeout_s, self.is_open = timeout_s, True
        self._free: queue.SimpleQueue[tuple[Any, Connection] | None] = queue.SimpleQueue()  # None: not started
        self._started: set[Any] = set()
        for _ in range(n):
            self._free.put(None)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_error: object) -> None:
        """Kill the processes: tasks that are running raise DiedError, and new ones as well."""
        self.is_open = False
        for child in list(self._started):
            child.kill()

    def run(self, task: Callable[..., Any], *args: Any) -> Any:
        """The result of `task(*args)`. Waits for a free process. Raises what the task raises, and DiedError."""
        worker = self._free.get()
        try:
            worker = worker or self._start()
            kind, value = self._ask(*worker, (task, args))
        except DiedError:
            worker = None
            raise
        finally:
            self._free.put(worker)
        if kind == "error":
            raise value
        return value

    def _start(self) -> tuple[Any, Connection]:
        if not self.is_open:
            raise DiedError(None)
        ours, theirs = CONTEXT.Pipe()
        child = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        with shielded():
            child.start()
        theirs.close()
        self._started.add(child)
        return child, ours

    def _ask(self, child: Any, pipe: Connection, job: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[str, Any]:
        try:
            pipe.send(job)
            if self.is_open and pipe.poll(self.timeout_s):
                return pipe.recv()
        except (EOFError, OSError):
            pass
        child.kill()
        child.join()
        self._started.discard(child)
        raise DiedError(child.exitcode)


def _serve(pipe: Connection) -> None:
    ignore(*_STOPPING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        task, args = pipe.recv()
        try:
            answer = "result", task(*args)
        except Exception as error:
            answer = "error", error
        pipe.send(answer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
