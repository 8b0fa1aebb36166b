"""The image files of a directory: copied from the image cache, or downloaded if they are not in it."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from utils.annotation.neighbor_dirs import image_name
from utils.errors import ImageError
from utils.images.cache import ImageCache
from utils.images.copies import write_copy
from utils.images.decode import decode
from utils.web.download import DownloadLimits, fetch
from utils.web.hosts import HostPool
from utils.web.urls import queue_host

COPIERS = 2  # threads; more do not help, copying small files is bound by the GIL and the file system
MIN_SIDE = 64  # pixels; a download is decoded only to check that it is a whole image


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
        self._downloaders: HostPool[str] = HostPool(n_workers, n_per_host)

    def __enter__(self) -> DirImages:
        return self

    def __exit__(self, *_error: object) -> None:
        self._downloaders.close()
        self._copiers.shutdown(cancel_futures=True)

    def start(self, ids: Sequence[str], folder: Path) -> Callable[[], list[str]]:
        """Begin to fill the new `folder` with the images of `ids`, named by rank.

        Returns a function that waits for the folder and returns the ids of the images in it, in rank order.
        """
        copying = self._copiers.submit(self._copy, list(ids), folder)
        return lambda: self._wait(list(ids), copying)

    def _copy(self, ids: list[str], folder: Path) -> dict[str, Future[str]]:
        """Copy cached images, start a download for each other. Copies, not links: viewers rotate files in place."""
        folder.mkdir()
        missing = [(rank, id_) for rank, id_ in enumerate(ids) if not self._copy_one(rank, id_, folder)]
        with self._lock:  # the first call opens Chroma
            urls = self._urls_of([id_ for _, id_ in missing]) if missing else []
        downloads: dict[str, Future[str]] = {}
        for (rank, id_), url in zip(missing, urls):
            work = functools.partial(self._download, rank, id_, url, folder, downloads.get(ids[0]))
            downloads[id_] = self._downloaders.submit(queue_host(url), work)
        return downloads

    def _copy_one(self, rank: int, id_: str, folder: Path) -> bool:
        path = self._cache.find(id_)
        try:
            file = path.open("rb") if path else None
        except OSError:  # deleted meanwhile, or unreadable: download it
            file = None
        if file is None:
            return False
        with file:
            try:
                write_copy(file, folder / image_name(rank, id_, ""))
            except ImageError:  # damaged
                return False
        return True

    def _download(self, rank: int, id_: str, url: str, folder: Path, main: Future[str] | None) -> str:
        """Returns the reason of a failure, "" for success. Skipped once the main image has failed."""
        if not url:
            return "bad_record"
        if main is not None and main.done() and main.result():
            return main.result()
        try:
            with fetch(url, self._limits) as file:
                decode(file, self._max_pixels, MIN_SIDE)
                file.seek(0)
                write_copy(file, folder / image_name(rank, id_, ""))
        except ImageError as error:
            return error.reason
        return ""

    def _wait(self, ids: list[str], copying: Future[dict[str, Future[str]]]) -> list[str]:
        reasons = {id_: download.result() for id_, download in copying.result().items()}
        if reasons.get(ids[0]):
            self.failures[reasons[ids[0]]] += 1  # of its neighbors only some were tried: not counted
            return []
        self.n_copied += len(ids) - len(reasons)
        self.n_downloaded += sum(not reason for reason in reasons.values())
        self.failures.update(filter(None, reasons.values()))
        return [id_ for id_ in ids if not reasons.get(id_)]
