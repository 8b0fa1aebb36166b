"""What reviewed directories brought, by sampler and by day, as the history tells it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from utils.annotation.history import Event

COLUMNS = ("shown", "loaded", "discarded", "positives", "negatives")


def count(events: Iterable[Event]) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Sampler -> figures, and day (UTC) of the review -> figures; by COLUMNS. A later load replaces an earlier one."""
    sampler_of: dict[str, str] = {}
    shown: set[tuple[Any, str]] = set()
    outcomes: dict[str, Event] = {}  # by main image
    by_sampler: dict[str, dict[str, int]] = {}
    by_day: dict[str, dict[str, int]] = {}
    for event in events:
        main = event["main"]
        if isinstance(event.get("shown"), dict):
            sampler_of[main] = str(event.get("sampler"))
            if (event.get("root"), main) not in shown:
                _line(by_sampler, sampler_of[main])["shown"] += 1
                _line(by_day, _day(event))["shown"] += 1
            shown.add((event.get("root"), main))
        elif event.get("undone"):
            outcomes.pop(main, None)
        elif event.get("discarded") or _is_load(event):
            outcomes[main] = event
    for main, event in outcomes.items():
        for table, key in ((by_sampler, sampler_of.get(main, "unknown")), (by_day, _day(event))):
            line = _line(table, key)
            line["discarded" if event.get("discarded") else "loaded"] += 1
            line["positives"] += max(0, len(event.get("kept", ())) - 1)  # without the main image
            line["negatives"] += len(event.get("deleted", ()))
    return dict(sorted(by_sampler.items())), dict(sorted(by_day.items()))


def _is_load(event: Event) -> bool:
    return isinstance(event.get("kept"), list) and isinstance(event.get("deleted"), list)


def _line(table: dict[str, dict[str, int]], key: str) -> dict[str, int]:
    return table.setdefault(key, dict.fromkeys(COLUMNS, 0))


def _day(event: Event) -> str:
    return str(event.get("time"))[:10]
