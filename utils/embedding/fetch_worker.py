"""A worker process of the fetcher. Many threads download, and one image at a time is decoded.

It may start before the model is loaded: downloads begin at once, and decoding waits for the model's Preprocess.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils.errors import ImageError, UserError
from utils.images.cache import ImageCache
from utils.images.decode import decode
from utils.images.preprocess import Preprocess, to_pixels
from utils.processes import ignore
from utils.web.download import DownloadLimits, fetch
from utils.web.urls import is_file

NO_PIXELS = np.empty(0, np.uint8)


class Job(NamedTuple):
    """One image to fetch. The caller chooses `key`; `id` is a uuid as text."""

    key: int
    id: str
    url: str


@dataclass(frozen=True)
class FetchSettings:
    """Settings of all workers, sent to them by pickle. `preprocess` may follow later."""

    limits: DownloadLimits
    max_pixels: int
    cache_dir: str
    cache_max_bytes: int
    preprocess: Preprocess | None = None


Loaded = tuple[np.ndarray, int]  # pixels (H, W, 3) uint8, digest of the bytes
Decoding = Callable[[], contextlib.AbstractContextManager[Preprocess]]


def load_pixels(job: Job, settings: FetchSettings, cache: ImageCache, decoding: Decoding) -> Loaded:
    """Load an image from the cache, or else from its url into the cache. A local file is read in place.

    `decoding` makes a context manager that waits for the Preprocess; bytes are decoded inside it. Raises ImageError.
    """
    is_cached = not is_file(job.url)
    if is_cached and (path := cache.find(job.id)):
        with contextlib.suppress(ImageError, OSError), path.open("rb") as file, decoding() as preprocess:
            return _load(file, settings.max_pixels, preprocess)  # a damaged file is fetched again
    with fetch(job.url, settings.limits) as file, decoding() as preprocess:
        loaded = _load(file, settings.max_pixels, preprocess)
        if is_cached:
            cache.add(job.id, file)
    return loaded


def _load(file: Any, max_pixels: int, preprocess: Preprocess) -> Loaded:
    image = decode(file, max_pixels, min_side=preprocess.min_side)
    return to_pixels(image, preprocess), digest_of(file)


def digest_of(file: BinaryIO) -> int:
    """A 63-bit hash of the bytes. Of ten million images, two have the same hash by chance in one of 180,000 runs."""
    file.seek(0)
    state = hashlib.blake2b(digest_size=8)
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return int.from_bytes(state.digest(), "little") >> 1


Load = Callable[[Job, FetchSettings, ImageCache, Decoding], Loaded]


def work(
    pipe: Connection, load: Load, settings: FetchSettings, n_threads: int, decoding: Any, cache_bytes: Any
) -> None:
    """Run `load` on each job from the pipe until the parent ends. `decoding` shows the key of the image being decoded.

    If `settings` has no Preprocess, it comes from the pipe.
    """
    ignore(signal.SIGINT)  # the parent decides when to stop
    cache = ImageCache(settings.cache_dir, settings.cache_max_bytes, cache_bytes)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    sending, decoder, can_decode = threading.Lock(), threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def marking_decode(key: int) -> Iterator[Preprocess]:
        can_decode.wait()
        with decoder:
            decoding.value = key
            try:
                yield preprocess
            finally:
                decoding.value = -1

    def serve() -> None:
        while True:
            job, pixels, digest = jobs.get(), NO_PIXELS, 0
            failure: ImageError | UserError | None = None
            try:
                pixels, digest = load(job, settings, cache, functools.partial(marking_decode, job.key))
            except (ImageError, UserError) as error:
                failure = error
            except Exception as error:  # whatever the error is, this image caused it
                failure = ImageError("bad_image", f"{type(error).__name__}: {error}")
            with sending, contextlib.suppress(OSError):  # the parent has ended, and this process will too
                pipe.send((job.key, pixels, digest, failure, cache.full))

    message: Any = settings.preprocess
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        pipe.send(_start_threads(serve, n_threads))
        while True:
            if isinstance(message, Preprocess):
                preprocess = message
                can_decode.set()
            elif message:
                jobs.put(message)
            message = pipe.recv()
    os._exit(0)  # the parent has ended: do not wait for downloads


def _start_threads(target: Callable[[], None], n_threads: int) -> int:
    """Start as many threads as memory and system allow; returns their number. Raises RuntimeError if none starts."""
    for number in range(n_threads):
        try:
            threading.Thread(target=target, daemon=True).start()
        except RuntimeError:
            if not number:
                raise
            return number
    return n_threads
