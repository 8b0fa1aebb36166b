"""A folder as input: one item per image file in it and below; and which folders were named as input."""

from __future__ import annotations

import array
import os
import stat
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import ImageError
from utils.files import read_json, write_json
from utils.images.formats import EXTENSIONS, identify
from utils.items.formatted import is_unicode
from utils.log import bar, printable

_SYSTEM = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}  # names of folders
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # brands in a file's first bytes
_NAMED = "folders.json"  # in the store's folder
_COARSE_NS = 2_000_000_000  # some file systems keep times to two seconds


class _Files(NamedTuple):
    """Image files directly in one folder: its path relative to the root, names, bytes, times of change in ns."""

    folder: str
    names: list[str]
    sizes: array.array[int]
    times: array.array[int]


class Images:
    """The image files in and below a folder when it was searched, sorted; 90 bytes of memory per file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: list[_Files] = []
        self.n_heic = self.n_others = self.n_unreadable = 0

    def items(self) -> Iterator[dict[str, Any]]:
        for folder, names, sizes, times in self.folders:
            relative = _normal(folder).replace(os.sep, "/")
            for name, size, time in zip(names, sizes, times):
                path = str(Path(self.root, folder, name))
                known = {"folder": relative, "name": _normal(name), "size_bytes": size, "mtime_ns": time}
                yield {"url": path, **known}

    def notes(self) -> tuple[str, ...]:
        remedy = "convert them to JPEG, for example with: magick mogrify -format jpg *.HEIC"
        notes = (
            (self.n_heic, f"HEIC images are left out; {remedy}"),
            (self.n_others, "files are left out, as they are not images"),
            (self.n_unreadable, "folders are left out, as they cannot be read"),
        )
        return tuple(f"{n} {text}" for n, text in notes if n)


def find_images(root: Path) -> Images:
    """Search a folder and the folders below it, without hidden and system folders and without links to folders."""
    images = Images(root.resolve())
    unreadable: list[OSError] = []
    with bar(None, f"search {printable(str(images.root))}", "file") as progress:
        for path, below, names in os.walk(images.root, onerror=unreadable.append):
            below[:] = sorted(name for name in below if not name.startswith(".") and name not in _SYSTEM)
            relative = Path(path).relative_to(images.root)
            files = _Files(str(relative) if relative.parts else "", [], array.array("q"), array.array("q"))
            for name in sorted(name for name in names if not name.startswith(".")):
                _look_at(Path(path, name), files, images)
                progress.update()
            if files.names:
                images.folders.append(files)
    images.n_unreadable = len(unreadable)
    return images


def _look_at(path: Path, files: _Files, images: Images) -> None:
    """Add a file to `files` if its first bytes are an image's. One that cannot be opened is taken by its name."""
    size = time = 0
    try:
        status = path.stat()
        size, time = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could hang
            images.n_others += 1
            return
        with path.open("rb") as file:
            head = file.read(12)
            identify(file)
    except ImageError:
        images.n_heic += (is_heic := head[4:8] == b"ftyp" and head[8:] in _HEIC)
        images.n_others += not is_heic
        return
    except OSError:
        if path.suffix.lower() not in (*EXTENSIONS, ".jpeg", ".tiff"):
            images.n_others += 1
            return
    files.names.append(path.name)
    files.sizes.append(size)
    files.times.append(time)


def image_id(item: dict[str, Any]) -> uuid.UUID:
    """uuid5(NAMESPACE_URL, path relative to the folder, as POSIX writes it, in NFC): the same wherever the folder lies.

    Raises ImageError("bad_record") for a name that is not Unicode.
    """
    if not is_unicode(item["url"]):
        raise ImageError("bad_record", "its path is not Unicode; rename it")
    return uuid.uuid5(uuid.NAMESPACE_URL, "/".join(filter(None, (item["folder"], item["name"]))))


def is_same_file(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two items' files have the same size and time of change; where a time is coarse, within two seconds."""
    if one.get("size_bytes") != other.get("size_bytes") or "mtime_ns" not in one or "mtime_ns" not in other:
        return False
    a, b = one["mtime_ns"], other["mtime_ns"]
    is_coarse = a % 1_000_000_000 == 0 or b % 1_000_000_000 == 0
    return bool(a == b or (is_coarse and abs(a - b) < _COARSE_NS))


def note_named(store: Path, folder: Path) -> None:
    """Note that files of the store in and below `folder` are allowed: later stages read them where they lie."""
    if (path := str(folder.resolve())) not in (known := named_folders(store)):
        write_json(store / _NAMED, [*known, path])


def named_folders(store: Path) -> tuple[str, ...]:
    """Absolute paths of the folders that note_named noted for the store in the folder `store`."""
    path = store / _NAMED
    return tuple(read_json(path, "list of input folders")) if path.exists() else ()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)
