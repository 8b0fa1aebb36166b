"""The vector journal: a SQLite file with every record, from which the Chroma index can be rebuilt.

    records   seq, id, metadata as JSON, vector (D,) float32
    batches   the (seq, id) pairs of each transaction, so that all ids can be read without the vectors
    facts     the model; the index's state: `indexed` and `indexing`; ids with a state: `gone`, `removing`, `changed`

A record counts as stored once its transaction is on the disk (write-ahead log, synchronous FULL). Numbers are
little-endian. Every row ends with the CRC-32 of its other columns. A row that is damaged, or lost in a damaged page, is
found when it is read. repair() then makes a new file without it, and embed.py embeds its image again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import fsync_dir
from utils.ids import from_ids
from utils.log import LOG, counted

ROW = np.dtype([("seq", "<i8"), ("id", "V16")])  # seq: position in the order of storing, from 1, never reused
PAGE_BYTES = 65_536  # SQLite's maximum; at 512 to 2,048 dimensions, at most 12% of a page stay empty
WAL_BYTES = 16 * 2**20  # size at which SQLite moves the write-ahead log into the file
WAIT_S = 60  # time to wait for another process that reads or writes
READ = 1_000  # records in memory at a time
UNKNOWN = -1  # value of `indexed` if damage has destroyed it
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "9p", "fuse.sshfs", "ceph", "lustre", "glusterfs"}
_FILES = ("", "-wal", "-shm", "-journal")
_TABLES = """
    CREATE TABLE IF NOT EXISTS records (seq INTEGER PRIMARY KEY, id BLOB, metadata BLOB, vector BLOB, checksum INTEGER);
    CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY, pairs BLOB, checksum INTEGER);
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB, checksum INTEGER) WITHOUT ROWID;
"""
_FACTS = ("model", "indexed", "indexing", "gone", "removing", "changed")
Record = tuple[bytes, bytes, bytes]  # id, metadata, vector


class DamagedError(Exception):
    """A record or a page of the journal is damaged."""


class Journal:
    """The journal at `path`, which the first write creates. One process at a time may write to it.

    `rows` (N,) ROW: all records in order. `ids` (n,) V16: the ids at the opening, sorted. `end`: the last seq.
    It takes 48 bytes of memory per record. Raises UserError if the file cannot be used.
    """

    # The facts, with their values in a new journal. Damage resets a fact to this value, except `indexed`, `indexing`.
    model: dict[str, Any] = {}  # the identity; replaced as a whole
    indexed = 0  # the index has all records up to this seq; UNKNOWN after damage
    indexing = False  # a write to the index has begun, or damage makes this unknown
    gone = np.empty(0, "V16")  # ids that people deleted from the collection
    removing = np.empty(0, "V16")  # ids whose removal has begun
    changed = np.empty(0, "V16")  # ids whose new metadata is not in the index
    _parts: list[np.ndarray]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None
        self._lock, self._is_stale = threading.RLock(), False
        self._read()

    @property
    def rows(self) -> np.ndarray:
        with self._lock:
            if len(self._parts) > 1:
                self._parts = [np.concatenate(self._parts)]
            return self._parts[0]

    def append(self, ids: np.ndarray, metadata: list[dict[str, Any]], vectors: np.ndarray) -> None:
        """Store records: ids (n,) V16, vectors (n, D) float32. If it raises UserError, no record is stored."""
        records = zip(ids.tolist(), map(_to_json, metadata), map(bytes, np.asarray(vectors, "<f4", order="C")))
        with self._writing() as database:
            rows = np.empty(len(ids), ROW)
            rows["seq"], rows["id"] = np.arange(self.end + 1, self.end + 1 + len(ids)), ids
            _insert(database, rows, records)
        with self._lock:
            self._parts.append(rows)
            self.end += len(ids)
            self.n_records += len(ids)

    def note(self, **facts: Any) -> None:
        """Store facts, given by name, in one transaction."""
        with self._writing() as database:
            for name, value in facts.items():
                data = value.tobytes() if isinstance(value, np.ndarray) else _to_json(value)
                checksum = zlib.crc32(name.encode() + data)
                database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (name, data, checksum))
        vars(self).update(facts)

    def change_metadata(self, ids: np.ndarray, metadata: list[dict[str, Any]]) -> None:
        """Replace the metadata of the records `ids` (n,) V16, and add them to `changed`. Raises DamagedError."""
        seq_of = dict(zip(self.rows["id"].tolist(), self.rows["seq"].tolist()))
        with self._writing() as database:
            for id_, one in zip(ids.tolist(), metadata):
                seq, data = seq_of[id_], _to_json(one)
                values = (data, _checksum(seq, id_, data, _get(database, seq, id_)[2]), seq)
                database.execute("UPDATE records SET metadata = ?, checksum = ? WHERE seq = ?", values)
            self.note(changed=np.union1d(self.changed, ids))

    def metadata(self) -> dict[bytes, dict[str, Any]]:
        """id -> metadata of every record. Damaged records are lost."""
        return self.repaired(
            lambda: {
                id_: one
                for ids, metadata, _ in read_records(self.path, self.rows)
                for id_, one in zip(ids.tolist(), metadata)
            }
        )

    def remove(self, ids: np.ndarray) -> None:
        """Remove the records `ids` (n,) V16."""
        with self._writing() as database:
            seqs = self.rows["seq"][np.isin(self.rows["id"], ids)]
            database.executemany("DELETE FROM records WHERE seq = ?", ((seq,) for seq in seqs.tolist()))
            for key, data in database.execute("SELECT seq, pairs FROM batches").fetchall():
                pairs = np.frombuffer(data, ROW)
                kept = pairs[~np.isin(pairs["seq"], seqs)].tobytes()
                if len(kept) < len(data):
                    database.execute("DELETE FROM batches WHERE seq = ?", (key,))
                    if kept:
                        database.execute("INSERT INTO batches VALUES (?, ?, ?)", (key, kept, zlib.crc32(kept)))
            self.note(**{name: np.setdiff1d(getattr(self, name), ids) for name in ("gone", "removing", "changed")})
        self._connect().execute("PRAGMA incremental_vacuum").fetchall()
        self._read()

    def repaired(self, action: Callable[[], Any]) -> Any:
        """Return the result of `action`. If it finds damaged records, repair the file and call it again."""
        try:
            return action()
        except DamagedError:
            self.repair()
            return action()

    def repair(self) -> None:
        """Make a new file from all readable records. The log lists the others."""
        size = self.path.stat().st_size
        listed, found = dict(self.rows.tolist()), set[int]()
        last = min(self.end, max([*listed, self.indexed]) + size // 100)  # a damaged seq may be beyond all bounds
        with building(self.path, size) as new:
            for start in range(1, last + 1, READ):
                records = {}
                for seq in range(start, start + READ):
                    with contextlib.suppress(DamagedError):
                        records[seq] = _get(self._connect(), seq)
                if records:
                    rows = np.array([(seq, record[0]) for seq, record in records.items()], ROW)
                    with new._writing() as database:
                        _insert(database, rows, records.values())
                    new.end = int(rows["seq"][-1])
                    found |= records.keys()
            new.note(**{name: getattr(self, name) for name in _FACTS})
            self.close()
        lost = [id_ for seq, id_ in listed.items() if seq not in found]
        names = from_ids(np.frombuffer(b"".join(lost[:20]), "V16")) + ["..."] * (len(lost) > 20)
        what = f"{counted(len(lost), 'record')} lost, to be embedded again: {' '.join(names)}"
        LOG.warning("journal %s was damaged and is repaired: %s", self.path, what)
        self._read()

    def close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):  # unwritten records were never acknowledged
                self._database.close()
            self._database = None

    def _read(self) -> None:
        """Read everything except the records. If a part cannot be read, repair the file."""
        self._forget()
        if self.path.exists():
            try:
                is_sound = self._read_tables()
                self._connect().rollback()
                if not is_sound:
                    self.repair()
            except sqlite3.Error as error:
                self._set_aside(error)
        self.ids, self.n_records = np.sort(self.rows["id"]), len(self.rows)

    def _forget(self) -> None:
        for name in _FACTS:
            vars(self).pop(name, None)
        self._parts, self.end, self._is_stale = [np.empty(0, ROW)], 0, False

    def _read_tables(self) -> bool:
        """Read facts and batches. Returns whether all are undamaged and the last record is also the last one listed."""
        database, damages = self._connect(), list[str]()
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM facts WHERE name = ''")
        except sqlite3.OperationalError as error:
            if not _is_damage(error, self.path):  # damage can make the file read-only
                raise
            damages.append("header")
        for key, data, checksum in _read_table(database, "SELECT * FROM facts", damages):
            name = str(key, errors="replace") if isinstance(key, bytes) else ""
            if name in _FACTS and _is_sound(data, checksum, key):
                is_array = isinstance(getattr(Journal, name), np.ndarray)
                setattr(self, name, np.frombuffer(data, "V16") if is_array else json.loads(data))
            else:
                damages.append("facts")
        if damages:
            self.indexing = True
            self.indexed = vars(self).get("indexed", UNKNOWN)
        batches = list(_read_table(database, "SELECT pairs, checksum FROM batches ORDER BY seq", damages))
        sound = [pairs for pairs, checksum in batches if _is_sound(pairs, checksum)]
        self._parts = [np.frombuffer(bytearray().join(sound), ROW)]
        last = max([seq or 0 for (seq,) in _read_table(database, "SELECT MAX(seq) FROM records", damages)], default=0)
        listed = int(self.rows["seq"].max(initial=0))
        self.end = max(last, listed, self.indexed)
        return not damages and len(sound) == len(batches) and last == listed

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, or a part of the current one. If it raises UserError, nothing is written."""
        with self._lock:
            if self._is_stale:
                self._read()
            if self._database and self._database.in_transaction:
                yield self._database
                return
            try:
                database = self._connect()
                database.execute("BEGIN IMMEDIATE")
                if (database.execute("SELECT MAX(seq) FROM records").fetchone()[0] or 0) > self.end:
                    raise UserError(f"another process writes to the journal {self.path}; wait until it has ended")
                yield database
                database.execute("COMMIT")
            except BaseException as error:
                self.close()  # rolls back; the file will show whether a failed COMMIT took effect
                self._is_stale = True
                if not isinstance(error, sqlite3.Error):
                    raise
                if _is_damage(error, self.path):  # in a page that only a write reads
                    self.repair()
                    raise UserError(f"journal {self.path} was damaged ({error}) and is repaired; run again") from None
                raise UserError(f"journal {self.path} cannot be written: {error}; fix that and run again") from None

    def _connect(self) -> sqlite3.Connection:
        if self._database is None:
            is_new = not self.path.exists() or not self.path.stat().st_size
            self.path.parent.mkdir(parents=True, exist_ok=True)
            pages = f"PRAGMA page_size = {PAGE_BYTES}; PRAGMA auto_vacuum = INCREMENTAL;" if is_new else ""
            mode = "TRUNCATE" if is_on_network(self.path) else "WAL"
            database = connect(self.path)
            try:
                database.executescript(
                    f"{pages} PRAGMA journal_mode = {mode}; PRAGMA wal_autocheckpoint = {WAL_BYTES // PAGE_BYTES};"
                    f"PRAGMA synchronous = FULL; PRAGMA fullfsync = ON; {_TABLES}"
                )
            except BaseException:
                database.close()
                raise
            self._database = database
            if is_new:
                fsync_dir(self.path.parent)
                fsync_dir(self.path.parent.parent)
        return self._database

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Rename a file that is not SQLite any more. Raises UserError for other errors (locked, full disk, rights)."""
        self.close()
        if not _is_damage(error, self.path):
            raise UserError(f"journal {self.path} cannot be read: {error}; fix that and run again") from None
        for suffix in _FILES:
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{self.path}.damaged{suffix}")
        LOG.warning(
            "journal %s cannot be read (%s) and is renamed to %s.damaged: the records of the collection are "
            "taken over, the others will be embedded again",
            self.path,
            error,
            self.path.name,
        )
        self._forget()


@contextlib.contextmanager
def building(path: Path, n_bytes: int) -> Iterator[Journal]:
    """Open a new journal of about `n_bytes` that replaces the closed journal at `path` if the block succeeds.

    After a kill, the old journal is unchanged. Raises UserError if the disk is too full for both.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < 1.2 * n_bytes:
        raise UserError(f"{path} needs {1.2 * n_bytes / 1e9:.1f} GB of disk, but only {free / 1e9:.1f} GB are free")
    temporary = path.with_name(f"{path.name}.new")
    _unlink(temporary)
    new = Journal(temporary)
    try:
        yield new
    finally:
        new.close()  # also moves the write-ahead log into the file
    if Path(f"{path}-wal").exists() or Path(f"{temporary}-wal").exists():
        raise UserError(f"another process reads the journal {path}; end it, and run again")
    os.replace(temporary, path)
    fsync_dir(path.parent)


def read_records(path: Path, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[dict[str, Any]], np.ndarray]]:
    """Yield ids (n,) V16, metadata and vectors (n, D) float32 of `rows` (N,) ROW, up to READ at a time.

    No transaction stays open in between, so that a writer never waits long. Raises DamagedError.
    """
    if not len(rows):  # a new store has no file yet
        return
    with contextlib.closing(connect(path)) as database:
        for start in range(0, len(rows), READ):
            part = rows[start : start + READ]
            database.execute("BEGIN")
            records = [_get(database, seq, id_) for seq, id_ in part.tolist()]
            database.execute("COMMIT")
            vectors = np.frombuffer(b"".join(vector for _, _, vector in records), "<f4").reshape(len(part), -1)
            yield part["id"], [json.loads(metadata) for _, metadata, _ in records], vectors


def connect(path: Path) -> sqlite3.Connection:
    """Open the SQLite file at `path`. A statement outside BEGIN and COMMIT is its own transaction. Text is bytes."""
    database = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
    database.text_factory = bytes  # damaged text may not be UTF-8
    return database


def is_on_network(path: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether `path` is on a network file system, where processes cannot share a write-ahead log's memory.

    Linux's table of mounts and Windows' drive types show this. On other systems, SQLite's own test must be enough.
    """
    path = path.absolute()
    if sys.platform == "win32":
        import ctypes

        return path.drive.startswith("\\\\") or ctypes.windll.kernel32.GetDriveTypeW(f"{path.drive}\\") == 4
    if not mounts.exists():
        return False
    entries = [line.split() for line in mounts.read_text(errors="surrogateescape").splitlines()]
    within = [(len(folder), kind) for _, folder, kind, *_ in entries if path.is_relative_to(folder)]
    return max(within, default=(0, ""))[1] in NETWORK


def _insert(database: sqlite3.Connection, rows: np.ndarray, records: Iterable[Record]) -> None:
    values = ((seq, *record, _checksum(seq, *record)) for seq, record in zip(rows["seq"].tolist(), records))
    database.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?)", values)
    pairs = rows.tobytes()
    database.execute("INSERT INTO batches VALUES (?, ?, ?)", (int(rows["seq"][0]), pairs, zlib.crc32(pairs)))


def _get(database: sqlite3.Connection, seq: int, id_: bytes | None = None) -> Record:
    """Read the record `seq`. Raises DamagedError if it is damaged, or if its id is not `id_`."""
    try:
        row = database.execute("SELECT id, metadata, vector, checksum FROM records WHERE seq = ?", (seq,)).fetchone()
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise
        raise DamagedError(f"record {seq}: {error}") from None
    if row is None or not all(isinstance(part, bytes) for part in row[:3]) or row[3] != _checksum(seq, *row[:3]):
        raise DamagedError(f"record {seq}: the checksum does not match")
    if id_ is not None and row[0] != id_:
        raise DamagedError(f"record {seq}: the id does not match")
    return row[:3]


def _read_table(database: sqlite3.Connection, query: str, damages: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows that can be read. If others cannot, the error is added to `damages`."""
    try:
        yield from database.execute(query)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        damages.append(str(error))


def _is_damage(error: sqlite3.Error, path: Path) -> bool:
    """Whether the file's content causes the error, and not a full disk, a permission or another process."""
    damages = ["no such", "unsupported file format", *(["readonly"] if os.access(path, os.W_OK) else [])]
    return not isinstance(error, sqlite3.OperationalError) or any(text in str(error) for text in damages)


def _is_sound(data: Any, checksum: Any, before: bytes = b"") -> bool:
    return isinstance(data, bytes) and zlib.crc32(before + data) == checksum


def _checksum(seq: int, id_: bytes, metadata: bytes, vector: bytes) -> int:
    return zlib.crc32(vector, zlib.crc32(metadata, zlib.crc32(seq.to_bytes(8, "little") + id_)))


def _to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _unlink(path: Path) -> None:
    for suffix in _FILES:
        Path(f"{path}{suffix}").unlink(missing_ok=True)
