"""One load: what reviewed directories change in the annotated data and the history, and how the last load is undone.

The history is written before the annotated data. If a kill or a full disk comes between, the next load finds events
without their records and takes these back first.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.annotation import history
from utils.annotation.history import Event
from utils.annotation.records import Record, backup_path, is_record, put_back, read_items, write_items
from utils.annotation.reviewed import Review, ReviewedDir
from utils.errors import UserError


class Compared(NamedTuple):
    """A directory whose record was made before."""

    folder: ReviewedDir
    record: Record

    @property
    def is_equal(self) -> bool:
        kept, deleted = set(self.folder.kept), set(self.folder.deleted)
        return (kept, deleted) == (set(self.record["pos"]), set(self.record["neg"]))

    @property
    def verdicts(self) -> Iterator[tuple[str, bool, bool]]:
        """(id, kept in the record, kept in the folder) of each image judged in both; not of the main image."""
        before = dict.fromkeys(self.record["neg"], False) | dict.fromkeys(self.record["pos"], True)
        after = dict.fromkeys(self.folder.deleted, False) | dict.fromkeys(self.folder.kept, True)
        return ((id_, kept, after[id_]) for id_, kept in before.items() if id_ in after and id_ != self.folder.main)


@dataclass
class Load:
    """The annotated data after a load, and the outcome of each directory."""

    items: list[Any]
    decisions: list[Event]  # of earlier loads, in effect
    interrupted: list[Event]  # of a load that never reached the annotated data
    n_foreign: int = 0  # items of other tools
    loaded: list[ReviewedDir] = field(default_factory=list)
    replaced: list[Compared] = field(default_factory=list)
    different: list[Compared] = field(default_factory=list)  # from their records, which stay
    already: list[Compared] = field(default_factory=list)  # equal to their records
    second_looks: list[Compared] = field(default_factory=list)  # at directories recorded from another root
    untouched: list[ReviewedDir] = field(default_factory=list)  # left out on request
    discarded: list[ReviewedDir] = field(default_factory=list)
    gone: list[ReviewedDir] = field(default_factory=list)  # deleted, but recorded before or from another root
    revived: list[str] = field(default_factory=list)  # loaded directories that were discarded before
    other_main: list[str] = field(default_factory=list)  # main image is a positive of another record
    root_of: dict[str, str] = field(default_factory=dict)  # main id -> root in which it was recorded


def plan(path: Path, history_path: Path | None, reviews: Sequence[Review], replace: bool, skip: bool) -> Load:
    """Decide about each directory, root by root, in index order. skip: leave out untouched directories."""
    items, decisions = read_items(path), history.read_decisions(history_path)
    last = _last_load(decisions, path.name)
    interrupted = last if _is_interrupted(items, last) else []
    load = Load(items, [event for event in decisions if event not in interrupted], interrupted)
    load.root_of = {event["main"]: str(event.get("root")) for event in load.decisions if "kept" in event}
    holders: dict[str, list[int]] = {}  # id -> records with it in "pos"
    for index, item in enumerate(items):
        load.n_foreign += not is_record(item)
        for id_ in item["pos"] if is_record(item) else ():
            holders.setdefault(id_, []).append(index)
    done: set[str] = set()
    for review in reviews:
        for folder in review.dirs:
            own = _find_record(items, holders.get(folder.main, []), folder)
            if own is not None:
                _compare(load, folder, own, replace and folder.main not in done, skip)
            elif skip and folder.is_untouched:
                load.untouched.append(folder)
            else:
                _add(load, folder, holders)
            done.add(folder.main)
        for folder in review.discarded:
            is_recorded = any(items[index]["pos"][0] == folder.main for index in holders.get(folder.main, []))
            (load.gone if is_recorded else load.discarded).append(folder)
    kept = {folder.main for folder in load.loaded}  # discarded in one root, kept in another
    load.gone += [folder for folder in load.discarded if folder.main in kept]
    load.discarded = [folder for folder in load.discarded if folder.main not in kept]
    known = history.discarded(load.decisions)
    load.revived = [folder.name for folder in load.loaded if folder.main in known]
    return load


def _find_record(items: Sequence[Any], indexes: Sequence[int], folder: ReviewedDir) -> int | None:
    """The record that starts with the main image or consists of exactly the samples."""
    samples = set(folder.review.samples[folder.main])
    for index in indexes:
        if items[index]["pos"][0] == folder.main or {*items[index]["pos"], *items[index]["neg"]} == samples:
            return index
    return None


def _add(load: Load, folder: ReviewedDir, holders: dict[str, list[int]]) -> None:
    if folder.main in holders:
        load.other_main.append(folder.name)
    for id_ in folder.kept:
        holders.setdefault(id_, []).append(len(load.items))
    load.items.append({"pos": folder.kept, "neg": folder.deleted})
    load.loaded.append(folder)
    load.root_of[folder.main] = folder.review.name


def _compare(load: Load, folder: ReviewedDir, index: int, replace: bool, skip: bool) -> None:
    compared = Compared(folder, load.items[index])
    if compared.is_equal:
        load.already.append(compared)
    elif replace and not (skip and folder.is_untouched):
        load.replaced.append(compared)
        load.items[index] = {**load.items[index], "pos": folder.kept, "neg": folder.deleted}
        load.root_of[folder.main] = folder.review.name
        return
    else:
        load.different.append(compared)
    root = load.root_of.get(folder.main, "")
    if root != folder.review.name and (root or not compared.is_equal):  # without a history any change could be one
        load.second_looks.append(compared)


def save(path: Path, history_path: Path | None, load: Load) -> None:
    """Append the load to the history, then replace the annotated data; nothing if nothing is new."""
    base = {"time": history.now(), "load": secrets.token_hex(6), "records": path.name}
    events = [*_undoing(load.interrupted), *({**event, **base} for event in _events(load))]
    history.append(history_path, events)
    if load.loaded or load.replaced:
        write_items(path, load.items)


def _events(load: Load) -> Iterator[Event]:
    for folder in load.loaded:
        yield {**_subject(folder), "kept": folder.kept, "deleted": folder.deleted}
    for folder, record in load.replaced:
        yield {**_subject(folder), "kept": folder.kept, "deleted": folder.deleted, "replaced": record}
    known = history.discarded(load.decisions)
    for folder in load.discarded:
        if folder.main not in known:
            yield {**_subject(folder), "discarded": True}
    noted = [(event["root"], event["main"], event["second_look"]) for event in load.decisions if "second_look" in event]
    for folder, record in load.second_looks:
        look = {"kept": folder.kept, "deleted": folder.deleted}
        if folder.main in load.root_of and (folder.review.name, folder.main, look) not in noted:
            yield {**_subject(folder), "second_look": look, "record": {"pos": record["pos"], "neg": record["neg"]}}


def _subject(folder: ReviewedDir) -> Event:
    return {"root": folder.review.name, "main": folder.main, "dir": folder.name}


# --- undo -------------------------------------------------------------------------------------------------------------
@dataclass
class Undone:
    """What taking back a load did."""

    items: list[Any]
    mains: list[str] = field(default_factory=list)  # whose records changed, if only .bak tells
    n_removed: int = 0
    n_restored: int = 0
    n_discards: int = 0
    n_second_looks: int = 0
    n_edited: int = 0  # records that are not as the load left them, and stay

    @property
    def n_changed(self) -> int:
        return self.n_removed + self.n_restored


def undo(path: Path, history_path: Path | None) -> Undone:
    """Take back the last load, as the history tells it; else put back .bak. Raises UserError if there is neither."""
    items = read_items(path)
    events = _last_load(history.read_decisions(history_path), path.name)
    backup = read_items(backup_path(path)) if path.exists() and backup_path(path).exists() else None
    if not events or (backup is not None and _without(backup, events).n_changed):  # the last is not in the history
        if backup is None:
            raise UserError(f"nothing to take back: no load in the history, and {backup_path(path)} does not exist")
        undone = _restored(items, backup)
        events = [{"main": main} for main in undone.mains]
    else:
        undone = _without(items, events)
    if undone.items != items:
        put_back(path, undone.items)
    history.append(history_path, _undoing(events))
    return undone


def _last_load(decisions: Sequence[Event], name: str) -> list[Event]:
    """The events of the last load of this annotated data; [] if it is of a version that noted no loads."""
    for event in reversed(decisions):
        if event.get("load") and event.get("records") == name:
            return [other for other in decisions if other.get("load") == event["load"]]
        if not event.get("load") and ("kept" in event or "discarded" in event):
            break
    return []


def _restored(items: Sequence[Any], backup: list[Any]) -> Undone:
    """What it takes to go back to `backup`."""
    before, after = set(map(_text, backup)), set(map(_text, items))
    mains = [item["pos"][0] for item in items if is_record(item) and _text(item) not in before]
    old = {item["pos"][0] for item in backup if is_record(item) and _text(item) not in after}
    n_restored = sum(main in old for main in mains)
    return Undone(backup, mains, n_removed=len(mains) - n_restored, n_restored=n_restored)


def _without(items: Sequence[Any], events: Sequence[Event]) -> Undone:
    undone = Undone(list(items))
    places: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if is_record(item):
            places.setdefault(_text(item), []).append(index)
    removed: set[int] = set()
    for event in reversed(events):
        if "kept" in event:
            old = event.get("replaced")
            found = places.get(_text({**(old or {}), "pos": event["kept"], "neg": event["deleted"]}), [])
            if not found:
                undone.n_edited += 1
            elif old:
                undone.items[found.pop()] = old
                undone.n_restored += 1
            else:
                removed.add(found.pop())
                undone.n_removed += 1
        undone.n_discards += bool(event.get("discarded"))
        undone.n_second_looks += "second_look" in event
    undone.items = [item for index, item in enumerate(undone.items) if index not in removed]
    return undone


def _is_interrupted(items: Sequence[Any], events: Sequence[Event]) -> bool:
    """Whether none of the load's records is there, as it made it or edited."""
    records = [event for event in events if "kept" in event]
    mains = {item["pos"][0] for item in items if is_record(item)}
    old = {_text(item) for item in items}
    is_old = [
        _text(event["replaced"]) in old if "replaced" in event else event["main"] not in mains for event in records
    ]
    return bool(records) and all(is_old)


def _text(item: Any) -> str:
    return repr(sorted(item.items())) if isinstance(item, dict) else repr(item)


def _undoing(events: Sequence[Event]) -> Iterator[Event]:
    for event in events:
        undoing: Event = {"root": None, "main": event["main"], "undone": True, "time": history.now()}
        yield undoing | {key: event[key] for key in ("load", "records") if key in event}
