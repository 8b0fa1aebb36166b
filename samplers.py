"""Samplers choose the main images: one function per sampler, and the registry SAMPLERS. Needs only numpy.

A sampler takes (pool, rng, n_nearest, *, options) and yields rows of the collection in the order to try them, until
none is left. It is lazy: the caller takes rows until it has enough directories, and clears pool.allowed[row] for every
row it has shown. A sampler skips rows that are not allowed at that moment. Its choices depend only on the pool at the
start, the seed and these changes. Options are the keyword-only parameters.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NEAR_DUPLICATE = 0.98  # cosine above which two images count as one
REPEATS = 0.5  # a group that shares more than this part of its images with an earlier group repeats it
MAX_CANDIDATES = 5_000  # images considered at once: a dense sample that takes seconds for 100,000 x 512
MAX_CLUSTERS = 500  # clusters of `typical`, as in its paper
ALWAYS = 3  # nearest images that `informative` always chooses
SPREAD = 3  # without decisions, `informative` spreads over this many times as many images as it chooses
SPARE = 10  # extra neighbors looked up, to replace near duplicates
_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TILE_CELLS = 10_000_000  # similarities in memory at a time: 40 MB, and 80 MB for their order


@dataclass
class Pool:
    """The input of a sampler."""

    ids: list[str]  # (N,) of the collection, sorted; a row is an index into it
    vectors: np.ndarray  # (N, D) float32, L2-normalized
    metadata: Callable[[], list[dict[str, Any]]]  # loads the N items
    text_vector: Callable[[str], np.ndarray]  # prompt -> (D,)
    allowed: np.ndarray  # (N,) bool: rows that may become main images
    annotated: list[tuple[list[int], list[int]]] = field(default_factory=list)  # (pos rows, main first; neg rows)
    shown: set[int] = field(default_factory=set)  # rows shown in earlier runs
    warn: Callable[[str], None] = lambda message: None  # shows a line to the user


Sampler = Callable[..., Iterator[int]]
Choice = Callable[[list[int], list[float]], list[int]]  # rows and similarities, nearest first -> sorted positions


def draw(name: str, cfg: dict[str, Any], pool: Pool, seed: int, n_nearest: int) -> Iterator[int]:
    """Rows in the order in which they become main images, each at most once.

    n_nearest: images in a directory besides the main image. Raises ValueError, one line, for an unknown sampler, an
    unknown or missing option, or a bad value. The first row is drawn during this call, so that it raises all errors.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; use one of {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    known = options(name)
    for option in cfg:
        if option not in known:
            raise ValueError(f"sampler {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in cfg:
            example = json.dumps({option: EXAMPLES[option]})
            raise ValueError(f"sampler {name} needs the option {option!r}, such as --ann-sampler-cfg '{example}'")
    rows = sampler(pool, np.random.default_rng(seed), n_nearest, **cfg)
    return itertools.chain(list(itertools.islice(rows, 1)), rows)


def options(name: str) -> dict[str, Any]:
    """Option names of a sampler and their defaults; inspect.Parameter.empty for a required option."""
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def random(pool: Pool, rng: np.random.Generator, n_nearest: int) -> Iterator[int]:
    """Uniformly random: the baseline for all others, and the only unbiased choice for an evaluation set. O(N)."""
    for row in rng.permutation(len(pool.ids)).tolist():
        if pool.allowed[row]:
            yield row


def metadata(pool: Pool, rng: np.random.Generator, n_nearest: int, *, fields: list[str]) -> Iterator[int]:
    """Uniform over the distinct values of `fields`, then uniform among the items of that value. O(N).

    With several fields, a value is their combination. Items without a field form one extra group.
    """
    groups = _group_by(pool, _strings("fields", fields))
    rows_of = [rng.permutation(rows).tolist() for rows in groups.values()]
    while rows_of:
        index = int(rng.integers(len(rows_of)))
        while rows_of[index] and not pool.allowed[rows_of[index][-1]]:
            rows_of[index].pop()
        if rows_of[index]:
            yield rows_of[index].pop()
        else:
            del rows_of[index]


def _group_by(pool: Pool, fields: list[str]) -> dict[tuple[str | None, ...], list[int]]:
    """Rows by the values of `fields`. JSON keys keep 1, "1" and true apart, and make lists hashable."""
    metadata = pool.metadata()
    names = {name for item in metadata for name in item}
    for name in fields:
        if name not in names:
            raise ValueError(f"no item has the field {name!r}; the fields are {', '.join(sorted(names)) or 'none'}")
    groups: dict[tuple[str | None, ...], list[int]] = {}
    for row, item in enumerate(metadata):
        value = tuple(json.dumps(item[name], sort_keys=True) if name in item else None for name in fields)
        groups.setdefault(value, []).append(row)
    return groups


def cluster(pool: Pool, rng: np.random.Generator, n_nearest: int, *, n_clusters: int = 100) -> Iterator[int]:
    """An equal number of main images for each k-means cluster, earlier ones included; the most central members first.

    Considers MAX_CANDIDATES random images at a time; O(MAX_CANDIDATES x (N + n_clusters)) dot products.
    """
    _check_number("n_clusters", n_clusters, int, 1, MAX_CANDIDATES)

    def start(part: _Part) -> _Scored:
        centers = _k_means(part.vectors, n_clusters, rng)
        centrality = (part.vectors @ centers.T).max(1)
        return _fewest_first(part, centers, part.mains, centrality, rng.permutation(len(centers)))

    return _greedy(pool, rng.permutation(len(pool.ids)), n_nearest, start)


def k_center(pool: Pool, rng: np.random.Generator, n_nearest: int) -> Iterator[int]:
    """The image farthest from all annotated and drawn images: covers every region, and draws outliers early.

    Considers MAX_CANDIDATES random images at a time; O(MAX_CANDIDATES x (N + annotated + drawn)) dot products.
    Source: Sener & Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, arXiv 1708.00489.
    """

    def start(part: _Part) -> _Scored:
        distance = 1 - _max_similarity(part.vectors, part.known)

        def update(i: int) -> None:
            np.minimum(distance, 1 - part.vectors @ part.vectors[i], out=distance)

        return distance, update

    return _greedy(pool, rng.permutation(len(pool.ids)), n_nearest, start)


def typical(pool: Pool, rng: np.random.Generator, n_nearest: int, *, n_neighbors: int = 20) -> Iterator[int]:
    """The densest unannotated image in the largest of the clusters with the fewest annotated images.

    There are as many clusters as directories would be needed for all images, at most MAX_CLUSTERS. Density is the mean
    similarity to the n_neighbors nearest. Considers MAX_CANDIDATES random images at a time;
    O(MAX_CANDIDATES x (N + MAX_CLUSTERS)) dot products.
    Source: Hacohen et al., Active Learning on a Budget (TypiClust), arXiv 2202.02794.
    """
    _check_number("n_neighbors", n_neighbors, int, 1, 1_000)

    def start(part: _Part) -> _Scored:
        centers = _k_means(part.vectors, min(MAX_CLUSTERS, -(-len(part.rows) // (n_nearest + 1))), rng)
        sizes = np.bincount((part.vectors @ centers.T).argmax(1), minlength=len(centers))
        density = part.similarity[:, : n_neighbors + 1].mean(1)
        return _fewest_first(part, centers, part.known, density, sizes)

    return _greedy(pool, rng.permutation(len(pool.ids)), n_nearest, start, n_listed=n_neighbors)


def herding(
    pool: Pool, rng: np.random.Generator, n_nearest: int, *, bandwidth: float | None = None, subset: int = 5_000
) -> Iterator[int]:
    """The image with the largest gain in coverage. A Gaussian kernel around annotated and drawn images covers others.

    bandwidth: of the kernel, a distance between unit vectors; None: the median distance of an image to its n_nearest-th
    neighbor. Considers `subset` random images at a time, and measures coverage on them; O(subset x N) dot products and
    O(subset^2) memory. Source: Bae et al., Generalized Coverage for More Robust Low-Budget Active Learning
    (MaxHerding), arXiv 2407.12212.
    """
    if bandwidth is not None:
        _check_number("bandwidth", bandwidth, float, 0.01, 100)
    _check_number("subset", subset, int, 1, 10_000)

    def start(part: _Part) -> _Scored:
        return _coverage(part, bandwidth or _bandwidth(part), np.ones(len(part.rows), np.float32))

    return _greedy(pool, rng.permutation(len(pool.ids)), n_nearest, start, n_candidates=subset)


def ambiguous(pool: Pool, rng: np.random.Generator, n_nearest: int) -> Iterator[int]:
    """The groups with the least certain decisions, spread over regions that no annotated image covers.

    The probability p that an image is kept is a logistic function of its similarity to the main image, fitted to all
    decisions so far. The uncertainty of a group is the mean of 4p(1 - p); it weights the coverage of `herding`. Without
    annotations both samplers are the same, at the same cost.
    Source: Bae et al., Uncertainty Herding, arXiv 2412.20644; pairs near the threshold: ANNEAL, arXiv 2306.11605.
    """

    def start(part: _Part) -> _Scored:
        return _coverage(part, _bandwidth(part), _uncertainty(pool, part))

    return _greedy(pool, rng.permutation(len(pool.ids)), n_nearest, start)


def text(pool: Pool, rng: np.random.Generator, n_nearest: int, *, prompt: str) -> Iterator[int]:
    """The images nearest to a text prompt, most similar first.

    Considers MAX_CANDIDATES at a time in this order; O(MAX_CANDIDATES x N) dot products each time.
    """
    if not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f"option 'prompt' must be a text that is not empty, but is {prompt!r}")
    similarity = pool.vectors @ np.asarray(pool.text_vector(prompt), np.float32)

    def start(part: _Part) -> _Scored:
        return similarity[part.rows], lambda i: None

    return _greedy(pool, np.argsort(-similarity, kind="stable"), n_nearest, start)


def ids(pool: Pool, rng: np.random.Generator, n_nearest: int, *, ids: list[str]) -> Iterator[int]:
    """Exactly the given ids, in their order. Annotated and unknown ids are skipped with a warning.

    An item can also be named by its value of ID_FIELD, by its path in the folder of images, or by the name of its
    directory. An id that was shown before, or in this run, is yielded with a warning, although it is not allowed. O(N).
    """
    asked = dict.fromkeys(_strings("ids", ids))
    wanted = {possible for name in asked for possible in _possible_ids(name)}
    row_of = {id_: row for row, id_ in enumerate(pool.ids) if id_ in wanted}
    annotated = {row for pos, _ in pool.annotated for row in pos}
    may_be_main = pool.allowed.copy()
    for id_ in asked:
        row = next((row_of[possible] for possible in _possible_ids(id_) if possible in row_of), None)
        if row is None:
            pool.warn(f"{id_}: not in the collection, left out")
        elif row in annotated:
            pool.warn(f"{id_}: already annotated, left out")
        elif not may_be_main[row] and row not in pool.shown:
            pool.warn(f"{id_}: not eligible as main image, left out")
        else:
            if row in pool.shown or not pool.allowed[row]:
                pool.warn(f"{id_}: shown before in another directory")
            yield row


def _possible_ids(name: str) -> tuple[str, ...]:
    named = (name, unicodedata.normalize("NFC", name))  # paths in folders are NFC
    return name, *(str(uuid.uuid5(uuid.NAMESPACE_URL, each)) for each in named), *_ID.findall(name.lower())


EXAMPLES = {"fields": ["product"], "prompt": "a red shoe", "ids": ["ID"]}  # values of the required options
SAMPLERS: dict[str, Sampler] = {
    sampler.__name__: sampler
    for sampler in (random, metadata, cluster, k_center, typical, herding, ambiguous, text, ids)
}


# --- the choice of a directory's images -------------------------------------------------------------------------------
def informative(pool: Pool, n_nearest: int) -> Choice:
    """Return a function that chooses n_nearest of the K images near a main image: the images whose decisions teach the
    most, instead of the nearest.

    The ALWAYS nearest come first; then, greedily, the image with the highest 4p(1 - p) x root of its distance to the
    nearest chosen image, with p as in `ambiguous`. Without kept and deleted images to learn from, choices spread evenly
    over the nearest SPREAD x n_nearest, and a warning says so. Deterministic; O(K D n_nearest).
    """
    similarity, kept = _decisions(pool)
    if not (kept.any() and (kept == 0).any()):
        n_covered = SPREAD * n_nearest
        pool.warn(f"no kept and deleted images to learn from yet: directories spread over the {n_covered} nearest")
        return lambda rows, similarities: _spread(min(n_covered, len(rows)), n_nearest)
    slope, offset = _fit_logistic(similarity, kept)

    def choose(rows: list[int], similarities: list[float]) -> list[int]:
        p = _logistic(slope * np.array(similarities) + offset)
        vectors, distance, chosen = pool.vectors[rows], np.full(len(rows), 2, np.float32), list[int]()
        while len(chosen) < min(n_nearest, len(rows)):
            score = p * (1 - p) * np.sqrt(np.maximum(distance, 0))
            score[chosen] = -1
            chosen.append(len(chosen) if len(chosen) < ALWAYS else int(score.argmax()))
            cosine = np.einsum("ij,j->i", vectors, vectors[chosen[-1]])  # not BLAS, whose threads wait for each other
            np.minimum(distance, 1 - cosine, out=distance)
        return sorted(chosen)

    return choose


def _spread(n: int, n_chosen: int) -> list[int]:
    """n_chosen evenly spaced positions from 0 to n - 1; all positions if there are not more."""
    return np.unique(np.linspace(0, n - 1, min(n, n_chosen)).round().astype(int)).tolist()


# --- shared by the samplers that use vectors --------------------------------------------------------------------------
_Scored = tuple[np.ndarray, Callable[[int], None]]  # score of each candidate, highest first; its update after a draw


@dataclass
class _Part:
    """Candidates without near duplicates, and their groups."""

    rows: np.ndarray  # (M,)
    vectors: np.ndarray  # (M, D)
    near: np.ndarray  # (M, k) rows of the candidate's group: itself, then the nearest; near duplicates last
    similarity: np.ndarray  # (M, k) similarity to the rows of `near`; -1 for a near duplicate of an earlier one
    known: np.ndarray  # (A, D) vectors of annotated and drawn images
    mains: np.ndarray  # (B, D) vectors of annotated and drawn main images


def _greedy(
    pool: Pool,
    order: np.ndarray,
    n_nearest: int,
    start: Callable[[_Part], _Scored],
    n_candidates: int = MAX_CANDIDATES,
    n_listed: int = 0,
) -> Iterator[int]:
    """Take n_candidates at a time, in `order`; yield the highest score first, and skip groups that repeat others."""
    drawn: list[int] = []
    groups_of: dict[int, list[int]] = {}  # row -> numbers of the drawn groups that contain it
    repeating: list[int] = []
    for first in range(0, len(order), n_candidates):
        part = _make_part(pool, order[first : first + n_candidates], drawn, max(n_nearest, n_listed))
        if not len(part.rows):
            continue
        score, update = start(part)
        is_open = np.ones(len(part.rows), bool)
        while (is_open & pool.allowed[part.rows]).any():
            i = int(np.where(is_open & pool.allowed[part.rows], score, -np.inf).argmax())
            is_open[i] = False
            group = part.near[i, : n_nearest + 1].tolist()
            earlier = [number for row in group for number in groups_of.get(row, ())]
            if earlier and np.bincount(earlier).max() > REPEATS * len(group):
                repeating.append(int(part.rows[i]))
                continue
            for row in group:
                groups_of.setdefault(row, []).append(len(drawn))
            drawn.append(int(part.rows[i]))
            yield drawn[-1]
            update(i)
    _report_skipped(pool, drawn, repeating)


def _report_skipped(pool: Pool, drawn: list[int], repeating: list[int]) -> None:
    n_repeating = int(pool.allowed[repeating].sum())
    n_duplicates = int(pool.allowed.sum() - pool.allowed[drawn].sum()) - n_repeating
    for n, reason in (
        (n_duplicates, "it is a near duplicate"),
        (n_repeating, "its directory would repeat another"),
    ):
        if n:
            pool.warn(f"no main image because {reason}: {n} image{'s' * (n > 1)}")


def _make_part(pool: Pool, rows: np.ndarray, drawn: list[int], n_nearest: int) -> _Part:
    vectors = pool.vectors
    mains = [pos[0] for pos, _ in pool.annotated] + drawn
    known = sorted({row for pos, _ in pool.annotated for row in pos}.union(drawn))
    rows = _distinct(vectors, rows[pool.allowed[rows]], vectors[known])
    near, similarity = _groups(vectors, rows, min(n_nearest + 1, len(vectors)))
    return _Part(rows, vectors[rows], near, similarity, vectors[known], vectors[mains])


def _distinct(vectors: np.ndarray, rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """`rows` without near duplicates of `known` or of an earlier row."""
    rows = rows[_max_similarity(vectors[rows], known) <= NEAR_DUPLICATE]
    candidates = vectors[rows]
    is_duplicate = np.zeros(len(rows), bool)
    for first in range(0, len(rows), 500):
        duplicates = np.triu(candidates[first : first + 500] @ candidates[first:].T > NEAR_DUPLICATE, 1)
        for i in np.flatnonzero(duplicates.any(1)):
            if not is_duplicate[first + i]:
                is_duplicate[first:] |= duplicates[i]
    return rows[~is_duplicate]


def _groups(vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """_Part.near and _Part.similarity for `rows`, exact; at most SPARE near duplicates are replaced."""
    near, similarity = np.empty((len(rows), k), np.intp), np.empty((len(rows), k), np.float32)
    depth = min(k + SPARE, len(vectors))
    size = max(1, TILE_CELLS // len(vectors))
    for first in range(0, len(rows), size):
        tile = rows[first : first + size]
        cosine = vectors[tile] @ vectors.T
        cosine[np.arange(len(tile)), tile] = 2  # itself first, despite rounding
        top = _largest(cosine, depth)
        cosine = np.take_along_axis(cosine, top, 1).clip(-1, 1)
        found = vectors[top]
        is_duplicate = np.tril(found @ found.transpose(0, 2, 1) > NEAR_DUPLICATE, -1).any(2)
        cosine[is_duplicate] = -1
        order = np.argsort(is_duplicate, axis=1, kind="stable")[:, :k]
        near[first : first + size] = np.take_along_axis(top, order, 1)
        similarity[first : first + size] = np.take_along_axis(cosine, order, 1)
    return near, similarity


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """(B, k) columns of the k largest of each row, largest first.

    They are in the k blocks with the largest maxima. Partitioning only these is several times faster on long rows.
    """
    n = values.shape[1]
    width = max(1, math.isqrt(n // k))
    starts = np.arange(0, n, width)
    blocks = np.argpartition(-np.maximum.reduceat(values, starts, axis=1), k - 1, axis=1)[:, :k]
    columns = (starts[blocks][:, :, None] + np.arange(width)).reshape(len(values), -1)
    found = np.where(columns < n, np.take_along_axis(values, np.minimum(columns, n - 1), 1), -np.inf)
    order = np.argpartition(-found, k - 1, axis=1)[:, :k]
    columns, found = np.take_along_axis(columns, order, 1), np.take_along_axis(found, order, 1)
    return np.take_along_axis(columns, np.lexsort((columns, -found), axis=1), 1)


def _max_similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each vector to its nearest of `others`; -1 if there are none."""
    result = np.full(len(vectors), -1, np.float32)
    for first in range(0, len(others), 1_000):
        np.maximum(result, (vectors @ others[first : first + 1_000].T).max(1), out=result)
    return result


def _k_means(vectors: np.ndarray, n_clusters: int, rng: np.random.Generator, n_rounds: int = 15) -> np.ndarray:
    """(K, D) unit centers by spherical k-means, k-means++ seeding; K <= n_clusters, fewer for few distinct rows."""
    centers = vectors[:1]
    distance = 1 - vectors @ vectors[0]
    while len(centers) < n_clusters and (distance > 1e-6).any():
        weights = np.maximum(distance, 0).astype(np.float64)
        row = int(rng.choice(len(vectors), p=weights / weights.sum()))
        centers = np.concatenate([centers, vectors[row : row + 1]])
        np.minimum(distance, 1 - vectors @ vectors[row], out=distance)
    for _ in range(n_rounds):
        nearest = (vectors @ centers.T).argmax(1)
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(lengths > 1e-6, sums / np.maximum(lengths, 1e-6), centers)  # empty clusters stay
    return centers


def _fewest_first(
    part: _Part, centers: np.ndarray, annotated: np.ndarray, quality: np.ndarray, priority: np.ndarray
) -> _Scored:
    """Score: clusters with the fewest annotated or drawn first, among these by priority, then by quality."""
    cluster_of = (part.vectors @ centers.T).argmax(1)
    counts = np.zeros(len(centers))
    for first in range(0, len(annotated), 1_000):
        nearest = (annotated[first : first + 1_000] @ centers.T).argmax(1)
        counts += np.bincount(nearest, minlength=len(centers))
    rank = quality.argsort(kind="stable").argsort() / len(part.rows)  # 0 to 1, by quality
    order = priority.argsort(kind="stable").argsort()  # 0 to C - 1
    score = (order[cluster_of] + rank) / (len(centers) + 1) - counts[cluster_of]

    def update(i: int) -> None:
        score[cluster_of == cluster_of[i]] -= 1

    return score, update


def _coverage(part: _Part, bandwidth: float, weights: np.ndarray) -> _Scored:
    """Score: gain in the weighted sum, over all images, of the kernel to the nearest known or drawn image."""

    def to_kernel(cosine: np.ndarray) -> np.ndarray:
        np.minimum(cosine, 1, out=cosine)
        return np.exp(np.divide(np.subtract(cosine, 1, out=cosine), bandwidth**2, out=cosine), out=cosine)

    kernel = to_kernel(part.vectors @ part.vectors.T)
    covered = to_kernel(_max_similarity(part.vectors, part.known)) if len(part.known) else np.zeros_like(weights)
    gain = np.zeros(len(weights))
    for j in range(0, len(weights), 500):
        gain += np.maximum(kernel[:, j : j + 500] - covered[j : j + 500], 0) @ weights[j : j + 500]

    def update(i: int) -> None:
        better = np.flatnonzero(kernel[i] > covered)
        for j in np.array_split(better, len(better) // 500 + 1):
            was, now = covered[j], kernel[i, j]
            gain[:] -= (np.maximum(kernel[:, j] - was, 0) - np.maximum(kernel[:, j] - now, 0)) @ weights[j]
        covered[better] = kernel[i, better]

    return gain, update


def _bandwidth(part: _Part) -> float:
    """Median distance between a candidate and the last of its group: the radius of one directory."""
    return max(float(np.median(np.sqrt(2 - 2 * part.similarity[:, -1]))), 0.01)


def _uncertainty(pool: Pool, part: _Part) -> np.ndarray:
    """(M,) mean of 4p(1 - p) over each candidate's group; p is the probability that a reviewer keeps an image."""
    similarity, kept = _decisions(pool)
    if not len(kept):
        return np.ones(len(part.rows), np.float32)
    slope, offset = _fit_logistic(similarity, kept)
    probability = _logistic(slope * part.similarity[:, 1:] + offset)
    return (4 * probability * (1 - probability)).mean(1, dtype=np.float32)


def _decisions(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """(n,) similarity to the main image and (n,) 1 for kept, 0 for deleted, of each judged image except main images."""
    pairs = [
        (pos[0], row, kept) for pos, neg in pool.annotated for rows, kept in ((pos[1:], 1), (neg, 0)) for row in rows
    ]
    if not pairs:
        return np.empty(0, np.float32), np.empty(0, np.intp)
    vectors = pool.vectors
    mains, rows, kept = np.array(pairs).T
    parts = [slice(first, first + 5_000) for first in range(0, len(pairs), 5_000)]
    return np.concatenate([(vectors[mains[part]] * vectors[rows[part]]).sum(1) for part in parts]), kept


def _fit_logistic(x: np.ndarray, y: np.ndarray, ridge: float = 1e-3, n_rounds: int = 20) -> tuple[float, float]:
    """Slope and offset of P(y = 1 | x) by Newton's method. The ridge keeps them finite if x separates y."""
    features = np.stack([x, np.ones_like(x)], 1).astype(np.float64)
    weights = np.zeros(2)
    for _ in range(n_rounds):
        p = _logistic(features @ weights)
        hessian = (features * (p * (1 - p))[:, None]).T @ features + ridge * np.eye(2)
        weights -= np.linalg.solve(hessian, features.T @ (p - y) + ridge * weights)
    return float(weights[0]), float(weights[1])


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _strings(name: str, value: Any) -> list[str]:
    if not (isinstance(value, list) and value and all(isinstance(element, str) for element in value)):
        raise ValueError(f"option {name!r} must be a list of strings that is not empty, but is {value!r}")
    return value


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    words = "a whole number" if kind is int else "a number"
    if not (is_number and low <= value <= high):
        raise ValueError(f"option {name!r} must be {words} from {low} to {high}, but is {value!r}")
