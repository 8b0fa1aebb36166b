"""What the index has yet to take from the journal, in batches that Chroma takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.ids import from_ids
from utils.store.collection import open_client
from utils.store.server import Place, fitting
from utils.store.vectors import CHANGE, STORE, read_frames

BATCH = 1_000  # records an upsert; Chroma takes 5,461 at most
Batch = tuple[int, list[str], list[dict[str, Any]], np.ndarray]


class Backlog(NamedTuple):
    """A part of a journal: its file, from byte to byte, less the ids that people deleted, (n,) V16; the model."""

    journal: Path
    start: int
    end: int
    gone: np.ndarray
    model: dict[str, Any]


def batches(backlog: Backlog) -> Iterator[Batch]:
    """(kind, ids, metadata, vectors) of each frame with records in it."""
    for frame in read_frames(backlog.journal, backlog.start, backlog.end):
        if frame.kind in (STORE, CHANGE):
            kept = ~np.isin(frame.ids, backlog.gone)
            metadata = [one for one, keep in zip(frame.metadata, kept) if keep]
            yield frame.kind, from_ids(frame.ids[kept]), metadata, frame.vectors[kept]


def joined(batches: Iterator[Batch]) -> Iterator[Batch]:
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


def requests(place: Place, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches of the number and size that a server takes."""
    if isinstance(place, Path):
        yield from batches
        return
    most = min(BATCH, open_client(place).get_max_batch_size())
    for kind, ids, metadata, vectors in batches:
        for part in fitting(metadata, vectors.shape[1], most):
            yield kind, ids[part], metadata[part], vectors[part]
