"""Progress bars and log lines on stderr, one log file per run, and text that is safe and correct to print."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOG = logging.getLogger("retrieval_ann")
# C0 and C1 controls, line and paragraph separators, marks that reverse the direction of text, lone surrogates.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def start_log(script: str, directory: str) -> None:
    """Log INFO and above to stderr, and everything to a new file in `directory` ("" = no file).

    If the directory is not writable, the run logs a warning and goes on without a file.
    """
    LOG.setLevel(logging.DEBUG)
    LOG.handlers.clear()
    LOG.propagate = False  # some libraries add a handler to the root logger
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
    """Escape control characters, so that names and URLs cannot move a terminal's cursor or forge a line."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(n: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 image", "2 images", "0 directories". plural: needed if it is not -s, or -ies for -y."""
    return f"{n} {noun if n == 1 else plural or re.sub('y$', 'ie', noun) + 's'}"


def bar(total: int | None, what: str, unit: str) -> tqdm[Any]:
    """Show a progress bar on stderr. If stderr is not a terminal, it prints at most one line every ten seconds."""
    slow = not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, mininterval=10 if slow else 0.2, dynamic_ncols=not slow, leave=True)


class _Formatter(logging.Formatter):
    """Formats each message as one line, even if it contains a URL or a server's answer with line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class names it)
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Screen(logging.Handler):
    """Prints log lines above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
