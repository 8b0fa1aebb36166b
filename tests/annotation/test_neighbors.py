"""utils/annotation/neighbors.py: exact nearest neighbors for any vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.annotation_data import random_vectors
from utils.annotation import neighbors


def brute_force(vectors: np.ndarray, main: int, n: int, eligible: np.ndarray | None = None) -> list[int]:
    """Brute force in float64; ties (to 12 decimals) are in the order of rows."""
    wide = vectors.astype(np.float64)
    wide /= np.sqrt((wide**2).sum(axis=1, keepdims=True))
    cosines = np.round([float(np.sum(row * wide[main])) for row in wide], 12)
    rows = [row for row in range(len(vectors)) if row != main and (eligible is None or eligible[row])]
    return sorted(rows, key=lambda row: (-cosines[row], row))[:n]


@pytest.mark.parametrize(("n", "dimension"), [(500, 4), (500, 64), (2000, 512)])
def test_the_nearest_are_those_of_brute_force(n, dimension):
    vectors = neighbors.normalize(random_vectors(n, dimension, seed=n + dimension))
    mains = [0, 7, n - 1]
    for main, found in zip(mains, neighbors.nearest(vectors, mains, 20)):
        assert found.rows == brute_force(vectors, main, 20)
        assert found.similarities == sorted(found.similarities, reverse=True)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 60), n_values=st.integers(1, 3), n_nearest=st.integers(1, 70))
def test_ties_are_in_the_order_of_ids(seed, n, n_values, n_nearest):
    """Vectors of few different values have many ties, and include equal vectors and zeros."""
    vectors = np.random.default_rng(seed).integers(0, n_values + 1, (n, 3)).astype(np.float32)
    neighbors.normalize(vectors)
    for main, found in enumerate(neighbors.nearest(vectors, range(n), n_nearest)):
        cosines = neighbors.cosines(vectors, range(n), main)
        expected = sorted((row for row in range(n) if row != main), key=lambda row: (-cosines[row], row))
        assert found.rows == expected[:n_nearest]


def test_the_block_in_which_a_main_image_is_compared_does_not_matter():
    vectors = neighbors.normalize(random_vectors(300, 100))
    together = neighbors.nearest(vectors, range(50), 10)
    assert together == [neighbors.nearest(vectors, [main], 10)[0] for main in range(50)]


def test_differences_below_float32_are_seen():
    """All vectors within 1e-6 of each other: a float32 product cannot order them."""
    vectors = np.ones((200, 64), np.float32) + random_vectors(200, 64) * 1e-3
    neighbors.normalize(vectors)
    assert neighbors.nearest(vectors, [3], 50)[0].rows == brute_force(vectors, 3, 50)


def test_all_vectors_equal():
    vectors = neighbors.normalize(np.ones((50_000, 8), np.float32))
    assert neighbors.nearest(vectors, [10], 3)[0].rows == [0, 1, 2]


def test_only_eligible_rows_that_were_not_judged_are_neighbors():
    vectors = neighbors.normalize(random_vectors(100, 8))
    eligible = np.arange(100) % 2 == 0
    (all_of_them,) = neighbors.nearest(vectors, [1], 100, eligible)
    assert all_of_them.rows == brute_force(vectors, 1, 100, eligible)
    assert len(all_of_them.rows) == 50
    judged = all_of_them.rows[:2]
    assert neighbors.nearest(vectors, [1], 5, eligible, [judged])[0].rows == all_of_them.rows[2:7]


@pytest.mark.parametrize("n_copies", [1, 200])
def test_near_duplicates_give_their_place_to_the_next(n_copies):
    originals = random_vectors(40, 32)
    vectors = np.repeat(originals, n_copies + 1, axis=0)
    vectors += random_vectors(len(vectors), 32, seed=1) * 0.01
    neighbors.normalize(vectors)
    main = 5 * (n_copies + 1)
    (found,) = neighbors.nearest(vectors, [main], 10, max_similarity=0.98)
    listed = [main, *found.rows]
    assert len(found.rows) == 10
    assert len({row // (n_copies + 1) for row in listed}) == 11, "one of each original"
    expected, n_dropped = [main], 0
    for row in brute_force(vectors, main, len(vectors)):
        if len(expected) == 11:
            break
        if (vectors[expected] @ vectors[row]).max() > 0.98:
            n_dropped += 1
        else:
            expected.append(row)
    assert listed == expected
    assert found.n_dropped == n_dropped


def test_too_few_that_are_different_end_the_search():
    vectors = neighbors.normalize(np.ones((100, 4), np.float32))
    (found,) = neighbors.nearest(vectors, [0], 5, max_similarity=0.99)
    assert found == neighbors.Neighbors([], [], 99)


def test_normalizing_keeps_the_bits_of_what_is_normalized():
    vectors = random_vectors(10, 512)
    lengths = np.arange(1, 11, dtype=np.float32)[:, None]
    assert (neighbors.normalize(vectors.copy()) == vectors).all()
    assert np.allclose(neighbors.normalize(vectors * lengths), vectors, atol=1e-6)
    assert (neighbors.normalize(np.zeros((2, 4), np.float32)) == 0).all()


# --- several rankings in turns ----------------------------------------------------------------------------------------
def test_two_rankings_in_turns_by_hand():
    """At rank 1, both rankings have 5; at rank 2, the first has 2, the second 7. The longer ranking goes on alone."""
    assert neighbors.interleave([[5, 2, 9], [5, 7, 2, 4, 3]], first=0) == {5: 0, 2: 0, 7: 1, 9: 0, 4: 1, 3: 1}
    assert list(neighbors.interleave([[5, 2, 9], [8, 7, 2]], first=1)) == [8, 5, 7, 2, 9]


@given(st.lists(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12), min_size=1, max_size=3), st.data())
def test_each_row_stands_once_by_its_best_rank_and_every_first_rank_comes_first(rankings, data):
    first = data.draw(st.integers(0, len(rankings) - 1))
    brought = neighbors.interleave(rankings, first)
    assert brought.keys() == {row for ranking in rankings for row in ranking}
    assert {ranking[0] for ranking in rankings} <= set(list(brought)[: len(rankings)])
    best = [min(ranking.index(row) for ranking in rankings if row in ranking) for row in brought]
    assert best == sorted(best)
    assert all(rankings[number].index(row) == rank for (row, number), rank in zip(brought.items(), best))
