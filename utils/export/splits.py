"""Which split a judged image belongs to: the same for all that positives or near duplicates join."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from utils.annotation.records import Record
from utils.errors import UserError
from utils.export.clusters import Clusters, join_near_duplicates

_NAME = re.compile(r"[A-Za-z0-9_-]+")  # a part of file names


def check_shares(shares: Mapping[str, float], constant: str) -> None:
    """Raises UserError unless `shares` names splits and their shares of a whole."""
    for name, share in shares.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"{constant}: {name!r} is no name for a split; use letters, digits, '_' and '-'")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"{constant}: the share of {name} is {share!r}; it must be a number from 0 to 1")
    if len({name.lower() for name in shares}) < len(shares):
        raise UserError(f"{constant}: two names differ in case only, which some file systems do not tell apart")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"{constant}: the shares sum up to {sum(shares.values()):g}; they must sum up to 1")


def split_items(
    records: Sequence[Record],
    row_of: Mapping[str, int],
    vectors: np.ndarray,
    near_duplicate: float,
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, str]:
    """id -> split, for every id in `records`; a group goes where its main image goes.

    vectors: (N, D) float32 of unit length, rows by `row_of`; an id that has no row can be joined by positives only.
    Clusters are assigned whole, the largest first, each to the split that lacks most groups. One that no positive
    touches goes where most groups have its images as negatives, so that few negatives are lost.
    """
    ids = sorted({id_ for record in records for id_ in (*record["pos"], *record["neg"])})
    place = {id_: i for i, id_ in enumerate(ids)}
    clusters = Clusters(len(ids))
    for record in records:
        for id_ in record["pos"][1:]:
            clusters.join(place[record["pos"][0]], place[id_])
    known = [i for i, id_ in enumerate(ids) if id_ in row_of]
    if len(known) < len(vectors) or any(row_of[ids[i]] != row for row, i in enumerate(known)):
        vectors = vectors[[row_of[ids[i]] for i in known]]
    join_near_duplicates(clusters, np.array(known, dtype=np.intp), vectors, near_duplicate)
    labels = clusters.labels().tolist()

    n_groups = Counter(labels[place[record["pos"][0]]] for record in records)
    split_of = _assign(n_groups, shares, seed)
    votes = Counter((labels[place[id_]], split_of[labels[place[r["pos"][0]]]]) for r in records for id_ in r["neg"])
    order = {name: i for i, name in enumerate(shares)}
    for label, split in sorted(votes, key=lambda vote: (votes[vote], -order[vote[1]])):
        if label not in n_groups:
            split_of[label] = split  # the last one, of most votes, stays
    return {id_: split_of[label] for id_, label in zip(ids, labels)}


def _assign(n_groups: Mapping[int, int], shares: Mapping[str, float], seed: int) -> dict[int, str]:
    """Cluster -> split. Greedy: the result is within the largest cluster of the exact shares."""
    labels = np.random.default_rng(seed).permutation(sorted(n_groups)).tolist()
    total = sum(n_groups.values())
    lacks = {name: share * total for name, share in shares.items() if share > 0}
    split_of = {}
    for label in sorted(labels, key=lambda label: -n_groups[label]):
        split_of[label] = max(lacks, key=lambda name: lacks[name])
        lacks[split_of[label]] -= n_groups[label]
    return split_of
