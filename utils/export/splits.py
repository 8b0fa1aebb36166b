"""Splits without leaks: images joined by shared positives or near duplicates are in one split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from utils.annotation.records import Record
from utils.errors import UserError

N_AXES = 48  # axes of the rough comparison: more take more time, fewer leave more pairs to the exact one
N_SAMPLED = 10_000  # vectors that the axes are computed from; the result is exact for any axes
HEIGHT, WIDTH = 1_024, 2_048  # block of the rough comparison: 8 MB, which stays in the processor's cache
PAIRS = 1 << 15  # pairs compared exactly at a time: 2 x 64 MB at 512 dimensions
MARGIN, TOLERANCE = 1e-4, 1e-6  # rounding errors of float32 cosines in the rough and the exact comparison

_NAME = re.compile(r"[A-Za-z0-9_-]+")  # it becomes part of file names


def check_shares(shares: Mapping[str, float], constant: str) -> None:
    """Raises UserError unless `shares` maps names of splits to shares that sum to 1."""
    for name, share in shares.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"{constant}: {name!r} is not a name for a split; use letters, digits, '_' and '-'")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"{constant}: the share of {name} is {share!r}; it must be a number from 0 to 1")
    if len({name.lower() for name in shares}) < len(shares):
        raise UserError(f"{constant}: two names differ in case only, and some file systems ignore case; rename one")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"{constant}: the sum of the shares is {sum(shares.values()):g}; it must be 1")


def split_items(
    records: Sequence[Record],
    row_of: Mapping[str, int],
    vectors: np.ndarray,
    near_duplicate: float,
    shares: Mapping[str, float],
    seed: int,
) -> tuple[dict[str, str], int]:
    """id -> split, for every id in `records`, and the number of clusters of groups.

    vectors: (N, D) float32 of unit length, rows by `row_of`, in the order of ids. An id without a row can be joined
    only by positives.
    A group is in the split of its main image. Clusters are assigned whole, the largest first, each to the split that
    is furthest below its share. A cluster without groups goes to the split whose groups have most of its images as
    negatives, so that few negatives are lost.
    """
    ids = sorted({id_ for record in records for id_ in (*record["pos"], *record["neg"])})
    position = {id_: i for i, id_ in enumerate(ids)}
    clusters = Clusters(len(ids))
    for record in records:
        for id_ in record["pos"][1:]:
            clusters.join(position[record["pos"][0]], position[id_])
    known = [i for i, id_ in enumerate(ids) if id_ in row_of]
    if len(known) < len(vectors):
        vectors = vectors[[row_of[ids[i]] for i in known]]
    _join_near_duplicates(clusters, np.array(known, dtype=np.intp), vectors, near_duplicate)
    label_of = dict(zip(ids, clusters.labels().tolist()))

    n_groups = Counter(label_of[record["pos"][0]] for record in records)
    split_of = _assign(n_groups, shares, seed)
    votes = Counter(
        (label_of[id_], split_of[label_of[record["pos"][0]]]) for record in records for id_ in record["neg"]
    )
    order = {name: i for i, name in enumerate(shares)}
    for label, split in sorted(votes, key=lambda vote: (votes[vote], -order[vote[1]])):
        if label not in n_groups:
            split_of[label] = split  # votes ascend, so the split with the most votes is assigned last
    return {id_: split_of[label] for id_, label in label_of.items()}, len(n_groups)


def _assign(n_groups: Mapping[int, int], shares: Mapping[str, float], seed: int) -> dict[int, str]:
    """Cluster -> split. Greedy: the result is within the largest cluster of the exact shares."""
    labels = np.random.default_rng(seed).permutation(sorted(n_groups)).tolist()
    total = sum(n_groups.values())
    missing = {name: share * total for name, share in shares.items() if share > 0}  # split -> number of missing groups
    split_of = {}
    for label in sorted(labels, key=lambda label: -n_groups[label]):
        split_of[label] = max(missing, key=lambda name: missing[name])
        missing[split_of[label]] -= n_groups[label]
    return split_of


class Clusters:
    """Rows 0 to n - 1, each in a cluster of its own until joined (union-find, path halving)."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, row: int) -> int:
        """The cluster's label: its smallest row."""
        parent = self._parent
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)

    def labels(self, rows: np.ndarray | None = None) -> np.ndarray:
        """find() of each of `rows`, or of all rows."""
        listed = range(len(self._parent)) if rows is None else rows.tolist()
        return np.array([self.find(row) for row in listed], dtype=np.intp)


def _join_near_duplicates(clusters: Clusters, rows: np.ndarray, vectors: np.ndarray, min_similarity: float) -> None:
    """Join `rows` (M,) if the cosine of their `vectors` (M, D), unit length, is at least min_similarity. Exact.

    A few axes decide nearly all pairs. If the rest of each vector is replaced by its length, a product can only grow
    (Cauchy-Schwarz), so a pair that is below min_similarity there is below it in full. O(M^2 N_AXES) time.
    """
    if min_similarity > 1 or len(rows) < 2:
        return
    reduced, threshold = _reduce(vectors), min_similarity - MARGIN
    products = np.empty((HEIGHT, WIDTH), np.float32)
    for top in range(0, len(rows), HEIGHT):
        for left in range(top, len(rows), WIDTH):
            here, there = slice(top, top + HEIGHT), slice(left, left + WIDTH)
            above, below = reduced[here], reduced[there]
            bound = np.matmul(above, below.T, out=products[: len(above), : len(below)])
            if bound.max() < threshold:
                continue
            a, b = np.divmod(np.flatnonzero(bound >= threshold), len(below))  # several times as fast as nonzero()
            a, b = a[left + b > top + a], b[left + b > top + a]
            _join_exactly(clusters, (rows[here], rows[there]), (vectors[here], vectors[there]), (a, b), min_similarity)


def _reduce(vectors: np.ndarray) -> np.ndarray:
    """(M, at most N_AXES + 1): coordinates on the leading uncentered principal axes, and the length of the rest."""
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
        if len(a):  # many copies of one image make many pairs, most of which are joined by now
            apart = clusters.labels(rows[0])[a] != clusters.labels(rows[1])[b]
            a, b = a[apart], b[apart]
