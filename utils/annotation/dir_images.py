"""The image files of a directory: review copies of cached originals, or of downloads if they are not in the cache."""

from __future__ import annotations

import collections
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.annotation.neighbor_dirs import file_digest, image_name
from utils.errors import ImageError, UserError
from utils.files import naming
from utils.images.cache import ImageCache
from utils.images.copies import shows_everywhere, write_copy, write_review_copy
from utils.processes import DiedError, Workers
from utils.web.download import DownloadLimits, fetch
from utils.web.hosts import HostPool
from utils.web.urls import queue_host

COPIERS = 2  # threads; more do not help, because the GIL and the file system limit the copying of small files
MAX_DECODE_S = 60  # a decoder that takes longer counts as hung
MAX_FAILURES = 16  # the run ends if this many downloads in a row fail because of the network
MAX_QUIET_S, MIN_FAILURES = 30, 4  # or this many in a row, without success for this long: one slow host is no outage
_OFFLINE = frozenset({"connection", "timeout"})  # reasons of failures while the network is down
_NO_REQUEST = frozenset({"bad_url", "blocked_address"})  # reasons that say nothing about the network


class _Outcome(NamedTuple):
    """The outcome of an image: the reason of its failure, or "" and the digest of the written file."""

    reason: str
    digest: str = ""
    was_cached: bool = False


class DirImages:
    """Fills folders, several at a time. A context manager: leaving it cancels pending work.

    urls_of: ids -> urls, for images that are not cached. failures: reason -> count, for completed folders. max_side:
    pixels of review copies, 0 for originals; see write_review_copy().
    """

    def __init__(
        self,
        cache: ImageCache,
        urls_of: Callable[[Sequence[str]], Sequence[str]],
        limits: DownloadLimits,
        max_pixels: int,
        n_workers: int,
        n_per_host: int,
        max_side: int = 0,
    ) -> None:
        self.failures: collections.Counter[str] = collections.Counter()
        self.n_copied = self.n_downloaded = 0
        self._cache, self._urls_of, self._limits, self._max_pixels = cache, urls_of, limits, max_pixels
        self._max_side, self._lock = max_side, threading.Lock()
        n_decoders = (os.cpu_count() or 1) + 1  # one more than cores, because one waits for its next image
        self._copiers, self._converters = ThreadPoolExecutor(COPIERS), ThreadPoolExecutor(n_decoders)
        self._decoders = Workers(n_decoders, MAX_DECODE_S)
        self._downloaders: HostPool[_Outcome] = HostPool(n_workers, n_per_host)
        self._n_failed_in_row, self._failing_since, self._offline = 0, 0.0, ""

    def __enter__(self) -> DirImages:
        return self

    def __exit__(self, *_error: object) -> None:
        self._decoders.__exit__()
        self._downloaders.close()
        self._copiers.shutdown(cancel_futures=True)
        self._converters.shutdown(cancel_futures=True)

    def start(self, ids: list[str], folder: Path) -> Callable[[], dict[str, str]]:
        """Start to fill the new `folder` with the images of `ids`, named by rank.

        Returns a function that waits for the folder and returns {id: digest} of the images in it, in rank order. It
        raises UserError if there seems to be no network.
        """
        copying = self._copiers.submit(self._copy, ids, folder)
        return lambda: self._wait(ids, copying)

    def _copy(self, ids: list[str], folder: Path) -> dict[str, _Outcome | Future[_Outcome]]:
        """Copy cached images, and download the others. Files are copied, not linked: viewers rotate files in place."""
        folder.mkdir()
        stems = {id_: folder / image_name(rank, id_, "") for rank, id_ in enumerate(ids)}
        placed = {id_: outcome for id_, stem in stems.items() if (outcome := self._copy_one(id_, stem))}
        missing = [id_ for id_ in ids if id_ not in placed]
        main: Future[_Outcome] | None = None
        for id_, url in zip(missing, self._urls(missing)):
            work = functools.partial(self._download, url, stems[id_], main)
            placed[id_] = download = self._downloaders.submit(queue_host(url), work)
            main = download if id_ == ids[0] else main
        return placed

    def _urls(self, ids: list[str]) -> Sequence[str]:
        with self._lock:  # the first call opens Chroma
            return self._urls_of(ids) if ids else []

    def _copy_one(self, id_: str, stem: Path) -> _Outcome | Future[_Outcome] | None:
        """Copy or convert the cached image. Returns None if the cache has no usable file."""
        path = self._cache.find(id_)
        try:
            file = path.open("rb") if path else None
        except OSError:  # deleted meanwhile, or unreadable: download it
            file = None
        if path is None or file is None:
            return None
        with file:
            try:
                if self._max_side and not shows_everywhere(file, self._max_side):
                    return self._converters.submit(self._convert, path, id_, stem)
                with naming(stem):
                    return _Outcome("", file_digest(write_copy(file, stem)), was_cached=True)
            except ImageError:  # damaged
                return None

    def _convert(self, path: Path, id_: str, stem: Path) -> _Outcome:
        try:
            return _Outcome("", self._write_review_copy(path, stem), was_cached=True)
        except ImageError as error:  # damaged
            if not self._decoders.is_open:
                return _Outcome(error.reason)
            (url,) = self._urls([id_])
            return self._download(url, stem, None)

    def _write_review_copy(self, path: Path, stem: Path) -> str:
        """Write a review copy in another process, as files may be hostile; returns its digest. Raises ImageError."""
        try:
            with naming(stem):
                return file_digest(self._decoders.run(write_review_copy, path, stem, self._max_side, self._max_pixels))
        except DiedError:
            for part in stem.parent.glob(f"{stem.name}.*"):
                part.unlink()
            raise ImageError("bad_image", "its decoder's process died or hung") from None

    def _download(self, url: str, stem: Path, main: Future[_Outcome] | None) -> _Outcome:
        """Download an image, unless the main image has failed or there is no network."""
        if not url:
            return _Outcome("bad_record")
        if main is not None and main.done() and main.result().reason:
            return main.result()
        if self._offline:
            return _Outcome("connection")
        begun = time.monotonic()
        try:
            with fetch(url, self._limits) as file:
                digest = self._write_download(file, stem)
        except ImageError as error:
            self._note(begun, error.reason, str(error))
            return _Outcome(error.reason)
        self._note(begun)
        return _Outcome("", digest)

    def _write_download(self, file: BinaryIO, stem: Path) -> str:
        original = stem.with_name(f".{stem.name}")
        try:
            with original.open("xb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
            return self._write_review_copy(original, stem)
        finally:
            original.unlink(missing_ok=True)

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

    def _wait(self, ids: list[str], copying: Future[dict[str, _Outcome | Future[_Outcome]]]) -> dict[str, str]:
        placed = copying.result().items()
        results = {id_: outcome.result() if isinstance(outcome, Future) else outcome for id_, outcome in placed}
        if self._offline:
            raise UserError(
                f"no network: {self._offline}. Check that the host is up, set IMAGE_CACHE_DIR_PATH to the cache that "
                "embed.py filled, or HTTPS_PROXY to your proxy, and run again to continue"
            )
        if results[ids[0]].reason:
            self.failures[results[ids[0]].reason] += 1  # its neighbors are not counted: only some were tried
            return {}
        self.n_copied += sum(result.was_cached for result in results.values())
        self.n_downloaded += sum(not result.reason and not result.was_cached for result in results.values())
        self.failures.update(result.reason for result in results.values() if result.reason)
        return {id_: results[id_].digest for id_ in ids if not results[id_].reason}
