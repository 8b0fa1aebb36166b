"""The items of the input list and the one outcome of each."""

from __future__ import annotations

import array
import collections
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import REASONS, ImageError, UserError, is_temporary
from utils.files import read_json, replacing
from utils.items.sources import Source
from utils.log import LOG, counted

# Outcomes. TODO: not reached yet. KNOWN: stored before this run. LASTING: failed before, and not tried again.
TODO, STORED, KNOWN, DUPLICATE, FAILED, LASTING = range(6)
SAVE_EVERY_S = 60  # between two writes of the failures file, if it has grown by a tenth
_NO_ID = b"\0" * 16


class Worklist:
    """All items of `source`: `ids` (N,) V16 and `outcome` (N,) uint8.

    If several items have the same id, the first counts and the others are duplicates; duplicates with other fields are
    logged. Memory: 33 bytes per item, plus the failures. The items themselves would take 6 GB for ten million, so the
    list is read again where they are needed, and each item is checked for changes. Raises UserError for an unusable
    list.
    """

    def __init__(self, source: Source, failed_path: Path) -> None:
        self.source, self.failed_path = source, failed_path
        self.failures: dict[int, dict[str, Any]] = {}  # index -> entry of the failures file
        self.n_differing = 0  # duplicates whose fields differ from the first item's
        ids, self._hashes = bytearray(), array.array("q")
        for index, item in enumerate(source.read()):
            try:
                ids += source.identify(item).bytes
            except ImageError as error:
                ids += _NO_ID
                self._add_failure(index, _url(item), error)
            self._hashes.append(_hash(item))
        self.ids = np.frombuffer(bytes(ids), "V16")
        LOG.info("%s: %s, %s", source.path, source.format, counted(len(self.ids), "item"))
        self.outcome = np.full(len(self.ids), TODO, np.uint8)
        self.outcome[list(self.failures)] = FAILED
        self._digests = np.zeros(len(self.ids), np.int64)
        self._find_duplicates()
        self._saved_at, self._n_saved = time.monotonic(), 0
        self._before = self._read_failures()

    def __len__(self) -> int:
        return len(self.ids)

    def settle(self, known: np.ndarray, retry_failed: bool, allow_local: bool, respect_noai: bool) -> None:
        """Set the outcome of items that need no work: items with an id in `known` (n,) V16, and permanent failures.

        A failure of an earlier run is retried if it is temporary, if a setting now allows it, or if `retry_failed`.
        """
        allowed = {"blocked_address": allow_local, "opted_out": not respect_noai}
        allowed["bad_url: no scheme"] = allow_local  # it may be a path
        self.outcome[(self.outcome == TODO) & np.isin(self.ids, known)] = KNOWN
        if not self._before:
            return
        for index, item in self.todo():
            entry = self._before.get(item["url"])
            if entry is not None:
                self.failures[index] = {**entry, "index": index}  # stays if this run does not reach the item
                reason, detail = entry["reason"], entry["detail"]
                is_allowed = allowed.get(reason) or allowed.get(f"{reason}: {detail}")
                if not (retry_failed or is_temporary(reason, detail) or is_allowed):
                    self.outcome[index] = LASTING
        self._before = {}

    def todo(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, item) of each remaining item. Raises UserError if the list was rewritten."""
        if (self.outcome == TODO).any():
            yield from self._read_again(lambda index: bool(self.outcome[index] == TODO))

    def firsts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, item) of each usable item except duplicates. Raises UserError if the list was rewritten."""
        yield from self._read_again(
            lambda index: bool(self.outcome[index] != DUPLICATE) and self.ids[index].tobytes() != _NO_ID
        )

    def _read_again(self, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        n = 0
        for index, item in enumerate(self.source.read()):
            if index == len(self):
                LOG.warning("%s grew during this run; run again to embed its new items", self.source.path)
                return
            if is_wanted(index):
                if _hash(item) != self._hashes[index]:
                    break
                yield index, item
            n += 1
        if n < len(self):
            raise UserError(f"list {self.source.path} was rewritten during this run, from item {n} on; run again")

    def store(self, index: int, digest: int = 0) -> None:
        """Note an item as stored; `digest` is a hash of its image's bytes, 0 if unknown."""
        self.outcome[index] = STORED
        self._digests[index] = digest
        self.failures.pop(index, None)

    def fail(self, index: int, url: str, error: ImageError) -> None:
        self.outcome[index] = FAILED
        self._add_failure(index, url, error)
        is_time = time.monotonic() - self._saved_at > SAVE_EVERY_S
        if is_time and len(self.failures) > 1.1 * self._n_saved:
            self.save()

    def save(self) -> None:
        """Write the failures file: every item that was not embedded, with the reason, in the order of the list."""
        entries = [entry for _, entry in sorted(self.failures.copy().items())]  # store() runs in another thread
        with replacing(self.failed_path) as file:
            file.write("[")
            for number, entry in enumerate(entries):
                file.write((",\n " if number else "\n ") + json.dumps(entry))
            file.write("\n]\n" if entries else "]\n")
        self._saved_at, self._n_saved = time.monotonic(), len(entries)

    def count(self, *outcomes: int) -> int:
        """The number of items with one of these outcomes."""
        return int(np.isin(self.outcome, outcomes).sum())

    def reasons(self) -> list[tuple[str, int]]:
        """(reason, number of failed items), most frequent first."""
        failed = np.isin(self.outcome, (FAILED, LASTING))
        counts = collections.Counter(e["reason"] for i, e in self.failures.items() if failed[i])
        return sorted(counts.items(), key=lambda reason: (-reason[1], reason[0]))

    def identical(self) -> tuple[int, int, str]:
        """Count the images of this run that are byte-identical to another image of this run.

        Returns their number, the number of copies of the most frequent image, and its first URL. Reads the list up to
        this URL.
        """
        stored = np.flatnonzero((self.outcome == STORED) & (self._digests != 0))
        _, first, counts = np.unique(self._digests[stored], return_index=True, return_counts=True)
        if not (counts > 1).any():
            return 0, 0, ""
        most = int(counts.argmax())
        wanted, url = int(stored[first[most]]), "a URL that is no longer in the list"
        with contextlib.suppress(UserError):
            url = next(item["url"] for _, item in self._read_again(lambda index: index == wanted))
        return int(counts[counts > 1].sum()), int(counts[most]), url

    def _add_failure(self, index: int, url: str | None, error: ImageError) -> None:
        self.failures[index] = {"index": index, "url": url, "reason": error.reason, "detail": error.detail}
        LOG.debug("%d %s: %s", index, url, error)

    def _find_duplicates(self) -> None:
        usable = np.flatnonzero(self.outcome == TODO)
        _, first, inverse = np.unique(self.ids[usable].view("S16"), return_index=True, return_inverse=True)
        first_of = usable[first[inverse]]
        again = usable != first_of
        self.outcome[usable[again]] = DUPLICATE
        for index, first_index in zip(usable[again].tolist(), first_of[again].tolist()):
            if self._hashes[index] != self._hashes[first_index]:
                LOG.debug("item %d has the id of item %d but other fields; the first counts", index, first_index)
                self.n_differing += 1
        if self.n_differing:
            LOG.info(
                "duplicates with other fields than the first item with their id: %d (in the log)", self.n_differing
            )

    def _read_failures(self) -> dict[str, dict[str, Any]]:
        """url -> entry of an earlier run. Bad records are left out, because every run finds them again."""
        if not self.failed_path.exists():
            return {}
        fields = {"index": int, "url": str | None, "reason": str, "detail": str}
        form = '[{"index": 0, "url": "https://...", "reason": "timeout", "detail": ""}, ...], as embed.py writes it'
        before = {}
        entries = read_json(self.failed_path, "failures file")
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict) or not all(isinstance(entry.get(k), t) for k, t in fields.items()):
                raise UserError(f"failures file {self.failed_path} has the wrong format; it must be {form}")
            if entry["url"] is not None and entry["reason"] in REASONS - {"bad_record"}:
                before[entry["url"]] = entry
        return before


def _hash(item: Any) -> int:
    """A hash that is equal for equal items within this process."""
    return hash(json.dumps(item, sort_keys=True, default=str))  # str for an ImageError


def _url(item: Any) -> str | None:
    url = item.get("url") if isinstance(item, dict) else None
    return url if isinstance(url, str) else None
