"""The Chroma collection as an index of the journal, touched by embed.py in child processes only.

A kill in the middle of Chroma's flush tears its files, and a torn store can take down the process that opens it: here
that is a child. And Chroma's upsert holds the GIL, which would stall the process that feeds the model.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils import collection as collections
from utils.children import ignore, shielded
from utils.errors import UserError
from utils.formatted import from_ids, to_ids
from utils.ids import is_uuid
from utils.journal import CHANGE, STORE, read_frames
from utils.lock import hold
from utils.server import Place, Server, fitting

if TYPE_CHECKING:
    import chromadb

BATCH = 1_000  # records an upsert; Chroma takes 5,461 at most
SAMPLE = 1_000  # vectors that are read all over the index to see whether it is whole, and as many of the last
READ = 20_000  # records a child reads and hands over, 40 MB at 512 dimensions
USUAL_SYNC_THRESHOLD = 1_000  # Chroma's default, left in the collection for whoever adds to it by other means


class TornError(UserError):
    """The store cannot be opened, read or written: its files are torn, or the process that tried died."""


Progress = Callable[[int], Any]
_Batch = tuple[int, list[str], list[dict[str, Any]], np.ndarray]


class Work(NamedTuple):
    """A part of the journal to be indexed: its file, from byte to byte, less what people deleted, (n,) V16."""

    journal: Path
    start: int
    end: int
    gone: np.ndarray
    model: dict[str, Any]


class Health(NamedTuple):
    """What a healthy store says: its collection's metadata (None: no such collection) and ids (n,) V16, sorted."""

    model: dict[str, Any] | None
    ids: np.ndarray


def inspect(place: Place, name: str) -> Health:
    """Open the store where a crash cannot hurt, finish what a killed run left in Chroma's log, read all over it.

    Raises TornError; UserError for a collection that is not ours to touch.
    """
    if isinstance(place, Path) and not (place / "chroma.sqlite3").exists():
        return Health(None, np.empty(0, "V16"))
    model, ids = _in_child(_inspect, place, name)
    return Health(model, np.sort(np.frombuffer(ids, "V16")))


def apply(place: Place, name: str, work: Work, progress: Progress = lambda n: None) -> int:
    """Bring the collection, made if missing, up to date with a part of the journal, and flush it once.

    `progress` is told the records done. Returns the records in the collection then. Raises TornError.
    """
    return _in_child(_apply, place, name, work, progress=progress)


def delete(place: Place, name: str, ids: np.ndarray) -> int:
    """Delete the records `ids` (n,) V16, those that are there; returns how many others are. Raises TornError."""
    return _in_child(_delete, place, name, ids.tobytes())


def drop(place: Place, name: str) -> None:
    """Delete the whole collection, torn or not, if it is there. Raises TornError."""
    _in_child(_drop, place, name)


def is_database(path: Path) -> bool:
    """Whether the store's SQLite file is missing or sound, by SQLite's own check."""
    return _in_child(_is_database, path)


def vectors(place: Place, name: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """(ids, vectors (n, D) float32, metadata) of the records `ids` (n,) V16, page by page."""
    for start in range(0, len(ids), READ):
        page = ids[start : start + READ]
        yield page, *_in_child(_read, place, name, page.tobytes())


def compare(place: Place, name: str, work: Work, progress: Progress = lambda n: None) -> tuple[int, list[str]]:
    """Compare each vector of the journal with the collection's: how many, and the ids that differ or are missing.

    Chroma normalizes what it is given once more, which moves last bits: 1e-6 in each number counts as the same.
    Raises TornError.
    """
    return _in_child(_compare, place, name, work, progress=progress)


# --- in the child ----------------------------------------------------------------------------------------------------


def _inspect(place: Place, name: str, _progress: Progress) -> tuple[dict[str, Any] | None, bytes]:
    from chromadb.errors import NotFoundError

    client = collections.open_client(place)
    try:
        collection = client.get_collection(name, embedding_function=None)
    except NotFoundError:
        return None, b""
    if isinstance(place, Server):
        return dict(collection.metadata or {}), _to_bytes(collections.read_ids(collection), place, name)
    # Set before the index is loaded: what the log still holds is then replayed and flushed, once, by count().
    _sync_every(place, collection, 2)
    count = collection.count()
    ids = collection.get(include=[])["ids"]
    if len(ids) != count:
        raise ValueError(f"{count} records counted, {len(ids)} listed")
    as_bytes = _to_bytes(ids, place, name)
    # A file that was cut short lacks what was inserted last; ids come in that order.
    sample = [*ids[: -SAMPLE : max(1, len(ids) // SAMPLE)], *ids[-SAMPLE:]]
    if sample:
        found = collections.read_vectors(collection, sample)
        lengths, is_ours = np.linalg.norm(found, axis=1), "dimension" in (collection.metadata or {})
        if not (lengths > 0).all() or (is_ours and not np.allclose(lengths, 1, atol=1e-3)):  # NaN, too
            raise ValueError("vectors that are not of length 1")
        collection.query(query_embeddings=found[:1], n_results=min(count, 10), include=["distances"])
    _sync_every(place, collection, USUAL_SYNC_THRESHOLD)
    return dict(collection.metadata or {}), as_bytes


def _to_bytes(ids: list[str], place: Place, name: str) -> bytes:
    try:
        return to_ids(ids).tobytes()
    except ValueError:
        raise UserError(
            f"collection {name} in {place} has ids that are no uuids; use another COLLECTION_NAME"
        ) from None


def _apply(place: Place, name: str, work: Work, progress: Progress) -> int:
    collection = collections.create(place, name, work.model)
    # Set before the index is loaded: the flush then comes with the last record, not in between.
    total = sum(len(ids) for _, ids, _, _ in _batches(work))
    _sync_every(place, collection, max(2, total))
    for kind, ids, metadata, vectors in _requests(place, _joined(_batches(work))):
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
    """Before the journal notes what is indexed, which would be taken for deleted if a power failure could undo it."""
    for file in path.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            with contextlib.suppress(OSError), file.open("r+b") as opened:
                os.fsync(opened.fileno())


def _batches(work: Work) -> Iterator[_Batch]:
    """(kind, ids, metadata, vectors) of each frame with records in it."""
    for frame in read_frames(work.journal, work.start, work.end):
        if frame.kind in (STORE, CHANGE):
            kept = ~np.isin(frame.ids, work.gone)
            metadata = [one for one, keep in zip(frame.metadata, kept) if keep]
            yield frame.kind, from_ids(frame.ids[kept]), metadata, frame.vectors[kept]


def _joined(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """Successive batches of one kind as one of up to BATCH records: Chroma has a price per call."""
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


def _requests(place: Place, batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """Batches of the number and size that a server takes."""
    if isinstance(place, Path):
        yield from batches
        return
    most = min(BATCH, collections.open_client(place).get_max_batch_size())
    for kind, ids, metadata, vectors in batches:
        for part in fitting(metadata, vectors.shape[1], most):
            yield kind, ids[part], metadata[part], vectors[part]


def _sync_every(place: Place, collection: chromadb.Collection, n: int) -> None:
    """How many new records make Chroma flush; a server, which others use, decides itself."""
    if isinstance(place, Path):
        collection.modify(configuration={"hnsw": {"sync_threshold": n}})


def _change(collection: chromadb.Collection, ids: list[str], metadata: list[dict[str, Any]]) -> None:
    """Replace metadata; update() merges, so fields that are gone are set to None, which deletes them."""
    old = collections.read_metadata(collection, ids)
    collection.update(ids=ids, metadatas=[dict.fromkeys(before, None) | now for before, now in zip(old, metadata)])


def _delete(place: Place, name: str, ids: bytes, progress: Progress) -> int:
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    _sync_every(place, collection, max(2, len(ids) // 16))
    texts = from_ids(np.frombuffer(ids, "V16"))
    for start in range(0, len(texts), BATCH):
        collection.delete(ids=texts[start : start + BATCH])
        progress(len(texts[start : start + BATCH]))
    _sync_every(place, collection, USUAL_SYNC_THRESHOLD)
    return collection.count()


def _drop(place: Place, name: str, _progress: Progress) -> None:
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


def _is_database(path: Path, _progress: Progress) -> bool:
    if not (path / "chroma.sqlite3").exists():
        return True
    try:
        with contextlib.closing(sqlite3.connect(path / "chroma.sqlite3")) as database:
            return database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.OperationalError:  # full, locked, not ours to read: nothing is known to be wrong with it
        return True
    except sqlite3.DatabaseError:
        return False


def _read(place: Place, name: str, ids: bytes, _progress: Progress) -> tuple[np.ndarray, list[dict[str, Any]]]:
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    texts = from_ids(np.frombuffer(ids, "V16"))
    return collections.read_vectors(collection, texts), collections.read_metadata(collection, texts)


def _compare(place: Place, name: str, work: Work, progress: Progress) -> tuple[int, list[str]]:
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    compared, differing = 0, []
    for kind, ids, _, vectors in _joined(_batches(work)):
        if kind == STORE:
            found = _find(collection, ids)
            compared += len(found)
            same = lambda id_, vector: id_ in found and np.abs(found[id_] - vector).max() <= 1e-6  # noqa: B023, E731
            differing += [id_ for id_, vector in zip(ids, vectors) if not same(id_, vector)]
            progress(len(ids))
    return compared, differing


def _find(collection: chromadb.Collection, ids: list[str]) -> dict[str, np.ndarray]:
    """id -> vector of what can be read of `ids`."""
    try:
        got = collection.get(ids=ids, include=["embeddings"])
    except Exception:  # one that is lost takes its neighbors along
        half = len(ids) // 2
        return _find(collection, ids[:half]) | _find(collection, ids[half:]) if half else {}
    return dict(zip(got["ids"], np.asarray(got["embeddings"], np.float32)))


def _in_child(task: Callable[..., Any], *args: Any, progress: Progress = lambda n: None) -> Any:
    """Run `task(*args, progress)` in a new process. Raises TornError for whatever goes wrong in it but UserErrors.

    It hears neither Ctrl-C nor SIGTERM, which go to the whole group; interrupted, it has ten seconds to end.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(sender, task, args), daemon=True)
    with shielded():
        child.start()
    sender.close()
    try:
        while True:
            kind, value = receiver.recv()
            if kind == "result":
                return value
            if kind == "error":
                raise value
            progress(value)
    except EOFError:
        child.join()
        raise TornError(f"the process that opened it died with {child.exitcode}") from None
    finally:
        child.join(timeout=None if child.exitcode is not None else 10)
        child.kill()


def _run(sender: Connection, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    ignore(signal.SIGINT, signal.SIGTERM)  # the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        place: Place = args[0]
        with contextlib.ExitStack() as stack:
            if isinstance(place, Path):  # until an orphan has died
                stack.enter_context(hold(place / ".index.lock", f"the index in {place}", wait_s=60))
            sender.send(("result", task(*args, lambda n: sender.send(("progress", n)))))
    except BaseException as error:  # Chroma's PanicException is no Exception
        is_users = isinstance(error, UserError) and not isinstance(error, collections.UnreadableError)
        first_line = (str(error).splitlines() or [type(error).__name__])[0][:300]
        sender.send(("error", error if is_users else TornError(first_line)))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
