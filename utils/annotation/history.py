"""The history of shown images and decisions: an append-only file with one JSON object per directory and event.

Shown:       {"root", "main", "dir", "shown": {id: cosine}, "sampler", "options", "seed", "pick", "model", "time"};
             with ANN_DIRRIFY_POOL + "pool": [collections], "brought": {id: collection that ranked it}
Loaded:      {"root", "main", "dir", "kept": [ids], "deleted": [ids], "time"}; + "replaced": the record before
Discarded:   {"root", "main", "dir", "discarded": true, "time"}
Second look: {"root", "main", "dir", "second_look": {"kept", "deleted"}, "record": {"pos", "neg"}, "time"}
Undone:      {"root": null, "main", "undone": true, "time"}, when its load was undone
Events of one load share "load", an id, and "records", the name of the annotated data; undone events repeat both.
`time` is UTC, ISO 8601. The annotated data do not depend on the history. Without a history (path ""), only the last
load can be undone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.files import naming
from utils.lock import hold, lock_path
from utils.log import LOG

Event = dict[str, Any]

WAIT_S = 60  # to wait for another process that appends


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_events(path: str | Path, skip: str = "") -> Iterator[Event]:
    """Yield all events, oldest first; none if there is no file. Damaged lines are skipped with a warning.

    Lines that contain `skip` are skipped without parsing, which is faster.
    """
    if not path or not Path(path).exists():
        return
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if skip and skip in line:
                continue
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if _is_event(event):
                yield event
            elif not line.isspace():
                LOG.warning("history %s, line %d, is damaged; skipped", path, number)


def _is_event(event: Any) -> bool:
    """Whether the fields that readers use have the types of the events above, even if someone edited the file."""
    if not isinstance(event, dict) or not isinstance(event.get("main"), str):
        return False
    if not isinstance(event.get("root"), str | None) or not isinstance(event.get("pool", []), list):
        return False
    if "second_look" in event:
        return _has_ids(event["second_look"], "kept", "deleted") and _has_ids(event.get("record"), "pos", "neg")
    if "kept" in event:
        return _has_ids(event, "kept", "deleted") and _has_ids(
            event.get("replaced", {"pos": [], "neg": []}), "pos", "neg"
        )
    return isinstance(event.get("shown", {}), dict)


def _has_ids(value: Any, *keys: str) -> bool:
    lists = [value.get(key) for key in keys] if isinstance(value, dict) else [None]
    return all(isinstance(ids, list) and all(isinstance(id_, str) for id_ in ids) for ids in lists)


def append(path: str | Path, events: Iterable[Event]) -> None:
    """Append events durably; does nothing without a path. First ends a half-written line of a killed process."""
    lines = b"".join(json.dumps(event).encode() + b"\n" for event in events)
    if not path or not lines:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(lock_path(path), f"history {path}", WAIT_S), naming(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else b"\n" + lines
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def append_shown(path: str | Path, root: Path, begun: str, shown: Sequence[Event]) -> None:
    """Append `shown`, events without root and time of a run in `root`, except events it has appended since `begun`."""
    name = str(root.resolve())
    known = {
        event["main"]
        for event in read_events(path)
        if "shown" in event and event.get("root") == name and str(event.get("time")) >= begun
    }
    append(path, ({"root": name, **event, "time": now()} for event in shown if event["main"] not in known))


def shown(events: Iterable[Event]) -> set[str]:
    """Ids of all images ever shown."""
    return {id_ for event in events if isinstance(event.get("shown"), dict) for id_ in event["shown"]}


def in_effect(events: Iterable[Event]) -> list[Event]:
    """Remove the events of undone loads, and the undone events that name a load."""
    events = list(events)
    undone = {str(event["load"]) for event in events if event.get("undone") and event.get("load")}
    return [event for event in events if str(event.get("load")) not in undone]


def read_decisions(path: str | Path) -> list[Event]:
    """The events in effect, except "shown" events."""
    return in_effect(event for event in read_events(path, skip='"shown": {') if "shown" not in event)


def discarded(decisions: Iterable[Event]) -> set[str]:
    """Main ids of directories whose last decision was to discard them."""
    mains: set[str] = set()
    for event in decisions:
        if event.get("discarded"):
            mains.add(event["main"])
        elif "kept" in event:
            mains.discard(event["main"])
    return mains


# --- second looks -----------------------------------------------------------------------------------------------------
def judgments(look: Event) -> dict[str, tuple[bool, bool]]:
    """Image -> (kept in the record, kept in the second look), for all images judged in both except the main image."""
    record, second = look["record"], look["second_look"]
    both = ({*record["pos"], *record["neg"]} & {*second["kept"], *second["deleted"]}) - {look["main"]}
    return {id_: (id_ in record["pos"], id_ in second["kept"]) for id_ in sorted(both)}


def kappa(judgments: Sequence[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa: agreement beyond chance, at most 1. None without judgments, and if the agreement by chance is 1.

    Source: Cohen, A Coefficient of Agreement for Nominal Scales, 1960.
    """
    if not judgments:
        return None
    n = len(judgments)
    first, second = (sum(kept) / n for kept in zip(*judgments))
    observed = sum(before == after for before, after in judgments) / n
    expected = first * second + (1 - first) * (1 - second)
    return None if expected == 1 else round((observed - expected) / (1 - expected), 6)
