"""Open and read a Chroma collection: cosine space, uuid ids, metadata with a url."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import UserError
from utils.lock import hold, lock_path
from utils.store.server import Place, Server, connect

if TYPE_CHECKING:
    import chromadb

WAIT_S = 60  # seconds to wait for embed.py to end
# A server that is killed during a flush leaves a torn index, so it flushes rarely. At its start it replays the log.
SERVER_SYNC_THRESHOLD = 50_000
IDS_PAGE = 250_000  # ids per request; a server's answer then has 10 MB
PART, WHOLE, OLD = ".part", ".whole", ".old"  # name suffixes of a derived collection: unfinished, complete, replaced
DERIVED = "projection"  # key in the metadata of a collection that ann_train.py derived from another
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,510}[a-zA-Z0-9]")
PAGE = 5_000  # records per call: Chroma's SQL fails above 32,766 variables, and a page limits memory


class MissingError(UserError):
    """There is no collection with this name."""


class UnreadableError(UserError):
    """The collection exists, but its files are torn."""


def open_client(place: Place) -> chromadb.ClientAPI:
    """A client of a server, or of embedded Chroma in a folder, which is created if missing. No other process may write
    to the folder."""
    if isinstance(place, Server):
        return connect(place)
    import chromadb
    from chromadb.config import Settings

    # The path is resolved, because "p" and "p/" would be two engines in one process. By default, Settings reads .env.
    settings = Settings(_env_file=None, anonymized_telemetry=False)  # type: ignore[call-arg]
    return chromadb.PersistentClient(path=str(place.resolve()), settings=settings)


def open_collection(place: Place, name: str) -> chromadb.Collection:
    """Open the collection `name` to read it. Raises UserError if it is missing, empty or not of cosine space."""
    _check_path(place)
    return _find(open_client(place), place, name)


@contextlib.contextmanager
def reading(place: Place, name: str) -> Iterator[chromadb.Collection]:
    """Like open_collection(), for a block in which embed.py cannot write to the folder; a server does its own locking.

    The end of the block frees the index, which takes 2.5 KB of memory per record at 512 dimensions.
    """
    _check_path(place)
    with contextlib.ExitStack() as stack:
        if isinstance(place, Path):
            stack.enter_context(hold(lock_path(place), f"the store {place}", WAIT_S))
        client = open_client(place)
        stack.callback(client.close)  # type: ignore[attr-defined]
        with _readable(place, name):
            yield _find(client, place, name)


def _check_path(place: Place) -> None:
    if isinstance(place, Path) and not (place / "chroma.sqlite3").exists():
        raise UserError(f"no Chroma database in {place}; run python embed.py first, or set CHROMADB_PATH")


def _find(client: chromadb.ClientAPI, place: Place, name: str) -> chromadb.Collection:
    from chromadb.errors import NotFoundError

    with _readable(place, name):
        try:
            collection = _get(client, name)
        except (NotFoundError, ValueError):
            raise MissingError(
                f"no collection {name} in {place}; run python embed.py, or correct the name (COLLECTION_NAME)"
            ) from None
        _check_space(collection)
        if not collection.get(limit=1, include=[])["ids"]:  # count() would load the index
            raise UserError(f"collection {name} in {place} is empty; run python embed.py first")
    return collection


def _get(client: chromadb.ClientAPI, name: str) -> chromadb.Collection:
    """Get the collection `name`. If a kill between the two renames of promote() left none, finish the renames."""
    from chromadb.errors import NotFoundError

    try:
        return client.get_collection(name, embedding_function=None)
    except NotFoundError:
        client.get_collection(name + WHOLE, embedding_function=None).modify(name=name)
        return client.get_collection(name, embedding_function=None)


def create(place: Place, name: str, model: dict[str, Any]) -> chromadb.Collection:
    """Open the collection `name` to write to it; create it with the metadata `model` if missing. Raises UserError."""
    from chromadb.errors import NotFoundError

    check_name(name)
    hnsw: Any = {"space": "cosine"}
    if isinstance(place, Server):
        hnsw["sync_threshold"] = SERVER_SYNC_THRESHOLD
    client = open_client(place)
    try:  # after get_or_create_collection(), the next write sometimes finds the database locked
        collection = client.get_collection(name, embedding_function=None)
    except NotFoundError:
        collection = client.get_or_create_collection(
            name, embedding_function=None, metadata=model or None, configuration={"hnsw": hnsw}
        )
    _check_space(collection)  # an existing collection keeps its configuration
    return collection


def check_name(name: str) -> None:
    """Raises UserError for a name that Chroma would reject, but only at the end of a run."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"collection name {name!r}: it must have 3 to 512 characters of a-z, A-Z, 0-9, '.', '_', '-', the first "
            "and the last of them a letter or digit"
        )


def _check_space(collection: chromadb.Collection) -> None:
    configuration = collection.configuration  # a distributed or cloud Chroma has spann instead of hnsw
    space = (configuration.get("hnsw") or configuration.get("spann") or {}).get("space")
    if space != "cosine":
        raise UserError(f"collection {collection.name} uses {space} distance, not cosine; use another COLLECTION_NAME")


def seen_path(path: Path, name: str) -> Path:
    """The file with the fingerprint that the collection's files had when they last agreed with the journal."""
    return path / "journal" / f"{name}.seen"


def read_ids(collection: chromadb.Collection, where: dict[str, Any] | None = None) -> list[str]:
    """All ids, sorted, or the ids of records whose metadata match `where`. Raises ValueError for an invalid `where`."""
    from chromadb.errors import InvalidArgumentError

    try:
        ids: list[str] = []
        while len(ids) % IDS_PAGE == 0:
            ids += (page := collection.get(where=where or None, limit=IDS_PAGE, offset=len(ids), include=[])["ids"])
            if not page:
                break
        return sorted(set(ids))  # another writer on the server can make an id appear twice
    except (ValueError, InvalidArgumentError) as error:
        raise ValueError(str(error).splitlines()[0]) from None


def read_vectors(collection: chromadb.Collection, ids: Sequence[str]) -> np.ndarray:
    """Embeddings (N, D) float32 of `ids`, in their order. Raises KeyError for a missing id."""
    result = np.empty((0, 0), np.float32)
    start = 0
    for vectors in _read_pages(collection, ids):
        if start == 0:
            result = np.empty((len(ids), vectors.shape[1]), np.float32)
        result[start : start + len(vectors)] = vectors
        start += len(vectors)
    return result


def spool_vectors(collection: chromadb.Collection, ids: Sequence[str]) -> Callable[[], np.ndarray]:
    """Like read_vectors(), but into a temporary file. Returns a function that loads the file once.

    Call this function after the collection is closed: index and vectors of a million records at 512 dimensions together
    take 5 GB.
    """
    file = tempfile.TemporaryFile()
    for vectors in _read_pages(collection, ids):
        vectors.tofile(file)

    def load() -> np.ndarray:
        with file:
            file.seek(0)
            return np.fromfile(file, np.float32).reshape(len(ids), -1)

    return load


def _read_pages(collection: chromadb.Collection, ids: Sequence[str]) -> Iterator[np.ndarray]:
    for page in _pages(ids):
        got = collection.get(ids=page, include=["embeddings"])
        row = {id_: i for i, id_ in enumerate(got["ids"])}  # get() returns insertion order
        yield np.asarray(got["embeddings"], dtype=np.float32)[[row[id_] for id_ in page]]


def read_metadata(collection: chromadb.Collection, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Metadata of `ids`, in their order. Raises KeyError for a missing id."""
    found = _metadata_of(collection, ids)
    return [found[id_] for id_ in ids]


def read_urls(collection: chromadb.Collection, ids: Sequence[str]) -> list[str]:
    """The urls of `ids`, in their order; "" for a record without url and for a missing id."""
    with _readable(None, collection.name):
        found = _metadata_of(collection, ids)
    return [url if isinstance(url := found.get(id_, {}).get("url"), str) else "" for id_ in ids]


def _metadata_of(collection: chromadb.Collection, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for page in _pages(ids):
        got = collection.get(ids=page, include=["metadatas"])
        result |= {id_: dict(metadata or {}) for id_, metadata in zip(got["ids"], got["metadatas"] or [])}
    return result


@contextlib.contextmanager
def _readable(place: Place | None, name: str) -> Iterator[None]:
    """Turn errors of a torn index, even panics of Chroma's Rust code, into one line; embed.py then checks the index."""
    try:
        yield
    except BaseException as error:
        is_torn = type(error).__name__ in ("InternalError", "PanicException")
        if isinstance(place, Path) and (is_torn or isinstance(error, UnreadableError)):
            with contextlib.suppress(OSError):
                seen_path(place, name).unlink()
        if not is_torn:
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UnreadableError(
            f"collection {name} cannot be read ({reason}); python embed.py repairs it, and python ann_train.py --apply "
            "repairs a trained collection"
        ) from None


def _pages(ids: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), PAGE):
        yield list(ids[start : start + PAGE])
