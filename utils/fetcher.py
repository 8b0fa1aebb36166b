"""Worker processes that turn urls into pixels, so that the model never waits and no image can take the run down.

Why processes: requests costs 3 ms of CPU an image and holds the GIL, which one process with 64 threads shares with
what feeds the model; a decoder that crashes or hangs then costs one image. Each process has many threads that
download, and one image at a time in its decoder, the one it is blamed for if it dies.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from utils import images
from utils.cache import ImageCache
from utils.children import ignore, shielded
from utils.download import DownloadLimits, fetch
from utils.errors import ImageError, UserError
from utils.host_queue import HostQueue
from utils.preprocess import Preprocess, to_pixels
from utils.progress import LOG
from utils.urls import host_of

WINDOW = 16  # jobs a download thread that are looked at to find another host than a slow one's
_NO_PIXELS = np.empty(0, np.uint8)
MAX_STILLBORN = 10  # workers in a row that die without a result: the machine's fault, not an image's
MAX_DEATHS = 2  # of its worker, after which an image that was only in hand is given up, too


class Job(NamedTuple):
    """One image to fetch: `key` is the caller's, `id` a uuid as text."""

    key: int
    id: str
    url: str


class Result(NamedTuple):
    """`pixels` (H, W, 3) uint8, or the `error` for which there are none (they are empty then)."""

    job: Job
    pixels: np.ndarray
    error: ImageError | None


@dataclass(frozen=True)
class FetchSettings:
    """What every worker needs; it is pickled to them."""

    limits: DownloadLimits
    max_pixels: int
    preprocess: Preprocess
    cache_dir: str
    cache_max_bytes: int


def load_pixels(
    job: Job, settings: FetchSettings, cache: ImageCache, decoding: contextlib.AbstractContextManager[None]
) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an image, from the cache or else the web, which then fills the cache.

    `decoding` is a context held while bytes are decoded. Raises ImageError.
    """
    path = cache.find(job.id)
    if path is not None:
        with contextlib.suppress(ImageError, OSError), path.open("rb") as file, decoding:  # damaged: fetch it again
            return _pixels(file, settings)
    with fetch(job.url, settings.limits) as file, decoding:
        pixels = _pixels(file, settings)
        cache.add(job.id, file, images.extension(file))
    return pixels


def _pixels(file: Any, settings: FetchSettings) -> np.ndarray:
    image = images.decode(file, settings.max_pixels, min_side=max(settings.preprocess.size))
    return to_pixels(image, settings.preprocess)


Load = Callable[[Job, FetchSettings, ImageCache, contextlib.AbstractContextManager[None]], np.ndarray]


class Fetcher:
    """Worker processes that work off `jobs`; iterate over it for the results, in the order in which they come.

    Bounded: a thread downloads one body (up to 1 MB of it in memory), and no job is begun while `n_ready` results wait
    to be taken. Use it as a context: leaving it ends the workers. `load` is what a worker does with a job, pickled.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        settings: FetchSettings,
        n_threads: int,
        per_host: int,
        n_ready: int,
        load: Load = load_pixels,
        n_cpus: int = 0,
    ) -> None:
        self._load, self._cache_full = load, ""
        self._n_stillborn = 0  # workers in a row that died before they had done a thing
        self._jobs, self._settings = iter(jobs), settings
        n_workers = max(1, min(n_threads, (n_cpus or os.cpu_count() or 1) - 1))
        self._n_threads, self._n_ready = -(-n_threads // n_workers), n_ready
        self._window = WINDOW * self._n_threads * n_workers
        self._context = multiprocessing.get_context("spawn")
        self._cache_bytes = self._context.Value("q", ImageCache(settings.cache_dir, 0).size()[1])
        self._waiting: HostQueue[Job] = HostQueue(per_host)
        self._deaths: collections.Counter[int] = collections.Counter()
        self._results: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self._stop, self._wake = self._context.Pipe(duplex=False)
        self._workers = [self._start() for _ in range(n_workers)]
        self._thread = threading.Thread(target=self._dispatch, daemon=True)

    def __enter__(self) -> Fetcher:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._wake.send(None)
        self._thread.join()
        for worker in self._workers:
            worker.process.kill()  # it holds nothing that a kill could harm: the cache is written by renames
            worker.process.join()

    def __iter__(self) -> Iterator[Result]:
        while True:
            result = self._results.get()
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        decoding = self._context.Value("q", -1, lock=False)
        process = self._context.Process(
            target=_work,
            args=(theirs, self._load, self._settings, self._n_threads, decoding, self._cache_bytes),
            daemon=True,
        )
        with shielded():
            process.start()
        theirs.close()
        return _Worker(process, ours, decoding, {})

    def _dispatch(self) -> None:
        """In a thread of its own: hand out jobs, collect results, replace workers that died."""
        try:
            while self._feed():
                by_pipe = {worker.pipe: worker for worker in self._workers}
                # a worker that died leaves an end of file; woken now and then to see whether results were taken
                for ready in wait([*by_pipe, self._stop], timeout=0.05 if self._results.qsize() else None):
                    if ready is self._stop:
                        return
                    self._collect(by_pipe[ready])  # type: ignore[index]
            self._results.put(None)
        except BaseException as error:  # to be raised where the results are read
            self._results.put(error)

    def _feed(self) -> bool:
        """Give jobs to workers with a free thread. False if nothing is left to do."""
        n_busy = sum(len(worker.jobs) for worker in self._workers)
        while True:
            for job in itertools.islice(self._jobs, max(0, self._window - len(self._waiting))):
                self._waiting.put(_host(job), job)
            worker = min(self._workers, key=lambda worker: len(worker.jobs))
            has_room = len(worker.jobs) < self._n_threads and self._results.qsize() < self._n_ready
            job_or_none = self._waiting.take() if has_room else None
            if job_or_none is None:
                return bool(n_busy or len(self._waiting))
            worker.jobs[job_or_none.key] = job_or_none
            n_busy += 1
            with contextlib.suppress(OSError):  # it died: its end of file is on the way
                worker.pipe.send(job_or_none)

    def _collect(self, worker: _Worker) -> None:
        try:
            key, pixels, error, cache_full = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        self._n_stillborn = 0
        if cache_full and not self._cache_full:
            self._cache_full = cache_full
            LOG.warning("the image cache takes no more: %s; embedding goes on", cache_full)
        job = worker.jobs.pop(key)
        self._waiting.done(_host(job))
        self._results.put(Result(job, pixels, error))

    def _bury(self, worker: _Worker) -> None:
        """Replace a worker that died. It costs the image in its decoder; the others in its hands are done again."""
        worker.process.join()
        self._n_stillborn += worker.decoding.value < 0
        if self._n_stillborn > MAX_STILLBORN:
            raise UserError(f"download processes end as soon as they start, the last with {worker.process.exitcode}")
        self._workers[self._workers.index(worker)] = self._start()
        for key, job in worker.jobs.items():
            self._waiting.done(_host(job))
            self._deaths[key] += 1
            is_to_blame = key == worker.decoding.value and worker.process.exitcode != -signal.SIGTERM
            if is_to_blame or self._deaths[key] > MAX_DEATHS:
                error = ImageError("bad_image", f"its decoder's process died ({worker.process.exitcode})")
                self._results.put(Result(job, _NO_PIXELS, error))
            else:
                self._waiting.put(_host(job), job)


class _Worker(NamedTuple):
    process: Any
    pipe: Connection
    decoding: Any  # shared: the key of the image in its decoder, -1 for none
    jobs: dict[int, Job]


def _host(job: Job) -> str:
    with contextlib.suppress(ValueError):
        return host_of(job.url)
    return ""


# --- in a worker -----------------------------------------------------------------------------------------------------


def _work(
    pipe: Connection, load: Load, settings: FetchSettings, n_threads: int, decoding: Any, cache_bytes: Any
) -> None:
    ignore(signal.SIGINT)  # the parent decides
    cache = ImageCache(settings.cache_dir, settings.cache_max_bytes, cache_bytes)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    sending, decoder = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def blamed(key: int) -> Iterator[None]:
        with decoder:
            decoding.value = key
            try:
                yield
            finally:
                decoding.value = -1

    def work() -> None:
        while True:
            job, pixels, failure = jobs.get(), _NO_PIXELS, None
            try:
                pixels = load(job, settings, cache, blamed(job.key))
            except ImageError as error:
                failure = error
            except Exception as error:  # whatever it is, it is this image's
                failure = ImageError("bad_image", f"{type(error).__name__}: {error}")
            with sending, contextlib.suppress(OSError):  # the parent is gone, and so are we in a moment
                pipe.send((job.key, pixels, failure, cache.full))

    for _ in range(n_threads):
        threading.Thread(target=work, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            jobs.put(pipe.recv())
    os._exit(0)  # the parent is gone: threads in downloads are not waited for
