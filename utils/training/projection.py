"""A linear projection of embeddings, learned from the kept and deleted images of groups, and its file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.annotation.neighbors import normalize
from utils.errors import UserError
from utils.files import replacing
from utils.store.collection import DERIVED

Group = tuple[list[int], list[int]]  # rows: kept images, the main image first; deleted images

N_DIMS = 128  # the projection is learned on this many leading directions of the collection
REST = 0.5  # weight of all other directions, mostly noise; on unseen images, removing them is worse than halving them
N_STEPS, BATCH_GROUPS, LEARNING_RATE, BETAS = 120, 32, 6e-3, (0.9, 0.999)  # settings of Adam
MARGIN = 0.45  # cosine; a kept and a deleted image below it are far enough apart
MAX_SIDE = 64  # kept images, and deleted images, of a group to learn from: a batch is as large as its largest group
CHUNK = 50_000  # vectors projected at a time


class Recipe(NamedTuple):
    """Settings of learning. Cross-validation chooses a recipe."""

    all_pairs: bool  # each kept image is an anchor; else only the main image, as similarity may not be transitive
    prior: float  # pull toward the identity, divided among all groups: few groups change the projection little


RECIPES = (Recipe(True, 0.15), Recipe(True, 0.05), Recipe(True, 0.5), Recipe(False, 0.15))


def leading(vectors: np.ndarray) -> np.ndarray:
    """(D, at most N_DIMS) leading uncentered principal directions of (N, D) `vectors`. O(N D^2)."""
    if vectors.shape[1] <= N_DIMS:
        return np.eye(vectors.shape[1], dtype=np.float32)
    return np.linalg.eigh(vectors.T @ vectors)[1][:, -N_DIMS:].astype(np.float32)


def learn(vectors: np.ndarray, groups: Sequence[Group], basis: np.ndarray, recipe: Recipe, seed: int) -> np.ndarray:
    """(D, D) float32 projection that pulls kept images together and pushes deleted ones below MARGIN.

    vectors: (M, D) of unit length, indexed by the groups; basis: from leading(). Returns the identity if no group has a
    pair. Takes a tenth of a second for 128 dimensions and groups of 21.
    Source: the contrastive loss of Hadsell, Chopra & LeCun, CVPR 2006, on cosines; Kingma & Ba, arXiv 1412.6980.
    """
    rng = np.random.default_rng(seed)
    groups = [(_sample(kept, rng), _sample(deleted, rng)) for kept, deleted in groups if kept and (kept[1:] or deleted)]
    if not groups:
        return np.eye(len(basis), dtype=np.float32)
    rows, is_anchor, is_kept, is_deleted = _as_arrays(groups, recipe)
    images = normalize(vectors @ basis)
    identity = np.eye(basis.shape[1], dtype=np.float32)
    projection, mean, square = identity.copy(), np.zeros_like(identity), np.zeros_like(identity)
    others = 1 - np.eye(rows.shape[1], dtype=np.float32)
    for step in range(1, N_STEPS + 1):
        batch = rng.integers(len(groups), size=BATCH_GROUPS)
        anchor = is_anchor[batch][:, :, None]
        similar, different = anchor * is_kept[batch][:, None] * others, anchor * is_deleted[batch][:, None]
        gradient = _gradient(projection, images[rows[batch]], similar, different)
        gradient += 2 * recipe.prior / len(groups) * (projection - identity)
        mean += (1 - BETAS[0]) * (gradient - mean)
        square += (1 - BETAS[1]) * (gradient**2 - square)
        spread = np.sqrt(square / (1 - BETAS[1] ** step)) + 1e-8
        projection -= LEARNING_RATE / (1 - BETAS[0] ** step) * mean / spread
    return _expand(projection, basis)


def _sample(side: list[int], rng: np.random.Generator) -> list[int]:
    """At most MAX_SIDE rows, chosen at random except for the first, which may be the main image."""
    return side if len(side) <= MAX_SIDE else [side[0], *rng.choice(side[1:], MAX_SIDE - 1, replace=False).tolist()]


def _gradient(projection: np.ndarray, images: np.ndarray, similar: np.ndarray, different: np.ndarray) -> np.ndarray:
    """(D, D) gradient of: mean of 1 - cosine of the similar pairs + mean of max(cosine - MARGIN, 0) of the different.

    images: (B, K, D); the pairs: (B, K, K), 1 or 0.
    """
    flat = images.reshape(-1, len(projection))
    projected = (flat @ projection.T).reshape(images.shape)  # one product is faster than one per group
    lengths = np.maximum(np.linalg.norm(projected, axis=2, keepdims=True), 1e-12)
    projected /= lengths
    is_close = projected @ projected.transpose(0, 2, 1) > MARGIN
    by_cosine = different * is_close / max(different.sum(), 1) - similar / max(similar.sum(), 1)
    by_unit = (by_cosine + by_cosine.transpose(0, 2, 1)) @ projected
    by_projected = (by_unit - (by_unit * projected).sum(2, keepdims=True) * projected) / lengths
    return by_projected.reshape(flat.shape).T @ flat


def _as_arrays(groups: Sequence[Group], recipe: Recipe) -> tuple[np.ndarray, ...]:
    """(G, largest group): rows, and as 0 or 1: anchors, kept images, deleted images."""
    shape = len(groups), max(len(kept) + len(deleted) for kept, deleted in groups)
    rows, masks = np.zeros(shape, np.int64), np.zeros((3, *shape), np.float32)
    for number, (kept, deleted) in enumerate(groups):
        n_kept, n = len(kept), len(kept) + len(deleted)
        rows[number, :n] = kept + deleted
        masks[0, number, : n_kept if recipe.all_pairs else 1] = 1
        masks[1, number, :n_kept] = 1
        masks[2, number, n_kept:n] = 1
    return rows, *masks


def _expand(projection: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Expand a projection of the leading directions to all D dimensions."""
    dimension, n = basis.shape
    if n == dimension:  # the basis is the identity
        return projection
    whole = REST * np.eye(dimension, dtype=np.float32)
    return whole + basis @ (projection - REST * np.eye(n, dtype=np.float32)) @ basis.T


def project(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Project vectors (N, D); returns (N, D) float32 of unit length."""
    result = np.empty((len(vectors), len(matrix)), np.float32)
    for start in range(0, len(vectors), CHUNK):
        result[start : start + CHUNK] = normalize(vectors[start : start + CHUNK] @ matrix.T)
    return result


# --- the file ---------------------------------------------------------------------------------------------------------
class Projection(NamedTuple):
    """A learned projection: new vectors are vectors @ matrix.T, scaled to unit length."""

    matrix: np.ndarray  # (D, D) float32
    model: dict[str, Any]  # model facts of the vectors, from their collection
    trained_on: list[str]  # main ids of the groups
    figures: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the matrix, stored with the collection that it made."""
        return hashlib.sha256(self.matrix.tobytes()).hexdigest()


def write_projection(path: Path, projection: Projection) -> None:
    """Replace `path`, atomically."""
    texts = {name: json.dumps(getattr(projection, name)) for name in ("model", "trained_on", "figures")}
    with replacing(path, binary=True) as file:
        np.savez(file, matrix=projection.matrix, **texts)  # type: ignore[arg-type]


def read_projection(path: Path) -> Projection:
    """Read a projection. Raises UserError if it is missing or damaged."""
    try:
        with np.load(path) as arrays:
            texts = (json.loads(str(arrays[name])) for name in ("model", "trained_on", "figures"))
            return Projection(arrays["matrix"], *texts)
    except FileNotFoundError:
        raise UserError(f"no projection in {path}; run python ann_train.py, or set ANN_PROJECTION_PATH") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"projection {path} is damaged ({error}); run python ann_train.py to make a new one") from None


def projection_of(facts: dict[str, Any], path: Path) -> Projection | None:
    """The projection that made the collection with these facts; None for a collection of embed.py.

    Raises UserError if `path` has another projection.
    """
    if DERIVED not in facts:
        return None
    projection = read_projection(path)
    if projection.digest != facts[DERIVED]:
        raise UserError(
            f"projection {path} did not make this collection; run python ann_train.py --apply, or set "
            "ANN_PROJECTION_PATH"
        )
    return projection
