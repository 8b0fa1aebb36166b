"""The store of embed.py: a journal that is the truth, and a Chroma collection that is brought up to date with it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import fsync_dir
from utils.log import LOG, bar
from utils.store import index
from utils.store.model import describe, same_model
from utils.store.server import Place, Server
from utils.store.vectors import CHANGE, INDEXED, MODEL, REMOVE, STORE, Journal

INDEX_EVERY = 5_000  # records: the index follows the journal when this many, and a tenth of it, are new


class Store:
    """Journal and collection `name` in the folder `path`, healthy and in step once it is open.

    Opening it repairs the collection from the journal where it is torn, missing or behind, and takes over a
    collection that has no journal. Hold the store's lock. Raises UserError if it can be neither opened nor repaired.

    With a server as `place` the collection is there and may have other writers: the journal is what this one made, from
    which the collection gets what it lacks, and is never made anew.
    """

    def __init__(self, path: Path, name: str, place: Place | None = None) -> None:
        self.path, self.name, self.place = path, name, place or path
        journal = f"{name}@{place.label}" if isinstance(place, Server) else name
        self.journal = Journal(path / "journal" / journal)
        self._others = np.empty(0, "V16")  # ids in the collection that are not in the journal
        self.stored = 0  # records appended since it was opened
        self._thread: threading.Thread | None = None
        self._indexed_to = self.journal.indexed
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
        """Ids (N,) V16 of what was stored when it was opened, by other writers too, deleted by people or not."""
        return np.concatenate([self.own, self._others])

    @property
    def own(self) -> np.ndarray:
        """Ids (N,) V16, sorted, of what is in the journal of what was stored when it was opened."""
        return self.journal.ids

    @property
    def model(self) -> dict[str, Any]:
        """The identity of the model that made the vectors; {} in a new store."""
        return self.journal.model

    def remember_model(self, identity: dict[str, Any]) -> None:
        """Note, before the first record, which model makes the vectors."""
        self.journal.note(MODEL, identity)
        self.journal.model = identity

    def append(self, ids: np.ndarray, metadata: list[dict[str, Any]], vectors: np.ndarray) -> None:
        """Store new records: ids (n,) V16, vectors (n, D) float32. When this returns they survive a crash.

        The index follows in the background. Raises UserError if they could not be written.
        """
        self.journal.append(STORE, ids, metadata, vectors)
        self.stored += len(ids)
        self._unindexed += len(ids)
        if self._unindexed >= max(INDEX_EVERY, (len(self.own) + self.stored) // 10) and self._is_idle():
            self._note_progress()
            self._unindexed = 0
            self._thread = threading.Thread(target=self._follow, args=(self.journal.end,), daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Bring the collection up to date with all that is stored, and flush it once."""
        if self._thread:
            self._thread.join()
        self._note_progress()
        if self._failure and isinstance(self.place, Path):
            LOG.info("the index failed (%s); it is made anew from the journal", self._failure)
            self._rebuild()
        elif self.journal.end > self.journal.indexed:
            self._catch_up("index")

    def change_metadata(self, ids: np.ndarray, metadata: list[dict[str, Any]]) -> None:
        """Replace the metadata of stored records `ids` (n,) V16."""
        self.journal.append(CHANGE, ids, metadata, np.empty((len(ids), 0), np.float32))

    def remove(self, ids: np.ndarray) -> None:
        """Remove records `ids` (n,) V16 from index and journal; killed on the way, the next opening does the rest."""
        self.journal.append(REMOVE, ids, [], np.empty((len(ids), 0), np.float32))
        try:
            self.count = index.call(index.delete, self.place, self.name, ids)
        except index.TornError as error:
            raise UserError(
                f"collection {self.name} in {self.place} cannot be written: {error}; run again, it is repaired then"
            ) from None
        self.journal.remove(ids)
        self._indexed_to = self.journal.indexed  # the journal is shorter now

    def compare(self) -> tuple[int, list[str]]:
        """Compare each vector of the journal with the collection's: how many, and the ids that differ or lack."""
        with bar(len(self.known), "verify", "record") as progress:
            backlog = self._backlog(self.journal.end)._replace(start=0)
            return index.call(index.compare, self.place, self.name, backlog, progress=progress.update)

    def close(self) -> None:
        self.journal.close()

    def _inspect(self) -> index.Health | None:
        """What the collection holds; None if it is torn, which is said."""
        if isinstance(self.place, Path) and not (self.place / "chroma.sqlite3").exists():
            return index.Health(None, np.empty(0, "V16"))  # an opening without a collection makes none
        try:
            return index.call(index.inspect, self.place, self.name)
        except index.TornError as error:
            if isinstance(self.place, Server):
                raise UserError(
                    f"collection {self.name} in {self.place} cannot be read ({error}); see the server's log. "
                    f"Were it deleted there, the {len(self.own)} records of the journal here would be stored again"
                ) from None
            if not len(self.known):
                raise UserError(
                    f"collection {self.name} in {self.path} cannot be read ({error}) and has no journal to repair it "
                    "from; put back a copy, or delete the folder to start afresh"
                ) from None
            LOG.info("collection %s is torn (%s)", self.name, error)
            return None

    def _reconcile(self, health: index.Health | None) -> None:
        if health is None:
            self._rebuild()
        elif health.model is not None and not self.journal.end:
            self._take_over(health)
        elif health.model is None and len(self.known):
            LOG.info("collection %s is missing", self.name)
            self._rebuild()
        else:
            self.count = len(health.ids)
            self._find_gone(health)
            if self.journal.end > self.journal.indexed:
                self._catch_up("index, left behind by a run that was stopped")

    def _join(self, health: index.Health | None) -> None:
        """A server's collection has other writers, too: it is added to, and nothing in it is repaired by a drop."""
        if health is None or health.model is None:  # there is none, or none any more
            self.journal.indexed = 0
        elif "model_name" not in health.model or (self.model and not same_model(self.model, health.model)):
            raise UserError(
                f"collection {self.name} in {self.place} was made with {describe(health.model)}, and what is in the "
                f"journal {self.journal.path.parent} with {describe(self.model)}; use another COLLECTION_NAME"
            )
        else:
            if not self.model:
                self.remember_model(health.model)
                self._indexed_to = self.journal.end
                self._note_progress()
            self.count = len(health.ids)
            self._find_gone(health)
            self._others = np.setdiff1d(health.ids, self.own)
        if self.journal.end > self.journal.indexed:
            self._catch_up("index, from the journal")

    def _find_gone(self, health: index.Health) -> None:
        """Ids that once were in the healthy collection, and no longer are, were deleted on purpose."""
        frames = (frame for frame in self.journal.frames() if frame.end <= self.journal.indexed)
        if self.journal.indexed == self.journal.end:  # the usual case, without reading the journal again
            indexed = self.known
        else:
            indexed = np.concatenate([np.empty(0, "V16"), *(f.ids for f in frames if f.kind == STORE)])
        gone = np.setdiff1d(indexed, np.concatenate([health.ids, self.journal.gone, self.journal.removing]))
        if len(gone):
            self.journal.mark_gone(gone)
        if len(self.journal.gone):
            LOG.info("%d ids were deleted from the collection on purpose; they stay deleted", len(self.journal.gone))

    def _take_over(self, health: index.Health) -> None:
        """A journal for a collection that has none: made by other means, or its journal was deleted."""
        if not health.model or "model_name" not in health.model:
            raise UserError(
                f"collection {self.name} in {self.path} does not say which model made it, so nothing can be added; "
                "use another COLLECTION_NAME"
            )
        LOG.info("collection %s has no journal; it is made from the %d records there", self.name, len(health.ids))
        taken = Journal(self.journal.path.parent / "unfinished")  # in place when it is whole
        taken.path.unlink(missing_ok=True)
        taken = Journal(taken.path.parent)
        taken.note(MODEL, health.model)
        with bar(len(health.ids), "take over", "record") as progress:
            for start in range(0, len(health.ids), index.READ):
                ids = health.ids[start : start + index.READ]
                vectors, metadata = index.call(index.read, self.path, self.name, ids)
                taken.append(STORE, ids, metadata, vectors)
                progress.update(len(ids))
        taken.note(INDEXED, {"end": taken.end})
        taken.close()
        taken.path.replace(self.journal.path)
        taken.path.parent.rmdir()
        fsync_dir(self.journal.path.parent)
        self.journal = Journal(self.journal.path.parent)
        self.count = len(health.ids)

    def _rebuild(self) -> None:
        try:
            index.call(index.drop, self.path, self.name)
        except index.TornError as error:
            self._set_aside(error)
        self.journal.indexed = self._indexed_to = 0
        self._failure = None
        self._catch_up(f"repairing {self.name} from the journal")

    def _set_aside(self, error: Exception) -> None:
        """A database that cannot even drop a collection is renamed, so that Chroma makes a new one."""
        database = self.path / "chroma.sqlite3"
        if index.call(index.is_database, self.path):
            raise UserError(
                f"collection {self.name} in {self.path} can be neither read nor made anew: {error}; mend that and run "
                f"again, all {len(self.known)} vectors are safe in the journal"
            )
        for file in self.path.glob("chroma.sqlite3*"):  # what SQLite keeps beside it, too
            if not file.name.endswith(".torn"):
                file.replace(file.with_name(f"{file.name}.torn"))
        LOG.info("the database is torn (%s); it was renamed to %s.torn", error, database)

    def _catch_up(self, what: str) -> None:
        total = len(self.own) + self.stored - len(self.journal.gone)
        try:
            with bar(total if not self.journal.indexed else None, what, "record") as progress:
                backlog = self._backlog(self.journal.end)
                self.count = index.call(index.apply, self.place, self.name, backlog, progress=progress.update)
        except index.TornError as error:
            if self.journal.indexed and isinstance(self.place, Path):  # it could be read, and cannot be written
                LOG.info("collection %s cannot be written (%s)", self.name, error)
                self._rebuild()
                return
            raise UserError(
                f"collection {self.name} in {self.place} cannot be written: {error}; all {total} vectors are safe in "
                "the journal, so mend that and run again"
            ) from None
        self.journal.note(INDEXED, {"end": self.journal.end})

    def _backlog(self, end: int) -> index.Backlog:
        return index.Backlog(self.journal.path, self.journal.indexed, end, self.journal.gone, self.model)

    def _is_idle(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def _follow(self, end: int) -> None:
        try:
            self.count = index.call(index.apply, self.place, self.name, self._backlog(end))
            self._indexed_to = end
        except Exception as error:  # said, and mended, when the run ends
            self._failure = error

    def _note_progress(self) -> None:
        if self._indexed_to > self.journal.indexed:
            self.journal.note(INDEXED, {"end": self._indexed_to})
