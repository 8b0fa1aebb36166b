"""The image files of a directory: copied from the image cache, or downloaded if they are not in it."""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.annotation.neighbor_dirs import file_digest, image_name
from utils.errors import ImageError, UserError
from utils.images.cache import ImageCache
from utils.images.copies import write_copy
from utils.images.decode import decode
from utils.web.download import DownloadLimits, fetch
from utils.web.hosts import HostPool
from utils.web.urls import queue_host

COPIERS = 2  # threads; more do not help, copying small files is bound by the GIL and the file system
MIN_SIDE = 64  # pixels; a download is decoded only to check that it is a whole image
MAX_FAILURES = 16  # downloads that fail in a row for reasons of the network before the run ends
MAX_QUIET_S, MIN_FAILURES = 30, 4  # or fewer in a row, without success for so long: one slow host is no outage
_OFFLINE = frozenset({"connection", "timeout"})  # reasons that a network that is down has
_NO_REQUEST = frozenset({"bad_url", "blocked_address"})  # reasons that say nothing about the network


class _Download(NamedTuple):
    """The outcome of one download: the reason of its failure, or "" and the digest of the file written."""

    reason: str
    digest: str = ""


class DirImages:
    """Fills folders, several at a time. Use it as a context: leaving it cancels pending work.

    urls_of: ids -> urls, for images that are not cached. failures: reason -> count, of completed folders.
    """

    def __init__(
        self,
        cache: ImageCache,
        urls_of: Callable[[Sequence[str]], Sequence[str]],
        limits: DownloadLimits,
        max_pixels: int,
        n_workers: int,
        n_per_host: int,
    ) -> None:
        self.failures: collections.Counter[str] = collections.Counter()
        self.n_copied = self.n_downloaded = 0
        self._cache, self._urls_of, self._limits, self._max_pixels = cache, urls_of, limits, max_pixels
        self._lock = threading.Lock()
        self._copiers = ThreadPoolExecutor(COPIERS)
        self._downloaders: HostPool[_Download] = HostPool(n_workers, n_per_host)
        self._n_failed_in_row, self._failing_since, self._offline = 0, 0.0, ""

    def __enter__(self) -> DirImages:
        return self

    def __exit__(self, *_error: object) -> None:
        self._downloaders.close()
        self._copiers.shutdown(cancel_futures=True)

    def start(self, ids: Sequence[str], folder: Path) -> Callable[[], dict[str, str]]:
        """Begin to fill the new `folder` with the images of `ids`, named by rank.

        Returns a function that waits for the folder and returns {id: digest} of the images in it, in rank order. It
        raises UserError once there seems to be no network.
        """
        copying = self._copiers.submit(self._copy, list(ids), folder)
        return lambda: self._wait(list(ids), copying)

    def _copy(self, ids: list[str], folder: Path) -> tuple[dict[str, str], dict[str, Future[_Download]]]:
        """Copy cached images, start a download for each other. Copies, not links: viewers rotate files in place."""
        folder.mkdir()
        copied = {id_: digest for rank, id_ in enumerate(ids) if (digest := self._copy_one(rank, id_, folder))}
        missing = [(rank, id_) for rank, id_ in enumerate(ids) if id_ not in copied]
        with self._lock:  # the first call opens Chroma
            urls = self._urls_of([id_ for _, id_ in missing]) if missing else []
        downloads: dict[str, Future[_Download]] = {}
        for (rank, id_), url in zip(missing, urls):
            work = functools.partial(self._download, rank, id_, url, folder, downloads.get(ids[0]))
            downloads[id_] = self._downloaders.submit(queue_host(url), work)
        return copied, downloads

    def _copy_one(self, rank: int, id_: str, folder: Path) -> str:
        """The digest of the copy; "" if there is none."""
        path = self._cache.find(id_)
        try:
            file = path.open("rb") if path else None
        except OSError:  # deleted meanwhile, or unreadable: download it
            file = None
        if file is None:
            return ""
        with file:
            try:
                return _write(file, rank, id_, folder)
            except ImageError:  # damaged
                return ""

    def _download(self, rank: int, id_: str, url: str, folder: Path, main: Future[_Download] | None) -> _Download:
        """Skipped once the main image has failed, and without a network."""
        if not url:
            return _Download("bad_record")
        if main is not None and main.done() and main.result().reason:
            return main.result()
        if self._offline:
            return _Download("connection")
        begun = time.monotonic()
        try:
            with fetch(url, self._limits) as file:
                decode(file, self._max_pixels, MIN_SIDE)
                file.seek(0)
                digest = _write(file, rank, id_, folder)
        except ImageError as error:
            self._note(begun, error.reason, str(error))
            return _Download(error.reason)
        self._note(begun)
        return _Download("", digest)

    def _note(self, begun: float, reason: str = "", detail: str = "") -> None:
        """Count failures in a row; any answer from a server shows that there is a network."""
        if reason in _NO_REQUEST:
            return
        with self._lock:
            if reason not in _OFFLINE:
                self._n_failed_in_row = 0
                return
            self._failing_since = self._failing_since if self._n_failed_in_row else begun
            self._n_failed_in_row += 1
            n, quiet_s = self._n_failed_in_row, time.monotonic() - self._failing_since
            if n >= MAX_FAILURES or (n >= MIN_FAILURES and quiet_s >= MAX_QUIET_S):
                self._offline = f"{n} downloads in a row failed within {quiet_s:.0f} s, the last: {detail}"

    def _wait(
        self, ids: list[str], copying: Future[tuple[dict[str, str], dict[str, Future[_Download]]]]
    ) -> dict[str, str]:
        copied, downloads = copying.result()
        results = {id_: download.result() for id_, download in downloads.items()}
        if self._offline:
            raise UserError(
                f"no network: {self._offline}. Set IMAGE_CACHE_DIR_PATH to the cache that embed.py filled, or "
                "HTTPS_PROXY to your proxy; the same command goes on"
            )
        if ids[0] in results and results[ids[0]].reason:
            self.failures[results[ids[0]].reason] += 1  # of its neighbors only some were tried: not counted
            return {}
        self.n_copied += len(copied)
        downloaded = {id_: result.digest for id_, result in results.items() if not result.reason}
        self.n_downloaded += len(downloaded)
        self.failures.update(result.reason for result in results.values() if result.reason)
        digests = copied | downloaded
        return {id_: digests[id_] for id_ in ids if id_ in digests}


def _write(file: BinaryIO, rank: int, id_: str, folder: Path) -> str:
    """The digest of the file written. Raises OSError that names it."""
    stem = folder / image_name(rank, id_, "")
    try:
        with write_copy(file, stem).open("rb") as copy:
            return file_digest(copy)
    except OSError as error:  # writing names no file
        raise OSError(error.errno, error.strerror, error.filename or str(stem)) from None
