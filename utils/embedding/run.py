"""Embed the remaining items of a list in this process: download, decode, encode and store, all at the same time."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.embedding.fetch_worker import FetchSettings, Job
from utils.embedding.fetcher import Fetcher, Result
from utils.embedding.weights import Model
from utils.errors import ImageError
from utils.ids import from_ids
from utils.items.formatted import to_metadata
from utils.items.worklist import FAILED, STORED, TODO, Worklist
from utils.log import bar
from utils.store.store import Store
from utils.web.download import DownloadLimits

if TYPE_CHECKING:
    from utils.embedding.encoder import Encoder

READY_BATCHES = 4  # fetched ahead, so that the model never waits; each needs 5 MB at 224 pixels
NOT_ENCODED = ImageError("model", "the forward pass returns no finite numbers")


class Plan(NamedTuple):
    """Settings shared by the local and the Ray run. `known` are the model facts stored with the collection."""

    model: tuple[str, str, str, str]  # name, pretrained, device, precision
    known: dict[str, Any]
    limits: DownloadLimits
    max_pixels: int
    cache: tuple[str, int]  # folder, maximum bytes
    n_threads: int
    per_host: int
    batch_size: int


def embed_todo(work: Worklist, store: Store, asked: Model, plan: Plan) -> None:
    """Embed and store the remaining items of `work`. Raises UserError.

    While torch is imported and the model loads, downloads begin, the model's files are hashed, and the index process
    starts.
    """
    settings = FetchSettings(plan.limits, plan.max_pixels, *plan.cache)
    n_ready = READY_BATCHES * plan.batch_size
    with (
        bar(work.count(TODO), "embed", "image") as progress,
        Keeper(work, store, progress) as keeper,
        Fetcher(keeper.jobs(), settings, plan.n_threads, plan.per_host, n_ready) as fetcher,
        ThreadPoolExecutor(1) as hashing,
    ):
        store.prepare()
        identity = hashing.submit(lambda: asked.identity)
        model = load(plan)
        progress.set_description(f"embed on {model.device}")
        fetcher.start_decoding(model.preprocess)
        results = prepare(model, iter(fetcher))
        if model.dimension and ("dimension" not in store.model or model.has_chosen):
            store.remember_model({**identity.result(), **model.facts()})
        encode_all(model, batches(results, plan.batch_size, keeper.fail), keeper)


def load(plan: Plan) -> Encoder:
    from utils.embedding import encoder

    return encoder.load(*plan.model, plan.known)


def prepare(model: Encoder, results: Iterator[Result]) -> Iterator[Result]:
    """Choose the model's precision with the first results, which also set its dimension; then return all results."""
    from utils.embedding.encoder import MAX_CHECKED, N_CHECKED

    if model.dimension and not model.has_choice:
        return results
    head, pixels = [], []
    enough = (N_CHECKED, MAX_CHECKED) if model.has_choice else (1,)
    for result in results:
        head.append(result)
        if result.error is None:
            pixels.append(result.pixels)
            if len(pixels) in enough and model.choose_precision(np.stack(pixels), len(pixels) == enough[-1]):
                break
    else:
        if pixels:
            model.choose_precision(np.stack(pixels), is_last=True)
    return itertools.chain(head, results)


def encode_all(model: Encoder, fetched: Iterator[list[Result]], keeper: Keeper) -> None:
    """Encode batches in the model's streams, and pass them to `keeper` in order."""
    encoding: collections.deque[tuple[list[Result], Future[np.ndarray]]] = collections.deque()
    with ThreadPoolExecutor(model.streams, initializer=model.take_share) as streams:
        try:
            for batch in fetched:
                encoding.append((batch, streams.submit(encode, model, batch)))
                if len(encoding) > model.streams:
                    keeper.keep(*encoding.popleft())
        finally:  # also when the run is stopped
            while encoding:
                keeper.keep(*encoding.popleft())
            keeper.wait()


def batches(results: Iterable[Result], size: int, fail: Callable[[Job, ImageError], None]) -> Iterator[list[Result]]:
    """Yield fetched images in batches of `size`; pass failures to `fail`."""
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


def encode(model: Encoder, batch: list[Result]) -> np.ndarray:
    """(B, D) float32 vectors of a batch, NaN where the model fails. Raises UserError if the model no longer works."""
    return model.encode_each(np.stack([result.pixels for result in batch]))


class Keeper:
    """Stores encoded batches in a thread of its own, and notes each image's outcome. A context manager."""

    def __init__(self, work: Worklist, store: Store, progress: Any) -> None:
        self._work, self._store, self._progress = work, store, progress
        self._metadata: dict[int, dict[str, Any]] = {}  # index -> metadata, for images in flight
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_error: object) -> None:
        self._writer.shutdown()  # waits, so that the store is not closed during a write

    def jobs(self) -> Iterator[Job]:
        for index, item in self._work.todo():
            self._metadata[index] = to_metadata(item)
            yield Job(index, from_ids(self._work.ids[index : index + 1])[0], item["url"])

    def keep(self, batch: list[Result], encoded: Future[np.ndarray]) -> None:
        """Wait until a batch is encoded and the batch before it is stored, then start to store it."""
        vectors = encoded.result()
        is_good = np.isfinite(vectors).all(axis=1)
        for result in itertools.compress(batch, ~is_good):
            self.fail(result.job, NOT_ENCODED)
        good = list(itertools.compress(batch, is_good))
        self.wait()
        if good:
            keys = [(result.job.key, result.digest) for result in good]  # without the pixels
            self._written = self._writer.submit(self._write, keys, vectors[is_good])
        self._progress.set_postfix(
            stored=self._work.count(STORED) + len(good), failed=self._work.count(FAILED), refresh=False
        )
        self._progress.update(len(good))

    def wait(self) -> None:
        """Wait until all batches are on the disk. Raises the writer's error."""
        if self._written:
            self._written.result()

    def fail(self, job: Job, error: ImageError) -> None:
        self._metadata.pop(job.key, None)
        self._work.fail(job.key, job.url, error)
        self._progress.update()

    def _write(self, keys: list[tuple[int, int]], vectors: np.ndarray) -> None:
        indexes = [index for index, _ in keys]
        self._store.append(self._work.ids[indexes], [self._metadata.pop(index) for index in indexes], vectors)
        for index, digest in keys:
            self._work.store(index, digest)
