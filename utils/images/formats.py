"""The accepted image formats, identified by their first bytes, never by a name or a Content-Type."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import BinaryIO

from utils.errors import ImageError

_J2K = b"\xff\x4f\xff\x51"  # a JPEG 2000 codestream without boxes around it
# Pillow's name of the format, the extension that file managers know, the first bytes.
_FORMATS: list[tuple[str, str, tuple[bytes, ...]]] = [
    ("JPEG", ".jpg", (b"\xff\xd8\xff",)),  # also MPO: a JPEG followed by more images
    ("PNG", ".png", (b"\x89PNG\r\n\x1a\n",)),
    ("GIF", ".gif", (b"GIF87a", b"GIF89a")),
    ("BMP", ".bmp", (b"BM",)),
    ("TIFF", ".tif", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("ICO", ".ico", (b"\0\0\1\0",)),
    ("PPM", ".ppm", tuple(b"P%c%c" % (kind, blank) for kind in b"123456f" for blank in b" \t\r\n#")),
    ("JPEG2000", ".jp2", (b"\0\0\0\x0cjP  \r\n\x87\n", _J2K)),
]
EXTENSIONS = (*(extension for _, extension, _ in _FORMATS), ".webp", ".avif", ".heic")  # all that identify() returns
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_FOREIGN = {  # first bytes, in lower case, of files that servers send instead of images -> name
    b"%pdf": "PDF",
    b"{": "JSON",
    b"8bps": "Photoshop",
    b"%!ps": "PostScript",
    b"\x1f\x8b": "gzip",
    b"pk\3\4": "zip",
}


def identify(file: BinaryIO) -> tuple[str, str]:
    """Pillow's name of the format and its extension (".jpg"). Raises ImageError(not_an_image). Rewinds `file`."""
    file.seek(0)
    head = file.read(1024)
    file.seek(0)
    for name, extension, signatures in _FORMATS:
        if head.startswith(signatures):
            return name, extension
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP", ".webp"
    if head[4:8] == b"ftyp" and (b"avif" in head[8:64] or b"avis" in head[8:64]):
        return "AVIF", ".avif"
    if is_heif(head) and can_read_heif():
        return "HEIF", ".heic"
    raise ImageError("not_an_image", _describe(head))


def is_heif(head: bytes) -> bool:
    """Whether a file that begins with `head` and is not AVIF is HEIF (HEIC), which phone cameras write."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


@functools.cache
def can_read_heif() -> bool:
    """Whether the package pillow-heif is installed. Only HEIC needs it."""
    return find_spec("pillow_heif") is not None


def _describe(head: bytes) -> str:
    """The likely kind of a file that is not an image."""
    if not head:
        return "empty"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        is_html = any(tag in text for tag in (b"<!doctype html", b"<html", b"<head", b"<body"))
        return "SVG" if b"<svg" in text and not is_html else "HTML" if is_html else "XML"
    if is_heif(head):
        return "HEIC; pip install pillow-heif makes it readable"
    if head[4:8] == b"ftyp":
        return f"a video, {head[8:12]!r}"
    kind = next((kind for start, kind in _FOREIGN.items() if text.startswith(start)), "")
    return kind or f"unknown format, begins with {head[:16]!r}"


def is_cut_off(data: bytes) -> bool | None:
    """Whether a WebP, AVIF or JPEG 2000 file is shorter than it declares. None for other formats."""
    if data.startswith(_J2K):
        return not data.endswith(b"\xff\xd9")
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[4:8] not in (b"ftyp", b"jP  "):
        return None
    at = 0
    while at < len(data):  # top-level boxes
        length = int.from_bytes(data[at : at + 4], "big")
        if length == 1:  # the length is in the next field
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        if length < 8:  # 0: up to the end of the file
            return False
        at += length
    return at > len(data) or not (b"mdat" in data or b"jp2c" in data)
