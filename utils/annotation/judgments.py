"""Compare records with the collection (judged items ranked by similarity) and with each other (contradictions)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from utils.annotation.neighbors import cosines
from utils.annotation.records import Record


class Item(NamedTuple):
    """An image that was judged against a main image."""

    id: str
    similarity: float  # cosine
    is_kept: bool


class Judged(NamedTuple):
    """The items of one record, ranked by the collection: most similar to the main image first, ties by id."""

    number: int  # number of the record
    main: str
    items: list[Item]  # without the main image and without ids that are not in the collection


class Chain(NamedTuple):
    """Judged similar: a and middle, middle and c. Judged not similar: a and c."""

    a: str
    middle: str
    c: str


def similarities(record: Record, row_of: Mapping[str, int], vectors: np.ndarray) -> dict[str, float]:
    """Judged items in the collection -> cosine to the main image; most similar first, ties by id."""
    main = row_of.get(record["pos"][0])
    items = sorted(id_ for id_ in {*record["pos"][1:], *record["neg"]} if id_ in row_of)
    if main is None or not items:
        return {}
    found = cosines(vectors, [row_of[id_] for id_ in items], main).tolist()
    return dict(sorted(zip(items, found), key=lambda pair: -pair[1]))


def rank(records: Sequence[Record], row_of: Mapping[str, int], vectors: np.ndarray) -> list[Judged]:
    """One entry per record, in record order. vectors: (N, D) float32 of unit length; row_of: id -> row."""
    result = []
    for number, record in enumerate(records):
        main, kept = record["pos"][0], set(record["pos"])
        found = similarities(record, row_of, vectors).items()
        result.append(Judged(number, main, [Item(id_, s, id_ in kept) for id_, s in found if id_ != main]))
    return result


def contradictions(records: Iterable[Record]) -> tuple[list[tuple[str, str]], list[Chain]]:
    """(pairs judged similar and not similar; for each other pair judged not similar, at most one chain)."""
    similar: dict[str, set[str]] = {}
    different: dict[str, set[str]] = {}
    for record in records:
        main = record["pos"][0]
        for judgment, ids in ((similar, record["pos"][1:]), (different, record["neg"])):
            for id_ in ids:
                judgment.setdefault(main, set()).add(id_)
                judgment.setdefault(id_, set()).add(main)
    pairs, chains = [], []
    for a, others in sorted(different.items()):
        near = similar.get(a, set())
        for c in sorted(id_ for id_ in others if id_ > a):
            if c in near:
                pairs.append((a, c))
            elif middles := near & similar.get(c, set()):
                chains.append(Chain(a, min(middles), c))
    return pairs, chains
