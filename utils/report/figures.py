"""The figures of a report as plain data: report.json holds them, the page shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from utils.annotation.history import Event
from utils.annotation.judgments import Judged, contradictions
from utils.annotation.records import Record
from utils.errors import UserError
from utils.report import statistics

N_BINS = 40
COUNTS = ("shown", "loaded", "discarded", "positives", "negatives")  # of directories and images, by sampler and by day

Figures = dict[str, Any]


@dataclass
class ReportData:
    """The records, and the facts that a collection has about their images."""

    records: list[Record]
    judged: list[Judged]
    n_images: int
    model: dict[str, Any]
    items: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> its formatted item


class Decision(NamedTuple):
    """An outcome of a directory, and the event in which it had been shown; {} if the history has none."""

    outcome: Event
    shown: Event


class Reviews(NamedTuple):
    """The directories in the history: the first time each was shown, and its last outcome."""

    shown: list[Event]
    decisions: list[Decision]


def measure(data: ReportData, events: Iterable[Event]) -> Figures:
    groups = [group for group in data.judged if group.items]
    two_sided = [group for group in groups if statistics.is_two_sided(group)]
    kept, deleted = similarities(groups, True), similarities(groups, False)
    keep_rate, precision = statistics.by_rank(groups)
    pairs, chains = contradictions(data.records)
    threshold = statistics.best_threshold(kept, deleted)
    low = min([*kept, *deleted], default=0.0)
    edges = np.linspace(low, max([*kept, *deleted, low + 1e-3]), N_BINS + 1)
    return {
        "progress": progress(data),
        "model": data.model,
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
        "yield": review_counts(read_reviews(events)),
    }


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


def similarities(groups: Sequence[Judged], is_kept: bool) -> np.ndarray:
    return np.array([s for group in groups for s, kept in zip(group.similarities, group.kept) if kept == is_kept])


def judged_ap(group: Judged) -> float:
    return statistics.average_precision(group.kept)


def compare(data: ReportData, rival: ReportData, name: str) -> Figures:
    """Judge both models on the same items of the same groups: those in both collections."""
    ours, theirs = [], []
    for group, other in zip(data.judged, rival.judged):
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


def read_reviews(events: Iterable[Event]) -> Reviews:
    """Directories are told apart by root and main image. A later outcome of a directory replaces an earlier one."""
    first: list[Event] = []
    shown: dict[str, dict[Any, Event]] = {}  # main image -> root -> last event
    decisions: dict[str, list[Decision]] = {}  # main image -> oldest first
    for event in events:
        main, root = event["main"], event.get("root")
        if isinstance(event.get("shown"), dict):
            if root not in shown.setdefault(main, {}):
                first.append(event)
            shown[main][root] = event
        elif event.get("undone"):
            del decisions.get(main, [])[-1:]
        elif event.get("discarded") or _is_load(event):
            dirs = shown.get(main, {})
            only = next(iter(dirs.values())) if len(dirs) == 1 else {}  # the directory was moved since it was shown
            decisions.setdefault(main, []).append(Decision(event, dirs.get(root, only)))
    last = {(main, one.outcome.get("root")): one for main, listed in decisions.items() for one in listed}
    return Reviews(first, list(last.values()))


def review_counts(reviews: Reviews) -> dict[str, dict[str, dict[str, int]]]:
    """COUNTS by sampler, and by day (UTC) of the event."""
    tables: dict[str, dict[str, dict[str, int]]] = {"by_sampler": {}, "by_day": {}}
    facts = [(event, event, {"shown": 1}) for event in reviews.shown]
    for outcome, shown in reviews.decisions:
        counts = {"positives": len(outcome.get("kept", ())), "negatives": len(outcome.get("deleted", ()))}
        facts.append((outcome, shown, counts | {"discarded" if outcome.get("discarded") else "loaded": 1}))
    for event, shown, counts in facts:
        names = str(shown.get("sampler", "unknown")), str(event.get("time"))[:10]
        for table, name in zip(tables.values(), names):
            line = table.setdefault(name, dict.fromkeys(COUNTS, 0))
            line.update({key: line[key] + count for key, count in counts.items()})
    return {key: dict(sorted(table.items())) for key, table in tables.items()}


def _is_load(event: Event) -> bool:
    return isinstance(event.get("kept"), list) and isinstance(event.get("deleted"), list)
