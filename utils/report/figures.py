"""The figures of a report, as plain data: what report.json holds and the page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.annotation.history import Event
from utils.annotation.judgments import Judged, contradictions
from utils.annotation.records import Record
from utils.errors import UserError
from utils.report import statistics, yields

N_BINS = 40

Figures = dict[str, Any]


@dataclass
class Material:
    """The annotations, and what a collection knows about their images."""

    records: list[Record]
    judged: list[Judged]
    n_images: int
    model: dict[str, Any]
    items: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> its formatted item


def measure(material: Material, events: Iterable[Event]) -> Figures:
    groups = [group for group in material.judged if group.items]
    two_sided = [group for group in groups if statistics.is_two_sided(group)]
    kept, deleted = similarities(groups, True), similarities(groups, False)
    keep_rate, precision = statistics.by_rank(groups)
    pairs, chains = contradictions(material.records)
    by_sampler, by_day = yields.count(events)
    threshold = statistics.best_threshold(kept, deleted)
    low = min([*kept, *deleted], default=0.0)
    edges = np.linspace(low, max([*kept, *deleted, low + 1e-3]), N_BINS + 1)
    return {
        "progress": progress(material),
        "model": material.model,
        "keep_rate_by_rank": [estimate._asdict() for estimate in keep_rate],
        "precision_at": [estimate._asdict() for estimate in precision],
        "average_precision": statistics.mean(list(map(judged_ap, two_sided)))._asdict(),
        "ordered_pairs": statistics.mean(list(map(statistics.ordered_share, two_sided)))._asdict(),
        "threshold": threshold and threshold._asdict(),
        "similarity_histogram": {
            "edges": edges.round(6).tolist(),
            "positives": np.histogram(kept, edges)[0].tolist(),
            "hard_negatives": np.histogram(deleted, edges)[0].tolist(),
        },
        "conflicts": {"pairs": pairs, "chains": [chain._asdict() for chain in chains]},
        "yield": {"by_sampler": by_sampler, "by_day": by_day},
    }


def progress(material: Material) -> dict[str, int]:
    """Positives count without the main images; an image in several records counts once as annotated."""
    annotated = {id_ for record in material.records for id_ in (*record["pos"], *record["neg"])}
    return {
        "images": material.n_images,
        "annotated": len(annotated),
        "annotated_no_longer_in_collection": len(annotated) - len(material.items),
        "groups": len(material.records),
        "positives": sum(len(record["pos"]) - 1 for record in material.records),
        "hard_negatives": sum(len(record["neg"]) for record in material.records),
    }


def similarities(groups: Sequence[Judged], is_kept: bool) -> np.ndarray:
    return np.array([s for group in groups for s, kept in zip(group.similarities, group.kept) if kept == is_kept])


def judged_ap(group: Judged) -> float:
    return statistics.average_precision(group.kept)


def compare(material: Material, rival: Material, name: str) -> Figures:
    """Both models rank the same items of the same groups: those that are in both collections."""
    ours, theirs = [], []
    for group, other in zip(material.judged, rival.judged):
        both = set(group.items) & set(other.items)
        group, other = only(group, both), only(other, both)
        if statistics.is_two_sided(group):
            ours.append(group)
            theirs.append(other)
    if not ours:
        raise UserError(f"no group has a kept and a deleted image in collection {name}; compare one with the same ids")
    result: Figures = {"collection": name, "model": rival.model}
    measures: dict[str, Callable[[Judged], float]] = {
        "average_precision": judged_ap,
        "ordered_pairs": statistics.ordered_share,
    }
    for key, measured in measures.items():
        one, other_one = np.array([*map(measured, ours)]), np.array([*map(measured, theirs)])
        result[key] = {
            "this": statistics.mean(one.tolist())._asdict(),
            "other": statistics.mean(other_one.tolist())._asdict(),
            "other_minus_this": statistics.mean((other_one - one).tolist())._asdict(),
        }
    return result


def only(group: Judged, ids: set[str]) -> Judged:
    there = [i for i, id_ in enumerate(group.items) if id_ in ids]
    return group._replace(
        items=[group.items[i] for i in there],
        similarities=[group.similarities[i] for i in there],
        kept=[group.kept[i] for i in there],
    )
