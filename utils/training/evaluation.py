"""Cross-validation: whether a projection helps on groups that it has not seen, and which recipe is best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from utils.processes import Progress
from utils.training.projection import RECIPES, Group, Recipe, learn, project

N_FOLDS = 5
NEAR_DUPLICATE = 0.98  # cosine; an image this similar to a held-out one is held out, too
N_RESAMPLES, PERCENTILES = 2_000, (2.5, 97.5)
MIN_GROUPS = 20  # two-sided groups; fewer prove nothing about other groups
MIN_GAIN = 0.02
NEEDED = (
    f"no gain: at least {MIN_GAIN} with an interval above 0 is needed. More directories help, informative ones the most"
)


class Gain(NamedTuple):
    """Held-out precision of the embeddings and of the projection; 95% interval of the gain, from resampling groups."""

    before: float
    after: float
    low: float
    high: float
    n_groups: int  # two-sided groups

    @property
    def value(self) -> float:
        return self.after - self.before

    @property
    def is_enough(self) -> bool:
        return self.value >= MIN_GAIN and self.low > 0

    def __str__(self) -> str:
        return (
            f"held-out average precision of judged images {self.before:.3f} before, {self.after:.3f} after, "
            f"gain {self.value:.3f} (95%: {self.low:.3f} to {self.high:.3f}), {self.n_groups} groups"
        )


def train(
    vectors: np.ndarray, groups: list[Group], basis: np.ndarray, seed: int, _progress: Progress
) -> tuple[Gain, Recipe, np.ndarray]:
    """Cross-validate, and learn the (D, D) projection from all groups with the best recipe. For a child process."""
    gain, recipe = cross_validate(vectors, groups, basis, seed)
    return gain, recipe, learn(vectors, groups, basis, recipe, seed)


def cross_validate(vectors: np.ndarray, groups: Sequence[Group], basis: np.ndarray, seed: int) -> tuple[Gain, Recipe]:
    """(the gain of learning from `groups`, the recipe for learning from all of them).

    vectors: (M, D) of unit length, indexed by the groups. The groups of the other folds choose the recipe of a fold.
    Learns 20 projections; finding near duplicates takes O(M^2 D).
    """
    duplicates = _near_duplicates(vectors)
    scores: list[np.ndarray] = []  # per fold: (1 + recipes, its two-sided groups); row 0: no projection
    for held_out, training in _folds(groups, duplicates, seed):
        learned = (learn(vectors, training[recipe.all_pairs], basis, recipe, seed) for recipe in RECIPES)
        spaces = [vectors, *(project(vectors, matrix) for matrix in learned)]
        scores.append(np.array([[precision(space, group) for group in held_out] for space in spaces]))
    after = [fold[_choose(np.concatenate(scores[:i] + scores[i + 1 :], axis=1))] for i, fold in enumerate(scores)]
    before = np.concatenate([fold[0] for fold in scores])
    gains = np.concatenate(after) - before
    draws = np.random.default_rng(seed).integers(len(gains), size=(N_RESAMPLES, len(gains)))
    low, high = np.percentile(gains[draws].mean(1), PERCENTILES)
    gain = Gain(float(before.mean()), float((before + gains).mean()), float(low), float(high), len(gains))
    return gain, RECIPES[max(0, _choose(np.concatenate(scores, axis=1)) - 1)]


def _choose(scores: np.ndarray) -> int:
    """Choose a row of the (1 + recipes, G) scores: the first recipe, unless another row is a standard error better."""
    ahead = scores - scores[1]
    is_ahead = ahead.mean(1) > ahead.std(1) / np.sqrt(ahead.shape[1])
    return int(np.where(is_ahead, ahead.mean(1), 0).argmax()) if is_ahead.any() else 1


def refuse_groups(groups: Sequence[Group]) -> str:
    """The reason why these groups are not enough to learn from; "" if they are."""
    n = sum(map(is_two_sided, groups))
    if n >= MIN_GROUPS:
        return ""
    if len(groups) < MIN_GROUPS:
        return f"too few annotated directories: {len(groups)}; at least {MIN_GROUPS} are needed"
    return (
        f"too few deletions: {n} of {len(groups)} directories with both kept and deleted images; at least {MIN_GROUPS} "
        f"are needed. --ann-dirrify-pick informative shows images that are harder to decide"
    )


def is_two_sided(group: Group) -> bool:
    """Whether a ranking of the group can be right or wrong: it needs two kept images and a deleted one."""
    return len(group[0]) > 1 and len(group[1]) > 0


def precision(vectors: np.ndarray, group: Group) -> float:
    """Average precision of the other kept images against the deleted ones, averaged over each kept image as query."""
    kept, deleted = group
    similarity = vectors[kept] @ vectors[kept + deleted].T
    np.fill_diagonal(similarity, -np.inf)  # the query itself comes last
    hits = (np.argsort(-similarity, axis=1, kind="stable") < len(kept))[:, :-1]
    ranks = np.arange(1, hits.shape[1] + 1)
    return float(((hits.cumsum(1) / ranks * hits).sum(1) / (len(kept) - 1)).mean())


def _near_duplicates(vectors: np.ndarray) -> list[list[int]]:
    """For each row, the rows with a cosine above NEAR_DUPLICATE, itself included. O(M^2 D)."""
    tiles = (vectors[start : start + 1_000] @ vectors.T > NEAR_DUPLICATE for start in range(0, len(vectors), 1_000))
    return [np.flatnonzero(row).tolist() for tile in tiles for row in tile]


def _folds(
    groups: Sequence[Group], duplicates: Sequence[Sequence[int]], seed: int
) -> Iterator[tuple[list[Group], dict[bool, list[Group]]]]:
    """Yield (groups to judge, groups to learn from) N_FOLDS times. No image or near duplicate of one is in both.

    The groups to learn from depend on Recipe.all_pairs: if True, a group without its main image still has pairs.
    """
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    for fold in range(N_FOLDS):
        held_out = [groups[i] for i in order[fold::N_FOLDS]]
        seen = {near for kept, deleted in held_out for row in (*kept, *deleted) for near in (row, *duplicates[row])}
        rest = [groups[i] for place, i in enumerate(order) if place % N_FOLDS != fold]
        left = [
            ([row for row in kept if row not in seen], [row for row in deleted if row not in seen])
            for kept, deleted in rest
        ]
        has_main = [group for group, before in zip(left, rest) if group[0][:1] == before[0][:1]]
        yield [group for group in held_out if is_two_sided(group)], {True: left, False: has_main}
