"""The store of embed.py: a journal that is the truth, and a Chroma collection that is brought up to date with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.ids import from_ids
from utils.log import LOG, bar
from utils.store import index
from utils.store.migration import migrate
from utils.store.model import describe, same_model
from utils.store.server import Place, Server
from utils.store.vectors import ROW, DamagedError, Journal, building

INDEX_EVERY = 5_000  # records: the index follows the journal when this many, and a tenth of it, are new
RECORD_BYTES = 3_000  # of a record in a journal, roughly
NO_ROWS = np.empty(0, ROW)


class Store:
    """Journal and collection `name` in the folder `path`, healthy and in step once it is open.

    Opening it repairs the collection from the journal where it is torn, missing or behind, and takes over a
    collection that has no journal. Hold the store's lock. Raises UserError if it can be neither opened nor repaired.

    With a server as `place` the collection is there and may have other writers: the journal holds the records of this
    one, adds what the collection misses, and never makes the collection anew.
    """

    def __init__(self, path: Path, name: str, place: Place | None = None) -> None:
        self.path, self.name, self.place = path, name, place or path
        file = f"{name}@{place.label}" if isinstance(place, Server) else name
        journal = path / "journal" / f"{file}.sqlite3"
        migrate(journal)
        self.journal = Journal(journal)
        self._others = np.empty(0, "V16")  # ids in the collection that are not in the journal
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._unindexed = 0
        self.count = 0  # records in the collection when it was opened and repaired
        if isinstance(self.place, Server):
            self._join(self._inspect())
        else:
            self._reconcile(self._inspect())
        if len(self.journal.removing):
            self.remove(self.journal.removing)

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
        """Note, before the first record, which model makes the vectors."""
        self.journal.note(model=identity)

    def append(self, ids: np.ndarray, metadata: list[dict[str, Any]], vectors: np.ndarray) -> None:
        """Store new records: ids (n,) V16, vectors (n, D) float32. When this returns they survive a crash.

        The index follows in the background. Raises UserError if they could not be written.
        """
        self.journal.append(ids, metadata, vectors)
        self._unindexed += len(ids)
        if self._unindexed >= max(INDEX_EVERY, self.journal.n_records // 10) and self._is_idle():
            self._unindexed = 0
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def prepare(self) -> None:
        """Start the index's process ahead of its work."""
        index.prepare()

    def finish(self) -> None:
        """Bring the collection up to date with all that is stored, and flush it once."""
        if self._thread:
            self._thread.join()
        failure, self._failure = self._failure, None
        if isinstance(failure, index.TornError) and isinstance(self.place, Path):
            LOG.info("the index failed (%s); it is made anew from the journal", failure)
            self._rebuild()
        elif self._is_behind():
            self._catch_up("index")

    def change_metadata(self, ids: np.ndarray, metadata: list[dict[str, Any]]) -> None:
        """Replace the metadata of stored records `ids` (n,) V16."""
        self.journal.change_metadata(ids, metadata)

    def remove(self, ids: np.ndarray) -> None:
        """Remove records `ids` (n,) V16 from index and journal; killed on the way, the next opening does the rest."""
        self.journal.note(removing=np.union1d(self.journal.removing, ids), indexing=True)
        try:
            self.count = index.call(index.delete, self.place, self.name, ids)
        except index.TornError as error:
            raise UserError(
                f"collection {self.name} in {self.place} cannot be written: {error}; run again, it is repaired then"
            ) from None
        self.journal.remove(ids)
        self.journal.note(indexing=False)

    def compare(self) -> tuple[int, list[str]]:
        """Compare the vector of each record with the collection's: how many, and the ids that differ or are missing."""
        compared, differing = self._compare(lambda: self._kept(self.journal.rows), "verify")
        return compared, from_ids(differing["id"])

    def close(self) -> None:
        index.forget()
        if self._thread:
            self._thread.join(5)  # a process that has just been started must find its parent
        self.journal.close()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _inspect(self) -> index.Health | None:
        """What the collection holds; None if it is torn, which the log says."""
        if isinstance(self.place, Path) and not (self.place / "chroma.sqlite3").exists():
            return index.Health(None, np.empty(0, "V16"))  # to look for a collection makes no database
        try:
            return index.call(index.inspect, self.place, self.name)
        except index.TornError as error:
            if isinstance(self.place, Server):
                raise UserError(
                    f"collection {self.name} in {self.place} cannot be read ({error}); see the server's log. If you "
                    f"delete the collection there, the next run stores the journal's {len(self.own)} records again"
                ) from None
            if not len(self.own):
                raise UserError(
                    f"collection {self.name} in {self.path} cannot be read ({error}) and has no journal to repair it "
                    "from; put back a copy, or delete the folder to start afresh"
                ) from None
            LOG.info("collection %s is torn (%s)", self.name, error)
            return None

    def _reconcile(self, health: index.Health | None) -> None:
        if health is None:
            self._rebuild()
        elif health.model is not None and not self.model and not len(self.own):
            self._take_over(health)
        elif health.model is None and len(self.own):
            LOG.info("collection %s is missing", self.name)
            self._rebuild()
        else:
            self._accept(health)
            self._bring_up_to_date("index, left behind by a run that was stopped")

    def _join(self, health: index.Health | None) -> None:
        """A server's collection has other writers, too: records are added to it, and it is never dropped."""
        if health is None or health.model is None:  # it is new, or was deleted
            if self.journal.indexed:
                self.journal.note(indexed=0)
        elif "model_name" not in health.model or (self.model and not same_model(self.model, health.model)):
            raise UserError(
                f"collection {self.name} in {self.place} was made with {describe(health.model)}, and the records of "
                f"the journal {self.journal.path} with {describe(self.model)}; use another COLLECTION_NAME"
            )
        else:
            self._accept(health)
            self._others = np.setdiff1d(health.ids, self.own)
        self._bring_up_to_date("index, from the journal")

    def _accept(self, health: index.Health) -> None:
        """Note what a healthy collection says: how many records, which are gone; its model if the journal has none."""
        self.count = len(health.ids)
        if not health.is_sound and not self.journal.indexing:
            self.journal.note(indexing=True)
        if not self.model and health.model:  # another writer's collection, or a damaged journal
            self.journal.note(model=health.model)
        rows, journal = self.journal.rows, self.journal
        indexed = rows["id"][rows["seq"] <= journal.indexed]
        gone = np.setdiff1d(indexed, np.concatenate([health.ids, journal.gone, journal.removing]))
        if len(gone):  # once in the collection, and no longer: deleted on purpose
            journal.note(gone=np.union1d(journal.gone, gone))
        if len(journal.gone):
            LOG.info("%d ids were deleted from the collection on purpose; they stay deleted", len(journal.gone))

    def _bring_up_to_date(self, what: str) -> None:
        """Bring the collection up to date; compare all of it first if the last write to it did not end well."""
        differing = NO_ROWS
        if self.journal.indexing and self.journal.indexed:
            differing = self._compare(self._indexed, "compare all after an interrupted write")[1]
        if len(differing):
            LOG.info("%d records of collection %s are damaged; they are written again", len(differing), self.name)
        if len(differing) or self._is_behind():
            self._catch_up(what, differing)
        elif self.journal.indexing:
            self.journal.note(indexing=False)
        if len(differing) and len(self._compare(lambda: differing, "compare again")[1]):
            if isinstance(self.place, Server):
                raise UserError(f"collection {self.name} in {self.place} keeps damaged records; see the server's log")
            self._rebuild()

    def _take_over(self, health: index.Health) -> None:
        """A journal for a collection that has none: made by other means, or its journal was deleted."""
        if not health.model or "model_name" not in health.model:
            raise UserError(
                f"collection {self.name} in {self.path} does not say which model made it, so nothing can be added; "
                "use another COLLECTION_NAME"
            )
        LOG.info("collection %s has no journal; it is made from the %d records there", self.name, len(health.ids))
        self.journal.close()
        with (
            building(self.journal.path, RECORD_BYTES * len(health.ids)) as taken,
            bar(len(health.ids), "take over", "record") as progress,
        ):
            for start in range(0, len(health.ids), index.TAKE):
                ids = health.ids[start : start + index.TAKE]
                vectors, metadata = index.call(index.read, self.path, self.name, ids)
                taken.append(ids, metadata, vectors)
                progress.update(len(ids))
            taken.note(model=health.model, indexed=len(health.ids))
        self.journal = Journal(self.journal.path)
        self.count = len(health.ids)

    # --- the index ----------------------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        self.journal.note(indexed=0, indexing=True)  # killed on the way, missing records must not look user-deleted
        try:
            index.call(index.drop, self.path, self.name)
        except index.TornError as error:
            self._set_aside(error)
        self._catch_up(f"repairing {self.name} from the journal", is_rebuild=True)

    def _set_aside(self, error: Exception) -> None:
        """A database that cannot even drop a collection is renamed, so that Chroma makes a new one."""
        database = self.path / "chroma.sqlite3"
        if index.call(index.is_database, self.path):
            raise UserError(
                f"collection {self.name} in {self.path} can be neither read nor made anew: {error}; fix that and run "
                f"again, all {self.journal.n_records} vectors are safe in the journal"
            )
        for file in self.path.glob("chroma.sqlite3*"):  # SQLite's files beside it, too
            if not file.name.endswith(".torn"):
                file.replace(file.with_name(f"{file.name}.torn"))
        LOG.info("the database is torn (%s); it was renamed to %s.torn", error, database)

    def _catch_up(self, what: str, again: np.ndarray = NO_ROWS, is_rebuild: bool = False) -> None:
        """Index what is new, and the rows `again`, (n,) ROW."""
        try:
            with bar(len(self._new()) + len(again), what, "record") as progress:
                self._apply(again, progress.update)
        except index.TornError as error:
            if isinstance(self.place, Path) and not is_rebuild:  # it could be read, and cannot be written
                LOG.info("collection %s cannot be written (%s); it is made anew", self.name, error)
                self._rebuild()
                return
            raise UserError(
                f"collection {self.name} in {self.place} cannot be written: {error}; all {self.journal.n_records} "
                "vectors are safe in the journal, so fix that and run again"
            ) from None

    def _apply(self, again: np.ndarray, progress: Callable[[int], Any]) -> None:
        journal = self.journal
        end, changed, n_records = journal.end, journal.changed, journal.n_records
        journal.note(indexing=True)
        watch = index.watch_size(self.place, self.name, journal.path, n_records)
        rows = lambda: np.concatenate([again, self._new()])  # noqa: E731
        self.count = self._with_records(index.apply, rows, progress, watch)
        journal.note(indexed=end, changed=np.setdiff1d(journal.changed, changed), indexing=False)

    def _follow(self) -> None:
        try:
            self._apply(NO_ROWS, lambda n: None)
        except Exception as error:  # reported and repaired when the run ends
            self._failure = error

    def _compare(self, rows: Callable[[], np.ndarray], what: str) -> tuple[int, np.ndarray]:
        with bar(len(rows()), what, "record") as progress:
            return self._with_records(index.compare, rows, progress.update)

    def _with_records(
        self,
        task: Callable[..., Any],
        rows: Callable[[], np.ndarray],
        progress: Callable[[int], Any],
        watch: Callable[[], None] = lambda: None,
    ) -> Any:
        """A task of the index on records of the journal; if that turns out damaged, it is repaired, and tried again."""
        journal = self.journal
        for is_again in (False, True):
            changed = self._kept(journal.rows[np.isin(journal.rows["id"], journal.changed)])
            work = index.Work(journal.path, rows(), changed, self.model)
            try:
                return index.call(task, self.place, self.name, work, progress=progress, watch=watch)
            except DamagedError:
                if is_again:
                    raise
                journal.repair()
        return None

    def _new(self) -> np.ndarray:
        rows = self.journal.rows
        return self._kept(rows[rows["seq"] > self.journal.indexed])

    def _indexed(self) -> np.ndarray:
        rows = self.journal.rows
        return self._kept(rows[rows["seq"] <= self.journal.indexed])

    def _kept(self, rows: np.ndarray) -> np.ndarray:
        """Rows without those that people deleted, or that are being removed."""
        hidden = np.concatenate([self.journal.gone, self.journal.removing])
        return rows[~np.isin(rows["id"], hidden)] if len(hidden) else rows

    def _is_behind(self) -> bool:
        return self.journal.end > self.journal.indexed or len(self.journal.changed) > 0

    def _is_idle(self) -> bool:
        return self._thread is None or not self._thread.is_alive()
