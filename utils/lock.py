"""One writer at a time: a lock file with its holder's name beside it. A killed process leaves it unlocked."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from utils.errors import UserError


def lock_path(path: Path) -> Path:
    """The lock file of `path`: hidden and beside it, so that people see nothing new inside a folder."""
    path = path.absolute()
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def hold(path: Path, what: str, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock file `path` for the block; messages call the locked thing `what`. Wait `wait_s` for its holder.

    Raises UserError with the holder's pid, host and start time. The operating system unlocks what a dead process held.
    The holder is written to a second file, as Windows lets nobody read a locked one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = path.with_name(path.name + ".owner")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=wait_s)
    except filelock.Timeout:
        raise UserError(f"{what} is in use by {_read_owner(owner)}; wait for it to finish, or stop it") from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read_owner(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text())
        return f"pid {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
