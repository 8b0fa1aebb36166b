"""The vector journal: an append-only file from which the Chroma index can be rebuilt.

A record counts as stored once its frame is here and fsynced. The file is a sequence of frames, little-endian:

    magic | kind | n | dimension | metadata bytes | CRC-32 of all that follows | CRC-32 of this head
    n ids of 16 bytes | metadata as JSON, UTF-8 | n x dimension float32 vectors

A write that was cut short leaves an incomplete last frame, which the next opening drops. Damage before intact frames
is no cut write: it is refused, not guessed at. Everything is checked at every opening, a second per GB or two.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import fsync_dir, replacing
from utils.log import LOG

_MAGIC = b"\xf5RAJ"
_HEAD = struct.Struct("<4sBIIQI")
_CRC = struct.Struct("<I")
# Kinds of frame. STORE: new records. CHANGE: new metadata of records. GONE: ids that people deleted from the
# collection. MODEL: the model's identity, first of all. INDEXED: {"end": n}, all before byte n is in the index.
# REMOVE: ids about to be removed from collection and journal.
STORE, CHANGE, GONE, MODEL, INDEXED, REMOVE = range(6)


class Frame(NamedTuple):
    """One frame: ids (n,) of dtype V16, n metadata, (n, D) float32 vectors, and where in the file it ends, bytes."""

    kind: int
    ids: np.ndarray
    metadata: list[dict[str, Any]]
    vectors: np.ndarray
    end: int


class Journal:
    """The journal in `folder`, checked and read when it is opened; one process at a time may open it.

    `ids` (N,) V16, sorted: all stored records when it was opened; `gone`: those of them that people deleted from the
    collection; `removing`: those whose removal was begun; `model`: the identity; `end`: bytes; `indexed`: all before
    this byte is in the index. 16 bytes of memory a record. Raises UserError for a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "vectors.bin"
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._read()

    def _read(self) -> None:
        self.model: dict[str, Any] = {}
        self.end = self.indexed = 0
        ids: dict[int, list[np.ndarray]] = {kind: [np.empty(0, "V16")] for kind in (STORE, GONE, REMOVE)}
        for frame in self.frames():
            if frame.kind in ids:
                ids[frame.kind].append(frame.ids.copy())  # a view would keep the frame's vectors
            elif frame.kind == MODEL:
                self.model = frame.metadata[0]
            elif frame.kind == INDEXED:
                self.indexed = frame.metadata[0]["end"]
            self._advance(frame.kind, frame.end)
        self.ids, self.gone, self.removing = (np.concatenate(ids[kind]) for kind in (STORE, GONE, REMOVE))
        self.ids.sort()
        if self.path.exists() and (lost := self.path.stat().st_size - self.end):
            LOG.info("journal: %d bytes of an unfinished write are dropped", lost)

    def _advance(self, kind: int, end: int) -> None:
        """The journal now ends at byte `end`; an index that had all before this frame may have nothing to do in it."""
        if self.indexed == self.end and kind not in (STORE, CHANGE):
            self.indexed = end
        self.end = end

    def frames(self) -> Iterator[Frame]:
        """All intact frames, oldest first. Raises UserError for a damaged file."""
        return read_frames(self.path)

    def append(self, kind: int, ids: np.ndarray, metadata: list[dict[str, Any]], vectors: np.ndarray) -> int:
        """Append a frame; it is on the disk when this returns its end, bytes. Raises UserError, then unchanged.

        ids (n,) V16; vectors (n, D) float32.
        """
        frame = _pack(kind, ids, metadata, vectors)
        with self._lock:
            try:
                if self._file is None:
                    self._file = self._open()
                self._file.write(frame)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                self.close()  # opened again, it drops what was written of this frame
                raise UserError(
                    f"journal {self.path} cannot be written: {error.strerror}; mend that and run again, it goes on here"
                ) from None
            self._advance(kind, self.end + len(frame))
            return self.end

    def note(self, kind: int, fact: dict[str, Any]) -> None:
        """Append a frame of kind MODEL or INDEXED."""
        if kind == INDEXED:
            self.indexed = fact["end"]
        self.append(kind, np.empty(0, "V16"), [fact], np.empty((0, 0), np.float32))

    def mark_gone(self, ids: np.ndarray) -> None:
        """Note that people deleted `ids` (n,) V16 from the collection, so that they stay deleted."""
        self.append(GONE, ids, [], np.empty((len(ids), 0), np.float32))
        self.gone = np.concatenate([self.gone, ids])

    def metadata(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """(id, metadata) of every record, and again for every change of it, oldest first."""
        for frame in self.frames():
            if frame.kind in (STORE, CHANGE):
                yield from zip(frame.ids.tolist(), frame.metadata)

    def remove(self, ids: np.ndarray) -> None:
        """Rewrite the journal without the records `ids` (n,) V16, all that is left being in the index."""
        self.close()
        end = 0
        with replacing(self.path, binary=True) as file:
            for frame in self.frames():
                if frame.kind in (INDEXED, REMOVE):
                    continue
                kept = ~np.isin(frame.ids, ids)
                metadata = frame.metadata if frame.kind == MODEL else [m for m, k in zip(frame.metadata, kept) if k]
                if frame.kind == MODEL or kept.any():
                    end += file.write(_pack(frame.kind, frame.ids[kept], metadata, frame.vectors[kept]))
            file.write(_pack(INDEXED, np.empty(0, "V16"), [{"end": end}], np.empty((0, 0), np.float32)))
        self._read()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be flushed was never acknowledged
                self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        file = self.path.open("ab" if is_new else "r+b")
        file.truncate(self.end)
        file.seek(self.end)
        if is_new:
            fsync_dir(self.path.parent)
            fsync_dir(self.path.parent.parent)
        return file


def read_frames(path: Path, start: int = 0, end: int | None = None) -> Iterator[Frame]:
    """The intact frames of a journal file from byte `start` to byte `end` (None: all). Raises UserError if damaged."""
    if not path.exists():
        return
    with path.open("rb") as file:
        size = path.stat().st_size if end is None else end
        while start < size:
            frame = _read_frame(file, start, size)
            if frame is None and _find_frame(file, start + 1, size):
                raise UserError(
                    f"journal {path} is damaged at byte {start}: a checksum does not fit. Put back a copy, or delete "
                    f"{path.parent}: what the collection holds is then taken over, and the rest embedded again"
                )
            if frame is None:
                return
            yield frame
            start = frame.end


def _pack(kind: int, ids: np.ndarray, metadata: Collection[dict[str, Any]], vectors: np.ndarray) -> bytes:
    text = json.dumps(list(metadata), ensure_ascii=False, separators=(",", ":")).encode()
    body = ids.tobytes() + text + vectors.astype("<f4", copy=False).tobytes()
    dimension = vectors.shape[1] if vectors.ndim == 2 else 0
    head = _HEAD.pack(_MAGIC, kind, len(ids), dimension, len(text), zlib.crc32(body))
    return head + _CRC.pack(zlib.crc32(head)) + body


def _read_frame(file: BinaryIO, start: int, size: int) -> Frame | None:
    """The frame at byte `start`, or None if what stands there before byte `size` is not an intact one."""
    file.seek(start)
    head = file.read(_HEAD.size + _CRC.size)
    if len(head) < _HEAD.size + _CRC.size or not head.startswith(_MAGIC):
        return None
    if _CRC.unpack_from(head, _HEAD.size)[0] != zlib.crc32(head[: _HEAD.size]):
        return None
    _, kind, n, dimension, text_bytes, checksum = _HEAD.unpack_from(head)
    end = start + len(head) + 16 * n + text_bytes + 4 * n * dimension
    body = file.read(end - start - len(head)) if end <= size else b""
    if end > size or zlib.crc32(body) != checksum:
        return None
    ids = np.frombuffer(body, "V16", n)
    metadata = json.loads(body[16 * n : 16 * n + text_bytes])
    vectors = np.frombuffer(body, "<f4", n * dimension, 16 * n + text_bytes).reshape(n, dimension)
    return Frame(kind, ids, metadata, vectors, end)


def _find_frame(file: BinaryIO, start: int, size: int) -> bool:
    """Whether an intact frame begins anywhere from byte `start` on."""
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
        position = content.find(_MAGIC, start)
        while position >= 0:
            if _read_frame(file, position, size):
                return True
            position = content.find(_MAGIC, position + 1)
    return False
