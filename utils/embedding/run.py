"""The work of embed.py in this process: downloading, decoding, encoding and storing go on side by side."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from utils.embedding.fetch_worker import FetchSettings, Job
from utils.embedding.fetcher import Fetcher, Result
from utils.embedding.plan import NO_NUMBERS, Plan, encode, facts
from utils.errors import ImageError
from utils.ids import from_ids
from utils.items.formatted import to_metadata
from utils.items.worklist import FAILED, STORED, TODO, Worklist
from utils.log import bar
from utils.store.store import Store

READY_BATCHES = 4  # fetched before the model has taken them: enough to never wait, 5 MB each at 224 pixels


def embed_todo(work: Worklist, store: Store, identity: dict[str, str], plan: Plan) -> None:
    """Embed what `work` has still to do, and store it. Raises UserError."""
    from utils.embedding import encoder

    model = encoder.load(*plan.model, plan.settled)
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
            for batch in keeper.batches(fetcher, plan.batch_size):
                encoding.append((batch, streams.submit(encode, model, plan, batch)))
                if "dimension" not in store.model:
                    encoding[-1][1].result()  # shows the dimension, and which precision the model bears
                    if model.dimension:
                        store.remember_model({**identity, **facts(model)})
                if len(encoding) > model.streams:
                    keeper.keep(*encoding.popleft())
        finally:  # what is in the model is kept, also when the run is stopped
            while encoding:
                keeper.keep(*encoding.popleft())
            keeper.wait()


class Keeper:
    """Brings every image to its outcome; a batch is written while the model works on the next ones. A context."""

    def __init__(self, work: Worklist, store: Store, progress: Any) -> None:
        self._work, self._store, self._progress = work, store, progress
        self._metadata: dict[int, dict[str, Any]] = {}  # of what is in flight
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_error: object) -> None:
        self._writer.shutdown()  # nothing is half written when the store is closed

    def jobs(self) -> Iterator[Job]:
        for index, item in self._work.todo():
            self._metadata[index] = to_metadata(item)
            yield Job(index, from_ids(self._work.ids[index : index + 1])[0], item["url"])

    def batches(self, results: Iterable[Result], size: int) -> Iterator[list[Result]]:
        """What was fetched, `size` images at a time; failures get their outcome on the way."""
        batch = []
        for result in results:
            if result.error is None:
                batch.append(result)
            else:
                self._fail(result.job, result.error)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def keep(self, batch: list[Result], encoded: Future[np.ndarray]) -> None:
        """Have a batch stored, less the images that the model fails on. Waits for it, and until the one before is."""
        vectors = encoded.result()
        is_good = np.isfinite(vectors).all(axis=1)
        for result in itertools.compress(batch, ~is_good):
            self._fail(result.job, ImageError("model", NO_NUMBERS))
        indexes = [result.job.key for result in itertools.compress(batch, is_good)]
        self.wait()
        if indexes:
            self._written = self._writer.submit(self._write, indexes, vectors[is_good])
        self._progress.set_postfix(
            stored=self._work.count(STORED) + len(indexes), failed=self._work.count(FAILED), refresh=False
        )
        self._progress.update(len(indexes))

    def wait(self) -> None:
        """Until everything that was kept is on the disk. Raises what came in the way."""
        if self._written:
            self._written.result()

    def _write(self, indexes: list[int], vectors: np.ndarray) -> None:
        self._store.append(self._work.ids[indexes], [self._metadata.pop(index) for index in indexes], vectors)
        for index in indexes:
            self._work.store(index)

    def _fail(self, job: Job, error: ImageError) -> None:
        self._metadata.pop(job.key, None)
        self._work.fail(job.key, job.url, error)
        self._progress.update()
