"""Child processes that Ctrl-C and SIGTERM, which often go to a whole process group, leave in peace."""

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

Progress = Callable[[int], Any]


class DiedError(Exception):
    """A child process ended without a word, with this exit code."""


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """A process that is started in the block is born with both signals held back, until it calls ignore()."""
    if not _HAS_MASKS:
        yield
        return
    resource_tracker.ensure_running()  # started by multiprocessing on the way, it would lift the shield
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(*numbers: signal.Signals) -> None:
    """In the child, first of all: ignore these, and take the others as usual."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    if _HAS_MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def call(task: Callable[..., Any], *args: Any, progress: Progress = lambda n: None) -> Any:
    """`task(*args, progress)` in a new process: what it returns. Raises what it raises, and DiedError if it dies."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_run, args=(sender, task, args), daemon=True)
    with shielded():
        child.start()
    sender.close()
    try:
        while True:
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


def _run(sender: Connection, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    ignore(*_STOPPING)  # the parent decides
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
