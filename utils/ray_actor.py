"""What a Ray actor of embed.py does: the single process's fetcher and encoder, for a block of the list at a time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from utils.download import DownloadLimits
from utils.fetch_worker import FetchSettings, Job
from utils.fetcher import Fetcher, Result

CALLS = 2  # blocks in an actor's hands: while one waits for its slowest download, the other keeps the model busy
READY_BATCHES = 4


class Row(NamedTuple):
    """An image to embed: `key` is the caller's, `metadata` JSON that comes back as it went."""

    key: int
    id: str
    url: str
    metadata: str


class Plan(NamedTuple):
    """What an actor needs; `settled` is the precision that the collection is known to bear, "" if none is yet."""

    model: tuple[str, str, str, str]  # name, pretrained, device, precision
    settled: str
    limits: DownloadLimits
    max_pixels: int
    cache: tuple[str, int]
    n_threads: int
    per_host: int
    batch_size: int
    n_cpus: int
    n_gpus: int
    folder: str  # relative paths are relative to it


class Embedder:
    """The single process's fetcher and encoder, for a block at a time; several threads may call it."""

    def __init__(self, plan: Plan) -> None:
        from utils import encoder

        with contextlib.suppress(OSError):  # on another machine there may be no such folder
            os.chdir(plan.folder)
        vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's own, which each spawned worker would run again
        name, pretrained, device, self._precision = plan.model
        self._encoder = encoder.load(name, pretrained, device, self._precision, plan.settled)
        self._plan, self._settling = plan, threading.Lock()
        self._turns = threading.BoundedSemaphore(self._encoder.streams)
        self._settings = FetchSettings(plan.limits, plan.max_pixels, self._encoder.preprocess, *plan.cache)

    def __call__(self, table: Any) -> Any:
        import pyarrow

        columns = table.to_pydict()
        n = len(columns["key"])
        columns |= {"vector": [b""] * n, "reason": [""] * n, "detail": [""] * n, "facts": [""] * n}
        batch: list[Result] = []
        for result in self._fetch(columns):
            if result.error:
                columns["reason"][result.job.key] = result.error.reason
                columns["detail"][result.job.key] = result.error.detail
            else:
                batch.append(result)
            if len(batch) == self._plan.batch_size:
                self._encode(batch, columns)
                batch = []
        if batch:
            self._encode(batch, columns)
        return pyarrow.table(columns)

    def _fetch(self, columns: dict[str, list[Any]]) -> Iterator[Result]:
        jobs = (Job(i, id_, url) for i, (id_, url) in enumerate(zip(columns["id"], columns["url"])))
        plan = self._plan
        n_threads = max(1, plan.n_threads // CALLS)
        with Fetcher(
            jobs, self._settings, n_threads, plan.per_host, READY_BATCHES * plan.batch_size, n_cpus=plan.n_cpus
        ) as fetcher:
            yield from fetcher

    def _encode(self, batch: list[Result], columns: dict[str, list[Any]]) -> None:
        pixels = np.stack([result.pixels for result in batch])
        with self._settling:
            self._encoder.settle_precision(pixels, may_fall_back=self._precision == "auto")
        with self._turns:
            self._encoder.take_share()
            vectors = self._encoder.encode_each(pixels)
        for result, vector in zip(batch, vectors):
            if np.isfinite(vector).all():
                columns["vector"][result.job.key] = vector.tobytes()
            else:
                columns["reason"][result.job.key] = "model"
                columns["detail"][result.job.key] = "the forward pass gives no numbers"
        columns["facts"][0] = json.dumps(facts(self._encoder))


def facts(encoder: Any) -> dict[str, Any]:
    """What a collection remembers of the model besides its identity."""
    preprocess = json.dumps(asdict(encoder.preprocess))
    return {"dimension": encoder.dimension, "precision": encoder.precision, "preprocess": preprocess}
