"""The store of embed.py: a journal, the source of truth, and a Chroma collection that is kept up to date with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.ids import from_ids
from utils.log import LOG, bar
from utils.store import collection as collections
from utils.store import index
from utils.store.migration import migrate
from utils.store.model import describe, same_model
from utils.store.server import Place, Server
from utils.store.vectors import ROW, UNKNOWN, Journal

INDEX_EVERY = 5_000  # records: the index is updated when this many, and a tenth of the journal, are new
LOST = 100  # records: a server that lacks this many of the newest, or all of the journal's records, has lost them
NO_ROWS = np.empty(0, ROW)


class Store:
    """The journal and the collection `name` in the folder `path`. Both are undamaged and agree once the store is open.

    Opening the store repairs a collection that is torn, missing or behind the journal, and makes the journal of a
    collection that has none. The caller holds the store's lock. Raises UserError if the store can be neither opened
    nor repaired.

    If `place` is a server, it has the collection, which may have other writers. The journal then has only the records
    of this writer. The store adds missing records to the collection, and never deletes the collection to rebuild it.
    """

    def __init__(self, path: Path, name: str, place: Place | None = None) -> None:
        self.path, self.name, self.place = path, name, place or path
        file = f"{name}@{place.label}" if isinstance(place, Server) else name
        journal = path / "journal" / f"{file}.sqlite3"
        migrate(journal)
        self.journal = Journal(journal)
        self._seen = collections.seen_path(path, name)
        self._others = np.empty(0, "V16")  # ids in the collection that are not in the journal
        self._thread: threading.Thread | None = None
        self._unindexed = 0
        self.count = 0  # records in the collection when it was opened and repaired
        if self._is_as_seen():
            self.count = len(self._rows())
        else:
            self._bring_in_step(self._inspect())
        if len(self.journal.gone):
            LOG.info("%d ids were deleted from the collection on purpose; they stay deleted", len(self.journal.gone))
        if len(self.journal.removing):
            self.remove(self.journal.removing)

    def __str__(self) -> str:
        return f"collection {self.name} in {self.place}"

    @property
    def known(self) -> np.ndarray:
        """Ids (N,) V16 stored before this run, including other writers' and user-deleted ones."""
        return np.concatenate([self.own, self._others])

    @property
    def own(self) -> np.ndarray:
        """Ids (N,) V16, sorted, that were in the journal before this run."""
        return self.journal.ids

    @property
    def model(self) -> dict[str, Any]:
        """The identity of the model that made the vectors; {} in a new store."""
        return self.journal.model

    def remember_model(self, identity: dict[str, Any]) -> None:
        """Store the identity of the model that makes the vectors, before the first record."""
        self.journal.note(model=identity)

    def append(self, ids: np.ndarray, metadata: list[dict[str, Any]], vectors: np.ndarray) -> None:
        """Store new records: ids (n,) V16, vectors (n, D) float32. When this returns, they survive a crash.

        The index is updated in the background. Raises UserError if the records could not be written.
        """
        self.journal.append(ids, metadata, vectors)
        self._unindexed += len(ids)
        is_idle = self._thread is None or not self._thread.is_alive()
        if self._unindexed >= max(INDEX_EVERY, self.journal.n_records // 10) and is_idle:
            self._unindexed = 0
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def prepare(self) -> None:
        """Start the index process before it is needed."""
        index.prepare()

    def finish(self) -> None:
        """Write all stored records to the collection, and flush it once."""
        if self._thread:
            self._thread.join()
        self._bring_up_to_date("index")

    def change_metadata(self, ids: np.ndarray, metadata: list[dict[str, Any]]) -> None:
        """Replace the metadata of stored records `ids` (n,) V16."""
        self.journal.change_metadata(ids, metadata)

    def remove(self, ids: np.ndarray) -> None:
        """Remove records `ids` (n,) V16 from index and journal. After a kill, the next opening finishes the removal."""
        self.journal.note(removing=np.union1d(self.journal.removing, ids), indexing=True)
        try:
            self.count = index.call(index.delete, self.place, self.name, ids)
        except index.TornError as error:
            raise UserError(f"{self} cannot be written: {error}; run again to repair it") from None
        self.journal.remove(ids)
        self.journal.note(indexing=False)

    def compare(self) -> tuple[int, list[str]]:
        """Compare all vectors with the collection. Returns the number found there, and the differing or missing ids."""
        if self._is_as_seen():  # bytes that changed on the disk do not change the fingerprint
            self._bring_in_step(self._inspect())
        compared, differing = self.journal.repaired(lambda: self._compare(self._rows(), "verify"))
        return compared, from_ids(differing["id"])

    def close(self) -> None:
        index.forget()
        if self._thread:
            self._thread.join(5)  # a process that has just started must find its parent
        fingerprint = self._fingerprint()
        if fingerprint and fingerprint != self._last_fingerprint():
            with contextlib.suppress(OSError):
                self._seen.write_bytes(fingerprint)
        self.journal.close()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _is_as_seen(self) -> bool:
        """Whether the collection is unchanged since it last agreed with the journal. Does not open it."""
        last = self._last_fingerprint()
        return bool(last) and last == self._fingerprint()

    def _last_fingerprint(self) -> bytes:
        """The fingerprint that the last run left, or b""."""
        try:
            return self._seen.read_bytes()
        except OSError:
            return b""

    def _fingerprint(self) -> bytes:
        """The fingerprint of a collection that agrees with the journal, else b""."""
        if isinstance(self.place, Server) or self.journal.indexing or self._is_behind():
            return b""
        return index.fingerprint(self.place, self.name, self._rows())

    def _inspect(self) -> index.Health | None:
        """Inspect the collection. Returns None, after a log line, if it is torn."""
        if isinstance(self.place, Path) and not (self.place / "chroma.sqlite3").exists():
            return index.Health()  # do not create a database to look for a collection
        try:
            return index.call(index.inspect, self.place, self.name)
        except index.TornError as error:
            if isinstance(self.place, Server):
                raise UserError(
                    f"{self} cannot be read ({error}); see the server's log. If you delete the collection there, the "
                    f"next run stores the journal's {len(self.own)} records again"
                ) from None
            if not len(self.own):
                raise UserError(
                    f"{self} cannot be read ({error}) and has no journal to repair it from; restore a copy, or "
                    "delete the folder to start over"
                ) from None
            LOG.info("collection %s is torn (%s)", self.name, error)
            return None

    def _bring_in_step(self, health: index.Health | None) -> None:
        """Make the collection agree with the journal, or make a journal for it. `health` is None if it is torn."""
        is_new = not self.model and not len(self.own)
        if health is not None and health.model is None and len(self.own):
            LOG.info("collection %s is missing", self.name)
            health = None
        if health is None:
            self._rebuild()
        elif is_new and health.model is not None and isinstance(self.place, Path):
            self._take_over(health)
        else:
            self._accept(health)
            self._bring_up_to_date("index the rest of a stopped run")

    def _accept(self, health: index.Health) -> None:
        """Note the facts of a healthy collection: its size, deleted ids, and its model if the journal has none."""
        journal, rows = self.journal, self._rows()
        self.count = len(health.ids)
        if isinstance(self.place, Server) and health.model is not None:
            self._check_model(health.model)
            self._others = np.setdiff1d(health.ids, self.own)
        if not health.is_sound:
            journal.note(indexing=True)
        if not self.model and health.model:  # another writer's collection, or a damaged journal
            journal.note(model=health.model)
        newest = int(rows["seq"][np.isin(rows["id"], health.ids)].max(initial=0))
        n_lost = np.count_nonzero((rows["seq"] > newest) & (rows["seq"] <= journal.indexed))
        if journal.indexed == UNKNOWN:  # records are indexed in the order of seq
            journal.note(indexed=newest)
        elif isinstance(self.place, Server) and n_lost >= (LOST if newest else 1):
            LOG.warning("%s has lost the newest %d of %d records, as if an older backup had been restored; they are "
                        "written again. If people deleted them, remove them from the list and run with --prune",
                        self, n_lost, len(rows))  # fmt: skip
            journal.note(indexed=newest)
        gone = np.setdiff1d(self._indexed()["id"], health.ids)
        if len(gone):  # they were in the collection and are not now: deleted on purpose
            journal.note(gone=np.union1d(journal.gone, gone))

    def _check_model(self, model: dict[str, Any]) -> None:
        if "model_name" not in model or (self.model and not same_model(self.model, model)):
            raise UserError(
                f"{self} was made with {describe(model)}, but the records of the journal {self.journal.path} with "
                f"{describe(self.model)}; use another COLLECTION_NAME"
            )

    def _take_over(self, health: index.Health) -> None:
        """Make a journal for a collection without one: another program made it, or its journal was deleted."""
        self.count = len(health.ids)
        if not health.model or "model_name" not in health.model:
            raise UserError(
                f"{self} does not name the model that made it, so nothing can be added; use another COLLECTION_NAME"
            )
        LOG.info("collection %s has no journal; one is made from its %d records", self.name, self.count)
        self.journal.close()
        with bar(self.count, "take over", "record") as progress:
            index.call(index.take_over, self.path, self.name, self.journal.path, progress=progress.update)
        self.journal = Journal(self.journal.path)

    # --- the index ----------------------------------------------------------------------------------------------------

    def _bring_up_to_date(self, what: str, is_rebuild: bool = False) -> None:
        """Bring the collection up to date. A collection in a folder is rebuilt if it cannot be written."""
        try:
            self.journal.repaired(lambda: self._write_missing(what))
        except index.TornError as error:
            if is_rebuild or isinstance(self.place, Server):
                raise UserError(
                    f"{self} cannot be written: {error}; all {self.journal.n_records} vectors are safe in the journal, "
                    "so fix that and run again"
                ) from None
            LOG.info("collection %s cannot be written (%s); it is rebuilt", self.name, error)
            self._rebuild()

    def _rebuild(self) -> None:
        """Rebuild the collection from the journal; on a server, only if it is missing."""
        self.journal.note(indexed=0, indexing=True)  # after a kill, missing records must not look user-deleted
        if isinstance(self.place, Path):
            self._drop(self.place)
        self._bring_up_to_date(f"repairing {self.name} from the journal", is_rebuild=True)

    def _drop(self, path: Path) -> None:
        try:
            index.call(index.drop, path, self.name)
        except index.TornError as error:
            if not index.set_aside(path):
                raise UserError(
                    f"{self} can be neither read nor rebuilt: {error}; fix that and run again, all "
                    f"{self.journal.n_records} vectors are safe in the journal"
                ) from None
            LOG.info("the database is torn (%s); it was renamed to %s.torn", error, path / "chroma.sqlite3")

    def _write_missing(self, what: str) -> None:
        """Index new records. After an interrupted write, first compare all records, and write differing ones again."""
        differing = NO_ROWS
        if self.journal.indexing and self.journal.indexed:
            differing = self._compare(self._indexed(), "compare all after an interrupted write")[1]
        if len(differing):
            LOG.info("%d records of collection %s are damaged; they are written again", len(differing), self.name)
        if len(differing) or self._is_behind():
            with bar(len(differing) + len(self._new()), what, "record") as progress:
                self._apply(differing, progress.update)
        elif self.journal.indexing:
            self.journal.note(indexing=False)
        if len(differing) and len(self._compare(differing, "compare again")[1]):
            raise index.TornError("its records stay damaged")

    def _follow(self) -> None:
        with contextlib.suppress(Exception):  # the end of the run tries again, and reports it
            self._apply()

    def _apply(self, again: np.ndarray = NO_ROWS, progress: Callable[[int], Any] = lambda n: None) -> None:
        """Index new records, changed metadata and the rows `again` (n,) ROW."""
        journal, kept = self.journal, self._rows()
        end, changed = journal.end, journal.changed
        journal.note(indexing=True)
        watch = index.watch_size(self.place, self.name, journal.path, journal.n_records)
        rows = np.concatenate([again, self._new()]), kept[np.isin(kept["id"], changed)]
        work = journal.path, *rows, self.model
        self.count = index.call(index.apply, self.place, self.name, *work, progress=progress, watch=watch)
        journal.note(indexed=end, changed=np.setdiff1d(journal.changed, changed), indexing=False)

    def _compare(self, rows: np.ndarray, what: str) -> tuple[int, np.ndarray]:
        """(number of `rows` (n,) ROW in the collection, the rows that differ or are missing)."""
        with bar(len(rows), what, "record") as progress:
            return index.call(index.compare, self.place, self.name, self.journal.path, rows, progress=progress.update)

    def _rows(self) -> np.ndarray:
        """Rows of the journal, except ids that people deleted and ids that are being removed."""
        rows, hidden = self.journal.rows, np.concatenate([self.journal.gone, self.journal.removing])
        return rows[~np.isin(rows["id"], hidden)] if len(hidden) else rows

    def _new(self) -> np.ndarray:
        rows = self._rows()
        return rows[rows["seq"] > self.journal.indexed]

    def _indexed(self) -> np.ndarray:
        rows = self._rows()
        return rows[rows["seq"] <= self.journal.indexed]

    def _is_behind(self) -> bool:
        return self.journal.end > self.journal.indexed or len(self.journal.changed) > 0
