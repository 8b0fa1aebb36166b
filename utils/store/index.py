"""The Chroma collection as an index of the journal: the tasks of embed.py on it, each run in a child process.

A kill during Chroma's flush tears its files, and a torn store can take down the process that opens it: a child here.
Chroma's upsert also holds the GIL, which would stall the process that feeds the model. `call(task, place, name, ...)`
runs one of the tasks below; each takes, last, a function that receives the number of records done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.ids import from_ids, is_uuid, to_ids
from utils.lock import hold
from utils.processes import DiedError, Progress
from utils.processes import call as call_process
from utils.store import collection as collections
from utils.store.server import Place, Server, fitting
from utils.store.vectors import CHANGE, STORE, read_frames

if TYPE_CHECKING:
    import chromadb

READ = 20_000  # records a child reads and hands over, 40 MB at 512 dimensions
SAMPLE = 1_000  # vectors read all over the index to see whether it is whole, and as many of the last
BATCH = 1_000  # records an upsert; Chroma takes 5,461 at most
USUAL_SYNC_THRESHOLD = 1_000  # Chroma's default, left in the collection for whoever adds to it by other means
Batch = tuple[int, list[str], list[dict[str, Any]], np.ndarray]


class TornError(UserError):
    """The store cannot be opened, read or written: its files are torn, or the process that tried died."""


class Health(NamedTuple):
    """A healthy store: its collection's metadata (None: no such collection) and ids (n,) V16, sorted."""

    model: dict[str, Any] | None
    ids: np.ndarray


class Backlog(NamedTuple):
    """A part of a journal: its file, from byte to byte, less the ids that people deleted, (n,) V16; the model."""

    journal: Path
    start: int
    end: int
    gone: np.ndarray
    model: dict[str, Any]


def call(task: Callable[..., Any], place: Place, *args: Any, progress: Progress = lambda n: None) -> Any:
    """`task(place, *args, progress)` in a child process that is alone with the store.

    Raises UserError as the task does, and TornError for everything else that goes wrong in it.
    """
    try:
        return call_process(_guarded, task, place, *args, progress=progress)
    except DiedError as error:
        raise TornError(f"the process that opened it died with {error}") from None


def _guarded(task: Callable[..., Any], place: Place, *args: Any) -> Any:
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(place, Path):  # an orphan of a killed run may still write
                stack.enter_context(hold(place / ".index.lock", f"the index in {place}", wait_s=60))
            return task(place, *args)
    except BaseException as error:  # Chroma's PanicException is no Exception
        if isinstance(error, UserError) and not isinstance(error, collections.UnreadableError):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TornError(first_line) from None


def inspect(place: Place, name: str, _progress: Progress) -> Health:
    """Finish what a killed run left in Chroma's log, and read vectors all over the index."""
    from chromadb.errors import NotFoundError

    try:
        collection = collections.open_client(place).get_collection(name, embedding_function=None)
    except NotFoundError:
        return Health(None, np.empty(0, "V16"))
    metadata = dict(collection.metadata or {})
    if isinstance(place, Server):
        return Health(metadata, _sorted_ids(collections.read_ids(collection), place, name))
    # Set before the index is loaded: count() then replays what the log holds, and flushes it once.
    _sync_every(place, collection, 2)
    count = collection.count()
    ids = collection.get(include=[])["ids"]
    if len(ids) != count:
        raise ValueError(f"{count} records counted, {len(ids)} listed")
    checked = _sorted_ids(ids, place, name)
    _check_sample(collection, ids)
    _sync_every(place, collection, USUAL_SYNC_THRESHOLD)
    return Health(metadata, checked)


def _sorted_ids(ids: list[str], place: Place, name: str) -> np.ndarray:
    try:
        return np.sort(to_ids(ids))
    except ValueError:
        raise UserError(
            f"collection {name} in {place} has ids that are not uuids; use another COLLECTION_NAME"
        ) from None


def _check_sample(collection: chromadb.Collection, ids: list[str]) -> None:
    # A file that was cut short misses the latest records; ids come in the order of insertion.
    sample = [*ids[: -SAMPLE : max(1, len(ids) // SAMPLE)], *ids[-SAMPLE:]]
    if sample:
        found = collections.read_vectors(collection, sample)
        lengths, is_ours = np.linalg.norm(found, axis=1), "dimension" in (collection.metadata or {})
        if not (lengths > 0).all() or (is_ours and not np.allclose(lengths, 1, atol=1e-3)):  # also if NaN
            raise ValueError("vectors that are not of length 1")
        collection.query(query_embeddings=found[:1], n_results=min(len(ids), 10), include=["distances"])


def apply(place: Place, name: str, backlog: Backlog, progress: Progress) -> int:
    """Bring the collection, made if missing, up to date with a part of the journal, and flush it once.

    Returns the number of records in the collection.
    """
    collection = collections.create(place, name, backlog.model)
    # Set before the index is loaded: the flush then comes with the last record, not in between.
    total = sum(len(ids) for _, ids, _, _ in _batches(backlog))
    _sync_every(place, collection, max(2, total))
    for kind, ids, metadata, vectors in _requests(place, _joined(_batches(backlog))):
        if kind == STORE:
            collection.upsert(ids=ids, embeddings=vectors, metadatas=metadata)  # type: ignore[arg-type]
        else:
            _change(collection, ids, metadata)
        progress(len(ids))
    _sync_every(place, collection, USUAL_SYNC_THRESHOLD)
    count = collection.count()
    if isinstance(place, Path):
        _fsync_all(place)
    return count


def _fsync_all(path: Path) -> None:
    """fsync before records are marked as indexed; after a power cut they would look user-deleted."""
    for file in path.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            with contextlib.suppress(OSError), file.open("r+b") as opened:
                os.fsync(opened.fileno())


def _sync_every(place: Place, collection: chromadb.Collection, n: int) -> None:
    """Set how many new records make embedded Chroma flush; a server has other users, and keeps its setting."""
    if isinstance(place, Path):
        collection.modify(configuration={"hnsw": {"sync_threshold": n}})


def _change(collection: chromadb.Collection, ids: list[str], metadata: list[dict[str, Any]]) -> None:
    """Replace metadata. update() merges: a field that is gone is set to None, which deletes it."""
    old = collections.read_metadata(collection, ids)
    collection.update(ids=ids, metadatas=[dict.fromkeys(before, None) | now for before, now in zip(old, metadata)])


def _batches(backlog: Backlog) -> Iterator[Batch]:
    """(kind, ids, metadata, vectors) of each frame with records in it."""
    for frame in read_frames(backlog.journal, backlog.start, backlog.end):
        if frame.kind in (STORE, CHANGE):
            kept = ~np.isin(frame.ids, backlog.gone)
            metadata = [one for one, keep in zip(frame.metadata, kept) if keep]
            yield frame.kind, from_ids(frame.ids[kept]), metadata, frame.vectors[kept]


def _joined(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Successive batches of one kind as one of up to BATCH records: each call of Chroma has a fixed cost."""
    kind = -1
    ids: list[str] = []
    metadata: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    for batch in batches:
        if ids and (batch[0] != kind or len(ids) + len(batch[1]) > BATCH):
            yield kind, ids, metadata, np.concatenate(vectors)
            ids, metadata, vectors = [], [], []
        kind = batch[0]
        ids, metadata, vectors = ids + batch[1], metadata + batch[2], [*vectors, batch[3]]
    if ids:
        yield kind, ids, metadata, np.concatenate(vectors)


def _requests(place: Place, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches of a number and size that a server accepts."""
    if isinstance(place, Path):
        yield from batches
        return
    most = min(BATCH, collections.open_client(place).get_max_batch_size())
    for kind, ids, metadata, vectors in batches:
        for part in fitting(metadata, vectors.shape[1], most):
            yield kind, ids[part], metadata[part], vectors[part]


def delete(place: Place, name: str, ids: np.ndarray, progress: Progress) -> int:
    """Delete the records `ids` (n,) V16, those that are there; returns the number of records left."""
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    _sync_every(place, collection, max(2, len(ids)))
    texts = from_ids(ids)
    for start in range(0, len(texts), BATCH):
        collection.delete(ids=texts[start : start + BATCH])
        progress(len(texts[start : start + BATCH]))
    _sync_every(place, collection, USUAL_SYNC_THRESHOLD)
    return collection.count()


def drop(place: Place, name: str, _progress: Progress) -> None:
    """Delete the whole collection, torn or not, if it is there."""
    from chromadb.errors import NotFoundError

    with contextlib.suppress(NotFoundError):
        collections.open_client(place).delete_collection(name)
    if isinstance(place, Path):
        _sweep(place)


def _sweep(path: Path) -> None:
    """Remove the folders of vector indexes that the database no longer knows: Chroma leaves them behind."""
    with contextlib.closing(sqlite3.connect(path / "chroma.sqlite3")) as database:
        known = {row[0] for row in database.execute("SELECT id FROM segments")}
    for folder in path.iterdir():
        if is_uuid(folder.name) and folder.name not in known and (folder / "data_level0.bin").exists():
            shutil.rmtree(folder, ignore_errors=True)


def is_database(path: Path, _progress: Progress) -> bool:
    """Whether Chroma's SQLite file in `path` is missing or sound, by SQLite's own check."""
    if not (path / "chroma.sqlite3").exists():
        return True
    try:
        with contextlib.closing(sqlite3.connect(path / "chroma.sqlite3")) as database:
            return database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.OperationalError:  # full, locked, not ours to read: no sign of damage
        return True
    except sqlite3.DatabaseError:
        return False


def read(place: Place, name: str, ids: np.ndarray, _progress: Progress) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Vectors (n, D) float32 and metadata of the records `ids` (n,) V16, at most READ of them."""
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    texts = from_ids(ids)
    return collections.read_vectors(collection, texts), collections.read_metadata(collection, texts)


def compare(place: Place, name: str, backlog: Backlog, progress: Progress) -> tuple[int, list[str]]:
    """Compare each vector of the journal with the collection's: how many, and the ids that differ or are missing.

    Chroma normalizes each vector once more, which moves last bits: 1e-6 in each number counts as equal.
    """
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    compared, differing = 0, []
    for kind, ids, _, vectors in _joined(_batches(backlog)):
        if kind == STORE:
            found = _find(collection, ids)
            compared += len(found)
            same = lambda id_, vector: id_ in found and np.abs(found[id_] - vector).max() <= 1e-6  # noqa: B023, E731
            differing += [id_ for id_, vector in zip(ids, vectors) if not same(id_, vector)]
            progress(len(ids))
    return compared, differing


def _find(collection: chromadb.Collection, ids: list[str]) -> dict[str, np.ndarray]:
    """id -> vector of the readable ones among `ids`."""
    try:
        got = collection.get(ids=ids, include=["embeddings"])
    except Exception:  # one lost record fails the whole page
        half = len(ids) // 2
        return _find(collection, ids[:half]) | _find(collection, ids[half:]) if half else {}
    return dict(zip(got["ids"], np.asarray(got["embeddings"], np.float32)))
