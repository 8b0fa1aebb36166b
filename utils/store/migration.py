"""Take over the journal of an earlier version, an append-only file of frames, as a SQLite file."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import fsync_dir
from utils.log import LOG
from utils.store.vectors import Journal, building

_MAGIC = b"\xf5RAJ"
_HEAD = struct.Struct("<4sBIIQI")  # magic, kind, n, dimension, metadata bytes, CRC-32 of all after the head
_HEAD_BYTES = _HEAD.size + 4  # and the CRC-32 of the head
_STORE, _CHANGE, _GONE, _MODEL, _INDEXED, _REMOVE = range(6)  # kinds


class _Frame(NamedTuple):
    kind: int
    ids: np.ndarray  # (n,) V16
    metadata: list[dict[str, Any]]
    vectors: np.ndarray  # (n, D) float32
    end: int  # its last byte is the one before


def migrate(path: Path) -> None:
    """Make the journal `path` from the file of the version before, if there is one, and rename that to .bak.

    Killed on the way, it begins again. Raises UserError for a damaged file or a full disk.
    """
    old = path.with_suffix("") / "vectors.bin"
    if not old.exists():
        return
    if not path.exists():
        with building(path, old.stat().st_size) as new:
            _copy(old, new)
    backup = old.with_name("vectors.bin.bak")
    os.replace(old, backup)
    fsync_dir(old.parent)
    LOG.info("the journal is now %s; %s is no longer used and can be deleted", path, backup)


def _copy(old: Path, new: Journal) -> None:
    indexed = max((int(frame.metadata[0]["end"]) for frame in _read(old) if frame.kind == _INDEXED), default=0)
    n_indexed = sum(len(frame.ids) for frame in _read(old) if frame.kind == _STORE and frame.end <= indexed)
    for frame in _read(old):
        if frame.kind == _MODEL:
            new.note(model=frame.metadata[0])
        elif frame.kind == _STORE and len(frame.ids):
            new.append(frame.ids, frame.metadata, frame.vectors)
        elif frame.kind == _CHANGE:
            new.change_metadata(frame.ids, frame.metadata)
            if frame.end <= indexed:
                new.note(changed=np.setdiff1d(new.changed, frame.ids))
        elif frame.kind == _GONE:
            new.note(gone=np.union1d(new.gone, frame.ids))
        elif frame.kind == _REMOVE:
            new.note(removing=np.union1d(new.removing, frame.ids))
    new.note(indexed=n_indexed)  # records count from 1


def _read(path: Path) -> Iterator[_Frame]:
    """The intact frames; a last one that was cut short was never acknowledged. Raises UserError for other damage."""
    with path.open("rb") as file:
        start, size = 0, path.stat().st_size
        while frame := _read_frame(file, start, size):
            yield frame
            start = frame.end
        if start < size and _find_frame(file, start + 1, size):
            raise UserError(
                f"journal {path} is damaged at byte {start}: a checksum does not match. Put back a copy, or delete "
                f"{path.parent}: the records of the collection are then taken over, and the rest embedded again"
            )


def _read_frame(file: BinaryIO, start: int, size: int) -> _Frame | None:
    file.seek(start)
    head = file.read(_HEAD_BYTES)
    if len(head) < _HEAD_BYTES or zlib.crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
        return None
    magic, kind, n, dimension, text_bytes, checksum = _HEAD.unpack(head[:-4])
    end = start + _HEAD_BYTES + 16 * n + text_bytes + 4 * n * dimension
    body = file.read(end - start - _HEAD_BYTES) if magic == _MAGIC and end <= size else b""
    if magic != _MAGIC or end > size or zlib.crc32(body) != checksum:
        return None
    metadata = json.loads(body[16 * n : 16 * n + text_bytes])
    vectors = np.frombuffer(body, "<f4", n * dimension, 16 * n + text_bytes).reshape(n, dimension)
    return _Frame(kind, np.frombuffer(body, "V16", n), metadata, vectors, end)


def _find_frame(file: BinaryIO, start: int, size: int) -> bool:
    """Whether an intact frame begins anywhere from byte `start` on."""
    with contextlib.closing(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) as content:
        position = content.find(_MAGIC, start)
        while position >= 0:
            if _read_frame(file, position, size):
                return True
            position = content.find(_MAGIC, position + 1)
    return False
