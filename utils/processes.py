"""Child processes. Ctrl-C and SIGTERM often reach a whole process group; here only the parent reacts to them."""

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
CONTEXT: Any = multiprocessing.get_context("spawn")  # a Chroma client does not survive a fork
_LAST_S = 10  # seconds that an interrupted parent gives its child to finish
_WATCH_S = 1  # seconds between two calls of `watch`

Task = Callable[..., Any]
Progress = Callable[[int], Any]
Watch = Callable[[], Any]
Call = tuple[Task, tuple[Any, ...], bool]  # task, arguments, whether the task takes a Progress as a further argument


class DiedError(Exception):
    """A child process died before it returned or raised; the argument is its exit code, or the reason."""


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A process started in the block has SIGINT and SIGTERM blocked until it calls ignore()."""
    if not _HAS_MASKS:
        yield
        return
    resource_tracker.ensure_running()  # otherwise it would start in the block and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(*numbers: signal.Signals) -> None:
    """Ignore these signals, and unblock the others. A child calls this first."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    if _HAS_MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


class Child:
    """A process that runs one task at a time. It starts at once and imports `modules` while no task is there yet."""

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
        """Run `task(*args, progress)`, return its result and end the process. Raises what ask() raises.

        `watch` is called every second; if it raises, the process is killed.
        """
        try:
            return self.ask((task, args, True), _WATCH_S, watch, progress)
        finally:
            with contextlib.suppress(OSError):  # the process died
                self._pipe.send(None)
            self._process.join(_LAST_S)
            self.kill()

    def ask(self, call: Call, patience_s: float, watch: Watch, progress: Progress = lambda n: None) -> Any:
        """Run a call and return its result. Raises the task's exception, or DiedError.

        `watch` is called each time the process has sent nothing for `patience_s`; if it raises, the process is killed.
        """
        with contextlib.suppress(OSError):  # the process died: _receive() raises DiedError
            self._pipe.send(call)
        while True:
            kind, value = self._receive(patience_s)
            if kind == "result":
                return value
            if kind == "error":
                raise value
            if kind == "progress":
                progress(value)
                continue
            try:
                watch()
            except Exception:
                self.kill()
                raise

    def _receive(self, patience_s: float) -> tuple[str, Any]:
        """(kind, value) of the next message; the kind is "silence" if none comes in `patience_s`. Raises DiedError."""
        try:
            return self._pipe.recv() if self._pipe.poll(patience_s) else ("silence", None)
        except (EOFError, OSError):  # OSError: it died within a message; on Windows, before poll()
            self._process.join(_LAST_S)
            self.kill()
            raise DiedError(self._process.exitcode) from None


def _serve(pipe: Connection, modules: tuple[str, ...]) -> None:
    ignore(*_STOPPING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for name in modules:
        importlib.import_module(name)
    with contextlib.suppress(EOFError, OSError):  # the parent no longer needs this process, or has ended
        while call := pipe.recv():
            task, args, has_progress = call
            try:
                pipe.send(("result", task(*args, *([lambda n: pipe.send(("progress", n))] if has_progress else []))))
            except Exception as error:
                pipe.send(("error", error))


class Workers:
    """Up to `n` processes, started on demand, that run tasks for the threads of this process. A context manager.

    If a process dies, or takes more than `timeout_s` for a task, only that task fails.
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
        """Kill the processes. Running tasks and new tasks raise DiedError."""
        self.is_open = False
        for child in list(self._started):
            child.kill()

    def run(self, task: Task, *args: Any) -> Any:
        """Run `task(*args)` in the next free process and return its result. Raises its exception, or DiedError."""
        child = self._free.get()
        try:
            if not self.is_open:
                raise DiedError(None)
            child = child or Child()
            self._started.add(child)
            if not self.is_open:  # closed in this moment: __exit__ has missed this child
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
