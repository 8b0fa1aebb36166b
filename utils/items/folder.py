"""A folder as input: one item per image file in and below it. Also the folders whose files later stages may read."""

from __future__ import annotations

import collections
import os
import stat
import unicodedata
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import ImageError
from utils.files import read_json, write_json
from utils.ids import is_uuid
from utils.images.copies import REPORT_DATA, THUMBNAILS
from utils.images.formats import EXTENSIONS, identify, is_heif
from utils.items.formatted import is_unicode
from utils.log import bar, counted, printable

_SYSTEM = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}  # names of folders
_HEIC, _NO_IMAGE, _UNREADABLE = "HEIC image", "file", "folder"  # what is left out
_NOTES = {_HEIC: "pip install pillow-heif makes HEIC readable", _NO_IMAGE: "no image", _UNREADABLE: "not readable"}
_NAMED = "folders.json"  # in the store's folder
_COARSE_NS = 2_000_000_000  # some file systems round times to two seconds


class File(NamedTuple):
    """An image file: folder relative to the root ("" at the top), name, size in bytes, modification time in ns."""

    folder: str
    name: str
    size: int
    time: int


def find_images(root: Path) -> tuple[list[File], tuple[str, ...], bool]:
    """Find the image files in and below a folder: (files, sorted; notes for people; whether all folders are readable).

    Hidden and system folders, links to folders and the folders of later stages are not searched. Takes 220 bytes of
    memory per file. Raises OSError if `root` is not readable.
    """
    files: list[File] = []
    left_out = collections.Counter[str]()
    os.scandir(root).close()  # raises; os.walk() takes it for a folder below
    with bar(None, f"search {printable(str(root))}", "file") as progress:
        for path, below, names in os.walk(root, onerror=lambda _: left_out.update([_UNREADABLE])):
            below[:] = sorted(name for name in below if _is_searched(name, names))
            folder = path.removeprefix(str(root)).lstrip(os.sep)
            for name in sorted(name for name in names if not name.startswith(".")):
                progress.update()
                size, time, no_image = _look_at(Path(path, name))
                if no_image:
                    left_out[no_image] += 1
                else:
                    files.append(File(folder, name, size, time))
    notes = tuple(f"{counted(left_out[w], w)} left out: {why}" for w, why in _NOTES.items() if left_out[w])
    return files, notes, not left_out[_UNREADABLE]


def _is_searched(name: str, files_beside: list[str]) -> bool:
    number, _, id_ = name.partition("_")
    is_review = number.isdigit() and is_uuid(id_)  # a directory of ann_dirrify.py, with copies of images
    is_report = name == THUMBNAILS and REPORT_DATA in files_beside
    return not (name.startswith(".") or name in _SYSTEM or is_review or is_report)


def _look_at(path: Path) -> tuple[int, int, str]:
    """(size in bytes, modification time in ns, "" for an image or what it is instead). The first bytes decide what is
    an image or, if the file cannot be opened, its extension."""
    size = time = 0
    try:
        status = path.stat()
        size, time = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could hang
            return size, time, _NO_IMAGE
        with path.open("rb") as file:
            head = file.read(12)
            identify(file)
    except ImageError:
        return size, time, _HEIC if is_heif(head) else _NO_IMAGE
    except OSError:
        return size, time, "" if path.suffix.lower() in (*EXTENSIONS, ".jpeg", ".tiff") else _NO_IMAGE
    return size, time, ""


def read_items(root: Path, files: Iterable[File]) -> Iterator[dict[str, Any]]:
    """Yield an item per file."""
    for folder, name, size, time in files:
        relative = _normal(folder).replace(os.sep, "/")
        known = {"folder": relative, "name": _normal(name), "size_bytes": size, "mtime_ns": time}
        yield {"url": str(Path(root, folder, name)), **known}


def image_id(item: dict[str, Any]) -> uuid.UUID:
    """uuid5(NAMESPACE_URL, path relative to the input folder, with slashes, in NFC). Moving the folder keeps the id.

    Raises ImageError("bad_record") for a name that is not Unicode.
    """
    if not is_unicode(item["url"]):
        raise ImageError("bad_record", "its path is not Unicode; rename it")
    return uuid.uuid5(uuid.NAMESPACE_URL, "/".join(filter(None, (item["folder"], item["name"]))))


def is_same_file(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two items' files have the same size and modification time. A time in whole seconds may be off by two."""
    if one.get("size_bytes") != other.get("size_bytes") or "mtime_ns" not in one or "mtime_ns" not in other:
        return False
    a, b = one["mtime_ns"], other["mtime_ns"]
    is_coarse = a % 1_000_000_000 == 0 or b % 1_000_000_000 == 0
    return bool(a == b or (is_coarse and abs(a - b) < _COARSE_NS))


def note_named(store: Path, folder: Path) -> None:
    """Record that later stages may read this store's files in and below `folder` in place."""
    if (path := str(folder.resolve())) not in (known := named_folders(store)):
        write_json(store / _NAMED, [*known, path])


def named_folders(store: Path) -> tuple[str, ...]:
    """Absolute paths of the folders that note_named() recorded for the store in the folder `store`."""
    path = store / _NAMED
    return tuple(read_json(path, "list of input folders")) if path.exists() else ()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)
