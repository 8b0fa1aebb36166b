"""Rows that belong together: joined one pair at a time, or by near duplicates among all of them."""

from __future__ import annotations

import numpy as np

N_AXES = 48  # axes of the first comparison: more cost time, fewer let more pairs through to the exact one
CELLS = 1 << 23  # of the first comparison at a time: 8 million, 32 MB
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

    def labels(self) -> np.ndarray:
        """(n,) what find() gives for each row."""
        return np.array([self.find(row) for row in range(len(self._parent))], dtype=np.intp)


def join_near_duplicates(clusters: Clusters, rows: np.ndarray, vectors: np.ndarray, min_similarity: float) -> None:
    """Join those of `rows` (M,) whose `vectors` (M, D), unit length, have a cosine of min_similarity or more. Exact.

    A few axes decide nearly all pairs: with the rest of each vector reduced to its length, the product can only grow
    (Cauchy-Schwarz), so what stays below min_similarity there is no near duplicate. O(M^2 N_AXES) time.
    """
    if min_similarity > 1 or len(rows) < 2:
        return
    reduced = _reduce(vectors)
    height = max(1, CELLS // len(rows))
    for start in range(0, len(rows), height):
        bound = reduced[start : start + height] @ reduced[start:].T
        near = np.flatnonzero(bound >= min_similarity - 1e-4)  # several times as fast as nonzero() in two dimensions
        a, b = np.divmod(near, len(rows) - start)
        a, b = a[b > a] + start, b[b > a] + start
        if len(a) > PAIRS:  # most of them are joined by now: a heap of copies
            labels = clusters.labels()[rows]
            apart = labels[a] != labels[b]
            a, b = a[apart], b[apart]
        _join_exactly(clusters, rows, vectors, a, b, min_similarity - TOLERANCE)


def _reduce(vectors: np.ndarray) -> np.ndarray:
    """(M, at most N_AXES + 1): along the leading uncentered principal axes, and the length of the rest."""
    if vectors.shape[1] <= N_AXES:
        return vectors
    axes = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))[1][:, -N_AXES:].astype(np.float32)
    along = vectors @ axes
    rest = np.sqrt(np.clip(1 - np.einsum("ij,ij->i", along, along), 0, None))
    return np.column_stack([along, rest])


def _join_exactly(
    clusters: Clusters, rows: np.ndarray, vectors: np.ndarray, a: np.ndarray, b: np.ndarray, least: float
) -> None:
    for start in range(0, len(a), PAIRS):
        left, right = a[start : start + PAIRS], b[start : start + PAIRS]
        near = np.einsum("ij,ij->i", vectors[left], vectors[right]) >= least
        for one, other in zip(rows[left[near]].tolist(), rows[right[near]].tolist()):
            clusters.join(one, other)
