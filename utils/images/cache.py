"""The image cache: downloaded originals as {id[:2]}/{id}{extension}, up to a total size."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from utils.images.formats import EXTENSIONS, identify

MIN_FREE_SHARE = 0.1  # caching stops when a smaller share of the disk is free
ABANDONED_S = 3600  # a temporary file that has not changed for this long belongs to a killed run
_TEMPORARY = re.compile(r"\.[0-9a-f-]{36}\.[a-z0-9]+\.\d+\.tmp")  # ".{id}{extension}.{pid}.tmp"


class ImageCache:
    """The folder `directory` ("" = no cache) with at most `max_bytes` in it.

    `used` is a multiprocessing Value("q") with the bytes in the folder, shared by all processes that add files.
    `files` maps ids to originals outside the folder. `full` is the reason why caching has stopped, or "". Readers see
    only complete files. A full or read-only disk raises no error: caching stops and embedding goes on.
    """

    def __init__(
        self, directory: str, max_bytes: int, used: Any = None, files: Mapping[str, Path] | None = None
    ) -> None:
        self.directory = Path(directory) if directory else None
        self.max_bytes = max_bytes
        self.full = ""
        self._used, self._files = used, files or {}

    def find(self, id_: str) -> Path | None:
        """Path of the original of `id_`, from `files` or in the cache; None if neither has it."""
        if id_ in self._files or self.directory is None:
            return self._files.get(id_)
        candidates = (self.directory / f"{id_[:2]}/{id_}{extension}" for extension in EXTENSIONS)
        return next((path for path in candidates if path.is_file()), None)

    def add(self, id_: str, file: BinaryIO) -> None:
        """Store the bytes of the image `file` under `id_`, unless the cache is full or not writable."""
        if self.directory is None or self.full:
            return
        path = self.directory / id_[:2] / f"{id_}{identify(file)[1]}"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._has_room(file.seek(0, os.SEEK_END)):
                return
            file.seek(0)
            with temporary.open("wb") as target:
                shutil.copyfileobj(file, target)
            temporary.replace(path)
        except OSError as error:
            self.full = f"{self.directory} cannot be written: {error.strerror}"
            with contextlib.suppress(OSError):
                temporary.unlink()

    def size(self) -> tuple[int, int]:
        """Count (files, bytes) in the cache by walking it, which takes about a second per 200,000 files.

        The walk also removes the temporary files of killed runs.
        """
        n_files = n_bytes = 0
        for folder, _, names in os.walk(self.directory) if self.directory else ():
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(OSError):
                    if _is_abandoned(path):
                        path.unlink()
                    else:
                        n_bytes += path.stat().st_size
                        n_files += 1
        return n_files, n_bytes

    def _has_room(self, size: int) -> bool:
        """Whether `size` more bytes fit within the limits. If so, they are added to `used`."""
        disk = shutil.disk_usage(self.directory or ".")
        if disk.free < MIN_FREE_SHARE * disk.total:
            self.full = f"less than {MIN_FREE_SHARE:.0%} of the disk is free"
            return False
        with self._used.get_lock():
            if self._used.value + size > self.max_bytes:
                self.full = f"it holds {self._used.value:,} bytes, IMAGE_CACHE_MAX_BYTES is {self.max_bytes:,}"
                return False
            self._used.value += size
        return True


def _is_abandoned(path: Path) -> bool:
    return bool(_TEMPORARY.fullmatch(path.name)) and time.time() - path.stat().st_mtime > ABANDONED_S
