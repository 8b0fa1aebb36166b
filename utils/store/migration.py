"""Convert the journal of an earlier version, an append-only file of frames, to a SQLite file."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    start: int  # its first byte
    end: int  # the byte after its last


def migrate(path: Path) -> None:
    """Make the journal `path` from the file of the earlier version, if there is one, and rename that file to .bak.

    If it is killed, the next run starts it again. Raises UserError for a full disk.
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
    n_indexed = n_bytes = 0
    for frame in _read(old):
        n_bytes += frame.end - frame.start
        if frame.kind == _MODEL:
            new.note(model=frame.metadata[0])
        elif frame.kind == _STORE and len(frame.ids):
            new.append(frame.ids, frame.metadata, frame.vectors)
            n_indexed += len(frame.ids) * (frame.end <= indexed)
        elif frame.kind == _CHANGE:
            known = np.isin(frame.ids, new.rows["id"])  # ids of damaged frames are unknown
            new.change_metadata(frame.ids[known], [one for one, is_known in zip(frame.metadata, known) if is_known])
            if frame.end <= indexed:
                new.note(changed=np.setdiff1d(new.changed, frame.ids))
        elif frame.kind in (_GONE, _REMOVE):
            name = "gone" if frame.kind == _GONE else "removing"
            new.note(**{name: np.union1d(getattr(new, name), frame.ids)})
    new.note(indexed=n_indexed)  # records count from 1
    if n_bytes < old.stat().st_size:
        n_lost = old.stat().st_size - n_bytes
        LOG.warning("journal %s: %d bytes are damaged or from an unfinished write; their records are lost", old, n_lost)


def _read(path: Path) -> Iterator[_Frame]:
    """Yield the intact frames. Bytes between them are damage; at the end, they are a write never acknowledged."""
    with path.open("rb") as file, contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as content:
        start = 0
        while start >= 0:
            frame = _read_frame(content, start)
            if frame:
                yield frame
            start = content.find(_MAGIC, frame.end if frame else start + 1)


def _read_frame(content: mmap.mmap, start: int) -> _Frame | None:
    head = content[start : start + _HEAD_BYTES]
    if len(head) < _HEAD_BYTES or zlib.crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
        return None
    _, kind, n, dimension, text_bytes, checksum = _HEAD.unpack(head[:-4])
    end = start + _HEAD_BYTES + 16 * n + text_bytes + 4 * n * dimension
    body = content[start + _HEAD_BYTES : end]
    if end > len(content) or zlib.crc32(body) != checksum:
        return None
    metadata = json.loads(body[16 * n : 16 * n + text_bytes])
    vectors = np.frombuffer(body, "<f4", n * dimension, 16 * n + text_bytes).reshape(n, dimension)
    return _Frame(kind, np.frombuffer(body, "V16", n), metadata, vectors, start, end)
