"""Worker processes that turn urls into pixels, so that the model never waits and no image can take the run down.

Why processes: requests costs 3 ms of CPU an image and holds the GIL, which one process with 64 threads shares with
what feeds the model; a decoder that crashes or hangs then costs one image. Each process has many threads that
download, and one image at a time in its decoder, the one it is blamed for if it dies.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import queue
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from utils import processes
from utils.embedding.fetch_worker import NO_PIXELS, FetchSettings, Job, Load, load_pixels, work
from utils.errors import ImageError, UserError
from utils.images.cache import ImageCache
from utils.log import LOG
from utils.web.hosts import HostQueue
from utils.web.urls import queue_host

WINDOW = 16  # jobs a download thread that are looked at to find another host than a slow one's
MAX_STILLBORN = 10  # workers in a row that die without a result: the machine's fault, not an image's
MAX_DEATHS = 2  # of its worker with nothing in the decoder, after which an image in hand is given up
MAX_DECODE_S = 60  # a decoder that needs longer hangs: 100 megapixels take ten seconds


class Result(NamedTuple):
    """`pixels` (H, W, 3) uint8, or the `error` for which there are none (they are empty then)."""

    job: Job
    pixels: np.ndarray
    error: ImageError | None


class Fetcher:
    """Worker processes that work off `jobs`; iterate over it for the results, in the order in which they come.

    Bounded: a thread downloads one body (up to 1 MB of it in memory), and no job is begun while `n_ready` results wait
    to be taken. Use it as a context: leaving it ends the workers. `load` is what a worker does with a job, pickled.
    With `stays_open` its results never end, and add() brings more jobs.
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
        stays_open: bool = False,
    ) -> None:
        self._load, self._cache_full = load, ""
        self._n_stillborn = 0  # workers in a row that died before they had done a thing
        self._jobs, self._settings, self._stays_open = iter(jobs), settings, stays_open
        self._added: queue.SimpleQueue[Job] = queue.SimpleQueue()
        n_workers = max(1, min(n_threads, (n_cpus or os.cpu_count() or 1) - 1))
        self._n_threads, self._n_ready = -(-n_threads // n_workers), n_ready
        self._window = WINDOW * self._n_threads * n_workers
        self._cache_bytes = processes.CONTEXT.Value("q", ImageCache(settings.cache_dir, 0).size()[1])
        self._waiting: HostQueue[Job] = HostQueue(per_host)
        self._deaths: collections.Counter[int] = collections.Counter()
        self._decoding_since: dict[int, tuple[int, float]] = {}  # pid of a worker -> (key of the image, when seen)
        self._hung: set[int] = set()  # keys of images
        self._results: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self._woken, self._wake = processes.CONTEXT.Pipe(duplex=False)  # True: there are more jobs; False: stop
        self._waking = threading.Lock()
        self._workers = [self._start() for _ in range(n_workers)]
        self._thread = threading.Thread(target=self._dispatch, daemon=True)

    def __enter__(self) -> Fetcher:
        self._thread.start()
        return self

    def add(self, jobs: Iterable[Job]) -> None:
        """More jobs, from any thread."""
        for job in jobs:
            self._added.put(job)
        with self._waking:
            self._wake.send(True)

    def __exit__(self, *_error: object) -> None:
        with self._waking:
            self._wake.send(False)
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
        ours, theirs = processes.CONTEXT.Pipe()
        decoding = processes.CONTEXT.Value("q", -1, lock=False)
        process = processes.CONTEXT.Process(
            target=work,
            args=(theirs, self._load, self._settings, self._n_threads, decoding, self._cache_bytes),
            daemon=True,
        )
        with processes.shielded():
            process.start()
        theirs.close()
        return _Worker(process, ours, decoding, {})

    def _dispatch(self) -> None:
        """In a thread of its own: hand out jobs, collect results, replace workers that died."""
        try:
            while self._feed():
                by_pipe = {worker.pipe: worker for worker in self._workers}
                # a worker that died leaves an end of file; woken now and then to see whether results were taken
                for ready in wait([*by_pipe, self._woken], timeout=0.05 if self._results.qsize() else 1):
                    if ready in by_pipe:
                        self._collect(by_pipe[ready])
                    elif not self._woken.recv():
                        return
                self._end_hung()
            self._results.put(None)
        except BaseException as error:  # to be raised where the results are read
            self._results.put(error)

    def _feed(self) -> bool:
        """Give jobs to workers with a free thread. False if nothing is left to do."""
        n_busy = sum(len(worker.jobs) for worker in self._workers)
        while not self._added.empty():
            job = self._added.get()
            self._waiting.put(queue_host(job.url), job)
        while True:
            for job in itertools.islice(self._jobs, max(0, self._window - len(self._waiting))):
                self._waiting.put(queue_host(job.url), job)
            worker = min(self._workers, key=lambda worker: len(worker.jobs))
            has_room = len(worker.jobs) < self._n_threads and self._results.qsize() < self._n_ready
            job_or_none = self._waiting.take() if has_room else None
            if job_or_none is None:
                return bool(n_busy or len(self._waiting)) or self._stays_open
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
        self._waiting.done(queue_host(job.url))
        self._results.put(Result(job, pixels, error))

    def _end_hung(self) -> None:
        """Kill the workers whose decoder hangs; their end of file does the rest."""
        now = time.monotonic()
        for worker in self._workers:
            pid, key = worker.process.pid, worker.decoding.value
            seen, since = self._decoding_since.get(pid, (-1, now))
            if key != seen:
                self._decoding_since[pid] = key, now
            elif key >= 0 and now - since > MAX_DECODE_S:
                self._hung.add(key)
                worker.process.kill()

    def _bury(self, worker: _Worker) -> None:
        """Replace a worker that died. It costs the image in its decoder; the others in its hands are done again."""
        worker.process.join()
        blamed, how = worker.decoding.value, f"died ({worker.process.exitcode})"
        if blamed in self._hung:
            how = f"took more than {MAX_DECODE_S} s"
        elif worker.process.exitcode == -signal.SIGTERM:  # from outside: nobody's fault
            blamed = -1
        self._decoding_since.pop(worker.process.pid, None)
        self._n_stillborn += worker.decoding.value < 0
        if self._n_stillborn > MAX_STILLBORN:
            raise UserError(f"download processes end as soon as they start, the last with {worker.process.exitcode}")
        self._workers[self._workers.index(worker)] = self._start()
        for key, job in worker.jobs.items():
            self._waiting.done(queue_host(job.url))
            self._deaths[key] += blamed < 0
            if key == blamed or self._deaths[key] > MAX_DEATHS:
                error = ImageError("bad_image", f"its decoder's process {how}")
                self._results.put(Result(job, NO_PIXELS, error))
            else:
                self._waiting.put(queue_host(job.url), job)


class _Worker(NamedTuple):
    process: Any
    pipe: Connection
    decoding: Any  # shared: the key of the image in its decoder, -1 for none
    jobs: dict[int, Job]
