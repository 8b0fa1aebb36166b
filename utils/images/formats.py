"""The image formats that are let in, told by their first bytes, never by a name or a Content-Type."""

from __future__ import annotations

import struct
from typing import BinaryIO

from PIL import UnidentifiedImageError

from utils.errors import ImageError

_J2K, _J2K_END = b"\xff\x4f\xff\x51", b"\xff\xd9"  # a JPEG 2000 codestream without a box around it
# Pillow's format, the extension that file managers know, and how such a file begins.
_FORMATS: list[tuple[str, str, tuple[bytes, ...]]] = [
    ("JPEG", ".jpg", (b"\xff\xd8\xff",)),  # MPO, too: a JPEG with further pictures behind it
    ("PNG", ".png", (b"\x89PNG\r\n\x1a\n",)),
    ("GIF", ".gif", (b"GIF87a", b"GIF89a")),
    ("BMP", ".bmp", (b"BM",)),
    ("TIFF", ".tif", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("ICO", ".ico", (b"\0\0\1\0",)),
    ("PPM", ".ppm", tuple(b"P%c%c" % (kind, blank) for kind in b"123456f" for blank in b" \t\r\n#")),
    ("JPEG2000", ".jp2", (b"\0\0\0\x0cjP  \r\n\x87\n", _J2K)),
]
EXTENSIONS = (*(suffix for _, suffix, _ in _FORMATS), ".webp", ".avif")  # all that extension() gives
_FOREIGN = {  # what comes in place of images, for people
    b"<!doctype html": "HTML",
    b"<html": "HTML",
    b"<svg": "SVG",
    b"%pdf": "PDF",
    b"<?xml": "XML",
    b"{": "JSON",
    b"8bps": "Photoshop",
    b"%!ps": "PostScript",
    b"\x1f\x8b": "gzip",
    b"pk\3\4": "zip",
}
_CUT_OFF = (  # in Pillow's messages
    *("runcated", "not enough image data", "buffer is not large enough", "Reached EOF", "but only got"),
)


def extension(file: BinaryIO) -> str:
    """ ".jpg" and the like, from the first bytes. Raises ImageError("not_an_image"). Leaves `file` at its start."""
    return identify(file)[1]


def identify(file: BinaryIO) -> tuple[str, str]:
    """Pillow's name of the format and our extension, by content. Raises ImageError("not_an_image")."""
    file.seek(0)
    head = file.read(1024)
    file.seek(0)
    for name, suffix, signatures in _FORMATS:
        if head.startswith(signatures):
            return name, suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP", ".webp"
    if head[4:8] == b"ftyp" and (b"avif" in head[8:64] or b"avis" in head[8:64]):
        return "AVIF", ".avif"
    raise ImageError("not_an_image", _describe(head))


def _describe(head: bytes) -> str:
    """What a file that is no image seems to be."""
    if not head:
        return "empty"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text and text.startswith(b"<"):
        return "SVG"
    kind = next((kind for start, kind in _FOREIGN.items() if text.startswith(start)), None)
    if kind is None and text.startswith(b"<") and (b"<head" in text or b"<body" in text or b"<html" in text):
        kind = "HTML"
    if kind is None and head[4:8] == b"ftyp":
        kind = f"a film or HEIF, {head[8:12]!r}"
    return kind or f"unknown format, begins with {head[:16]!r}"


def ended_early(file: BinaryIO, error: Exception) -> bool:
    """Whether a decoder failed because the file is cut off: it says so, read on to the end for more of the header, or
    the length that the file itself declares is not there."""
    if isinstance(error, EOFError) or any(word in str(error) for word in _CUT_OFF):
        return True
    position = file.tell()
    file.seek(0, 2)
    size = file.tell()
    file.seek(max(0, size - 2))
    tail = file.read(2)
    file.seek(0)
    head = file.read(12)
    if head.startswith(_J2K):
        return tail != _J2K_END
    if head[:4] == b"RIFF":
        return struct.unpack("<I", head[4:8])[0] + 8 > size
    if head[4:8] in (b"ftyp", b"jP  "):
        return _box_cut_off(file, size)
    return isinstance(error, UnidentifiedImageError) and position >= size


def _box_cut_off(file: BinaryIO, size: int) -> bool:
    """Whether the top-level boxes of an AVIF or JPEG 2000 file reach beyond its end, or those with the pixels lack."""
    start, kinds = 0, set()
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = struct.unpack(">I", head[:4])[0]
        kinds.add(head[4:8])
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8:  # 0: up to the end of the file
            return False
        start += length
    return start != size or not kinds & {b"mdat", b"jp2c"}
