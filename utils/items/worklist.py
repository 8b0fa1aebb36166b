"""The items of the formatted data, each on its way to exactly one outcome."""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import REASONS, ImageError, UserError, can_heal
from utils.files import read_list, replacing
from utils.items.formatted import item_id, read_items
from utils.log import LOG

TODO, STORED, KNOWN, DUPLICATE, FAILED, LASTING = range(6)  # outcomes; TODO is what a run has not reached
SAVE_EVERY_S = 60  # failures reach the disk at least this often, if they are a tenth more
_NO_ID = b"\0" * 16


class Worklist:
    """All items of the list `source`: `ids` (N,) V16 and `outcome` (N,) uint8. Reads the whole list once.

    The first of several items with one id counts, the others are duplicates; those that differ from it in another
    field are logged. Memory: 25 bytes an item, and the failures. Raises UserError if the list is unusable.
    """

    def __init__(self, source: Path, id_field: str, failed_path: Path) -> None:
        self.source, self.id_field, self.failed_path = source, id_field, failed_path
        self.failures: dict[int, dict[str, Any]] = {}  # index -> entry of the failures file
        self.n_differing = 0  # duplicates with other fields than the first
        ids, hashes = bytearray(), []
        for index, item in enumerate(read_items(source)):
            try:
                ids += item_id(item, id_field).bytes
            except ImageError as error:
                ids += _NO_ID
                self._add_failure(index, _url(item), error)
            hashes.append(hash(json.dumps(item, sort_keys=True)))
        self.ids = np.frombuffer(bytes(ids), "V16")
        self.outcome = np.full(len(self.ids), TODO, np.uint8)
        self.outcome[list(self.failures)] = FAILED
        self._find_duplicates(np.array(hashes, np.int64))
        self._saved_at, self._n_saved = time.monotonic(), 0
        self._before = self._read_failures()

    def __len__(self) -> int:
        return len(self.ids)

    def settle(self, known: np.ndarray, retries: Callable[[str, str], bool]) -> None:
        """Give the items that need no work their outcome: those in `known` (n,) V16, and lasting failures.

        `retries` tells of a (reason, detail) of an earlier run whether to try again.
        """
        self.outcome[(self.outcome == TODO) & np.isin(self.ids, known)] = KNOWN
        if not self._before:
            return
        for index, item in self.todo():
            entry = self._before.get(item["url"])
            if entry is not None:
                if entry["index"] != index:
                    entry = {**entry, "index": index}
                self.failures[index] = entry  # kept if this run does not reach it
                if not retries(entry["reason"], entry["detail"]):
                    self.outcome[index] = LASTING
        self._before = {}

    def todo(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, item) of what is still to be done, read again from the list."""
        if (self.outcome == TODO).any():
            for index, item in enumerate(read_items(self.source)):
                if index < len(self) and self.outcome[index] == TODO:
                    yield index, item

    def firsts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, item) of every usable item, without the duplicates."""
        for index, item in enumerate(read_items(self.source)):
            if self.outcome[index] != DUPLICATE and self.ids[index].tobytes() != _NO_ID:
                yield index, item

    def store(self, index: int) -> None:
        self.outcome[index] = STORED
        self.failures.pop(index, None)

    def fail(self, index: int, url: str, error: ImageError) -> None:
        self.outcome[index] = FAILED
        self._add_failure(index, url, error)
        is_time = time.monotonic() - self._saved_at > SAVE_EVERY_S
        if is_time and len(self.failures) > 1.1 * self._n_saved:
            self.save()

    def save(self) -> None:
        """Write the failures file: whatever is not embedded and why, in the list's order."""
        with replacing(self.failed_path) as file:
            lines = (json.dumps(self.failures[index]) for index in sorted(self.failures))
            file.write("[")
            for number, line in enumerate(lines):
                file.write((",\n " if number else "\n ") + line)
            file.write("\n]\n" if self.failures else "]\n")
        self._saved_at, self._n_saved = time.monotonic(), len(self.failures)

    def count(self, *outcomes: int) -> int:
        """How many items have one of these outcomes."""
        return int(np.isin(self.outcome, outcomes).sum())

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, number) of the failures, most frequent first."""
        failed = np.isin(self.outcome, (FAILED, LASTING))
        counts = collections.Counter(e["reason"] for i, e in self.failures.items() if failed[i])
        return sorted(counts.items(), key=lambda reason: (-reason[1], reason[0]))

    def _add_failure(self, index: int, url: str | None, error: ImageError) -> None:
        self.failures[index] = {"index": index, "url": url, "reason": error.reason, "detail": error.detail}
        LOG.debug("%d %s: %s", index, url, error)

    def _find_duplicates(self, hashes: np.ndarray) -> None:
        usable = np.flatnonzero(self.outcome == TODO)
        _, first, inverse = np.unique(self.ids[usable].view("S16"), return_index=True, return_inverse=True)
        first_of = usable[first[inverse]]
        again = usable != first_of
        self.outcome[usable[again]] = DUPLICATE
        for index, first_index in zip(usable[again].tolist(), first_of[again].tolist()):
            if hashes[index] != hashes[first_index]:
                LOG.debug("item %d has the id of item %d and other fields; the first counts", index, first_index)
                self.n_differing += 1
        if self.n_differing:
            LOG.info("%d duplicates differ from the first item of their id; the log file names them", self.n_differing)

    def _read_failures(self) -> dict[str, dict[str, Any]]:
        """url -> the entry that an earlier run wrote for it, but for bad records: each run finds these by itself."""
        if not self.failed_path.exists():
            return {}
        fields = {"index": int, "url": str | None, "reason": str, "detail": str}
        known = REASONS.keys() - {"bad_record"}
        before = {}
        for entry in read_list(self.failed_path, "failures file"):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(k), t) for k, t in fields.items()):
                raise UserError(f"failures file {self.failed_path} is not what embed.py writes; mend or remove it")
            if entry["url"] is not None and entry["reason"] in known:
                before[entry["url"]] = entry
        return before


def retry_rule(retry_failed: bool, allow_local: bool, respect_noai: bool) -> Callable[[str, str], bool]:
    """Which failures of earlier runs are tried again: what can heal, what a setting now allows, or all."""
    allowed = {"blocked_address": allow_local, "opted_out": not respect_noai}
    return lambda reason, detail: retry_failed or can_heal(reason, detail) or allowed.get(reason, False)


def _url(item: Any) -> str | None:
    url = item.get("url") if isinstance(item, dict) else None
    return url if isinstance(url, str) else None
