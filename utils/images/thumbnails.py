"""Thumbnails of cached images, as {id[:2]}/{id}.jpg in a folder of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils.errors import ImageError
from utils.ids import is_uuid
from utils.images.cache import ImageCache
from utils.images.decode import decode

SIDE, QUALITY = 128, 80  # pixels of the longer side; JPEG quality: about 4 KB


def relative_path(id_: str) -> str:
    return f"{id_[:2]}/{id_}.jpg"


def make(ids: Iterable[str], cache: ImageCache, folder: Path, max_pixels: int, tick: Callable[[], object]) -> set[str]:
    """Make what is missing or older than its image; returns the ids that have one. `tick` is called after each.

    Decoding frees the GIL: threads use all cores.
    """

    def make_one(id_: str) -> str:
        source, target = cache.find(id_), folder / relative_path(id_)
        made = source is not None and (_is_current(source, target) or _make(source, target, max_pixels))
        tick()
        return id_ if made else ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return set(filter(None, pool.map(make_one, ids)))


def remove_others(folder: Path, ids: Collection[str]) -> None:
    """Remove thumbnails of other images, and what a killed run left half made; no other file."""
    for path in folder.glob("??/*"):
        id_ = path.name.removeprefix(".").removesuffix(".tmp").removesuffix(".jpg")
        own = folder / relative_path(id_)
        if is_uuid(id_) and (path == _temporary(own) or (path == own and id_ not in ids)):
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _is_current(source: Path, target: Path) -> bool:
    return target.exists() and target.stat().st_mtime >= source.stat().st_mtime


def _make(source: Path, target: Path, max_pixels: int) -> bool:
    try:
        with source.open("rb") as file:
            image = decode(file, max_pixels, SIDE // 2)
    except (ImageError, OSError):
        return False
    image.thumbnail((SIDE, SIDE))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    image.save(temporary, "JPEG", quality=QUALITY)
    temporary.replace(target)
    return True
