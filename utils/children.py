"""Child processes that Ctrl-C and SIGTERM, which often go to a whole process group, leave in peace."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_HAS_MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows, which sends children no SIGTERM either


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
