"""Files that are either the old version or the new one, never a mixture; and JSON in them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError


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
