"""What a run tells: bars and log on stderr, a log file per run."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOG = logging.getLogger("retrieval_ann")


def start_log(script: str, directory: str) -> None:
    """Log warnings to stderr, and everything to a new file in `directory` ("" = none; unwritable = said, no file)."""
    LOG.setLevel(logging.DEBUG)
    LOG.handlers.clear()
    LOG.propagate = False  # libraries give the root logger a handler of their own
    screen = _Screen()
    screen.setLevel(logging.INFO)
    screen.setFormatter(_Formatter("%(message)s"))
    LOG.addHandler(screen)
    if not directory:
        return
    path = Path(directory) / f"{time.strftime('%Y%m%d-%H%M%S')}-{script}-{os.getpid()}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        LOG.warning("no log file: %s: %s", path, error.strerror)
        return
    file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(file)


def printable(text: str) -> str:
    """The text without what could move a terminal's cursor, forge a line or confuse an encoding: it is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bar(total: int | None, what: str, unit: str) -> tqdm[Any]:
    """A progress bar on stderr; where stderr is no terminal, a line every ten seconds at most."""
    slow = not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, mininterval=10 if slow else 0.2, dynamic_ncols=not slow, leave=True)


class _Formatter(logging.Formatter):
    """One line a message, whatever a url or a server has put into it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class names it)
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Screen(logging.Handler):
    """Log lines that do not tear the bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
