"""The Chroma collection as an index of the journal: embed.py's tasks on the collection, each in a child process.

A kill during Chroma's flush tears its files, and a torn store can crash the process that opens it. Chroma's upsert also
holds the GIL, which would stall the process that feeds the model. `call(task, place, name, ...)` runs one of the tasks
below. The last argument of each task is a function that receives the number of records done.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.ids import from_ids, is_uuid, to_ids
from utils.items.formatted import restore_item, to_metadata
from utils.lock import hold
from utils.processes import Child, DiedError, Progress
from utils.store import collection as collections
from utils.store.server import Place, Server, request_slices
from utils.store.vectors import READ, DamagedError, building, read_records

if TYPE_CHECKING:
    import chromadb

SAMPLE = 1_000  # vectors read to check an index: this many from all over it, and as many of the last
USUAL_SYNC_THRESHOLD = 1_000  # Chroma's default, restored for other programs that add to the collection
GROWTH, GROWTH_BYTES = 4, 100_000_000  # Chroma's files may have this many times their normal size, or this many bytes
RECORD_BYTES = 3_000  # approximate size of a record in a journal
_ahead: list[Child] = []  # processes that prepare() started


class TornError(UserError):
    """The store cannot be opened, read or written: its files are torn, or the child process died."""


class Health(NamedTuple):
    """A readable collection: metadata (None: it is missing), sorted ids (n,) V16, whether a sample was undamaged."""

    model: dict[str, Any] | None = None
    ids: np.ndarray = np.empty(0, "V16")
    is_sound: bool = True


def prepare() -> None:
    """Start the process of the next call() ahead, as importing Chroma takes a second. forget() ends an unused one."""
    _ahead.append(Child("chromadb"))


def forget() -> None:
    while _ahead:
        _ahead.pop().kill()


def call(
    task: Callable[..., Any],
    place: Place,
    *args: Any,
    progress: Progress = lambda n: None,
    watch: Callable[[], None] = lambda: None,
) -> Any:
    """Run `task(place, *args, progress)` in a child process that has the store to itself; `watch` can stop it.

    Raises the task's UserError or DamagedError, and TornError for any other failure.
    """
    child = _ahead.pop() if _ahead else None
    child = child if child and child.is_alive() else Child()
    try:
        result = child.call(_guarded, task, place, *args, progress=progress, watch=watch)
    except DiedError as error:
        raise TornError(f"the process that opened it died with {error}") from None
    watch()
    return result


def _guarded(task: Callable[..., Any], place: Place, *args: Any) -> Any:
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(place, Path):  # an orphan of a killed run may still write
                stack.enter_context(hold(place / ".index.lock", f"the index in {place}", wait_s=60))
            return task(place, *args)
    except (UserError, DamagedError):
        raise
    except BaseException as error:  # Chroma's PanicException is not an Exception
        first_line = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TornError(first_line) from None


# --- reading ----------------------------------------------------------------------------------------------------------


def inspect(place: Place, name: str, _progress: Progress) -> Health:
    """Check a collection: apply what a killed run left in Chroma's log, and read vectors from all over the index."""
    from chromadb.errors import ChromaError, NotFoundError

    try:
        collection = _get(place, name)
    except NotFoundError:
        return Health()
    metadata, is_sound = dict(collection.metadata or {}), True
    if collections.DERIVED in metadata:
        raise UserError(
            f"collection {name} is derived from another by ann_train.py: embed into that one, then run python "
            "ann_train.py --apply; or set another COLLECTION_NAME"
        )
    if isinstance(place, Server):
        ids = collections.read_ids(collection)
        try:
            _check_sample(collection, ids, SAMPLE // 10)
        except (ValueError, KeyError, ChromaError):
            is_sound = False
    else:
        # Set before the index is loaded, so that count() replays the log and flushes it once.
        _sync_every(place, collection, 2)
        count = collection.count()
        ids = collection.get(include=[])["ids"]
        if len(ids) != count:
            raise ValueError(f"records counted: {count}, listed: {len(ids)}")
        _check_sample(collection, ids, SAMPLE)
        _end_write(place, collection)
    try:
        return Health(metadata, np.sort(to_ids(ids)), is_sound)
    except ValueError:
        raise UserError(
            f"collection {name} in {place} has ids that are not uuids; use another COLLECTION_NAME"
        ) from None


def _get(place: Place, name: str) -> chromadb.Collection:
    return collections.open_client(place).get_collection(name, embedding_function=None)


def _check_sample(collection: chromadb.Collection, ids: list[str], n: int) -> None:
    """Raises an error unless `n` vectors from all over the collection and the last `n` are readable, with length 1."""
    # A truncated file lacks the latest records; embedded Chroma lists ids in the order of insertion.
    sample = [*ids[: -n : max(1, len(ids) // n)], *ids[-n:]]
    if sample:
        found = collections.read_vectors(collection, sample)
        lengths, is_ours = np.linalg.norm(found, axis=1), "dimension" in (collection.metadata or {})
        if not (lengths > 0).all() or (is_ours and not np.allclose(lengths, 1, atol=1e-3)):  # also if NaN
            raise ValueError("some vectors do not have length 1")
        collection.query(query_embeddings=found[:1], n_results=min(len(ids), 10), include=["distances"])


def compare(place: Place, name: str, journal: Path, rows: np.ndarray, progress: Progress) -> tuple[int, np.ndarray]:
    """Compare the vectors of `rows` (n,) ROW with the collection.

    Returns the number of vectors found there, and the rows that differ or are missing. Chroma normalizes each vector
    again, which changes the last bits, so differences up to 1e-6 per number count as equal.
    """
    collection = _get(place, name)
    compared, same = 0, [np.empty(0, bool)]
    for ids, _, vectors in read_records(journal, rows):
        texts = from_ids(ids)
        found = _find(collection, texts)
        missing = np.full(vectors.shape[1], np.inf, np.float32)
        differences = np.abs(np.stack([found.get(id_, missing) for id_ in texts]) - vectors).max(axis=1)
        same.append(differences <= 1e-6)
        compared += len(found)
        progress(len(ids))
    return compared, rows[~np.concatenate(same)]


def _find(collection: chromadb.Collection, ids: list[str]) -> dict[str, np.ndarray]:
    """id -> vector, for each of `ids` that can be read."""
    try:
        got = collection.get(ids=ids, include=["embeddings"])
    except Exception:  # one lost record makes the whole page fail
        half = len(ids) // 2
        return _find(collection, ids[:half]) | _find(collection, ids[half:]) if half else {}
    return dict(zip(got["ids"], np.asarray(got["embeddings"], np.float32)))


def take_over(place: Place, name: str, journal: Path, progress: Progress) -> None:
    """Make the journal of a collection that has none. If the process is killed, there is still none."""
    collection = _get(place, name)
    texts = collections.read_ids(collection)
    with building(journal, RECORD_BYTES * len(texts)) as new:
        for start in range(0, len(texts), READ):
            page = texts[start : start + READ]
            metadata = collections.read_metadata(collection, page)
            new.append(to_ids(page), metadata, collections.read_vectors(collection, page))
            progress(len(page))
        new.note(model=dict(collection.metadata), indexed=len(texts))


# --- writing ----------------------------------------------------------------------------------------------------------


def apply(
    place: Place,
    name: str,
    journal: Path,
    new: np.ndarray,
    changed: np.ndarray,
    removed: np.ndarray,
    model: dict[str, Any],
    progress: Progress,
) -> int:
    """Write records `new` (n,) ROW and metadata of `changed` (m,) ROW of a journal; delete the ids `removed` (k,) V16.

    The collection is created if missing, and flushed once. Returns the number of records in it.
    """
    collection = collections.create(place, name, model)
    # Set before the index is loaded, so that Chroma flushes with the last record and not before.
    _sync_every(place, collection, len(new) + len(changed) + len(removed))
    for ids, metadata, vectors in _requests(place, journal, new):
        collection.upsert(ids=ids, embeddings=vectors, metadatas=metadata)  # type: ignore[arg-type]
        progress(len(ids))
    for ids, metadata, _ in _requests(place, journal, changed):
        old = collections.read_metadata(collection, ids)  # update() merges: None deletes a field that is gone
        merged = [dict.fromkeys(before, None) | now for before, now in zip(old, metadata)]
        collection.update(ids=ids, metadatas=merged)  # type: ignore[arg-type]
        progress(len(ids))
    for start in range(0, len(removed), READ):
        page = from_ids(removed[start : start + READ])
        collection.delete(ids=page)  # ignores missing ids
        progress(len(page))
    return _end_write(place, collection)


def _requests(
    place: Place, journal: Path, rows: np.ndarray
) -> Iterator[tuple[list[str], list[dict[str, Any]], np.ndarray]]:
    """Yield ids, metadata and vectors of records, in batches that do not exceed Chroma's limits of number and size."""
    most = READ
    if isinstance(place, Server) and len(rows):
        most = min(READ, collections.open_client(place).get_max_batch_size())
    for ids, metadata, vectors in read_records(journal, rows):
        texts, fit = from_ids(ids), [to_metadata(restore_item(one)) for one in metadata]
        for part in request_slices(fit, vectors.shape[1], most):
            yield texts[part], fit[part], vectors[part]


def _sync_every(place: Place, collection: chromadb.Collection, n: int) -> None:
    """Make embedded Chroma flush after `n` new records. A server has other users, and keeps its setting."""
    if isinstance(place, Path):
        collection.modify(configuration={"hnsw": {"sync_threshold": max(2, n)}})


def _end_write(place: Place, collection: chromadb.Collection) -> int:
    """End a write, and return the number of records in the collection.

    fsync comes before records are marked as indexed and files as seen. Otherwise, after a power cut, lost records would
    look user-deleted, and torn files would look undamaged.
    """
    _sync_every(place, collection, USUAL_SYNC_THRESHOLD)
    count = collection.count()
    for file in place.rglob("*") if isinstance(place, Path) else ():
        if file.is_file() and not file.name.startswith("."):
            with contextlib.suppress(OSError), file.open("r+b") as opened:
                os.fsync(opened.fileno())
    return count


def drop(place: Place, name: str, _progress: Progress) -> None:
    """Delete the collection, torn or not, if it exists, and the index folders that Chroma left behind."""
    from chromadb.errors import NotFoundError

    with contextlib.suppress(NotFoundError):
        collections.open_client(place).delete_collection(name)
    if isinstance(place, Path):
        known = {id_ for (id_,) in _query(place, "SELECT id FROM segments")}
        for folder in place.iterdir():
            if is_uuid(folder.name) and folder.name not in known and (folder / "data_level0.bin").exists():
                shutil.rmtree(folder, ignore_errors=True)


def derive(
    place: Place,
    source: str,
    name: str,
    transform: Callable[[np.ndarray], np.ndarray],
    metadata: dict[str, Any],
    progress: Progress,
) -> int:
    """Make the collection `name` + WHOLE from the records of `source` with transformed vectors; returns their number.

    promote() gives it its name. Until then, an existing collection `name` does not change.
    """
    for suffix in (collections.PART, collections.WHOLE, collections.OLD):
        drop(place, name + suffix, progress)
    origin, target = _get(place, source), collections.create(place, name + collections.PART, metadata)
    ids, page = collections.read_ids(origin), collections.PAGE
    most = min(page, collections.open_client(place).get_max_batch_size())
    _sync_every(place, target, len(ids))  # one flush, after the last record
    for start in range(0, len(ids), page):
        got: Any = origin.get(ids=ids[start : start + page], include=["embeddings", "metadatas"])
        vectors = transform(np.asarray(got["embeddings"], np.float32))
        for part in request_slices(got["metadatas"], vectors.shape[1], most):
            target.upsert(ids=got["ids"][part], embeddings=vectors[part], metadatas=got["metadatas"][part])
        progress(len(got["ids"]))
    count = _end_write(place, target)
    target.modify(name=name + collections.WHOLE)
    return count


def promote(place: Place, name: str, progress: Progress) -> None:
    """Replace the collection `name` by `name` + WHOLE. After a kill between the two renames, readers finish them."""
    from chromadb.errors import NotFoundError

    whole = _get(place, name + collections.WHOLE)
    with contextlib.suppress(NotFoundError):
        _get(place, name).modify(name=name + collections.OLD)
    whole.modify(name=name)
    drop(place, name + collections.OLD, progress)


# --- Chroma's files, read without Chroma ------------------------------------------------------------------------------


def watch_size(place: Place, name: str, journal: Path, n_records: int) -> Callable[[], None]:
    """Return a function that raises TornError if Chroma's files are much larger than `n_records` of the journal need.

    Chroma's graph of neighbors can grow without bound. A record needs about twice its bytes in the journal, plus 1 KB.
    """
    if isinstance(place, Server):
        return lambda: None
    limit = max(GROWTH_BYTES, GROWTH * (2 * journal.stat().st_size + 1_000 * n_records))
    database = place / "chroma.sqlite3"
    before = _disk_bytes(database)  # it may contain other collections

    def watch() -> None:
        files = (file for segment in _segments(place, name) for file in (place / segment).glob("*"))
        size = _disk_bytes(database) - before + sum(map(_disk_bytes, files))
        if size > limit:
            raise TornError(f"its files grew to {size / 1e6:.0f} MB; {limit / 1e6:.0f} MB are more than enough")

    return watch


def fingerprint(place: Path, name: str, rows: np.ndarray) -> bytes:
    """Bytes that change with every write to the collection, and with the journal's `rows` (n,) ROW.

    b"" if the collection has another number of records, or its log is not applied, except for one write, which Chroma
    never flushes alone. This does not load Chroma, whose index takes 2.5 KB of memory per record at 512 dimensions.
    """
    query = """
        SELECT s.id, m.seq_id, (SELECT MAX(seq_id) FROM embeddings_queue WHERE topic LIKE '%' || c.id),
            (SELECT COUNT(*) FROM embeddings_queue WHERE topic LIKE '%' || c.id AND seq_id > m.seq_id),
            (SELECT COUNT(*) FROM embeddings WHERE segment_id = s.id)
        FROM collections c JOIN segments s ON s.collection = c.id JOIN max_seq_id m ON m.segment_id = s.id
        WHERE c.name = ? ORDER BY s.id"""
    segments = _query_if_sound(place, query, name)
    if {n for *_, n in segments} != {0, len(rows)} or any(n > 1 for *_, n, _ in segments):
        return b""
    files = [file for id_, *_ in segments for file in sorted((place / id_).glob("*"))]
    times = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([zlib.crc32(rows.tobytes()), segments, times]).encode()


def _segments(place: Path, name: str) -> list[str]:
    """Names of the folders of the collection `name`."""
    query = "SELECT s.id FROM segments s JOIN collections c ON s.collection = c.id WHERE c.name = ?"
    return [id_ for (id_,) in _query_if_sound(place, query, name)]


def _query_if_sound(place: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    with contextlib.suppress(sqlite3.Error):
        return _query(place, query, *values)
    return []


def _query(place: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    path = place / "chroma.sqlite3"
    if not path.exists():  # connect() would create it; SQLite's URIs, which would not, refuse Windows' shares
        raise sqlite3.OperationalError(f"{path} does not exist")
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute(query, values).fetchall()


def _disk_bytes(path: Path) -> int:
    """Bytes on the disk, without the holes of a sparse file; 0 if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return min(status.st_size, 512 * getattr(status, "st_blocks", sys.maxsize))


def set_aside(place: Path) -> bool:
    """Rename Chroma's database if SQLite's own check finds damage; Chroma makes a new one. Returns whether it did."""
    try:
        if _query(place, "PRAGMA quick_check(1)") == [("ok",)]:
            return False
    except sqlite3.OperationalError:  # a full disk, a lock or missing permission is not damage
        return False
    except sqlite3.DatabaseError:
        pass
    for file in place.glob("chroma.sqlite3*"):  # also SQLite's files beside it
        if not file.name.endswith(".torn"):
            file.replace(file.with_name(f"{file.name}.torn"))
    return True
