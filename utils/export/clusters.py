"""Rows that belong together: joined one pair at a time, or by near duplicates among all of them."""

from __future__ import annotations

import numpy as np

N_AXES = 48  # axes of the first comparison: more cost time, fewer let more pairs through to the exact one
N_SAMPLED = 10_000  # vectors that these axes are found from; any axes are right, good ones are quick
HEIGHT, WIDTH = 1_024, 2_048  # of the first comparison at a time: 8 MB, near the processor in its cache
PAIRS = 1 << 15  # compared exactly at a time: 2 x 64 MB at 512 dimensions
TOLERANCE = 1e-6  # of cosines of float32 vectors


class Clusters:
    """Rows 0 to n - 1, each at first in a cluster of its own (union-find, path halving)."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, row: int) -> int:
        """The row that stands for the cluster of `row`: its smallest."""
        parent = self._parent
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)

    def labels(self, rows: np.ndarray | None = None) -> np.ndarray:
        """What find() gives for each of `rows`, or for all."""
        listed = range(len(self._parent)) if rows is None else rows.tolist()
        return np.array([self.find(row) for row in listed], dtype=np.intp)


def join_near_duplicates(clusters: Clusters, rows: np.ndarray, vectors: np.ndarray, min_similarity: float) -> None:
    """Join those of `rows` (M,) whose `vectors` (M, D), unit length, have a cosine of min_similarity or more. Exact.

    A few axes decide nearly all pairs: with the rest of each vector reduced to its length, the product can only grow
    (Cauchy-Schwarz), so what stays below min_similarity there is no near duplicate. O(M^2 N_AXES) time.
    """
    if min_similarity > 1 or len(rows) < 2:
        return
    reduced = _reduce(vectors)
    products = np.empty((HEIGHT, WIDTH), np.float32)
    for top in range(0, len(rows), HEIGHT):
        for left in range(top, len(rows), WIDTH):
            here, there = slice(top, top + HEIGHT), slice(left, left + WIDTH)
            above, below = reduced[here], reduced[there]
            bound = np.matmul(above, below.T, out=products[: len(above), : len(below)])
            if bound.max() < min_similarity - 1e-4:
                continue
            near = np.flatnonzero(bound >= min_similarity - 1e-4)  # several times as fast as nonzero()
            a, b = np.divmod(near, len(below))
            a, b = a[left + b > top + a], b[left + b > top + a]
            _join_exactly(clusters, (rows[here], rows[there]), (vectors[here], vectors[there]), (a, b), min_similarity)


def _reduce(vectors: np.ndarray) -> np.ndarray:
    """(M, at most N_AXES + 1): along the leading uncentered principal axes, and the length of the rest."""
    if vectors.shape[1] <= N_AXES:
        return vectors
    sample = vectors[:: -(-len(vectors) // N_SAMPLED)]
    axes = np.linalg.eigh((sample.T @ sample).astype(np.float64))[1][:, -N_AXES:].astype(np.float32)
    along = vectors @ axes
    rest = np.sqrt(np.clip(1 - np.einsum("ij,ij->i", along, along), 0, None))
    return np.column_stack([along, rest])


Both = tuple[np.ndarray, np.ndarray]


def _join_exactly(clusters: Clusters, rows: Both, vectors: Both, pairs: Both, min_similarity: float) -> None:
    a, b = pairs
    while len(a):
        one, other = a[:PAIRS], b[:PAIRS]
        near = np.einsum("ij,ij->i", vectors[0][one], vectors[1][other]) >= min_similarity - TOLERANCE
        for row, joined in zip(rows[0][one[near]].tolist(), rows[1][other[near]].tolist()):
            clusters.join(row, joined)
        a, b = a[PAIRS:], b[PAIRS:]
        if len(a):  # a heap of copies: most of them are joined by now
            apart = clusters.labels(rows[0])[a] != clusters.labels(rows[1])[b]
            a, b = a[apart], b[apart]
