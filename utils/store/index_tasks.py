"""What is done to a Chroma collection, always in a child process of embed.py: utils/store/index.py starts them.

Each task takes the place and name of the collection first and, last, a function that is told the records done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import UserError
from utils.ids import from_ids, is_uuid, to_ids
from utils.lock import hold
from utils.processes import Progress
from utils.store import collection as collections
from utils.store.backlog import BATCH, Backlog, batches, joined, requests
from utils.store.server import Place, Server
from utils.store.vectors import STORE

if TYPE_CHECKING:
    import chromadb

SAMPLE = 1_000  # vectors that are read all over the index to see whether it is whole, and as many of the last
USUAL_SYNC_THRESHOLD = 1_000  # Chroma's default, left in the collection for whoever adds to it by other means


class TornError(UserError):
    """The store cannot be opened, read or written: its files are torn, or the process that tried died."""


def guarded(task: Callable[..., Any], place: Place, *args: Any) -> Any:
    """`task(place, *args)`, alone with the store. Raises TornError for whatever goes wrong in it but UserErrors."""
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(place, Path):  # until an orphan has died
                stack.enter_context(hold(place / ".index.lock", f"the index in {place}", wait_s=60))
            return task(place, *args)
    except BaseException as error:  # Chroma's PanicException is no Exception
        if isinstance(error, UserError) and not isinstance(error, collections.UnreadableError):
            raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise TornError(first_line) from None


def inspect(place: Place, name: str, _progress: Progress) -> tuple[dict[str, Any] | None, bytes]:
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


def apply(place: Place, name: str, backlog: Backlog, progress: Progress) -> int:
    collection = collections.create(place, name, backlog.model)
    # Set before the index is loaded: the flush then comes with the last record, not in between.
    total = sum(len(ids) for _, ids, _, _ in batches(backlog))
    _sync_every(place, collection, max(2, total))
    for kind, ids, metadata, vectors in requests(place, joined(batches(backlog))):
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


def _sync_every(place: Place, collection: chromadb.Collection, n: int) -> None:
    """How many new records make Chroma flush; a server, which others use, decides itself."""
    if isinstance(place, Path):
        collection.modify(configuration={"hnsw": {"sync_threshold": n}})


def _change(collection: chromadb.Collection, ids: list[str], metadata: list[dict[str, Any]]) -> None:
    """Replace metadata; update() merges, so fields that are gone are set to None, which deletes them."""
    old = collections.read_metadata(collection, ids)
    collection.update(ids=ids, metadatas=[dict.fromkeys(before, None) | now for before, now in zip(old, metadata)])


def delete(place: Place, name: str, ids: bytes, progress: Progress) -> int:
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    _sync_every(place, collection, max(2, len(ids) // 16))
    texts = from_ids(np.frombuffer(ids, "V16"))
    for start in range(0, len(texts), BATCH):
        collection.delete(ids=texts[start : start + BATCH])
        progress(len(texts[start : start + BATCH]))
    _sync_every(place, collection, USUAL_SYNC_THRESHOLD)
    return collection.count()


def drop(place: Place, name: str, _progress: Progress) -> None:
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
    if not (path / "chroma.sqlite3").exists():
        return True
    try:
        with contextlib.closing(sqlite3.connect(path / "chroma.sqlite3")) as database:
            return database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.OperationalError:  # full, locked, not ours to read: nothing is known to be wrong with it
        return True
    except sqlite3.DatabaseError:
        return False


def read(place: Place, name: str, ids: bytes, _progress: Progress) -> tuple[np.ndarray, list[dict[str, Any]]]:
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    texts = from_ids(np.frombuffer(ids, "V16"))
    return collections.read_vectors(collection, texts), collections.read_metadata(collection, texts)


def compare(place: Place, name: str, backlog: Backlog, progress: Progress) -> tuple[int, list[str]]:
    collection = collections.open_client(place).get_collection(name, embedding_function=None)
    compared, differing = 0, []
    for kind, ids, _, vectors in joined(batches(backlog)):
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
