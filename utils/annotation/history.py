"""The history: what reviewers were shown and what they decided, one JSON object per directory and event, append-only.

Shown:     {"root", "main", "shown": {id: cosine to main}, "sampler", "options", "seed", "pick", "model", "time"}
Loaded:    {"root", "main", "kept": [ids], "deleted": [ids], "time"}
Discarded: {"root", "main", "discarded": true, "time"}
Undone:    {"root": null, "main", "undone": true, "time"}, when its load was undone
`time` is UTC, ISO 8601. The annotated data do not depend on the history; everything else works without one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.lock import hold
from utils.log import LOG

Event = dict[str, Any]

WAIT_S = 60  # for another appending process


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_events(path: Path | None) -> Iterator[Event]:
    """All events, oldest first; none without a file. Damaged lines are skipped with a warning."""
    if path is None or not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("main"), str):
                yield event
            elif not line.isspace():
                LOG.warning("history %s, line %d, is damaged; skipped", path, number)


def append(path: Path | None, events: Iterable[Event]) -> None:
    """Append events durably; does nothing without a path. A half-written line of a killed process is ended first."""
    lines = b"".join(json.dumps(event).encode() + b"\n" for event in events)
    if path is None or not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path.with_name(f".{path.name}.lock"), f"history {path}", WAIT_S), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else b"\n" + lines
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def append_shown(
    path: Path | None, root: Path, begun: str, shown: Mapping[str, Mapping[str, float]], facts: Event
) -> None:
    """Append the directories that a run, begun at that time, has in `root`: main id -> {id: cosine}; each once."""
    name = str(root.resolve())
    known = {event["main"] for event in read_events(path) if _is_of(event, name, begun)}
    append(
        path,
        (
            {"root": name, "main": main, "shown": cosines, **facts, "time": now()}
            for main, cosines in shown.items()
            if main not in known
        ),
    )


def _is_of(event: Event, root: str, begun: str) -> bool:
    return "shown" in event and event.get("root") == root and str(event.get("time")) >= begun


def shown(events: Iterable[Event]) -> set[str]:
    """Ids of all images ever shown."""
    return {id_ for event in events if isinstance(event.get("shown"), dict) for id_ in event["shown"]}


def discarded(events: Iterable[Event]) -> set[str]:
    """Main ids of directories whose last decision was to discard them."""
    mains: set[str] = set()
    for event in events:
        if event.get("discarded"):
            mains.add(event["main"])
        elif "kept" in event:
            mains.discard(event["main"])
    return mains
