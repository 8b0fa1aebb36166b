"""The projection: learned from decisions, saved, and judged on held-out groups."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from utils.annotation.neighbors import normalize
from utils.errors import UserError
from utils.store.collection import DERIVED
from utils.training.evaluation import Gain, cross_validate, precision, refuse_groups
from utils.training.projection import (
    N_DIMS,
    RECIPES,
    REST,
    Group,
    Projection,
    Recipe,
    leading,
    learn,
    project,
    projection_of,
    read_projection,
    write_projection,
)


def on_circle(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def hidden_classes(dimension: int = 12, n: int = 240) -> tuple[np.ndarray, list[Group]]:
    """Four classes in four directions, hidden by louder ones; and groups of random images, judged by class."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 4
    vectors = 0.5 * rng.normal(size=(n, dimension))
    vectors[:, :4] = np.eye(4)[labels] + 0.2 * rng.normal(size=(n, 4))
    groups = []
    for main in rng.permutation(n)[:40].tolist():
        shown = [row for row in rng.permutation(n)[:20].tolist() if row != main]
        kept = [row for row in shown if labels[row] == labels[main]]
        groups.append(([main, *kept], [row for row in shown if row not in kept]))
    return normalize(vectors.astype(np.float32)), groups


def mean_precision(vectors: np.ndarray, groups: list[Group]) -> float:
    return float(np.mean([precision(vectors, group) for group in groups if len(group[0]) > 1]))


# --- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_it_learns_helps_groups_that_it_has_not_seen(recipe):
    vectors, groups = hidden_classes()
    matrix = learn(vectors, groups[:30], leading(vectors), recipe, 0)
    assert mean_precision(project(vectors, matrix), groups[30:]) > mean_precision(vectors, groups[30:]) + 0.1


def test_a_group_of_a_thousand_images_takes_the_memory_of_a_small_one():
    vectors, groups = hidden_classes(n=1_000)
    labels = np.arange(1_000) % 4
    groups[0] = (np.flatnonzero(labels == 0).tolist(), np.flatnonzero(labels).tolist())
    tracemalloc.start()
    matrix = learn(vectors, groups[:30], leading(vectors), RECIPES[0], 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    assert mean_precision(project(vectors, matrix), groups[30:]) > mean_precision(vectors, groups[30:]) + 0.1


def test_the_same_seed_gives_the_same_projection_and_another_seed_another():
    vectors, groups = hidden_classes()
    one, again, other = (learn(vectors, groups, leading(vectors), RECIPES[0], seed) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()


def test_fewer_groups_and_a_stronger_prior_move_it_less():
    vectors, groups = hidden_classes()

    def distance(n: int, prior: float) -> float:
        return float(np.abs(learn(vectors, groups[:n], leading(vectors), Recipe(True, prior), 0) - np.eye(12)).sum())

    assert distance(2, 0.5) < distance(40, 0.5) < distance(40, 0.05)


def test_only_all_pairs_hold_a_deleted_image_against_the_other_kept_ones():
    # The main image at 0 degrees is far from the deleted one at 75; the other kept one, at 50, is near it.
    vectors = on_circle(0, 50, 75)
    projected = [
        project(vectors, learn(vectors, [([0, 1], [2])], np.eye(2, dtype=np.float32), Recipe(all_pairs, 0.0), 0))
        for all_pairs in (True, False)
    ]
    assert projected[0][1] @ projected[0][2] < projected[1][1] @ projected[1][2]


def test_directions_beyond_the_leading_ones_are_kept_at_a_part_of_their_weight():
    rng = np.random.default_rng(0)
    vectors = normalize(rng.normal(size=(400, N_DIMS + 10)).astype(np.float32))
    groups: list[Group] = [(rng.permutation(400)[:5].tolist(), rng.permutation(400)[5:9].tolist()) for _ in range(5)]
    basis = leading(vectors)
    matrix = learn(vectors, groups, basis, RECIPES[0], 0)
    rest = normalize(rng.normal(size=(3, N_DIMS + 10)).astype(np.float32))
    rest -= rest @ basis @ basis.T
    assert rest @ matrix.T == pytest.approx(REST * rest, abs=1e-5)


def test_projected_vectors_have_unit_length_and_zeros_stay():
    vectors = np.array([[3, 4], [0, 0], [1, 0]], np.float32)
    assert project(vectors, 2 * np.eye(2, dtype=np.float32)) == pytest.approx(np.array([[0.6, 0.8], [0, 0], [1, 0]]))


# --- judging ----------------------------------------------------------------------------------------------------------
def test_precision_by_hand():
    # Main image at 0 degrees, kept 20 and 60, deleted 30 and 90.
    # Query 0: 20 kept, 30, 60 kept: (1 + 2/3) / 2. Query 20: 30, 0 kept, 60 kept: (1/2 + 2/3) / 2.
    # Query 60: 30 and 90 tie and are first in their order, then 20 kept, 0 kept: (1/3 + 2/4) / 2.
    vectors = on_circle(0, 20, 60, 30, 90)
    queries = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2]
    assert precision(vectors, ([0, 1, 2], [3, 4])) == pytest.approx(np.mean(queries))


def test_precision_is_one_where_all_kept_images_are_nearer():
    assert precision(on_circle(0, 5, 10, 90, 100), ([0, 1, 2], [3, 4])) == 1


def test_real_decisions_gain_and_shuffled_ones_do_not():
    vectors, groups = hidden_classes()
    gain, _ = cross_validate(vectors, groups, leading(vectors), 0)
    assert gain.is_enough
    assert gain.low < gain.value < gain.high
    rng = np.random.default_rng(1)
    shuffled = []
    for kept, deleted in groups:
        shown = rng.permutation(kept[1:] + deleted).tolist()
        shuffled.append(([kept[0], *shown[: len(kept) - 1]], shown[len(kept) - 1 :]))
    assert not cross_validate(vectors, shuffled, leading(vectors), 0)[0].is_enough


def test_a_held_out_image_and_its_near_duplicates_teach_nothing():
    # All groups judge the same images, or copies of them: whatever is held out, nothing is left to learn from.
    vectors = normalize(np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    copies = np.concatenate([vectors, vectors + 1e-3])
    groups: list[Group] = [([0, 1, 2, 3], [4, 5, 6, 7]), ([8, 9, 10, 11], [12, 13, 14, 15])] * 10
    gain, _ = cross_validate(normalize(copies), groups, np.eye(6, dtype=np.float32), 0)
    assert (gain.before, gain.low, gain.high) == (gain.after, 0, 0)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([([0, 1], [2])] * 19, "too few annotated directories: 19"),
        ([([0, 1], [2])] * 19 + [([0, 1, 2], [])] * 9, "too few deletions: 19 of 28 directories with both"),
        ([([0], [1, 2])] * 30, "too few deletions: 0 of 30 directories with both"),
        ([([0, 1], [2])] * 20, ""),
    ],
)
def test_too_few_groups_to_judge_are_refused(groups, reason):
    assert refuse_groups(groups).startswith(reason) and bool(refuse_groups(groups)) == bool(reason)


@pytest.mark.parametrize(("after", "low", "is_enough"), [(0.53, 0.01, True), (0.519, 0.01, False), (0.6, 0.0, False)])
def test_a_gain_is_enough_if_it_is_large_and_certain(after, low, is_enough):
    assert Gain(0.5, after, low, 0.1, 30).is_enough == is_enough


# --- the file ---------------------------------------------------------------------------------------------------------
A_PROJECTION = Projection(np.eye(3, dtype=np.float32), {"model_name": "m"}, ["id"], {"before": 0.5})


def test_a_projection_survives_its_file(tmp_path):
    write_projection(tmp_path / "p.npz", A_PROJECTION)
    found = read_projection(tmp_path / "p.npz")
    assert (found.matrix == A_PROJECTION.matrix).all() and found.matrix.dtype == np.float32
    assert found[1:] == A_PROJECTION[1:]
    assert found.digest == A_PROJECTION.digest


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content):
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .* run python ann_train.py"):
        read_projection(tmp_path / "p.npz")


def test_a_file_without_a_projection_is_damaged(tmp_path: Path):
    np.savez(tmp_path / "p.npz", other=np.eye(2))
    with pytest.raises(UserError, match="is damaged"):
        read_projection(tmp_path / "p.npz")


def test_the_projection_of_a_collection_is_the_one_that_made_it(tmp_path):
    path = tmp_path / "p.npz"
    assert projection_of({"model_name": "m"}, path) is None
    write_projection(path, A_PROJECTION)
    found = projection_of({DERIVED: A_PROJECTION.digest}, path)
    assert found is not None and found.digest == A_PROJECTION.digest
    with pytest.raises(UserError, match=r"did not make this collection; run python ann_train.py --apply"):
        projection_of({DERIVED: "another"}, path)
