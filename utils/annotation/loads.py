"""One load: the changes that reviewed directories make in the annotated data and the history; and undoing a load.

The history is written before the annotated data. After a kill or a full disk in between, the next load finds events
without their records, and undoes these events first.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.annotation import history
from utils.annotation.history import Event
from utils.annotation.records import Record, backup_path, is_record, put_back, read_items, write_items
from utils.annotation.reviewed import Review, ReviewedDir
from utils.errors import UserError


@dataclass
class Load:
    """The annotated data after a load, and the outcome of each directory."""

    items: list[Any]
    decisions: list[Event]  # events of earlier loads, in effect
    interrupted: list[Event]  # events of a load that did not reach the annotated data
    n_of_other_tools: int = 0  # items that are not records
    loaded: list[ReviewedDir] = field(default_factory=list)
    replaced: list[ReviewedDir] = field(default_factory=list)
    different: list[ReviewedDir] = field(default_factory=list)  # they differ from their records, which stay
    already: list[ReviewedDir] = field(default_factory=list)  # equal to their records
    second_looks: list[ReviewedDir] = field(default_factory=list)  # at directories recorded from another root
    untouched: list[ReviewedDir] = field(default_factory=list)  # left out because of `skip`
    discarded: list[ReviewedDir] = field(default_factory=list)
    gone: list[ReviewedDir] = field(default_factory=list)  # deleted, but recorded before or from another root
    revived: list[ReviewedDir] = field(default_factory=list)  # loaded now, but discarded before
    other_main: list[ReviewedDir] = field(default_factory=list)  # loaded, but their main image is a positive elsewhere
    root_of: dict[str, str] = field(default_factory=dict)  # main id -> root in which it was recorded

    @property
    def recorded(self) -> list[ReviewedDir]:
        return self.loaded + self.replaced


def plan(path: Path, history_path: str, reviews: Sequence[Review], replace: bool, skip: bool) -> Load:
    """Decide on each directory, root by root, in index order. skip: leave out untouched directories."""
    items, decisions = read_items(path), history.read_decisions(history_path)
    records = {index: item for index, item in enumerate(items) if is_record(item)}
    last = _last_load(decisions, path.name)
    interrupted = last if _is_interrupted(records.values(), last) else []
    load = Load(items, [event for event in decisions if event not in interrupted], interrupted)
    load.n_of_other_tools = len(items) - len(records)
    load.root_of = {event["main"]: str(event.get("root")) for event in load.decisions if "kept" in event}
    holders: dict[str, list[int]] = {main: [] for review in reviews for main in review.samples}  # -> records: in "pos"
    for index, record in records.items():
        for main in holders.keys() & record["pos"]:
            holders[main].append(index)
    done: set[str] = set()
    for review in reviews:
        for folder in review.dirs:
            own = _find_record(items, holders[folder.main], folder)
            if own is not None:
                _compare(load, folder, own, replace and folder.main not in done, skip)
            elif skip and folder.is_untouched:
                load.untouched.append(folder)
            else:
                _add(load, folder, holders)
            done.add(folder.main)
        for folder in review.discarded:
            is_recorded = any(items[index]["pos"][0] == folder.main for index in holders[folder.main])
            (load.gone if is_recorded else load.discarded).append(folder)
    kept = {folder.main for folder in load.loaded}  # discarded in one root, kept in another
    load.gone += [folder for folder in load.discarded if folder.main in kept]
    load.discarded = [folder for folder in load.discarded if folder.main not in kept]
    known = history.discarded(load.decisions)
    load.revived = [folder for folder in load.loaded if folder.main in known]
    return load


def _find_record(items: Sequence[Any], indexes: Sequence[int], folder: ReviewedDir) -> int | None:
    """Index of the record that starts with the main image or has exactly the images of samples.json."""
    samples = set(folder.review.samples[folder.main])
    for index in indexes:
        if items[index]["pos"][0] == folder.main or {*items[index]["pos"], *items[index]["neg"]} == samples:
            return index
    return None


def _add(load: Load, folder: ReviewedDir, holders: dict[str, list[int]]) -> None:
    if holders[folder.main]:
        load.other_main.append(folder)
    for main in holders.keys() & folder.kept:
        holders[main].append(len(load.items))
    load.items.append({"pos": folder.kept, "neg": folder.deleted})
    load.loaded.append(folder)
    load.root_of[folder.main] = folder.review.name


def _compare(load: Load, folder: ReviewedDir, index: int, replace: bool, skip: bool) -> None:
    folder.before = record = load.items[index]
    is_equal = (set(folder.kept), set(folder.deleted)) == (set(record["pos"]), set(record["neg"]))
    if is_equal:
        load.already.append(folder)
    elif replace and not (skip and folder.is_untouched):
        load.replaced.append(folder)
        load.items[index] = {**record, "pos": folder.kept, "neg": folder.deleted}
        load.root_of[folder.main] = folder.review.name
        return
    else:
        load.different.append(folder)
    root = load.root_of.get(folder.main, "")
    if root != folder.review.name and (root or not is_equal):  # without a history, any change may be one
        load.second_looks.append(folder)


def save(path: Path, history_path: str, load: Load) -> None:
    """Append the load to the history, then replace the annotated data. Writes nothing if nothing is new."""
    base = {"time": history.now(), "load": secrets.token_hex(6), "records": path.name}
    events = [*_undoing(load.interrupted), *({**event, **base} for event in _events(load))]
    history.append(history_path, events)
    if load.recorded:
        write_items(path, load.items)


def _events(load: Load) -> Iterator[Event]:
    for folder in load.recorded:
        replaced = {"replaced": folder.before} if folder.before["pos"] else {}
        yield {**_subject(folder), "kept": folder.kept, "deleted": folder.deleted, **replaced}
    known = history.discarded(load.decisions)
    for folder in load.discarded:
        if folder.main not in known:
            yield {**_subject(folder), "discarded": True}
    looks = [event for event in load.decisions if "second_look" in event]
    noted = {(event.get("root"), event["main"]): event["second_look"] for event in looks}  # the last one of each
    for folder in load.second_looks:
        event = second_look(folder)
        if folder.main in load.root_of and noted.get((event["root"], event["main"])) != event["second_look"]:
            yield event


def second_look(folder: ReviewedDir) -> Event:
    look = {"kept": folder.kept, "deleted": folder.deleted}
    record = {"pos": folder.before["pos"], "neg": folder.before["neg"]}
    return {**_subject(folder), "second_look": look, "record": record}


def _subject(folder: ReviewedDir) -> Event:
    return {"root": folder.review.name, "main": folder.main, "dir": folder.name}


# --- undo -------------------------------------------------------------------------------------------------------------
@dataclass
class Undone:
    """The result of undoing a load."""

    items: list[Any]
    n_removed: int = 0
    n_restored: int = 0
    n_discards: int = 0
    n_second_looks: int = 0
    n_edited: int = 0  # records that were edited after the load, and stay


def undo(path: Path, history_path: str) -> Undone:
    """Undo the last load by its events in the history, else restore .bak. Raises UserError if there is neither."""
    items = read_items(path)
    events = _last_load(history.read_decisions(history_path), path.name)
    backup = read_items(backup_path(path)) if path.exists() and backup_path(path).exists() else None
    undone = _without(items, events)
    is_later = backup is not None and _without(backup, events).items != backup  # the last load is not in the history
    if is_later or not events:
        if backup is None:
            raise UserError(f"nothing to undo: no load in the history, and {backup_path(path)} does not exist")
        before, had = set(map(_text, backup)), {item["pos"][0] for item in backup if is_record(item)}
        events = [{"main": item["pos"][0]} for item in items if is_record(item) and _text(item) not in before]
        n_restored = sum(event["main"] in had for event in events)
        undone = Undone(backup, len(events) - n_restored, n_restored)
    if undone.items != items:
        put_back(path, undone.items)
    history.append(history_path, _undoing(events))
    return undone


def _last_load(decisions: Sequence[Event], name: str) -> list[Event]:
    """The events of the last load of this annotated data; [] if an earlier version wrote them, without "load"."""
    for event in reversed(decisions):
        if event.get("load") and event.get("records") == name:
            return [other for other in decisions if other.get("load") == event["load"]]
        if not event.get("load") and ("kept" in event or "discarded" in event):
            break
    return []


def _without(items: Sequence[Any], events: Sequence[Event]) -> Undone:
    """Undo the events of one load."""
    undone = Undone([])
    left: dict[int, Any] = dict(enumerate(items))
    places: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        places.setdefault(_text(item), []).append(index)
    for event in reversed(events):
        undone.n_discards += bool(event.get("discarded"))
        undone.n_second_looks += "second_look" in event
        if "kept" not in event:
            continue
        old = event.get("replaced")
        found = places.get(_text({**(old or {}), "pos": event["kept"], "neg": event["deleted"]}))
        if not found:
            undone.n_edited += 1
        elif old:
            left[found.pop()] = old
            undone.n_restored += 1
        else:
            del left[found.pop()]
            undone.n_removed += 1
    undone.items = list(left.values())
    return undone


def _is_interrupted(records: Collection[Record], events: Sequence[Event]) -> bool:
    """Whether none of the load's records is in the annotated data, neither unchanged nor edited."""
    made = [event for event in events if "kept" in event]
    mains = {record["pos"][0] for record in records}
    old = set(map(_text, records)) if any("replaced" in event for event in made) else set()
    is_old = [_text(event["replaced"]) in old if "replaced" in event else event["main"] not in mains for event in made]
    return bool(made) and all(is_old)


def _text(item: Any) -> str:
    return repr(sorted(item.items())) if isinstance(item, dict) else repr(item)


def _undoing(events: Sequence[Event]) -> Iterator[Event]:
    for event in events:
        undoing: Event = {"root": None, "main": event["main"], "undone": True, "time": history.now()}
        yield undoing | {key: event[key] for key in ("load", "records") if key in event}
