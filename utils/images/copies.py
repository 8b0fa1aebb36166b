"""Copies of images for people to look at: originals in review folders, thumbnails beside the report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from utils.errors import ImageError
from utils.ids import is_uuid
from utils.images.cache import ImageCache
from utils.images.decode import decode
from utils.images.formats import identify

THUMBNAIL_SIDE = 128  # pixels of the longer side
_THUMBNAIL_QUALITY = 80  # of JPEG: about 4 KB


def write_copy(file: BinaryIO, stem: Path) -> Path:
    """Write the bytes of `file` to the new file `stem` + the extension of its format; returns its path.

    Raises ImageError(not_an_image), and OSError if the copy cannot be written.
    """
    _, extension = identify(file)
    path = stem.with_name(stem.name + extension)
    with path.open("xb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
    return path


def thumbnail_path(id_: str) -> str:
    return f"{id_[:2]}/{id_}.jpg"


def make_thumbnails(
    ids: Iterable[str], cache: ImageCache, folder: Path, max_pixels: int, tick: Callable[[], object]
) -> set[str]:
    """Make the thumbnails that are missing or older than their cached image; returns the ids that have one.

    `tick` is called after each id. Threads use all cores, for decoding frees the GIL.
    """

    def make_one(id_: str) -> str:
        source, target = cache.find(id_), folder / thumbnail_path(id_)
        made = source is not None and (_is_current(source, target) or _make_thumbnail(source, target, max_pixels))
        tick()
        return id_ if made else ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return set(filter(None, pool.map(make_one, ids)))


def remove_other_thumbnails(folder: Path, ids: Collection[str]) -> None:
    """Remove the thumbnails of ids not in `ids` and the temporary files of killed runs, but no other file."""
    for path in folder.glob("??/*"):
        id_ = path.name.removeprefix(".").removesuffix(".tmp").removesuffix(".jpg")
        own = folder / thumbnail_path(id_)
        if is_uuid(id_) and (path == _temporary(own) or (path == own and id_ not in ids)):
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _is_current(source: Path, target: Path) -> bool:
    return target.exists() and target.stat().st_mtime >= source.stat().st_mtime


def _make_thumbnail(source: Path, target: Path, max_pixels: int) -> bool:
    try:
        with source.open("rb") as file:
            image = decode(file, max_pixels, THUMBNAIL_SIDE // 2)
    except (ImageError, OSError):
        return False
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(_temporary(target), "JPEG", quality=_THUMBNAIL_QUALITY)
    _temporary(target).replace(target)
    return True
