"""Embed the rest of a list in this process: download, decode, encode and store, side by side."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from utils.embedding.fetch_worker import FetchSettings, Job
from utils.embedding.fetcher import Fetcher, Result
from utils.errors import ImageError
from utils.ids import from_ids
from utils.items.formatted import to_metadata
from utils.items.worklist import FAILED, STORED, TODO, Worklist
from utils.log import bar
from utils.store.store import Store
from utils.web.download import DownloadLimits

READY_BATCHES = 4  # fetched before the model takes them: the model never waits, and each needs 5 MB at 224 pixels
NOT_ENCODED = ImageError("model", "the forward pass gives no numbers")


class Plan(NamedTuple):
    """Settings shared by the local and the Ray run.

    `checked` is the precision that the collection's model is known to be accurate in, "" before its first batch.
    """

    model: tuple[str, str, str, str]  # name, pretrained, device, precision
    checked: str
    limits: DownloadLimits
    max_pixels: int
    cache: tuple[str, int]  # folder, maximum bytes
    n_threads: int
    per_host: int
    batch_size: int


def embed_todo(work: Worklist, store: Store, identity: dict[str, str], plan: Plan) -> None:
    """Embed and store all items of `work` that are still to do. Raises UserError."""
    from utils.embedding import encoder

    model = encoder.load(*plan.model, plan.checked)
    settings = FetchSettings(plan.limits, plan.max_pixels, model.preprocess, *plan.cache)
    n_ready = READY_BATCHES * plan.batch_size
    with (
        bar(work.count(TODO), f"embed on {model.device}", "image") as progress,
        Keeper(work, store, progress) as keeper,
        Fetcher(keeper.jobs(), settings, plan.n_threads, plan.per_host, n_ready) as fetcher,
        ThreadPoolExecutor(model.streams, initializer=model.take_share) as streams,
    ):
        encoding: collections.deque[tuple[list[Result], Future[np.ndarray]]] = collections.deque()
        try:
            for batch in batches(fetcher, plan.batch_size, keeper.fail):
                encoding.append((batch, streams.submit(encode, model, plan, batch)))
                if "dimension" not in store.model:
                    encoding[-1][1].result()  # after it, dimension and precision are known
                    if model.dimension:
                        store.remember_model({**identity, **facts(model)})
                if len(encoding) > model.streams:
                    keeper.keep(*encoding.popleft())
        finally:  # also when the run is stopped
            while encoding:
                keeper.keep(*encoding.popleft())
            keeper.wait()


def batches(results: Iterable[Result], size: int, fail: Callable[[Job, ImageError], None]) -> Iterator[list[Result]]:
    """Fetched images, `size` at a time; failures go to `fail`."""
    batch = []
    for result in results:
        if result.error is None:
            batch.append(result)
        else:
            fail(result.job, result.error)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def encode(encoder: Any, plan: Plan, batch: list[Result]) -> np.ndarray:
    """(B, D) float32 vectors of a batch, NaN where the model fails; a run's first batch checks the precision.

    Raises UserError if the chosen precision is not accurate enough, and if the model fails on every image.
    """
    pixels = np.stack([result.pixels for result in batch])
    encoder.check_precision(pixels, may_fall_back=plan.model[-1] == "auto")
    return encoder.encode_each(pixels)


def facts(encoder: Any) -> dict[str, Any]:
    """The model facts stored with a collection; the dimension is known after the first batch."""
    preprocess = json.dumps(asdict(encoder.preprocess))
    return {"dimension": encoder.dimension, "precision": encoder.precision, "preprocess": preprocess}


class Keeper:
    """Stores encoded batches in a thread of its own, and notes each image's outcome. A context."""

    def __init__(self, work: Worklist, store: Store, progress: Any) -> None:
        self._work, self._store, self._progress = work, store, progress
        self._metadata: dict[int, dict[str, Any]] = {}  # of the images in flight
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_error: object) -> None:
        self._writer.shutdown()  # waits, so that the store is closed between writes

    def jobs(self) -> Iterator[Job]:
        for index, item in self._work.todo():
            self._metadata[index] = to_metadata(item)
            yield Job(index, from_ids(self._work.ids[index : index + 1])[0], item["url"])

    def keep(self, batch: list[Result], encoded: Future[np.ndarray]) -> None:
        """Store a batch, once it is encoded and the batch before it is stored."""
        vectors = encoded.result()
        is_good = np.isfinite(vectors).all(axis=1)
        for result in itertools.compress(batch, ~is_good):
            self.fail(result.job, NOT_ENCODED)
        indexes = [result.job.key for result in itertools.compress(batch, is_good)]
        self.wait()
        if indexes:
            self._written = self._writer.submit(self._write, indexes, vectors[is_good])
        self._progress.set_postfix(
            stored=self._work.count(STORED) + len(indexes), failed=self._work.count(FAILED), refresh=False
        )
        self._progress.update(len(indexes))

    def wait(self) -> None:
        """Wait until all kept batches are on the disk. Raises the writer's error."""
        if self._written:
            self._written.result()

    def fail(self, job: Job, error: ImageError) -> None:
        self._metadata.pop(job.key, None)
        self._work.fail(job.key, job.url, error)
        self._progress.update()

    def _write(self, indexes: list[int], vectors: np.ndarray) -> None:
        self._store.append(self._work.ids[indexes], [self._metadata.pop(index) for index in indexes], vectors)
        for index in indexes:
            self._work.store(index)
