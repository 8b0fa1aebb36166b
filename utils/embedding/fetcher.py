"""Worker processes that turn urls into pixels, so that the model never waits and no image ends the run.

They are processes, not threads, for two reasons. A download takes up to 2 ms of CPU and holds the GIL, which the thread
that feeds the model needs. And if a decoder crashes or hangs, only one image fails: each process has many threads that
download, but decodes one image at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
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
from utils.images.preprocess import Preprocess
from utils.log import LOG
from utils.web.hosts import HostQueue
from utils.web.machine import Suspects
from utils.web.urls import queue_host

WINDOW = 16  # waiting jobs per download thread, so that other hosts are at hand while one host is slow
MAX_FAILED_STARTS = 10  # if more workers in a row die without a result, the machine is at fault, not an image
MAX_DEATHS = 2  # an image fails if its workers die more often than this outside the decoder
MAX_DECODE_S = 60  # a decoder that takes longer counts as hung; 100 megapixels take ten seconds


class Result(NamedTuple):
    """`pixels` (H, W, 3) uint8 and the digest of the image's bytes, or the `error` and no pixels."""

    job: Job
    pixels: np.ndarray
    error: ImageError | None
    digest: int = 0


class Fetcher:
    """Worker processes that fetch `jobs`. Iterate over it for the results, in the order in which they arrive.

    `jobs` yields None while it has no job; call wake() when it has jobs again. Memory is bounded: each thread downloads
    one body (up to 1 MB of it in memory), and no job starts while `n_ready` results wait. Workers call `load`, which is
    pickled, for each job. Without settings.preprocess, decoding waits for start_decoding(). A context manager, which
    ends the workers.
    """

    def __init__(
        self,
        jobs: Iterable[Job | None],
        settings: FetchSettings,
        n_threads: int,
        per_host: int,
        n_ready: int,
        load: Load = load_pixels,
        n_cpus: int = 0,
    ) -> None:
        self._load, self._cache_full = load, ""
        self._n_failed_starts = 0  # workers in a row that died before their first result
        self._jobs, self._has_more, self._settings = iter(jobs), True, settings
        n_workers = max(1, min(n_threads, (n_cpus or os.cpu_count() or 1) - 1))
        self._n_threads, self._n_ready = -(-n_threads // n_workers), n_ready
        self._window = WINDOW * self._n_threads * n_workers
        self._cache_bytes = processes.CONTEXT.Value("q", ImageCache(settings.cache_dir, 0).size()[1])
        self._waiting: HostQueue[Job] = HostQueue(per_host)
        self._suspects: Suspects[Result] = Suspects()
        self._deaths: collections.Counter[int] = collections.Counter()
        self._killed: set[int] = set()  # keys of images in the decoder of a worker that was killed from outside
        self._results: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        # Messages to the dispatcher. True: there are jobs again; False: stop; a Preprocess: start decoding.
        self._woken, self._wake = processes.CONTEXT.Pipe(duplex=False)
        self._waking = threading.Lock()
        self._workers = [self._start() for _ in range(n_workers)]
        self._thread = threading.Thread(target=self._dispatch, daemon=True)

    def __enter__(self) -> Fetcher:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._tell(False)
        self._thread.join()
        for worker in self._workers:
            worker.process.kill()  # harmless: a worker adds files to the cache by rename
            worker.process.join()

    def __iter__(self) -> Iterator[Result]:
        while True:
            try:  # on Windows, and just before a wait, Ctrl-C does not end the wait: wait a second at a time
                result = self._results.get(timeout=1)
            except queue.Empty:
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result

    def wake(self) -> None:
        """Signal, from any thread, that `jobs` has jobs again."""
        self._tell(True)

    def start_decoding(self, preprocess: Preprocess) -> None:
        self._tell(preprocess)

    def _tell(self, message: bool | Preprocess) -> None:
        with self._waking:
            self._wake.send(message)

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
        return _Worker(process, ours, decoding)

    def _dispatch(self) -> None:
        """Hand out jobs, collect results and replace dead workers, in a thread of its own."""
        try:
            while self._feed():
                by_pipe = {worker.pipe: worker for worker in self._workers}
                # The pipe of a dead worker is ready, too. The timeout is there because results may be taken meanwhile.
                for ready in wait([*by_pipe, self._woken], timeout=0.05 if self._results.qsize() else 1):
                    if ready in by_pipe:
                        self._collect(by_pipe[ready])
                    elif not (message := self._woken.recv()):
                        return
                    elif message is not True:
                        self._settings = dataclasses.replace(self._settings, preprocess=message)
                        for worker in self._workers:
                            _send(worker, message)
                self._end_hung()
            self._results.put(None)
        except BaseException as error:  # __iter__ raises it
            self._results.put(error)

    def _feed(self) -> bool:
        """Give jobs to workers with a free thread. Returns False if nothing is left to do."""
        n_busy = sum(len(worker.jobs) for worker in self._workers)
        while True:
            self._pull()
            worker = min(self._workers, key=lambda worker: len(worker.jobs))
            has_room = len(worker.jobs) < self._n_threads and self._results.qsize() < self._n_ready
            job = self._waiting.take() if has_room else None
            if job is None:
                if not n_busy and not len(self._waiting):
                    self._hand_on(self._suspects.release())
                return bool(n_busy or len(self._waiting) or self._has_more)
            worker.jobs[job.key] = job
            n_busy += 1
            _send(worker, job)

    def _pull(self) -> None:
        """Take jobs until WINDOW of them wait per download thread."""
        while self._has_more and len(self._waiting) < self._window:
            try:
                job = next(self._jobs)
            except StopIteration:
                self._has_more = False
                return
            if job is None:
                return
            self._waiting.put(queue_host(job.url), job)

    def _collect(self, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if isinstance(message, int):
            self._note_start(worker, message)
            return
        key, pixels, digest, error, cache_full = message
        self._n_failed_starts = 0
        if cache_full and not self._cache_full:
            self._cache_full = cache_full
            LOG.warning("no more images are cached: %s; embedding goes on", cache_full)
        job = worker.jobs.pop(key)
        self._waiting.done(queue_host(job.url))
        if isinstance(error, UserError):
            raise error
        self._hand_on(self._suspects.add(Result(job, pixels, error, digest), error))

    def _note_start(self, worker: _Worker, n_threads: int) -> None:
        worker.has_started = True
        if n_threads < self._n_threads:
            LOG.warning(
                "only %d of %d download threads of a process could start: memory or the process limit (ulimit -u) is "
                "too low; embedding goes on with fewer concurrent downloads",
                *(n_threads, self._n_threads),
            )
            self._n_threads = n_threads

    def _hand_on(self, results: list[Result]) -> None:
        for result in results:
            self._results.put(result)

    def _end_hung(self) -> None:
        """Kill workers whose decoder hangs. _collect() then replaces them."""
        now = time.monotonic()
        for worker in self._workers:
            key = worker.decoding.value
            if key != worker.seen:
                worker.seen, worker.seen_since = key, now
            elif key >= 0 and now - worker.seen_since > MAX_DECODE_S:
                worker.is_hung = True
                worker.process.kill()

    def _replace(self, worker: _Worker) -> None:
        """Replace a dead worker. The image in its decoder fails, but if the worker was killed from outside, only the
        second time. Its other jobs are repeated, unless their workers have died more than MAX_DEATHS times."""
        worker.process.join()
        code, in_decoder = worker.process.exitcode, worker.decoding.value
        self._n_failed_starts += in_decoder < 0
        if self._n_failed_starts > MAX_FAILED_STARTS:
            raise UserError(
                f"download processes end as soon as they start, the last with exit code {code}; "
                "check free memory and the limits of this machine, then run again"
            )
        is_kill = code == -9 and not worker.is_hung and in_decoder not in self._killed  # probably out of memory
        if is_kill:
            self._killed.add(in_decoder)
        if is_kill or code == -signal.SIGTERM:
            in_decoder = -1
        self._workers[self._workers.index(worker)] = self._start()
        for key, job in worker.jobs.items():
            self._waiting.done(queue_host(job.url))
            self._deaths[key] += in_decoder < 0 and worker.has_started and not is_kill
            if key == in_decoder or self._deaths[key] > MAX_DEATHS:
                how = f"took more than {MAX_DECODE_S} s" if worker.is_hung else f"died ({code})"
                error = ImageError("bad_image", f"its decoder's process {how}")
                self._results.put(Result(job, NO_PIXELS, error))
            else:
                self._waiting.put(queue_host(job.url), job)


def _send(worker: _Worker, message: Job | Preprocess) -> None:
    with contextlib.suppress(OSError):  # the worker died: _collect() replaces it
        worker.pipe.send(message)


@dataclasses.dataclass
class _Worker:
    """`decoding` is shared memory: the key of the image in the worker's decoder, or -1. `seen`: its value last read."""

    process: Any
    pipe: Connection
    decoding: Any
    jobs: dict[int, Job] = dataclasses.field(default_factory=dict)
    has_started: bool = False  # its threads run
    seen: int = -1
    seen_since: float = 0
    is_hung: bool = False
