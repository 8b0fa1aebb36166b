"""Lock files, which allow one writer at a time. The system releases the lock of a killed process."""

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
from utils.files import naming


def lock_path(path: Path) -> Path:
    """Path of the lock file for `path`: a hidden file beside it, so that a folder shows nothing new inside."""
    path = path.absolute()
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def hold(path: Path, what: str, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock file `path` for the block; messages call the locked thing `what`.

    Waits up to `wait_s` for another holder, then raises UserError with its pid, host and start time. These are kept in
    a second file, because Windows does not let other processes read a locked file.
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
        with naming(owner):
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
