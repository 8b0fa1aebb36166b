"""Estimates from judged groups, each with a 95% interval from resampling whole groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np

from utils.annotation.judgments import Judged

N_RESAMPLES = 1_000
PERCENTILES = (2.5, 97.5)
CHUNK = 50  # resamples at a time: 50 x 10,000 groups x 8 bytes = 4 MB
MAX_RANK = 50


class Estimate(TypedDict):
    """A figure with its interval; None without data."""

    value: float | None
    low: float | None
    high: float | None
    n: int  # number of groups


def ratios(above: np.ndarray, below: np.ndarray) -> list[Estimate]:
    """sum(above) / sum(below) per column, both (G, K), with percentile bootstrap intervals (Efron 1979).

    Groups are resampled, not items: items of one group share its main image and are not independent. Every column of
    `below` must have a nonzero group.
    """
    n_groups, n_columns = below.shape
    if not n_groups:
        return [Estimate(value=None, low=None, high=None, n=0)] * n_columns
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(N_RESAMPLES // CHUNK):
        weights = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), CHUNK).astype(np.float64)
        samples.append(_divide(weights @ above, weights @ below))
    low, high = np.nanpercentile(np.concatenate(samples), PERCENTILES, axis=0)
    columns = (above.sum(0) / below.sum(0)).tolist(), low.tolist(), high.tolist(), np.count_nonzero(below, 0).tolist()
    return [
        Estimate(value=round(value, 6), low=round(low, 6), high=round(high, 6), n=n)
        for value, low, high, n in zip(*columns)
    ]


def mean(values: Sequence[float]) -> Estimate:
    """The mean of one value per group. For differences between two models, the interval is a paired one."""
    column = np.array(values, dtype=np.float64)[:, None]
    return ratios(column, np.ones_like(column))[0]


def by_rank(groups: Sequence[Judged]) -> tuple[list[Estimate], list[Estimate]]:
    """Keep rate at rank j, and precision@j, the kept share of the first j; both over groups with j items or more."""
    width = min(MAX_RANK, max((len(group.items) for group in groups), default=0))
    kept, there = np.zeros((len(groups), width)), np.zeros((len(groups), width))
    for row, group in enumerate(groups):
        n = min(width, len(group.items))
        kept[row, :n], there[row, :n] = [item.is_kept for item in group.items[:n]], 1
    return ratios(kept, there), ratios(np.cumsum(kept, 1) / np.arange(1, width + 1) * there, there)


def average_precision(group: Judged) -> float:
    """Average precision of the ranking by similarity. The group must have a kept item."""
    hits = np.flatnonzero([item.is_kept for item in group.items])
    return float(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))


def ordered_share(group: Judged) -> float:
    """The share of a group's pairs (kept, deleted) whose kept item is more similar; a tie counts half."""
    return auc(similarities([group], True), similarities([group], False))


def auc(kept: np.ndarray, deleted: np.ndarray) -> float:
    """Probability that a kept item is more similar than a deleted one; a tie counts half."""
    smaller, at_most = (np.searchsorted(np.sort(deleted), kept, side).sum() for side in ("left", "right"))
    return float(smaller + at_most) / 2 / (len(kept) * len(deleted))


def similarities(groups: Iterable[Judged], is_kept: bool) -> np.ndarray:
    """The similarities of the kept or of the deleted items."""
    return np.array([item.similarity for group in groups for item in group.items if item.is_kept == is_kept])


def is_two_sided(group: Judged) -> bool:
    return len({item.is_kept for item in group.items}) == 2


def best_threshold(kept: np.ndarray, deleted: np.ndarray) -> dict[str, float] | None:
    """The similarity that separates kept (n,) and deleted (m,) items best: it maximizes the mean of the two shares.

    None if either is empty.
    """
    if not (len(kept) and len(deleted)):
        return None
    candidates = np.unique(np.concatenate([kept, deleted]))
    kept_above = 1 - np.searchsorted(np.sort(kept), candidates) / len(kept)
    deleted_below = np.searchsorted(np.sort(deleted), candidates) / len(deleted)
    best = int(np.argmax(kept_above + deleted_below))
    figures = {
        "similarity": candidates[best],
        "kept_above": kept_above[best],  # share of kept items at or above it
        "deleted_below": deleted_below[best],  # share of deleted items below it
        "auc": auc(kept, deleted),  # over all groups
    }
    return {name: round(float(figure), 6) for name, figure in figures.items()}


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)
