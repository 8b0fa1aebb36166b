"""The history as a report needs it: how directories were shown, their outcomes, and second looks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from utils.annotation.history import Event, in_effect
from utils.annotation.records import Record

COUNTS = ("shown", "loaded", "discarded", "positives", "negatives")  # three counts of directories, two of ids


class Decision(NamedTuple):
    """The event with the outcome of a directory, and the event with its showing; {} if the history has none."""

    outcome: Event
    shown: Event


@dataclass
class ReviewHistory:
    """The directories of the history; root and main image identify one."""

    shown: dict[str, dict[Any, Event]] = field(default_factory=dict)  # main image -> root -> event
    decisions: dict[str, list[Decision]] = field(default_factory=dict)  # main image -> oldest first
    second_looks: dict[tuple[Any, str], Event] = field(default_factory=dict)  # (root, main image) -> the last one

    def shown_in(self, main: str, root: Any) -> Event:
        """The "shown" event of a directory. A directory that was moved is found if no other has its main image."""
        dirs = self.shown.get(main, {})
        return dirs.get(root) or (next(iter(dirs.values())) if len(dirs) == 1 else {})

    def origin(self, record: Record) -> Decision:
        """The load that made a record, and the "shown" event of its directory; {} for an event not in the history."""
        main = record["pos"][0]
        loads = [one for one in self.decisions.get(main, []) if "kept" in one.outcome]
        made = [one for one in loads if set(one.outcome["kept"]) == set(record["pos"])]
        return (made or loads or [Decision({}, self.shown_in(main, None))])[-1]


def read_reviews(events: Iterable[Event]) -> ReviewHistory:
    reviews = ReviewHistory()
    slim = ({**event, "shown": {}} if "shown" in event else event for event in events)  # most of a history is cosines
    for event in in_effect(slim):
        main, root = event["main"], event.get("root")
        if "shown" in event:
            reviews.shown.setdefault(main, {})[root] = event
        elif event.get("undone"):
            del reviews.decisions.get(main, [])[-1:]
        elif "second_look" in event:
            reviews.second_looks[root, main] = event
        elif event.get("discarded") or "kept" in event:
            reviews.decisions.setdefault(main, []).append(Decision(event, reviews.shown_in(main, root)))
    return reviews


def count_reviews(reviews: ReviewHistory) -> dict[str, dict[str, dict[str, int]]]:
    """COUNTS by sampler, and by day (UTC) of the event. The last outcome of a directory counts."""
    tables: dict[str, dict[str, dict[str, int]]] = {"by_sampler": {}, "by_day": {}}
    facts = [(event, event, {"shown": 1}) for dirs in reviews.shown.values() for event in dirs.values()]
    last = {(main, one.outcome.get("root")): one for main, listed in reviews.decisions.items() for one in listed}
    for outcome, shown in last.values():
        counts = {"positives": len(outcome.get("kept", ())), "negatives": len(outcome.get("deleted", ()))}
        facts.append((outcome, shown, counts | {"discarded" if outcome.get("discarded") else "loaded": 1}))
    for event, shown, counts in facts:
        names = str(shown.get("sampler", "unknown")), str(event.get("time"))[:10]
        for table, name in zip(tables.values(), names):
            line = table.setdefault(name, dict.fromkeys(COUNTS, 0))
            line.update({key: line[key] + count for key, count in counts.items()})
    return {key: dict(sorted(table.items())) for key, table in tables.items()}


def dir_name(main: str, event: Mapping[str, Any]) -> str:
    """The name of a directory for a reviewer, "root/18_id"; "*" if the history does not have its number."""
    root = re.split(r"[/\\]", str(event.get("root") or "").rstrip("/\\"))[-1]
    return "/".join(filter(None, (root, str(event.get("dir") or f"*_{main}"))))
