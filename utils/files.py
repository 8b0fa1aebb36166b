"""Files that hold either their old or their new content, never a mixture; and JSON in them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` durable. Windows cannot open a folder; its file system writes renames by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, binary: bool = False) -> Iterator[IO[Any]]:
    """A new file that replaces `path` when the block ends, or vanishes when the block raises.

    Temporary name, flush, fsync, rename. The permissions of an old `path` stay. Raises OSError (full disk, read-only
    folder) with `path` untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb" if binary else "x", encoding=None if binary else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Replace `path` with `value` as JSON, in ASCII: every tool reads that, and lone surrogates survive."""
    with replacing(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def read_json(path: Path, what: str) -> Any:
    """The value in `path`; messages call the file `what`. Raises UserError if it is unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())  # UTF-8 or UTF-16, with or without a byte order mark
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}; correct it, or put a copy in its place") from None
