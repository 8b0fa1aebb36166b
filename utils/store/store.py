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
from utils.log import LOG, bar, counted
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
        collections.check_name(name)
        self.path, self.name, self.place = path, name, place or path
        file = f"{name}@{place.label}" if isinstance(place, Server) else name
        journal = path / "journal" / f"{file}.sqlite3"
        migrate(journal)
        self.journal = Journal(journal)
        self._seen = collections.seen_path(path, name)
        self._others = np.empty(0, "V16")  # ids in the collection that are not in the journal
        self._thread: threading.Thread | None = None
        self.count = 0  # records in the collection when it was opened and repaired
        if self._is_as_seen():
            self.count = len(self._rows())
        else:
            self._repaired(self._bring_in_step)
        if len(self.journal.gone):
            LOG.info("ids deleted from the collection on purpose, and not added again: %d", len(self.journal.gone))

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
        journal = self.journal
        journal.append(ids, metadata, vectors)
        is_idle = self._thread is None or not self._thread.is_alive()
        is_many = journal.end - journal.indexed >= max(INDEX_EVERY, journal.n_records // 10)
        if is_idle and is_many and not journal.indexing:  # after a failed write, finish() compares all records
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def prepare(self) -> None:
        """Start the index process before it is needed."""
        index.prepare()

    def finish(self) -> None:
        """Write all stored records to the collection, and flush it once."""
        if self._thread:
            self._thread.join()
        self._repaired(lambda: self._write_missing("index"))

    def change_metadata(self, ids: np.ndarray, metadata: list[dict[str, Any]]) -> None:
        """Replace the metadata of stored records `ids` (n,) V16."""
        self.journal.change_metadata(ids, metadata)

    def remove(self, ids: np.ndarray) -> None:
        """Remove records `ids` (n,) V16 from index and journal. After a kill, the next opening finishes the removal."""
        self.journal.note(removing=np.union1d(self.journal.removing, ids))
        self._repaired(lambda: self._write_missing("remove"))

    def compare(self) -> tuple[int, list[str]]:
        """Compare all vectors with the collection. Returns the number found there, and the differing or missing ids."""
        if self._is_as_seen():  # bytes that changed on the disk do not change the fingerprint
            self._repaired(self._bring_in_step)
        compared, differing = self._repaired(lambda: self._compare(self._rows(), "verify"))
        return compared, from_ids(differing["id"])

    def close(self) -> None:
        index.forget()
        if self._thread:
            self._thread.join(5)  # a process that has just started must find its parent
        if fingerprint := self._fingerprint():
            with contextlib.suppress(OSError):
                self._seen.write_bytes(fingerprint)
        self.journal.close()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _is_as_seen(self) -> bool:
        """Whether the collection is unchanged since it last agreed with the journal. Does not open it."""
        fingerprint = self._fingerprint()
        return fingerprint != b"" and self._seen.exists() and self._seen.read_bytes() == fingerprint

    def _fingerprint(self) -> bytes:
        """The fingerprint of a collection that agrees with the journal, else b""."""
        if isinstance(self.place, Server) or self.journal.indexing or any(map(len, self._lacking())):
            return b""
        return index.fingerprint(self.place, self.name, self._rows())

    def _bring_in_step(self) -> None:
        """Inspect the collection, and make it agree with the journal. Make a journal for a collection without one."""
        health, is_new = index.Health(), not self.model and not len(self.own)
        if isinstance(self.place, Server) or (self.place / "chroma.sqlite3").exists():  # else Chroma would make one
            health = index.call(index.inspect, self.place, self.name)
        if health.model is None and len(self._indexed()):
            LOG.info("collection %s is missing", self.name)
            self._rebuild()
        elif health.model is not None and is_new and isinstance(self.place, Path):
            self._take_over(health)
        else:
            self._accept(health)
            self._write_missing("index the rest of a stopped run")

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
            what = f"its newest records ({n_lost} of {len(rows)}), as if an older backup had been restored"
            remedy = "If people deleted them, remove them from the list and run with --prune"
            LOG.warning("%s has lost %s; they are written again. %s", self, what, remedy)
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
        LOG.info("collection %s has no journal; one is made from its %s", self.name, counted(self.count, "record"))
        self.journal.close()
        with bar(self.count, "take over", "record") as progress:
            index.call(index.take_over, self.path, self.name, self.journal.path, progress=progress.update)
        self.journal = Journal(self.journal.path)

    # --- the index ----------------------------------------------------------------------------------------------------

    def _repaired(self, use: Callable[[], Any], is_rebuilt: bool = False) -> Any:
        """Return the result of `use`. If the collection is torn and in a folder, rebuild it, and call `use` again.

        Raises UserError if the collection is on a server, cannot be rebuilt, or has no journal.
        """
        try:
            if is_rebuilt:
                self.journal.repaired(self._rebuild)
            return self.journal.repaired(use)
        except index.TornError as error:
            n_records, is_local = len(self.journal.rows), isinstance(self.place, Path)
            if is_local and n_records and not is_rebuilt:
                LOG.info("collection %s is unusable (%s); it is rebuilt from the journal", self.name, error)
                return self._repaired(use, is_rebuilt=True)
            remedy = f"all vectors ({n_records}) are safe in the journal, so fix that and run again"
            if not is_local:
                remedy += "; see the server's log. If you delete the collection there, the next run writes it again"
            elif not n_records:
                remedy = "it has no journal to repair it from; restore a copy, or delete the folder to start over"
            raise UserError(f"{self} cannot be used ({error}); {remedy}") from None

    def _rebuild(self) -> None:
        """Write the whole journal to a new collection. On a server, the collection must be missing."""
        self.journal.note(indexed=0, indexing=True)  # after a kill, missing records must not look user-deleted
        if isinstance(self.place, Path):
            try:
                index.call(index.drop, self.place, self.name)
            except index.TornError as error:
                if not index.set_aside(self.place):
                    raise
                LOG.info("the database is torn (%s); it was renamed to %s.torn", error, self.place / "chroma.sqlite3")
        self._write_missing(f"repairing {self.name} from the journal")

    def _write_missing(self, what: str) -> None:
        """Write what the collection lacks. After an interrupted write, compare all records, and write what differs."""
        differing = NO_ROWS
        if self.journal.indexing and self.journal.indexed:
            differing = self._compare(self._indexed(), "compare all after an interrupted write")[1]
        if len(differing):
            LOG.info("writing %s of collection %s again", counted(len(differing), "damaged record"), self.name)
        if n_records := len(differing) + sum(map(len, self._lacking())):
            with bar(n_records, what, "record") as progress:
                self._apply(differing, progress.update)
        elif self.journal.indexing:
            self.journal.note(indexing=False)
        if len(differing) and len(self._compare(differing, "compare again")[1]):
            raise index.TornError("its records stay damaged")

    def _follow(self) -> None:
        with contextlib.suppress(Exception):  # the end of the run tries again, and reports it
            self._apply()

    def _apply(self, again: np.ndarray = NO_ROWS, progress: Callable[[int], Any] = lambda n: None) -> None:
        """Write what the collection lacks, and the rows `again` (n,) ROW."""
        journal = self.journal
        end, changed, (new, changed_rows, removing) = journal.end, journal.changed, self._lacking()
        journal.note(indexing=True)
        watch = index.watch_size(self.place, self.name, journal.path, journal.n_records)
        work = journal.path, np.concatenate([again, new]), changed_rows, removing, self.model
        self.count = index.call(index.apply, self.place, self.name, *work, progress=progress, watch=watch)
        journal.note(indexed=end, changed=np.setdiff1d(journal.changed, changed), indexing=False)
        if len(removing):
            journal.remove(removing)

    def _compare(self, rows: np.ndarray, what: str) -> tuple[int, np.ndarray]:
        """(number of `rows` (n,) ROW in the collection, the rows that differ or are missing)."""
        with bar(len(rows), what, "record") as progress:
            return index.call(index.compare, self.place, self.name, self.journal.path, rows, progress=progress.update)

    def _rows(self) -> np.ndarray:
        """Rows of the journal, except ids that people deleted and ids that are being removed."""
        rows, hidden = self.journal.rows, np.concatenate([self.journal.gone, self.journal.removing])
        return rows[~np.isin(rows["id"], hidden)] if len(hidden) else rows

    def _indexed(self) -> np.ndarray:
        rows = self._rows()
        return rows[rows["seq"] <= self.journal.indexed]

    def _lacking(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the collection lacks: new rows (n,) ROW, rows (m,) ROW of changed metadata, ids (k,) V16 to remove."""
        journal, rows = self.journal, self._rows()
        return rows[rows["seq"] > journal.indexed], rows[np.isin(rows["id"], journal.changed)], journal.removing
