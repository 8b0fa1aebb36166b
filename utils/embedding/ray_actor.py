"""What a Ray actor of embed.py does: the single process's fetcher and encoder, for a block of the list at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from utils.embedding.fetch_worker import FetchSettings, Job
from utils.embedding.fetcher import Fetcher, Result
from utils.embedding.plan import NO_NUMBERS, Plan, encode, facts

CALLS = 2  # blocks in an actor's hands: while one waits for its slowest download, the other keeps the model busy
MAX_ROWS = 1 << 32  # of a block


class Row(NamedTuple):
    """An image to embed: `key` is the caller's, `metadata` JSON that comes back as it went."""

    key: int
    id: str
    url: str
    metadata: str


class Embedder:
    """The single process's fetcher and encoder, for a block at a time; several threads may call it.

    It has `n_cpus` cores, and relative paths are relative to `folder`.
    """

    def __init__(self, plan: Plan, n_cpus: int, folder: str) -> None:
        from utils.embedding import encoder

        with contextlib.suppress(OSError):  # on another machine there may be no such folder
            os.chdir(folder)
        vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's own, which each spawned worker would run again
        self._encoder = encoder.load(*plan.model, plan.settled)
        self._plan, self._n_cpus, self._lock = plan, n_cpus, threading.Lock()
        self._fetcher: Fetcher | None = None
        self._calls, self._inboxes = itertools.count(), dict[int, Any]()
        self._streams = ThreadPoolExecutor(self._encoder.streams, initializer=self._encoder.take_share)
        self._settings = FetchSettings(plan.limits, plan.max_pixels, self._encoder.preprocess, *plan.cache)

    def __call__(self, table: Any) -> Any:
        import pyarrow

        columns = table.to_pydict()
        n = len(columns["key"])
        columns |= {"vector": [b""] * n, "reason": [""] * n, "detail": [""] * n, "facts": [""] * n}
        encoding, batch = [], list[Result]()
        for result in self._fetch(columns):
            if result.error:
                columns["reason"][result.job.key] = result.error.reason
                columns["detail"][result.job.key] = result.error.detail
            else:
                batch.append(result)
            if len(batch) == self._plan.batch_size:
                encoding.append(self._streams.submit(self._encode, batch))
                batch = []
        if batch:
            encoding.append(self._streams.submit(self._encode, batch))
        for done in encoding:
            for key, vector in done.result():
                if np.isfinite(vector).all():
                    columns["vector"][key] = vector.tobytes()
                else:
                    columns["reason"][key] = "model"
                    columns["detail"][key] = NO_NUMBERS
        if self._encoder.dimension:
            columns["facts"][0] = json.dumps(facts(self._encoder))
        return pyarrow.table(columns)

    def _fetch(self, columns: dict[str, list[Any]]) -> Iterator[Result]:
        """The rows of one block, through the one fetcher: its processes take a second to start."""
        n, mine = len(columns["id"]), queue.SimpleQueue[Result | BaseException]()
        with self._lock:
            call = next(self._calls)
            self._inboxes[call] = mine
            if self._fetcher is None:
                self._fetcher = self._make_fetcher()
                threading.Thread(target=self._sort, args=(self._fetcher,), daemon=True).start()
            jobs = zip(itertools.count(call * MAX_ROWS), columns["id"], columns["url"])
            self._fetcher.add(itertools.starmap(Job, jobs))
        try:
            for _ in range(n):
                result = mine.get()
                if isinstance(result, BaseException):
                    raise result
                yield result._replace(job=result.job._replace(key=result.job.key % MAX_ROWS))
        finally:
            del self._inboxes[call]

    def _make_fetcher(self) -> Fetcher:
        """Its results are taken at once, and are as many as the rows of CALLS blocks at most."""
        plan = self._plan
        return Fetcher(
            (), self._settings, plan.n_threads, plan.per_host, MAX_ROWS, n_cpus=self._n_cpus, stays_open=True
        )

    def _sort(self, fetcher: Fetcher) -> None:
        """Hand each result to the call that waits for it, until this process ends."""
        try:
            with fetcher:
                for result in fetcher:
                    if inbox := self._inboxes.get(result.job.key // MAX_ROWS):
                        inbox.put(result)
        except BaseException as error:  # for all who wait; who comes next gets another fetcher
            with self._lock:
                self._fetcher = None
                for inbox in list(self._inboxes.values()):
                    inbox.put(error)

    def _encode(self, batch: list[Result]) -> list[tuple[int, np.ndarray]]:
        """(row, vector) of each image of a batch; NaN where the model fails."""
        vectors = encode(self._encoder, self._plan, batch)
        return [(result.job.key, vector) for result, vector in zip(batch, vectors)]
