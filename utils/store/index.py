"""The Chroma collection as an index of the journal, touched by embed.py in child processes only.

A kill in the middle of Chroma's flush tears its files, and a torn store can take down the process that opens it: here
that is a child. And Chroma's upsert holds the GIL, which would stall the process that feeds the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.processes import DiedError, Progress, call
from utils.store import index_tasks as tasks
from utils.store.backlog import Backlog
from utils.store.index_tasks import TornError
from utils.store.server import Place

__all__ = ["Backlog", "Health", "TornError", "apply", "compare", "delete", "drop", "inspect", "is_database", "vectors"]

READ = 20_000  # records a child reads and hands over, 40 MB at 512 dimensions


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
    model, ids = _in_child(tasks.inspect, place, name)
    return Health(model, np.sort(np.frombuffer(ids, "V16")))


def apply(place: Place, name: str, backlog: Backlog, progress: Progress = lambda n: None) -> int:
    """Bring the collection, made if missing, up to date with a part of the journal, and flush it once.

    `progress` is told the records done. Returns the records in the collection then. Raises TornError.
    """
    return _in_child(tasks.apply, place, name, backlog, progress=progress)


def delete(place: Place, name: str, ids: np.ndarray) -> int:
    """Delete the records `ids` (n,) V16, those that are there; returns how many others are. Raises TornError."""
    return _in_child(tasks.delete, place, name, ids.tobytes())


def drop(place: Place, name: str) -> None:
    """Delete the whole collection, torn or not, if it is there. Raises TornError."""
    _in_child(tasks.drop, place, name)


def is_database(path: Path) -> bool:
    """Whether the store's SQLite file is missing or sound, by SQLite's own check."""
    return _in_child(tasks.is_database, path)


def vectors(place: Place, name: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """(ids, vectors (n, D) float32, metadata) of the records `ids` (n,) V16, page by page."""
    for start in range(0, len(ids), READ):
        page = ids[start : start + READ]
        yield page, *_in_child(tasks.read, place, name, page.tobytes())


def compare(place: Place, name: str, backlog: Backlog, progress: Progress = lambda n: None) -> tuple[int, list[str]]:
    """Compare each vector of the journal with the collection's: how many, and the ids that differ or are missing.

    Chroma normalizes what it is given once more, which moves last bits: 1e-6 in each number counts as the same.
    Raises TornError.
    """
    return _in_child(tasks.compare, place, name, backlog, progress=progress)


def _in_child(task: Callable[..., Any], *args: Any, progress: Progress = lambda n: None) -> Any:
    try:
        return call(tasks.guarded, task, *args, progress=progress)
    except DiedError as error:
        raise TornError(f"the process that opened it died with {error}") from None
