"""The images that directories can show: ids and vectors of a collection, restricted by past decisions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.annotation import neighbors
from utils.annotation.records import Record
from utils.errors import UserError
from utils.ids import is_uuid
from utils.store import collection
from utils.store.server import Place

if TYPE_CHECKING:
    import chromadb


@dataclass
class Candidates:
    """N images of a collection, in the order of their ids; a row is an index into them."""

    ids: list[str]
    vectors: np.ndarray  # (N, D) float32 of unit length
    allowed: np.ndarray  # (N,) bool: may become main images
    eligible: np.ndarray  # (N,) bool: may be neighbors
    model: dict[str, Any]  # model facts stored with the collection
    annotated: list[tuple[list[int], list[int]]] = field(default_factory=list)  # (pos rows, main first; neg rows)
    judged: dict[int, set[int]] = field(default_factory=dict)  # row -> rows that must not be shown with it
    name: str = ""  # name of the collection
    pool: dict[str, np.ndarray] = field(default_factory=dict)  # name of a further collection -> its vectors (N, D)
    brought: dict[str, dict[str, str]] = field(default_factory=dict)  # main id -> shown id -> collection that ranked it
    row_of: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.row_of = {id_: row for row, id_ in enumerate(self.ids)}

    def rows(self, ids: Iterable[str]) -> list[int]:
        """Rows of these ids; ids that are not in the collection are skipped."""
        return [self.row_of[id_] for id_ in ids if id_ in self.row_of]

    def leave_out(self, ids: Iterable[str]) -> None:
        """Exclude these ids as main images."""
        self.allowed[self.rows(ids)] = False

    def leave_out_annotated(self, records: Sequence[Record], show_judged: bool) -> None:
        """Exclude positives as main images and, unless `show_judged`, pairs of a main image and a judged image."""
        for record in records:
            self.leave_out(record["pos"])
            if record["pos"][0] not in self.row_of:
                continue
            positives, negatives = self.rows(record["pos"]), self.rows(record["neg"])
            self.annotated.append((positives, negatives))
            for row in [] if show_judged else (*positives[1:], *negatives):
                self.judged.setdefault(positives[0], set()).add(row)
                self.judged.setdefault(row, set()).add(positives[0])

    def add_pool(self, place: Place, name: str) -> int:
        """Also show the nearest images of collection `name`. Images missing there are not shown; returns their number.

        Raises UserError if the collection cannot be read or has none of the images.
        """
        with collection.reading(place, name) as images:
            is_there = _are_in(self.ids, collection.read_ids(images))
            if not is_there.any():
                raise UserError(f"ANN_DIRRIFY_POOL: collection {name} has no image of this one; embed the same list")
            load_vectors = collection.spool_vectors(images, [self.ids[row] for row in np.flatnonzero(is_there)])
        found = neighbors.normalize(load_vectors())
        self.pool[name] = np.zeros((len(self.ids), found.shape[1]), np.float32)
        self.pool[name][is_there] = found
        self.allowed &= is_there
        self.eligible &= is_there
        return int((~is_there).sum())

    def nearest(self, mains: Sequence[int], n_nearest: int, max_similarity: float) -> list[neighbors.Neighbors]:
        """The nearest images of each main image. With a pool, the collections take turns, rank by rank.

        Similarities are from this collection. The main image decides which collection has the first turn.
        """
        judged = [sorted(self.judged.get(main, ())) for main in mains]
        if not self.pool:
            return neighbors.nearest(self.vectors, mains, n_nearest, self.eligible, judged, max_similarity)
        n_each = n_nearest if max_similarity >= 1 else 2 * n_nearest  # spares for near duplicates, which are dropped
        spaces = [self.vectors, *self.pool.values()]
        found = [neighbors.nearest(vectors, mains, n_each, self.eligible, judged, max_similarity) for vectors in spaces]
        return [
            self._pooled(main, [near.rows for near in of_main], n_nearest, max_similarity)
            for main, of_main in zip(mains, zip(*found))
        ]

    def _pooled(self, main: int, rankings: list[list[int]], n: int, max_similarity: float) -> neighbors.Neighbors:
        brought = neighbors.interleave(rankings, int(self.ids[main][:8], 16) % len(rankings))
        rows, n_dropped = np.array(list(brought), np.intp), 0
        if max_similarity < 1:
            taken, n_dropped = neighbors.distinct(self.vectors, main, rows, n, max_similarity)
            rows = rows[taken]
        rows = rows[:n]
        names = [self.name, *self.pool]
        self.brought[self.ids[main]] = {self.ids[row]: names[brought[row]] for row in rows.tolist()}
        similarities = neighbors.cosines(self.vectors, rows, main).tolist()
        return neighbors.Neighbors(rows.tolist(), similarities, n_dropped)

    def cosines(self, ids: Sequence[str]) -> dict[str, float]:
        """Cosine of each id to the first, 6 decimals. Ids not in the collection are skipped; {} if the first is not."""
        rows = self.rows(ids)
        if not rows or self.ids[rows[0]] != ids[0]:
            return {}
        cosines = neighbors.cosines(self.vectors, rows, rows[0])
        return {self.ids[row]: round(float(cosine), 6) for row, cosine in zip(rows, cosines)}

    def fingerprint(self) -> str:
        """SHA-256 over ids, vectors, roles, decisions and judged pairs: equal fingerprints give equal directories."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        for vectors in (self.vectors, *self.pool.values()):  # another model may have embedded the same images
            digest.update(vectors.data)
        digest.update(self.allowed.tobytes() + self.eligible.tobytes())
        digest.update(repr(sorted((row, sorted(rows)) for row, rows in self.judged.items())).encode())
        digest.update(repr(self.annotated).encode())
        return digest.hexdigest()


def read_candidates(place: Place, name: str, where: dict[str, Any], neighbors_where: dict[str, Any]) -> Candidates:
    """Read all images of collection `name`. `where` restricts the main images, `neighbors_where` the neighbors.

    Raises UserError if the collection is missing, empty or torn, or if a filter is malformed or matches nothing.
    """
    with collection.reading(place, name) as images:
        ids = collection.read_ids(images)
        foreign = next((id_ for id_ in ids if not is_uuid(id_)), None)
        if foreign is not None:
            raise UserError(f"collection {name} has the id {foreign!r}, which is not a uuid; make it with embed.py")
        allowed = _matching(images, ids, where, "ANN_DIRRIFY_WHERE")
        eligible = _matching(images, ids, neighbors_where, "ANN_DIRRIFY_NEIGHBORS_WHERE")
        load_vectors = collection.spool_vectors(images, ids)
        model = dict(images.metadata or {})
    return Candidates(ids, neighbors.normalize(load_vectors()), allowed, eligible, model, name=name)


def _matching(images: chromadb.Collection, ids: Sequence[str], where: dict[str, Any], constant: str) -> np.ndarray:
    """(N,) bool: which of `ids` match the filter of `constant`."""
    if not where:
        return np.ones(len(ids), bool)
    try:
        found = collection.read_ids(images, where)
    except ValueError as error:
        raise UserError(
            f"{constant} {json.dumps(where)} is malformed: {str(error).rstrip('.')}. Combine conditions with "
            '{"$and": [{...}, {...}]}; nested values cannot be filtered'
        ) from None
    if not found:
        raise UserError(f"{constant} {json.dumps(where)} matches no image in collection {images.name}")
    return _are_in(ids, found)


def _are_in(ids: Sequence[str], found: Iterable[str]) -> np.ndarray:
    """(N,) bool: which of `ids` were found."""
    there = set(found)
    return np.fromiter((id_ in there for id_ in ids), bool, len(ids))
