"""Child processes. Ctrl-C and SIGTERM often reach a whole process group; here the parent decides for its children."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
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


def call(
    task: Callable[..., Any], *args: Any, progress: Progress = lambda n: None, watch: Callable[[], Any] = lambda: None
) -> Any:
    """The result of `task(*args, progress)` in a new process. Raises what the task raises, and DiedError.

    `watch` is called every second; if it raises, the process is killed.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_run, args=(sender, task, args), daemon=True)
    with shielded():
        child.start()
    sender.close()
    try:
        while True:
            while not receiver.poll(_WATCH_S):
                _watch(child, watch)
            kind, value = receiver.recv()
            if kind == "result":
                return value
            if kind == "error":
                raise value
            progress(value)
    except EOFError:
        child.join()
        raise DiedError(child.exitcode) from None
    finally:
        child.join(timeout=None if child.exitcode is not None else _LAST_S)
        child.kill()


def _watch(child: Any, watch: Callable[[], Any]) -> None:
    try:
        watch()
    except Exception:
        child.kill()
        raise


def _run(sender: Connection, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    ignore(*_STOPPING)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        sender.send(("result", task(*args, lambda n: sender.send(("progress", n)))))
    except Exception as error:
        sender.send(("error", error))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
