"""Image files for tests: encoded by Pillow, or written by hand so that no reader is tested against its own writer."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

from PIL import Image


def encoded(image: Image.Image, format: str, **options) -> io.BytesIO:
    if format == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def heic(image: Image.Image | None = None, orientation: int = 1) -> io.BytesIO:
    """A HEIC file, written by pillow-heif, which turns an EXIF orientation into HEIF's own rotation."""
    return encoded(image or Image.new("RGB", (64, 32)), "HEIF", quality=95, exif=exif(orientation))


def png_chunks(width: int, height: int, depth: int, color: int, rows: bytes, *extra: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG with chunks `extra` between header and pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*pair) for pair in chunks))


def png_chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png_with(data: bytes, *chunks: bytes) -> bytes:
    """A PNG file with whole chunks put behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG file with segments (marker, body) put in front of its own."""
    parts = (struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return data[:2] + b"".join(parts) + data[2:]


def exif(orientation: int, type_: int = 3, count: int = 1) -> bytes:
    """EXIF data with one tag. Source: EXIF 2.3, tag 0x0112."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, type_, count, orientation, 0)


def cmyk_profile(inked_lab: Sequence[int]) -> bytes:
    """An ICC profile in which any ink at all makes the color `inked_lab` (8-bit Lab), and paper is white.

    Source: ICC.1:2010, lut8Type.
    """
    identity = struct.pack(">9i", *(65536 * (index in (0, 4, 8)) for index in range(9)))
    ramp = bytes(range(256))
    table = bytes([255, 128, 128]) + bytes(inked_lab) * 15
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I4sII4sII", 2, b"A2B0", start, len(lut), b"wtpt", start + len(lut), len(white))
    size = start + len(lut) + len(white)
    head = struct.pack(">I4xI", size, 0x02400000) + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28) + white[8:]
    return head.ljust(128, b"\0") + tags + lut + white
