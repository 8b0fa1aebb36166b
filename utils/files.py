"""Replace files atomically, so that a file has either its old or its new content; read and write JSON files."""

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
    """Make a rename in the folder `path` durable. Windows cannot open a folder; its file system persists renames."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError of the system name `path`: errors of writing do not name a file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a new file that replaces `path` when the block ends, and is deleted if the block raises.

    Steps: temporary name, flush, fsync, rename. The permissions of an existing `path` are kept. Raises OSError (full
    disk, read-only folder) and leaves `path` unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with naming(path), open(temporary, "xb" if binary else "x", encoding=None if binary else "utf-8") as file:
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
    """Replace `path` with `value` as ASCII JSON, which every tool can read and which preserves lone surrogates."""
    with replacing(path) as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def read_json(path: Path, what: str) -> Any:
    """Read the JSON value in `path`; error messages call the file `what`.

    Raises UserError if the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())  # UTF-8 or UTF-16, with or without a byte order mark
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not JSON: {error}; correct it, or restore it from a copy") from None
