"""What annotation is for: a linear projection learned from recorded groups, and how well it retrieves held-out images.

The recipe was fixed with random picks alone, on other seeds than those reported; all samplers get the same.
"""

from __future__ import annotations

import numpy as np

N_DIMS = 128  # vectors of more are first reduced to their leading uncentered principal components
N_STEPS, BATCH_GROUPS, LEARNING_RATE = 120, 32, 3e-3  # the same glances, however many groups there are
MARGIN = 0.6  # cosine below which a negative is far enough
PRIOR = 0.2  # pull of the projection towards the identity, shared by all groups: few groups move it little

Group = tuple[list[int], list[int]]  # rows: positives, the main one first; negatives


def reduce_dims(vectors: np.ndarray, basis_of: np.ndarray) -> np.ndarray:
    """(N, at most N_DIMS): `vectors` along the leading right singular vectors of `basis_of`, L2-normalized."""
    if vectors.shape[1] <= N_DIMS:
        return vectors
    basis = np.linalg.eigh(basis_of.T @ basis_of)[1][:, -N_DIMS:]
    return _normalize(vectors @ basis)


def train(vectors: np.ndarray, groups: list[Group], seed: int) -> np.ndarray:
    """(D, D) projection that draws positives to their main image and pushes its negatives below MARGIN.

    Source: the contrastive loss of Hadsell, Chopra & LeCun, CVPR 2006, on cosines.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = max(len(pos) + len(neg) for pos, neg in groups)
    rows = torch.zeros(len(groups), size, dtype=torch.long)
    is_pos, is_neg = torch.zeros(len(groups), size), torch.zeros(len(groups), size)
    for number, (pos, neg) in enumerate(groups):
        rows[number, : len(pos) + len(neg)] = torch.tensor(pos + neg)
        is_pos[number, 1 : len(pos)] = 1
        is_neg[number, len(pos) : len(pos) + len(neg)] = 1
    images, identity = torch.from_numpy(vectors), torch.eye(vectors.shape[1])
    projection = identity.clone().requires_grad_()
    optimizer = torch.optim.Adam([projection], lr=LEARNING_RATE)
    for _ in range(N_STEPS):
        batch = torch.randint(len(groups), (BATCH_GROUPS,), generator=generator)
        projected = torch.nn.functional.normalize(images[rows[batch]] @ projection.T, dim=-1)
        cosine = torch.einsum("gd,gkd->gk", projected[:, 0], projected)
        pos, neg = is_pos[batch], is_neg[batch]
        loss = (pos * (1 - cosine)).sum() / pos.sum().clamp(min=1)
        loss = loss + (neg * (cosine - MARGIN).clamp(min=0)).sum() / neg.sum().clamp(min=1)
        loss = loss + PRIOR / len(groups) * ((projection - identity) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return projection.detach().numpy()


def project(vectors: np.ndarray, projection: np.ndarray) -> np.ndarray:
    return _normalize(vectors @ projection.T)


def map_at_r(vectors: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """MAP@R and recall@1 of each image among the others. Source: Musgrave et al., arXiv 2003.08505."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    hits = labels[np.argsort(-similarity, axis=1, kind="stable")] == labels[:, None]
    hits[:, -1] = False  # the image itself
    n_same = (labels[:, None] == labels).sum(1) - 1
    rank = np.arange(1, len(labels) + 1)
    precision = (hits.cumsum(1) / rank * hits * (rank <= n_same[:, None])).sum(1)
    has_same = n_same > 0
    return float((precision[has_same] / n_same[has_same]).mean()), float(hits[has_same, 0].mean())


def _normalize(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
