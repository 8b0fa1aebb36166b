"""The images in a tree of folders, whatever people and file managers did to the names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils import ids

_IMAGE_EXTENSIONS = """.apng .avif .avifs .bmp .dib .gif .heic .heics .heif .heifs .ico .j2c .j2k .jfif .jp2 .jpc .jpe
    .jpeg .jpf .jpg .jpm .jpx .jxl .mpo .pbm .pgm .png .pnm .ppm .qoi .svg .tga .tif .tiff .webp"""
IMAGE_EXTENSIONS = frozenset(_IMAGE_EXTENSIONS.split())
# Folders that systems put anywhere: what lies in a trash can is deleted, thumbnails and AppleDouble are no images.
_SYSTEM_DIRS = frozenset({"__macosx", "$recycle.bin", "recycler", "system volume information", "@eadir", "lost+found"})


@dataclass(frozen=True)
class Image:
    """A file with an image's extension and ids (utils.ids.in_name) in its name."""

    name: str
    ids: list[str]
    is_empty: bool


@dataclass(eq=False)
class Folder:
    """A folder and the images directly in it. parent: None for the one where the walk began."""

    path: Path
    parent: Folder | None
    images: list[Image] = field(default_factory=list)


def walk(root: Path) -> Iterator[Folder]:
    """`root` and all folders in it, parents first. Symbolic links are not followed; the systems' folders left out."""
    waiting = [Folder(root, None)]
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if image := _read_image(entry):
                    folder.images.append(image)
                elif entry.is_dir(follow_symlinks=False) and not _is_system_dir(entry.name):
                    waiting.append(Folder(Path(entry.path), folder))
        yield folder


def _is_system_dir(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_DIRS


def _read_image(entry: os.DirEntry[str]) -> Image | None:
    """None for what file managers, cameras and people leave beside images, AppleDouble twins (._name.jpg) included."""
    stem, dot, extension = entry.name.rpartition(".")
    if dot + extension.lower() not in IMAGE_EXTENSIONS or entry.name.startswith("._"):
        return None
    found = ids.in_name(stem)
    if not found or not entry.is_file(follow_symlinks=False):
        return None
    return Image(entry.name, found, entry.stat(follow_symlinks=False).st_size == 0)
