"""Copies of images for people: review copies that every file manager can show, and thumbnails for the report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from utils.errors import ImageError
from utils.files import naming
from utils.ids import is_uuid
from utils.images.cache import ImageCache
from utils.images.color import is_srgb
from utils.images.decode import decode, decode_within
from utils.images.formats import identify
from utils.images.metadata import read_layout

THUMBNAILS, REPORT_DATA = "thumbnails", "report.json"  # a report's folder of thumbnails, and the file beside it
THUMBNAIL_SIDE = 128  # pixels of the longer side
_THUMBNAIL_QUALITY = 80  # of JPEG: about 4 KB
_REVIEW_QUALITY = 85  # of JPEG: about 0.3 MB at 1,600 pixels; artifacts are invisible at that size
_CHECK_SIDE = 64  # pixels; a file to copy is decoded at this size only to check that it is complete
_KEPT_BLOCKS = 3  # blocks of 16 MB that Pillow reuses; new memory for each large image costs a sixth of the time
_HEAD_BYTES = 1 << 16  # a file with a longer header counts as one that not every file manager can show


def write_review_copy(source: Path, stem: Path, max_side: int, max_pixels: int) -> Path:
    """Write the image in `source` to the new file `stem` + extension, so that every file manager can show it.

    The file is copied byte for byte if shows_everywhere(), or if `max_side` is 0. Otherwise the copy has the first
    frame, upright and in sRGB, as JPEG, or as PNG if anything is transparent. Returns the path of the copy. Raises
    OSError, and ImageError for an unusable image, for example a truncated one.
    """
    Image.core.set_blocks_max(_KEPT_BLOCKS)
    with source.open("rb") as file:
        if not max_side or shows_everywhere(file, max_side, is_srgb):
            decode(file, max_pixels, _CHECK_SIDE)
            return write_copy(file, stem)
        image = decode_within(file, max_pixels, max_side)
    path = stem.with_name(stem.name + (".png" if image.mode == "RGBA" else ".jpg"))
    with path.open("xb") as copy:
        if image.mode == "RGBA":
            image.save(copy, "PNG", compress_level=3)
        else:
            image.save(copy, "JPEG", quality=_REVIEW_QUALITY)
    return path


def shows_everywhere(
    file: BinaryIO, max_side: int, is_srgb: Callable[[bytes], bool] = lambda profile: not profile
) -> bool:
    """Whether a file's header shows an upright sRGB JPEG, PNG, GIF or BMP of at most `max_side` pixels per side.

    Raises ImageError(not_an_image). Rewinds `file`.
    """
    name, _ = identify(file)
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if (layout := read_layout(name, head)) is None:
        return False
    size, metadata = layout
    return max(size) <= max_side and metadata.orientation == 1 and is_srgb(metadata.profile)


def write_copy(file: BinaryIO, stem: Path) -> Path:
    """Copy the bytes of `file` to the new file `stem` + the extension of its format; returns the new path.

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
    """Make the thumbnails that are missing or older than their image; returns the ids that have a thumbnail.

    `tick` is called after each id. Threads use all cores, because decoding releases the GIL.
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
    with naming(target):
        image.save(_temporary(target), "JPEG", quality=_THUMBNAIL_QUALITY)
    _temporary(target).replace(target)
    return True
