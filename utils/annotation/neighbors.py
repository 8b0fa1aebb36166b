"""Exact nearest neighbors of some rows: cosine over all vectors, ties by id."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 8_192  # rows compared in float64 at a time: 8,192 x 512 x 8 bytes = 34 MB
GROUPS_PER_RANK = 8  # groups of rows per wanted row; at first only the maximum of each group is compared


@dataclass(frozen=True)
class Neighbors:
    """The nearest rows of one row, most similar first, the row itself excluded."""

    rows: list[int]
    similarities: list[float]
    n_dropped: int  # near duplicates that the next nearest images replaced

    def only(self, positions: Sequence[int]) -> Neighbors:
        return Neighbors([self.rows[i] for i in positions], [self.similarities[i] for i in positions], self.n_dropped)


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale the rows of (N, D) float32 to unit length, in place. Unit rows keep their bits; zero rows stay zero."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    rows = np.flatnonzero((np.abs(lengths - 1) > 1e-6) & (lengths > 0))
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        vectors[chunk] /= lengths[chunk, None]
    return vectors


def nearest(
    vectors: np.ndarray,
    mains: Sequence[int],
    n_nearest: int,
    eligible: np.ndarray | None = None,
    judged: Sequence[Sequence[int]] | None = None,
    max_similarity: float = 1.0,
) -> list[Neighbors]:
    """The `n_nearest` nearest rows of each row in `mains`, exactly. O(B N D) time, B x N x 4 bytes.

    vectors: (N, D) float32 of unit length, in the order of ids, so that ties by row are ties by id.
    eligible: (N,) bool, rows that may be neighbors. judged: per main, rows that may not.
    max_similarity: below 1, a neighbor is skipped if its cosine to the main or to one already listed is above this.
    """
    rough = vectors[np.asarray(mains, dtype=np.intp)] @ vectors.T  # (B, N)
    if eligible is not None:
        rough += np.where(eligible, np.float32(0), np.float32(-np.inf))  # faster than indexing by most rows
    result = []
    for i, main in enumerate(mains):
        rough[i, [main, *(judged[i] if judged else ())]] = -np.inf
        result.append(_pick(vectors, main, rough[i], n_nearest, max_similarity))
    return result


def _pick(vectors: np.ndarray, main: int, rough: np.ndarray, n_nearest: int, max_similarity: float) -> Neighbors:
    n_usable = int(np.count_nonzero(rough > -np.inf))
    n_ranked = n_nearest
    while True:
        rows, similarities = _rank(vectors, main, rough, min(n_ranked, n_usable))
        if max_similarity >= 1:
            return Neighbors(rows.tolist(), similarities.tolist(), 0)
        taken, n_dropped = distinct(vectors, main, rows, n_nearest, max_similarity)
        if len(taken) == n_nearest or n_ranked >= n_usable:
            return Neighbors(rows[taken].tolist(), similarities[taken].tolist(), n_dropped)
        n_ranked *= 4


def _rank(vectors: np.ndarray, main: int, rough: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n rows most similar to `main`, and their similarities in float64.

    A float32 product depends on how BLAS splits the sum, so it only selects: every row within the error bound of the
    n-th (Higham, Accuracy and Stability, 3.5: D u for unit vectors) is compared again in float64.
    """
    if n == 0:
        return np.empty(0, np.intp), np.empty(0)
    error = (vectors.shape[1] + 4) * 2.0**-24
    least = _largest(rough, n)
    rows = np.flatnonzero(rough >= max(least - 2 * error, -2.0))  # -2: never a row masked with -inf
    similarities = cosines(vectors, rows, main)
    order = np.lexsort((rows, -similarities))[:n]
    return rows[order], similarities[order]


def _largest(values: np.ndarray, n: int) -> np.floating:
    """The n-th largest value. The n-th largest group maximum is a lower bound, so few values need sorting."""
    n_groups = GROUPS_PER_RANK * n
    if len(values) >= 4 * n_groups:
        maxima = values[: len(values) // n_groups * n_groups].reshape(-1, n_groups).max(0)
        values = values[values >= np.partition(maxima, n_groups - n)[n_groups - n]]
    return np.partition(values, len(values) - n)[len(values) - n]


def cosines(vectors: np.ndarray, rows: Sequence[int] | np.ndarray, main: int) -> np.ndarray:
    """Cosine of each of `rows` to `main`, in float64, rounded to 12 decimals: smaller differences are ties.

    Row by row in one order of summation (einsum, not BLAS), so that equal vectors have equal cosines.
    """
    query = vectors[main].astype(np.float64)
    result = np.empty(len(rows))
    for start in range(0, len(rows), CHUNK):
        chunk = vectors[rows[start : start + CHUNK]].astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", chunk, chunk) * np.einsum("j,j", query, query))
        products = np.einsum("ij,j->i", chunk, query)
        result[start : start + CHUNK] = np.divide(products, lengths, out=np.zeros(len(chunk)), where=lengths > 0)
    return np.round(result, 12)


def distinct(
    vectors: np.ndarray, main: int, rows: np.ndarray, n_nearest: int, max_similarity: float
) -> tuple[list[int], int]:
    """Positions in `rows` of the first n_nearest that are not near duplicates, and the number of rows skipped."""
    listed: list[int] = [main]
    taken: list[int] = []
    for position, row in enumerate(rows.tolist()):
        if len(taken) == n_nearest:
            return taken, position - n_nearest
        if cosines(vectors, listed, row).max() <= max_similarity:
            listed.append(row)
            taken.append(position)
    return taken, len(rows) - len(taken)


def interleave(rankings: Sequence[Sequence[int]], first: int) -> dict[int, int]:
    """Merge rankings: each row once, by its best rank -> number of its ranking. At equal rank, `first` comes first."""
    order = [*range(first, len(rankings)), *range(first)]
    brought: dict[int, int] = {}
    for of_rank in itertools.zip_longest(*(rankings[number] for number in order)):
        for number, row in zip(order, of_rank):
            if row is not None:
                brought.setdefault(row, number)
    return brought
