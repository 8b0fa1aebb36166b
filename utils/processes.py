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

Task = Callable[..., Any]
Progress = Callable[[int], Any]
Watch = Callable[[], Any]
Job = tuple[Task, tuple[Any, ...], bool]  # the task, its arguments, whether it takes a Progress as the last one


class DiedError(Exception):
    """A child process died before it returned or raised; the argument is its exit code, or the reason."""


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
    """A process that does tasks, one at a time. Started ahead of them, it imports `modules` meanwhile."""

    def __init__(self, *modules: str) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, modules), daemon=True)
        with shielded():
            self._process.start()
        theirs.close()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def call(self, task: Task, *args: Any, progress: Progress = lambda n: None, watch: Watch = lambda: None) -> Any:
        """The result of `task(*args, progress)`, with which the process ends. Raises as ask() does.

        `watch` is called every second; if it raises, the process is killed.
        """
        try:
            return self.ask((task, args, True), _WATCH_S, watch, progress)
        finally:
            with contextlib.suppress(OSError):  # it died
                self._pipe.send(None)
            self._process.join(_LAST_S)
            self.kill()

    def ask(self, job: Job, patience_s: float, watch: Watch, progress: Progress = lambda n: None) -> Any:
        """The result of a job. Raises what its task raises, and DiedError.

        `watch` is called whenever the process has said nothing for `patience_s`; if it raises, the process is killed.
        """
        try:
            with contextlib.suppress(OSError):  # it died: its end of file follows
                self._pipe.send(job)
            while True:
                while not self._pipe.poll(patience_s):
                    try:
                        watch()
                    except Exception:
                        self.kill()
                        raise
                kind, value = self._pipe.recv()
                if kind != "progress":
                    break
                progress(value)
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise DiedError(self._process.exitcode) from None
        if kind == "error":
            raise value
        return value


def _serve(pipe: Connection, modules: tuple[str, ...]) -> None:
    ignore(*_STOPPING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for name in modules:
        importlib.import_module(name)
    with contextlib.suppress(EOFError):  # the parent no longer needs this process
        while job := pipe.recv():
            task, args, has_progress = job
            try:
                pipe.send(("result", task(*args, *([lambda n: pipe.send(("progress", n))] if has_progress else []))))
            except Exception as error:
                pipe.send(("error", error))


class Workers:
    """Up to `n` processes, started when needed, that run tasks for the threads of this one.

    A process that dies, or needs more than `timeout_s` for a task, costs that task alone. Use it as a context.
    """

    def __init__(self, n: int, timeout_s: float) -> None:
        self.timeout_s, self.is_open = timeout_s, True
        self._free: queue.SimpleQueue[Child | None] = queue.SimpleQueue()  # None: not started
        self._started: set[Child] = set()
        for _ in range(n):
            self._free.put(None)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_error: object) -> None:
        """Kill the processes: tasks that are running raise DiedError, and new ones as well."""
        self.is_open = False
        for child in list(self._started):
            child.kill()

    def run(self, task: Task, *args: Any) -> Any:
        """The result of `task(*args)`. Waits for a free process. Raises what the task raises, and DiedError."""
        child = self._free.get()
        try:
            if not self.is_open:
                raise DiedError(None)
            child = child or Child()
            self._started.add(child)
            if not self.is_open:  # since a moment ago, so that __exit__ has missed this one
                child.kill()
            return child.ask((task, args, False), self.timeout_s, _give_up)
        except DiedError:
            self._started.discard(child)
            child = None
            raise
        finally:
            self._free.put(child)


def _give_up() -> None:
    raise DiedError("it took too long")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
