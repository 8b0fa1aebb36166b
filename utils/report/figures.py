"""The figures of a report as plain data, which report.json stores and the page shows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.annotation.history import Event, judgments, kappa
from utils.annotation.judgments import Judged, contradictions
from utils.annotation.records import Record
from utils.errors import UserError
from utils.report import statistics
from utils.report.reviews import Decision, ReviewHistory, count_reviews, dir_name

N_BINS = 40
NEAREST, INFORMATIVE, POOLED = "nearest", "informative", "pooled"  # how the images of a directory were picked

Figures = dict[str, Any]


@dataclass
class ReportData:
    """The records, and a collection's facts about their images."""

    records: list[Record]
    judged: list[Judged]
    n_images: int
    model: dict[str, Any]
    items: dict[str, dict[str, Any]]  # id -> its formatted item
    origins: list[Decision]  # per record


def measure(data: ReportData, reviews: ReviewHistory) -> Figures:
    groups = [group for group in data.judged if group.items]
    picks = [picked(data.origins[group.number].shown) for group in groups]
    nearest = [group for group, pick in zip(groups, picks) if pick == NEAREST]
    kept, deleted = statistics.similarities(groups, True), statistics.similarities(groups, False)
    keep_rate, precision = statistics.by_rank(nearest)
    pairs, chains = contradictions(data.records)
    low = min([*kept, *deleted], default=0.0)
    edges = np.linspace(low, max([*kept, *deleted, low + 1e-3]), N_BINS + 1)
    return {
        "progress": progress(data),
        "model": data.model,
        "not_nearest": {kind: picks.count(kind) for kind in (INFORMATIVE, POOLED)},
        "keep_rate_by_rank": keep_rate,
        "precision_at": precision,
        "average_precision": mean_of(statistics.average_precision, nearest),
        "ordered_pairs": mean_of(statistics.ordered_share, groups),
        "threshold": statistics.best_threshold(kept, deleted),
        "similarity_histogram": {
            "edges": edges.round(6).tolist(),
            "positives": np.histogram(kept, edges)[0].tolist(),
            "hard_negatives": np.histogram(deleted, edges)[0].tolist(),
        },
        "conflicts": {"pairs": pairs, "chains": [chain._asdict() for chain in chains]},
        "agreement": agreement(list(reviews.second_looks.values())),
        "yield": count_reviews(reviews),
    }


def picked(shown: Event) -> str:
    """How the images of a directory were picked. Events of earlier versions do not say it; they mean the nearest."""
    if shown.get("pick", NEAREST) != NEAREST:
        return INFORMATIVE
    return POOLED if len(pool_of(shown)) > 1 else NEAREST


def pool_of(shown: Event) -> set[str]:
    """The collections whose nearest images a directory shows; empty if the history does not say."""
    return set(map(str, shown.get("pool") or ()))


def mean_of(measured: Callable[[Judged], float], groups: Sequence[Judged]) -> statistics.Estimate:
    """The mean over groups with kept and deleted items."""
    return statistics.mean([measured(group) for group in groups if statistics.is_two_sided(group)])


def progress(data: ReportData) -> dict[str, int]:
    """Positives are the ids in "pos", main images included. An image in several records is annotated once."""
    annotated = {id_ for record in data.records for id_ in (*record["pos"], *record["neg"])}
    return {
        "images": data.n_images,
        "annotated": len(annotated),
        "annotated_no_longer_in_collection": len(annotated) - len(data.items),
        "groups": len(data.records),
        "positives": sum(len(record["pos"]) for record in data.records),
        "hard_negatives": sum(len(record["neg"]) for record in data.records),
    }


def compare(data: ReportData, rival: ReportData, names: tuple[str, str], trained_on: Collection[str]) -> Figures:
    """Judge both models on the same items of the same groups.

    Items must be in both collections. Groups with images picked to be informative are left out.
    names: of the two collections. trained_on: main images of the groups that a collection learned from. These groups
    are left out, too, unless there are no others.
    """
    found: dict[str, list[tuple[Judged, Judged]]] = {"unseen": [], "trained_on": [], INFORMATIVE: []}
    for group, other in zip(data.judged, rival.judged):
        both = {item.id for item in group.items} & {item.id for item in other.items}
        group, other = (one._replace(items=[item for item in one.items if item.id in both]) for one in (group, other))
        if statistics.is_two_sided(group):
            is_informative = picked(data.origins[group.number].shown) == INFORMATIVE
            kind = INFORMATIVE if is_informative else "trained_on" if group.main in trained_on else "unseen"
            found[kind].append((group, other))
    pairs = found["unseen"] or found["trained_on"]
    if not pairs:
        remedy = (
            "review directories of ANN_DIRRIFY_PICK nearest" if found[INFORMATIVE] else "embed the same list into it"
        )
        raise UserError(f"no group of nearest images has a kept and a deleted image in collection {names[1]}; {remedy}")
    return {
        "collection": names[1],
        "model": rival.model,
        "groups": len(pairs),
        "pooled": sum(set(names) <= pool_of(data.origins[group.number].shown) for group, _ in pairs),
        "left_out": {
            "informative": len(found[INFORMATIVE]),
            "trained_on": len(found["trained_on"]) if found["unseen"] else 0,
        },
        "is_trained_on": not found["unseen"],
        "average_precision": paired(statistics.average_precision, pairs),
        "ordered_pairs": paired(statistics.ordered_share, pairs),
    }


def paired(measured: Callable[[Judged], float], pairs: Sequence[tuple[Judged, Judged]]) -> Figures:
    one, other = (np.array([measured(group) for group in side]) for side in zip(*pairs))
    values = {"this": one, "other": other, "other_minus_this": other - one}
    return {key: statistics.mean(value.tolist()) for key, value in values.items()}


def agreement(looks: Sequence[Event]) -> Figures:
    """Compare second looks with the records of that time: the share of equal judgments, and Cohen's kappa (1960)."""
    judged = [(look, both) for look in looks if (both := judgments(look))]
    equal = np.array([[sum(first == second for first, second in both.values())] for _, both in judged], dtype=float)
    n_images = np.array([[len(both)] for _, both in judged], dtype=float)
    return {
        "directories": len(judged),
        "images": int(n_images.sum()),
        "equal": statistics.ratios(equal.reshape(-1, 1), n_images.reshape(-1, 1))[0],
        "kappa": kappa([judgment for _, both in judged for judgment in both.values()]),
        "disagreements": [
            {"main": look["main"], "dir": dir_name(look["main"], look), "image": id_, "kept_first": first}
            for look, both in judged
            for id_, (first, second) in both.items()
            if first != second
        ],
    }
