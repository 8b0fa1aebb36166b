"""Measure how well a projection retrieves held-out images; and the recipe before ann_train.py, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.annotation.neighbors import normalize
from utils.training.projection import Group, leading

N_STEPS, BATCH_GROUPS, LEARNING_RATE = 120, 32, 3e-3
MARGIN = 0.6  # cosine below which a negative is far enough
PRIOR = 0.2  # pull of the projection towards the identity, shared by all groups


def learn_old(vectors: np.ndarray, groups: Sequence[Group], basis_of: np.ndarray, seed: int) -> np.ndarray:
    """(K, D) projection onto the leading directions of `basis_of`, from pairs with the main image alone.

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
    basis = leading(basis_of)
    images, identity = torch.from_numpy(normalize(vectors @ basis)), torch.eye(basis.shape[1])
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
    return projection.detach().numpy() @ basis.T


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
