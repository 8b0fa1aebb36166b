"""A Ray actor of embed.py: it embeds blocks of the list with the fetcher and the encoder of the local run."""

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
from utils.embedding.run import NOT_ENCODED, Plan, batches, encode, load, prepare
from utils.errors import ImageError

CALLS = 2  # blocks per actor at once: while one waits for its slowest download, the other keeps the model busy
MAX_ROWS = 1 << 32  # limit for the rows of a block


class Row(NamedTuple):
    """An image to embed. The caller chooses `key`; `metadata` is JSON that is returned unchanged."""

    key: int
    id: str
    url: str
    metadata: str


class Embedder:
    """Embeds blocks, which are pyarrow tables with the columns of Row. CALLS threads may call it at once.

    It uses `n_cpus` cores. Relative paths are relative to `folder`.
    """

    def __init__(self, plan: Plan, n_cpus: int, folder: str) -> None:
        with contextlib.suppress(OSError):  # it may not exist on another machine
            os.chdir(folder)
        vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's script, which each spawned worker would run again
        self._encoder = load(plan)
        self._plan, self._n_cpus = plan, n_cpus
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._fetcher: Fetcher | None = None
        self._jobs = queue.SimpleQueue[Job]()
        self._calls, self._inboxes = itertools.count(), dict[int, Any]()
        self._streams = ThreadPoolExecutor(self._encoder.streams, initializer=self._encoder.take_share)
        self._settings = FetchSettings(plan.limits, plan.max_pixels, *plan.cache, self._encoder.preprocess)

    def __call__(self, table: Any) -> Any:
        """Return the block with new columns: digest, vector, reason, detail and, only in its first row, facts."""
        import pyarrow

        columns = table.to_pydict()
        n = len(columns["key"])
        columns |= {"digest": [0] * n, "vector": [b""] * n, "reason": [""] * n, "detail": [""] * n, "facts": [""] * n}

        def fail(job: Job, error: ImageError) -> None:
            columns["reason"][job.key], columns["detail"][job.key] = error.reason, error.detail

        with self._preparing:
            results = prepare(self._encoder, self._fetch(columns))
        fetched = batches(results, self._plan.batch_size, fail)
        encoding = [(batch, self._streams.submit(encode, self._encoder, batch)) for batch in fetched]
        for batch, encoded in encoding:
            for result, vector in zip(batch, encoded.result()):
                row = result.job.key
                if np.isfinite(vector).all():
                    columns["vector"][row], columns["digest"][row] = vector.tobytes(), result.digest
                else:
                    fail(result.job, NOT_ENCODED)
        if self._encoder.dimension:
            columns["facts"][0] = json.dumps(self._encoder.facts())
        return pyarrow.table(columns)

    def _fetch(self, columns: dict[str, list[Any]]) -> Iterator[Result]:
        """Fetch the rows of a block. All blocks share one fetcher, because its processes take a second to start."""
        n, inbox = len(columns["id"]), queue.SimpleQueue[Result | BaseException]()
        with self._lock:
            call = next(self._calls)
            self._inboxes[call] = inbox
            for job in map(Job, itertools.count(call * MAX_ROWS), columns["id"], columns["url"]):
                self._jobs.put(job)
            if self._fetcher is None:
                self._fetcher = self._make_fetcher()
                threading.Thread(target=self._distribute, args=(self._fetcher,), daemon=True).start()
            self._fetcher.wake()
        try:
            for _ in range(n):
                result = inbox.get()
                if isinstance(result, BaseException):
                    raise result
                yield result._replace(job=result.job._replace(key=result.job.key % MAX_ROWS))
        finally:
            del self._inboxes[call]

    def _make_fetcher(self) -> Fetcher:
        """Results are taken at once and never exceed the rows of CALLS blocks, so their number needs no limit."""
        plan = self._plan
        jobs = iter(self._next_job, "never")
        return Fetcher(jobs, self._settings, plan.n_threads, plan.per_host, MAX_ROWS, n_cpus=self._n_cpus)

    def _next_job(self) -> Job | None:
        with contextlib.suppress(queue.Empty):
            return self._jobs.get_nowait()
        return None

    def _distribute(self, fetcher: Fetcher) -> None:
        """Pass each result to the call that waits for it, until this process ends."""
        try:
            with fetcher:
                for result in fetcher:
                    if inbox := self._inboxes.get(result.job.key // MAX_ROWS):
                        inbox.put(result)
        except BaseException as error:  # all waiting calls raise it; the next call gets a new fetcher
            with self._lock:
                self._fetcher, self._jobs = None, queue.SimpleQueue()
                for inbox in list(self._inboxes.values()):
                    inbox.put(error)
