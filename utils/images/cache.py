"""The image cache: downloaded originals as {id[:2]}/{id}{extension}, up to a size."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from utils.images.formats import EXTENSIONS

MIN_FREE_SHARE = 0.1  # of the disk: less free than this, and caching stops


class ImageCache:
    """The folder `directory` ("" keeps nothing) with at most `max_bytes` in it.

    `used` is a number shared between the processes that add, multiprocessing's Value("q"): bytes in it. `full` says
    why nothing is added any more, "" while it is. Readers see whole files only. A disk that is full or read-only
    raises nothing: caching stops, embedding goes on.
    """

    def __init__(self, directory: str, max_bytes: int, used: Any = None) -> None:
        self.directory = Path(directory) if directory else None
        self.max_bytes = max_bytes
        self.full = ""
        self._used = used

    def find(self, id_: str) -> Path | None:
        """The cached original of `id_`, whatever its extension; None if there is none."""
        if self.directory is None:
            return None
        stem = self.directory / id_[:2] / id_
        candidates = (stem.with_name(id_ + extension) for extension in EXTENSIONS)
        return next((path for path in candidates if path.is_file()), None)

    def add(self, id_: str, file: BinaryIO, extension: str) -> None:
        """Keep the bytes of `file`, read from its beginning, under `id_`, unless the cache is full or unwritable."""
        if self.directory is None or self.full:
            return
        path = self.directory / id_[:2] / f"{id_}{extension}"
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
        """(files, bytes) in the cache, counted by walking it: about a second per 200,000 files."""
        files = total = 0
        for folder, _, names in os.walk(self.directory) if self.directory else ():
            for name in names:
                with contextlib.suppress(OSError):
                    total += Path(folder, name).stat().st_size
                    files += 1
        return files, total

    def _has_room(self, size: int) -> bool:
        """Whether `size` bytes more are within the limits; counts them."""
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
