"""The samplers: their guarantees, by hand-computed cases, properties, and the behavior that their papers describe."""

from __future__ import annotations

import inspect
import re
import uuid
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import ALWAYS, NEAR_DUPLICATE, SAMPLERS, Pool, draw, informative, options

CLEVER = ["cluster", "k_center", "typical", "herding", "ambiguous", "text"]  # those that look at vectors
CFG = {
    "metadata": {"fields": ["a"]},
    "text": {"prompt": "a cat"},
    "ids": {"ids": [f"id{i:06}" for i in range(0, 200, 3)]},
}


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def a_pool(vectors=None, metadata=None, n=None, **kwargs) -> Pool:
    n = n or len(metadata if vectors is None else vectors)
    kwargs.setdefault("allowed", np.ones(n, bool))

    kwargs.setdefault("text_vector", lambda prompt: unit(vectors)[0])

    def refuse():
        raise AssertionError("loaded without need")

    return Pool(
        ids=[f"id{i:06}" for i in range(n)],
        vectors=np.empty(0) if vectors is None else unit(vectors),
        metadata=refuse if metadata is None else lambda: metadata,
        **kwargs,
    )


def take(name, pool, n=None, seed=0, n_nearest=5, **cfg) -> list[int]:
    return list(islice(draw(name, CFG.get(name, {}) | cfg, pool, seed, n_nearest), n))


def on_circle(*degrees) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def blobs(sizes, spread=0.15, dim=16, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around orthogonal centers, and the blob of each."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    noise = np.random.default_rng(seed).normal(0, spread, (len(labels), dim))
    return unit(np.eye(dim)[labels] + noise), labels


def full_pool(vectors, **kwargs) -> Pool:
    return a_pool(vectors, [{"a": row % 7} for row in range(len(vectors))], **kwargs)


def test_unknown_sampler_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown sampler 'rnd'; use one of random, metadata"):
        draw("rnd", {}, a_pool(n=3), 0, 2)


def test_unknown_option_names_the_known_ones():
    with pytest.raises(ValueError, match=r"metadata has no option 'field'; it has fields"):
        draw("metadata", {"field": 1}, a_pool(n=3), 0, 2)
    with pytest.raises(ValueError, match=r"random has no option 'x'; it has none"):
        draw("random", {"x": 1}, a_pool(n=3), 0, 2)


def test_a_missing_option_is_shown_by_an_example():
    example = """sampler metadata needs the option 'fields', such as --ann-sampler-cfg '{"fields": ["product"]}'"""
    with pytest.raises(ValueError, match=re.escape(example)):
        draw("metadata", {}, a_pool(n=3), 0, 2)
    for name in SAMPLERS:
        if inspect.Parameter.empty in options(name).values():
            with pytest.raises(ValueError, match=f"sampler {name} needs the option .* such as"):
                draw(name, {}, a_pool(n=3), 0, 2)


def test_options_come_from_the_signature():
    assert options("random") == {}
    assert options("metadata") == {"fields": inspect.Parameter.empty}


def test_random_is_a_permutation_and_uniform():
    assert sorted(draw("random", {}, a_pool(n=50), 0, 5)) == list(range(50))
    firsts = Counter(next(draw("random", {}, a_pool(n=4), seed, 5)) for seed in range(800))
    assert all(150 < firsts[row] < 250 for row in range(4))


def test_a_row_shown_meanwhile_is_not_drawn():
    for name, cfg in (("random", {}), ("metadata", {"fields": ["a"]})):
        pool = a_pool(metadata=[{"a": row % 3} for row in range(30)])
        rows = draw(name, cfg, pool, 0, 5)
        first = list(islice(rows, 5))
        pool.allowed[:25] = False
        assert sorted(rows) == sorted(set(range(25, 30)) - set(first))


def test_metadata_is_uniform_over_values_then_inside():
    items = [{"a": "rare"}] + [{"a": "common"}] * 8 + [{}]
    firsts = Counter(next(draw("metadata", {"fields": ["a"]}, a_pool(metadata=items), seed, 5)) for seed in range(900))
    assert 240 < firsts[0] < 360
    assert 240 < firsts[9] < 360  # without the field: a group of its own
    assert all(15 < firsts[row] < 65 for row in range(1, 9))


def test_metadata_takes_every_row_once():
    items = [{"a": [row % 2], "b": row % 3 == 0} for row in range(40)]
    assert sorted(draw("metadata", {"fields": ["a", "b"]}, a_pool(metadata=items), 3, 5)) == list(range(40))


def test_metadata_tells_types_apart_and_takes_combinations():
    items = [{"a": 1, "b": 0}, {"a": "1", "b": 0}, {"a": True, "b": 0}, {"a": 1, "b": 1}, {"b": 0}]
    firsts = {next(draw("metadata", {"fields": ["a", "b"]}, a_pool(metadata=items), seed, 5)) for seed in range(100)}
    assert firsts == set(range(5))


@pytest.mark.parametrize("fields", [[], "a", [1], None, {"a": 1}])
def test_metadata_refuses_fields_that_are_not_names(fields):
    with pytest.raises(ValueError, match="option 'fields' must be a list of strings"):
        draw("metadata", {"fields": fields}, a_pool(metadata=[{"a": 1}]), 0, 5)


def test_metadata_names_the_fields_when_one_is_unknown():
    with pytest.raises(ValueError, match="no item has the field 'c'; the fields are a, b"):
        draw("metadata", {"fields": ["a", "c"]}, a_pool(metadata=[{"a": 1}, {"b": 2}]), 0, 5)


def test_every_sampler_is_documented():
    assert all(sampler.__doc__ for sampler in SAMPLERS.values())


# --- what holds for every sampler -------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 60), seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_are_unique_in_range_never_annotated_and_the_same_for_the_same_seed(name, n, seed, data):
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(n, 4)))
    annotated = []
    for _ in range(data.draw(st.integers(0, 3))):
        rows = rng.permutation(n)[:6].tolist()
        annotated.append((rows[:3], rows[3:]))
    known = {row for pos, _ in annotated for row in pos}
    allowed = np.array([row not in known for row in range(n)])
    cfg = {"ids": [f"id{i:06}" for i in range(n)]} if name == "ids" else {}
    first, second = (
        take(name, full_pool(vectors, allowed=allowed.copy(), annotated=annotated), seed=seed, **cfg) for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == len(first)
    assert set(first) <= set(range(n)) - known
    assert first or not allowed.any() or name in CLEVER


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_annotated_gives_none(name):
    pool = full_pool(np.eye(4), allowed=np.zeros(4, bool), annotated=[([0, 1], [2]), ([2, 3], [])])
    assert take(name, pool) == []


@pytest.mark.parametrize("name", CLEVER)
def test_all_equal_vectors_count_as_one_image_and_it_is_said(name):
    said = []
    assert len(take(name, full_pool(np.ones((30, 4)), warn=said.append))) == 1
    assert said == ["no main image because it is a near duplicate: 29 images"]


@pytest.mark.parametrize("name", CLEVER)
def test_near_duplicates_count_as_one(name):
    vectors, _ = blobs([30, 30], spread=0.3)
    vectors = np.concatenate([vectors, np.repeat(vectors[:1], 40, axis=0)])  # 41 copies must not look like a crowd
    rows = take(name, full_pool(vectors), n_nearest=4)
    similarity = unit(vectors)[rows] @ unit(vectors)[rows].T
    assert (similarity[np.triu_indices(len(rows), 1)] <= NEAR_DUPLICATE).all()


@pytest.mark.parametrize("name", CLEVER)
def test_a_group_that_mostly_repeats_another_is_skipped(name):
    vectors, labels = blobs([12, 12, 12], spread=0.1, seed=1)
    said = []
    rows = take(name, full_pool(vectors, warn=said.append), n_nearest=11)  # a folder shows a whole blob
    assert sorted(labels[rows]) == [0, 1, 2]
    assert said == ["no main image because its directory would repeat another: 33 images"]


@pytest.mark.parametrize("name", CLEVER)
def test_rows_shown_meanwhile_are_respected(name):
    pool = full_pool(blobs([40, 40])[0])
    rows = draw(name, CFG.get(name, {}), pool, 0, 5)
    next(rows)
    pool.allowed[:40] = False
    rest = list(rows)
    assert rest
    assert min(rest) >= 40


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_that_is_done_again_draws_the_same(name):
    vectors, _ = blobs([30, 30, 30], spread=0.3)

    def run() -> list[int]:
        pool = full_pool(vectors)
        drawn = []
        for row in draw(name, CFG.get(name, {}) | ({"ids": pool.ids} if name == "ids" else {}), pool, 7, 5):
            pool.allowed[np.argsort(-vectors @ vectors[row])[:6]] = False  # what the directory shows
            drawn.append(row)
        return drawn

    assert run() == run()


def test_more_candidates_than_fit_at_once_are_all_reached():
    vectors = np.random.default_rng(0).normal(size=(60, 40))
    assert sorted(take("herding", full_pool(vectors), n_nearest=0, subset=7)) == list(range(60))


@pytest.mark.parametrize(
    ("name", "cfg", "message"),
    [
        ("cluster", {"n_clusters": 0}, "option 'n_clusters' must be a whole number from 1 to 5000, but is 0"),
        ("cluster", {"n_clusters": True}, "option 'n_clusters' must be a whole number"),
        ("cluster", {"n_clusters": 2.5}, "option 'n_clusters' must be a whole number"),
        ("typical", {"n_neighbors": "20"}, "option 'n_neighbors' must be a whole number from 1 to 1000, but is '20'"),
        ("herding", {"bandwidth": 0}, "option 'bandwidth' must be a number from 0.01 to 100, but is 0"),
        ("herding", {"bandwidth": float("nan")}, "option 'bandwidth' must be a number"),
        ("herding", {"subset": 10**6}, "option 'subset' must be a whole number from 1 to 10000"),
        ("text", {"prompt": " "}, "option 'prompt' must be a text that is not empty, but is ' '"),
        ("text", {"prompt": 3}, "option 'prompt' must be a text"),
        ("ids", {"ids": "id000000"}, "option 'ids' must be a list of strings"),
        ("ids", {"ids": []}, "option 'ids' must be a list of strings"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_of_one_line(name, cfg, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(name, cfg, full_pool(np.eye(3)), 0, 2)
    assert "\n" not in str(caught.value)


# --- what each promises -----------------------------------------------------------------------------------------------
def test_k_center_by_hand():
    # From the annotated image at 0 degrees the farthest is at 170; then the one at 80 is farther from both than 40.
    vectors = on_circle(0, 10, 40, 80, 170)
    pool = full_pool(vectors, allowed=np.array([False, True, True, True, True]), annotated=[([0], [])])
    assert take("k_center", pool, n_nearest=0) == [4, 3, 2]  # 10 degrees: cosine 0.985, a near duplicate of 0


def test_cluster_by_hand():
    # Two clusters, around 15 and 105 degrees; in turn, the most central first.
    vectors = on_circle(0, 14, 30, 90, 104, 120)
    rows = take("cluster", full_pool(vectors), n_nearest=0, n_clusters=2)
    assert set(rows[:2]) == {1, 4}
    assert sorted(row // 3 for row in rows[2:4]) == [0, 1]


def test_cluster_counts_past_main_images_in_the_quota():
    vectors, labels = blobs([20, 20], spread=0.2)
    allowed = np.ones(40, bool)
    allowed[:3] = False
    pool = full_pool(vectors, allowed=allowed, annotated=[([0], []), ([1], []), ([2], [])])
    assert list(labels[take("cluster", pool, 3, n_nearest=0, n_clusters=2)]) == [1, 1, 1]


def test_typical_by_hand():
    # One cluster (4 images, folders of 4). Cosines to all others: 45 degrees 2.38, 60 degrees 2.33; to the nearest two:
    # 45 degrees 1.67, 60 degrees 1.83.
    vectors = on_circle(0, 45, 60, 90)
    assert take("typical", full_pool(vectors), 1, n_nearest=3) == [1]
    assert take("typical", full_pool(vectors), 1, n_nearest=3, n_neighbors=2) == [2]


def test_herding_by_hand():
    # Wide kernel: the middle image covers both sides. With it annotated the best covers the larger uncovered side.
    vectors = on_circle(0, 30, 60, 180, 150)
    assert take("herding", full_pool(vectors), 1, n_nearest=0, bandwidth=0.6) == [1]
    pool = full_pool(vectors, allowed=np.arange(5) != 1, annotated=[([1], [])])
    assert take("herding", pool, 1, n_nearest=0, bandwidth=0.6)[0] in (3, 4)


def test_ambiguous_by_hand():
    # Kept at cosines of 0.9 and more, deleted at 0.5 and less: the pair at 0.7 is the least certain.
    past = on_circle(0, 20, 25, 60, 65)
    angles = {"sure": 22, "unsure": 45, "hopeless": 75}
    vectors = np.zeros((11, 8))
    vectors[:5, :2] = past
    for number, angle in enumerate(angles.values()):
        vectors[5 + 2 * number : 7 + 2 * number, 2 * number + 2 : 2 * number + 4] = on_circle(0, angle)
    allowed = np.arange(11) >= 5
    pool = full_pool(vectors, allowed=allowed, annotated=[([0, 1, 2], [3, 4])])
    assert take("ambiguous", pool, 1, n_nearest=1)[0] in (7, 8)


def test_ambiguous_without_annotations_is_herding():
    vectors, _ = blobs([20, 15, 10], spread=0.3)
    assert take("ambiguous", full_pool(vectors)) == take("herding", full_pool(vectors))


def test_text_takes_the_most_similar_first():
    vectors = on_circle(0, 20, 40, 60, 80)
    pool = a_pool(vectors, text_vector=lambda prompt: unit(on_circle(63))[0])
    assert take("text", pool, n_nearest=0) == [3, 4, 2, 1, 0]


def test_ids_may_be_what_the_list_names_the_images_by():
    names = ["http://x/1", "7", "Kreta 2019/M\u00fcller.jpg"]  # values of ID_FIELD, a path in a folder
    pool = a_pool(np.eye(4))
    pool.ids = sorted(str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in [*names, "other"])
    asked = [names[0], names[1], "Kreta 2019/Mu\u0308ller.jpg", str(uuid.uuid5(uuid.NAMESPACE_URL, "other"))]
    rows = list(draw("ids", {"ids": asked}, pool, 0, 2))
    assert [pool.ids[row] for row in rows] == [str(uuid.uuid5(uuid.NAMESPACE_URL, n)) for n in [*names, "other"]]


def test_ids_may_be_copied_from_a_file_manager_and_one_image_named_twice_is_shown_once():
    said = []
    pool = a_pool(np.eye(3), warn=said.append)
    pool.ids = sorted(str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in "abc")
    url = next(name for name in "abc" if str(uuid.uuid5(uuid.NAMESPACE_URL, name)) == pool.ids[0])
    rows = draw("ids", {"ids": [f"18_{pool.ids[0]}", f"3_{pool.ids[1].upper()}.JPG", url]}, pool, 0, 2)
    assert next(rows) == 0
    pool.allowed[0] = False
    assert list(rows) == [1, 0]  # the caller shows no row twice
    assert said == [f"{url}: shown before in another directory"]


def test_ids_are_taken_as_given_and_the_others_reported():
    said = []
    allowed = np.array([True, False, True, False, True, False])
    pool = a_pool(n=6, allowed=allowed, annotated=[([1], [2])], shown={3}, warn=said.append)
    asked = ["id000004", "id000001", "nowhere", "id000003", "id000005", "id000002", "id000004"]
    rows = draw("ids", {"ids": asked}, pool, 0, 5)
    assert next(rows) == 4
    pool.allowed[2] = False  # shown by that directory
    assert list(rows) == [3, 2]
    assert said == [
        "id000001: already annotated, left out",
        "nowhere: not in the collection, left out",
        "id000003: shown before in another directory",
        "id000005: not eligible as main image, left out",
        "id000002: shown before in another directory",
    ]


@pytest.fixture(scope="module")
def crowds_and_outliers() -> tuple[np.ndarray, np.ndarray]:
    """Four crowds, and 8 planted outliers, each far from everything: rows 200 and more."""
    vectors, _ = blobs([80, 60, 40, 20], spread=0.12, dim=32)
    return np.concatenate([vectors, np.eye(32)[10:18]]), np.arange(208) >= 200


@pytest.mark.parametrize("name", ["typical", "herding", "ambiguous"])
def test_small_budgets_avoid_outliers(name, crowds_and_outliers):
    vectors, is_outlier = crowds_and_outliers
    for seed in range(5):
        rows = take(name, full_pool(vectors), 4, seed=seed, n_nearest=10)
        assert not is_outlier[rows].any()
        assert len({int(np.argmax(vectors[row][:4])) for row in rows}) >= 3  # of four crowds


def test_k_center_takes_the_outliers_first(crowds_and_outliers):
    vectors, is_outlier = crowds_and_outliers
    for seed in range(5):
        assert is_outlier[take("k_center", full_pool(vectors), 12, seed=seed, n_nearest=10)].sum() == 8


def test_typical_begins_where_nothing_is_annotated(crowds_and_outliers):
    vectors, _ = crowds_and_outliers
    annotated = list(range(0, 80, 4))  # all over the largest crowd
    pool = full_pool(vectors, allowed=~np.isin(np.arange(208), annotated), annotated=[(annotated, [])])
    assert take("typical", pool, 1, n_nearest=40)[0] in range(80, 200)


def test_cluster_gives_small_crowds_their_share():
    vectors, labels = blobs([150, 10, 10], spread=0.1)
    assert set(labels[take("cluster", full_pool(vectors), 3, n_clusters=3, n_nearest=3)]) == {0, 1, 2}


def test_typical_measures_density_by_the_true_nearest():
    vectors = unit(np.random.default_rng(0).normal(size=(101, 6)))
    nearest = np.sort(vectors @ vectors.T, axis=1)[:, ::-1]
    for k in (1, 7, 100):
        densest = nearest[:, : k + 1].mean(1).argmax()  # n_nearest 100: one cluster
        assert take("typical", full_pool(vectors), 1, n_nearest=100, n_neighbors=k) == [densest]


def test_the_first_of_near_duplicates_is_taken_and_none_of_an_annotated_image():
    vectors = on_circle(5, 0, 40, 44, 90, 88)
    pool = full_pool(vectors, allowed=np.arange(6) != 4, annotated=[([4], [])])
    pool.text_vector = lambda prompt: unit(on_circle(2))[0]
    assert take("text", pool, n_nearest=0) == [1, 2]


@pytest.mark.parametrize(("positives", "negatives"), [([0, 1, 2], []), ([0], [3, 4]), ([0, 1], [3, 4])])
def test_ambiguous_works_when_similarity_separates_all_decisions(positives, negatives):
    vectors = on_circle(0, 10, 20, 60, 70, *range(80, 360, 20))
    allowed = np.arange(len(vectors)) >= 5
    pool = full_pool(vectors, allowed=allowed, annotated=[(positives, negatives)])
    assert len(take("ambiguous", pool, n_nearest=1)) > 3


# --- which of the nearest images a directory shows --------------------------------------------------------------------
def near(vectors, main) -> tuple[list[int], list[float]]:
    """Rows and similarities of all others, nearest first."""
    similarity = unit(vectors) @ unit(vectors)[main]
    rows = [row for row in np.argsort(-similarity, kind="stable").tolist() if row != main]
    return rows, similarity[rows].tolist()


def test_informative_by_hand():
    # Kept up to 20 degrees, deleted from 60: p is one half near 40. Beside the three nearest, 38 degrees is shown, and
    # then not its neighbor at 39, but 46, which is nearly as uncertain and farther from what is shown.
    past = on_circle(0, 18, 20, 60, 62)
    vectors = np.zeros((13, 4))
    vectors[:5, :2], vectors[5:, 2:] = past, on_circle(0, 1, 2, 3, 38, 39, 46, 75)
    pool = full_pool(vectors, annotated=[([0, 1, 2], [3, 4])])
    rows, similarities = near(vectors[5:], 0)
    shown = informative(pool, 5)([row + 5 for row in rows], similarities)
    assert [[1, 2, 3, 38, 39, 46, 75][position] for position in shown] == [1, 2, 3, 38, 46]


def test_informative_without_decisions_of_both_kinds_spreads_evenly_and_says_so():
    vectors = on_circle(*range(0, 90, 3))
    for annotated in ([], [([0, 1, 2], [])], [([0], [5, 6])]):
        said = []
        pool = full_pool(vectors, annotated=annotated, warn=said.append)
        assert informative(pool, 4)(*near(vectors, 10)) == [0, 4, 7, 11]  # of the 12 nearest
        assert said == ["no kept and deleted images to learn from yet: directories spread over the 12 nearest"]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), n_nearest=st.integers(1, 12), seed=st.integers(0, 99), is_annotated=st.booleans())
def test_informative_chooses_distinct_positions_in_order_and_the_nearest_always(n, n_nearest, seed, is_annotated):
    vectors = unit(np.random.default_rng(seed).normal(size=(n + 1, 5)))
    annotated = [([0, n // 2], [n]), ([n], [n // 2])] if is_annotated else []
    rows, similarities = near(vectors, 0)
    choose = informative(full_pool(vectors, annotated=annotated), n_nearest)
    shown = choose(rows, similarities)
    assert shown == sorted(set(shown)) == choose(rows, similarities)
    assert len(shown) == min(n, n_nearest)
    assert all(0 <= position < n for position in shown)
    if annotated:
        assert shown[:ALWAYS] == list(range(min(ALWAYS, len(shown))))
