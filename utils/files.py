"""Files that are either the old version or the new one, never a mixture; and JSON in them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from utils.errors import UserError

CHUNK = 1 << 16  # characters of a list read at a time
_SPACE, _AFTER = re.compile(r"[ \t\n\r]*"), set(",] \t\n\r")


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` durable. Windows cannot open folders; there the file system does it by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write that takes the place of `path` when the block ends well, and leaves no trace when it does not.

    Temporary name, flush, fsync, rename. Raises OSError (full disk, read-only folder) with `path` untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb" if binary else "w", encoding=None if binary else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_dir(path.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON in place of `path`, ASCII only, so that any string survives any tool."""
    with replacing(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def read_json(path: Path, what: str) -> Any:
    """The value in `path`; `what` names the file's role in the message. Raises UserError if unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}; mend or remove it") from None


def read_list(path: Path, what: str) -> Iterator[Any]:
    """The items of a JSON list one by one: read as a whole, a list takes four times its text in memory.

    Raises UserError as read_json does, when it gets there, and if it is no list.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _Items(file)
    except (OSError, ValueError, RecursionError):
        wrong = "is not a list; it must be [{...}, ...], so mend or remove it"
        if isinstance(read_json(path, what), list):  # it says what is wrong with other files, and where
            wrong = "changed while it was read; run again"
        raise UserError(f"{what} {path} {wrong}") from None


class _Items:
    """The items of a list in `file`. Raises ValueError for whatever else is there."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._decode = file, json.JSONDecoder().raw_decode
        self._text, self._at, self._is_whole = "", 0, False

    def __iter__(self) -> Iterator[Any]:
        if self._mark() != "[":
            raise ValueError("no list")
        if self._mark() != "]":
            self._at -= 1
            yield self._value()
            while (mark := self._mark()) == ",":
                self._mark()
                self._at -= 1
                yield self._value()
            if mark != "]":
                raise ValueError("no end")
        if self._mark():
            raise ValueError("more than a list")

    def _mark(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._is_whole:
                self._at += 1
                return self._text[self._at - 1 : self._at]
            self._read_on()

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if self._is_whole or self._text[end : end + 1] in _AFTER:  # else a number may go on
                    self._at = end
                    return value
            except ValueError:
                if self._is_whole:
                    raise
            self._read_on()

    def _read_on(self) -> None:
        rest = self._text[self._at :]
        more = self._file.read(max(CHUNK, len(rest)))
        self._text, self._at, self._is_whole = rest + more, 0, not more
