"""Whole pictures with random metadata, valid and damaged: each must be stored, with the pixels that Chromium shows.

    python -m tests.faults.fuzz_metadata 2000 [SEED]

prints a tally by format, and each file that is refused, turned or differs. What Chromium does not show (TIFF, PPM, JPEG
2000, or a file that it refuses) must be stored only if Pillow wrote it whole. The suite runs a few.
"""

from __future__ import annotations

import collections
import io
import random
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from tests.faults.fuzz_images import SEEDS
from tests.support import shown
from utils.errors import ImageError
from utils.images.decode import decode
from utils.images.metadata import matrix_profile

MAX_DIFFERENCE = 1.0  # mean of 255; conversions of color round differently
MAX_CMYK_DIFFERENCE = 4.0  # tables of inks are interpolated differently
BATCH = 50
_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
_P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


class File(NamedTuple):
    name: str  # of its seed
    data: bytes
    lacks_end: bool  # shown in part by browsers, though no pixel is missing


def profile(rng: random.Random) -> bytes:
    """An ICC profile: sRGB, a wider space, a gray one, or one that is damaged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide = matrix_profile(_P3, (rng.choice([1.0, 1.8, 2.2]),))
    gray = bytearray(wide)
    gray[16:20] = b"GRAY"
    gray[128 + 4 + 12 * 4 : 128 + 4 + 12 * 4 + 4] = b"kTRC"
    whole = rng.choice([srgb, wide, bytes(gray)])
    return rng.choice([whole, whole, whole, whole[: rng.randrange(len(whole))], rng.randbytes(200), b""])


def exif(rng: random.Random) -> bytes:
    """TIFF data with an orientation, or damaged."""
    order, mark = rng.choice([("<", b"II*\0"), (">", b"MM\0*")])
    entry = struct.pack(
        order + "HHIHH", 0x0112, rng.choice([3, 3, 3, 4, 1]), rng.choice([1, 1, 2]), rng.randrange(10), 0
    )
    other = struct.pack(order + "HHII", 0x010F, 2, rng.choice([4, 2**31]), rng.choice([8, 2**31]))
    entries = rng.sample([entry, other], rng.choice([1, 2, 2]))
    whole = mark + struct.pack(order + "IH", 8, rng.choice([len(entries), 0, 500])) + b"".join(entries) + bytes(4)
    return rng.choice([whole, whole, whole[: rng.randrange(len(whole))], rng.randbytes(30)])


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 2, 5, 50, 3000]))


# --- PNG --------------------------------------------------------------------------------------------------------------
def _png_body(kind: bytes, rng: random.Random) -> bytes:
    long = zlib.compress(bytes(2_000_000))
    numbers = struct.pack(">9I", rng.choice([45455, 100_000, 55_000]), *(round(value * 100_000) for value in _P3))
    return {
        b"tEXt": b"Comment\0" + noise(rng),
        b"zTXt": b"workflow\0\0" + long,
        b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP,
        b"iCCP": b"name\0\0" + zlib.compress(profile(rng)),
        b"gAMA": numbers[:4],
        b"cHRM": numbers[4:],
        b"sRGB": bytes([rng.randrange(5)]),
        b"cICP": bytes([rng.choice([1, 9, 12, 2]), rng.choice([1, 8, 13]), 0, 1]),
        b"eXIf": exif(rng),
        b"pHYs": struct.pack(">IIB", 2835, 2835, 1),
        b"tIME": bytes(7),
        b"acTL": struct.pack(">II", 1, 0),
    }.get(kind, noise(rng))


def add_to_png(data: bytes, rng: random.Random) -> bytes:
    kinds = b"tEXt zTXt iTXt iCCP gAMA cHRM sRGB cICP eXIf pHYs tIME bKGD hIST sBIT sPLT oFFs vpAg".split()
    for _ in range(rng.randint(1, 5)):
        kind = rng.choice(kinds)
        body = rng.choice([_png_body(kind, rng)] * 3 + [noise(rng), _png_body(kind, rng)[: rng.randrange(8)]])
        checksum = rng.choice([zlib.crc32(kind + body)] * 4 + [rng.randrange(2**32)])
        at = rng.choice([33, 33, 33, len(data) - 12])  # behind IHDR or before IEND
        data = data[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum) + data[at:]
    return data


# --- JPEG -------------------------------------------------------------------------------------------------------------
def _jpeg_body(marker: int, rng: random.Random) -> bytes:
    icc = profile(rng)
    irb = (
        b"Photoshop 3.0\0"
        + b"8BIM"
        + rng.choice([b"\7\xdb", b"\x03\xed\0\0\0\0\0\x10" + bytes(16), b"\3\xed\0\0\0\0\0\x10\1"])
    )
    return {
        0xE0: rng.choice(
            [b"JFIF\0\1\1\0\0\1\0\1\0\0", b"JFIF\0", b"JFXX\0\x10" + noise(rng), b"JFIF\0\1\1\0\0\1\0\1\xff\xff"]
        ),
        0xE1: rng.choice([b"Exif\0\0" + exif(rng), b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0" + _XMP]),
        0xE2: rng.choice(
            [
                b"ICC_PROFILE\0\1\1" + icc[:60_000],
                b"ICC_PROFILE\0\1\2" + icc[:60_000],
                b"ICC_PROFILE\0",
                b"MPF\0II*\0" + noise(rng),
                b"FPXR\0",
            ]
        ),
        0xED: irb,
        0xEE: rng.choice([b"Adobe", b"Adobe\0d", b"Ducky\0"]),
    }.get(marker, noise(rng))


def add_to_jpeg(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 5)):
        marker = rng.choice([*range(0xE0, 0xF0), 0xE0, 0xE1, 0xE1, 0xE1, 0xE2, 0xE2, 0xED, 0xFE])
        body = rng.choice([_jpeg_body(marker, rng)] * 3 + [noise(rng) if marker != 0xEE else b"Adobe"])
        length = rng.choice([len(body) + 2] * 8 + [0, 1] * (not body))
        segment = rng.choice([b"", b"", b"\xff\xff"]) + struct.pack(">BBH", 0xFF, marker, length) + body
        data = data[:2] + segment + data[2:]
    return data


# --- the others -------------------------------------------------------------------------------------------------------
def add_to_webp(data: bytes, rng: random.Random) -> bytes:
    """More chunks at the end of an extended file, or in front of the pixels."""
    if data[12:16] != b"VP8X":
        return data
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice([b"EXIF", b"XMP ", b"ICCP", b"abcd", b"META"])
        body = {b"EXIF": exif, b"ICCP": profile}.get(kind, noise)(rng)
        chunk = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
        at = 30 if kind == b"ICCP" and b"ICCP" not in data else len(data)
        data = data[:at] + chunk + data[at:]
    flags = data[20] | rng.choice([0, 0x20, 0x0C])
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:20] + bytes([flags]) + data[21:]


def add_to_gif(data: bytes, rng: random.Random) -> bytes:
    """Extensions in front of the first picture."""
    start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    for _ in range(rng.randint(1, 4)):
        blocks = b"".join(bytes([len(block)]) + block for block in (noise(rng)[:255] for _ in range(3)) if block)
        extension = rng.choice(
            [
                b"\xfe" + blocks,
                b"\xff\x0bNETSCAPE2.0\3\1\0\0",
                b"\xff\x0bNETSCAPE2.0\1\1",
                b"\xff\x0bXMP DataXMP" + bytes([len(_XMP[:255])]) + _XMP[:255],
                b"\xff\x0bICCRGBG1012" + blocks,
                b"\xff\3abc" + blocks,
                b"\x01\x0c" + bytes(12) + blocks,
                b"\x77" + blocks,
            ]
        )
        data = data[:start] + b"\x21" + extension + b"\0" + data[start:]
    return data


def add_to_bmp(data: bytes, rng: random.Random) -> bytes:
    """A gap before the pixels, wrong sizes in the header, junk behind."""
    (offset,) = struct.unpack_from("<I", data, 10)
    gap = rng.randbytes(rng.choice([0, 4, 100]))
    head = bytearray(data[:offset])
    head[10:14] = struct.pack("<I", offset + len(gap))
    head[2:6] = struct.pack("<I", rng.choice([0, len(data), 2**31]))
    head[6:10] = rng.randbytes(4)
    head[34:38] = struct.pack("<I", rng.choice([0, 1, len(data)]))  # bytes of the pixels
    head[38:46] = rng.randbytes(8)  # resolution
    return bytes(head) + gap + data[offset:] + noise(rng)


def add_to_avif(data: bytes, rng: random.Random) -> bytes:
    boxes = [b"free" + noise(rng), b"uuid" + rng.randbytes(30), b"skip"]
    for body in rng.sample(boxes, rng.randint(1, 3)):
        data += struct.pack(">I", len(body) + 4) + body
    return data


def add_to_ico(data: bytes, rng: random.Random) -> bytes:
    entry = bytearray(data)
    entry[9] = rng.choice([0, 1, 255])  # reserved
    entry[10:12] = struct.pack("<H", rng.choice([0, 1, 7]))  # planes
    return bytes(entry) + noise(rng)


def add_to_tiff(data: bytes, rng: random.Random) -> bytes:
    """Junk behind the file; Pillow has written its tags."""
    return data + noise(rng)


def encoded(image: Image.Image, form: str, rng: random.Random, **options: object) -> bytes:
    """With metadata as Pillow itself writes them."""
    file = io.BytesIO()
    if rng.random() < 0.5:
        options["icc_profile"] = profile(rng) or None
    if rng.random() < 0.5:
        tags = Image.Exif()
        tags[0x0112] = rng.randrange(1, 9)
        options["exif"] = tags
    if rng.random() < 0.3:
        options["xmp"] = _XMP
    image.save(file, form, **options)
    return file.getvalue()


ADD: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "jpeg": add_to_jpeg,
    "mpo": add_to_jpeg,
    "png": add_to_png,
    "webp": add_to_webp,
    "gif": add_to_gif,
    "bmp": add_to_bmp,
    "avif": add_to_avif,
    "ico": add_to_ico,
    "tiff": add_to_tiff,
}
PLAIN = {  # a seed without metadata: the mode of its picture, Pillow's format and options
    "jpeg": ("RGB", "JPEG", {"quality": 90}),
    "jpeg_progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg_gray": ("L", "JPEG", {}),
    "jpeg_cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "png_palette": ("P", "PNG", {}),
    "png_alpha": ("RGBA", "PNG", {}),
    "png_gray": ("L", "PNG", {}),
    "png_gray_alpha": ("LA", "PNG", {}),
    "png_bits": ("1", "PNG", {}),
    "png_16": ("I;16", "PNG", {}),
    "webp": ("RGB", "WEBP", {"quality": 90}),
    "webp_lossless": ("RGBA", "WEBP", {"lossless": True}),
    "avif": ("RGB", "AVIF", {"speed": 10}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "bmp_palette": ("P", "BMP", {}),
    "ico": ("RGBA", "ICO", {}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff_lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
}


def picture(mode: str) -> Image.Image:
    """48 x 40, smooth, with some noise."""
    y, x = np.mgrid[0:40, 0:48]
    noise = np.random.default_rng(0).integers(0, 30, (40, 48))
    channels = [x * 4 + noise, y * 4 + noise, (x + y) * 2 + noise, 255 - x * 3]
    pixels = np.stack(channels, axis=2).clip(0, 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels if mode in ("RGBA", "LA") else pixels[..., :3]).convert(mode)


def make(number: int, seed: int) -> File:
    rng = random.Random(seed * 1_000_003 + number)
    name = rng.choice([*PLAIN, "png_animated", "webp_animated", "gif_animated", "mpo", "jp2", "ppm"])
    if name not in PLAIN:
        data = SEEDS[name]()
    else:
        mode, form, options = PLAIN[name]
        data = encoded(picture(mode), form, rng, **options)
    add = ADD.get(name.partition("_")[0])
    data = add(data, rng) if add and rng.random() < 0.9 else data
    lacks_end = name.startswith("jpeg") and rng.random() < 0.1
    return File(name, data.removesuffix(b"\xff\xd9") + rng.choice([b"", b"\xff"]) if lacks_end else data, lacks_end)


def pixels(data: bytes) -> np.ndarray | str:
    try:
        return np.asarray(decode(io.BytesIO(data), 4_000_000))
    except ImageError as error:
        return str(error)


def judge(file: File, found: np.ndarray | str, expected: np.ndarray | None) -> str:
    """ "as Chromium", "as without metadata", or what is wrong."""
    how = "as Chromium"
    if expected is None:
        how, expected = "shown nowhere else", found if isinstance(found, np.ndarray) else np.empty((0, 0, 3))
        if isinstance(found, str):
            return "refused as by Chromium"
    if isinstance(found, str):
        return f"REFUSED: {found}"
    if found.shape != expected.shape:
        return f"TURNED: {found.shape}, not {expected.shape}"
    limit = MAX_CMYK_DIFFERENCE if "cmyk" in file.name else MAX_DIFFERENCE
    difference = float(np.abs(found.astype(int) - expected).mean())
    return how if difference <= limit else f"DIFFERS by {difference:.1f}"


def run(count: int, seed: int, show: shown.Show) -> Iterator[tuple[int, File, str]]:
    for start in range(0, count, BATCH):
        files = [make(number, seed) for number in range(start, min(count, start + BATCH))]
        references = show([file.data + b"\xff\xd9" * file.lacks_end for file in files])
        for number, (file, reference) in enumerate(zip(files, references), start):
            yield number, file, judge(file, pixels(file.data), reference)


def main(count: int, seed: int = 0) -> int:
    tally: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, shown.chromium(Path(folder)) as show:
        for number, file, judgment in run(count, seed, show):
            tally[file.name.partition("_")[0], judgment.partition(":")[0].partition(" by")[0]] += 1
            if judgment[:3].isupper():
                wrong += 1
                print(f"file {number} of seed {seed}, {file.name}: {judgment}")
    for (form, judgment), n in sorted(tally.items()):
        print(f"{n:6} {form:5} {judgment}")
    print(f"{count} files, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:])))
