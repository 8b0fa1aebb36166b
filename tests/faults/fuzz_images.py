"""Mutated image files: every one must end as pixels or as an ImageError. The suite runs a few hundred; by hand

    python -m tests.faults.fuzz_images 20000 [SEED]

prints the tally of outcomes, the slowest file and the peak memory, and names a mutation that raised anything else.
"""

from __future__ import annotations

import collections
import functools
import io
import random
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from utils.errors import ImageError
from utils.images.decode import decode
from utils.images.formats import identify
from utils.images.preprocess import Preprocess, to_pixels

_MAX_PIXELS = 4_000_000  # small, so that a header edited into a huge picture is refused, not decoded for a minute
_PREPROCESS = Preprocess((32, 32), "shortest", "bicubic", 0)


@functools.cache
def _seed(format: str, mode: str = "RGB", frames: int = 1, **options: object) -> bytes:
    """A 48x40 picture with some noise, so that its file is not tiny."""
    y, x = np.mgrid[0:40, 0:48]
    noise = np.random.default_rng(0).integers(0, 60, (40, 48))
    channels = [x * 4 + noise, y * 4 + noise, (x + y) * 2 + noise, 255 - x * 3]
    pixels = np.stack(channels, axis=2).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3])
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        options["exif"] = exif
    if frames > 1:
        options.update(save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)] * (frames - 1))
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


SEEDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: _seed("JPEG"),
    "jpeg_progressive": lambda: _seed("JPEG", progressive=True),
    "jpeg_gray": lambda: _seed("JPEG", "L"),
    "jpeg_cmyk": lambda: _seed("JPEG", "CMYK"),
    "mpo": lambda: _seed("MPO", frames=2),
    "png": lambda: _seed("PNG"),
    "png_palette": lambda: _seed("PNG", "P"),
    "png_alpha": lambda: _seed("PNG", "RGBA"),
    "png_16": lambda: _seed("PNG", "I;16"),
    "png_animated": lambda: _seed("PNG", frames=3),
    "webp": lambda: _seed("WEBP"),
    "webp_lossless": lambda: _seed("WEBP", "RGBA", lossless=True),
    "webp_animated": lambda: _seed("WEBP", frames=3),
    "gif": lambda: _seed("GIF"),
    "gif_animated": lambda: _seed("GIF", frames=3),
    "bmp": lambda: _seed("BMP"),
    "tiff": lambda: _seed("TIFF"),
    "tiff_lzw": lambda: _seed("TIFF", compression="tiff_lzw"),
    "tiff_deflate": lambda: _seed("TIFF", "RGBA", compression="tiff_adobe_deflate"),
    "tiff_jpeg": lambda: _seed("TIFF", compression="jpeg"),
    "tiff_16": lambda: _seed("TIFF", "I;16"),
    "avif": lambda: _seed("AVIF", speed=10),
    "ico": lambda: _seed("ICO", "RGBA"),
    "ico_bmp": lambda: _seed("ICO", "RGBA", bitmap_format="bmp"),
    "ppm": lambda: _seed("PPM"),
    "jp2": lambda: _seed("JPEG2000"),
    "j2k": lambda: _seed("JPEG2000", no_jp2=True),
}


def mutate(rng: random.Random) -> tuple[str, bytes]:
    """A seed's name and its file after one to three mutations."""
    name = rng.choice(list(SEEDS))
    data = bytearray(SEEDS[name]())
    for _ in range(rng.randint(1, 3)):
        rng.choice([_flip_bits, _cut, _splice, _edit_header, _repeat])(data, rng)
    return name, bytes(data)


def _flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 3, 30])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _splice(data: bytearray, rng: random.Random) -> None:
    """Put a piece of any seed, or noise, over or into the file."""
    other = rng.choice([SEEDS[rng.choice(list(SEEDS))](), rng.randbytes(64)])
    start, length = rng.randrange(len(other)), rng.randint(1, 200)
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.choice([0, length])] = other[start : start + length]


def _edit_header(data: bytearray, rng: random.Random) -> None:
    """Overwrite 1, 2 or 4 bytes near the start by a number that decoders may trip over."""
    width = rng.choice([1, 2, 4])
    number = rng.choice([0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 1000, 65_000])
    at = rng.randrange(min(len(data), 160) + 1)
    data[at : at + width] = (number % 256**width).to_bytes(width, rng.choice(["big", "little"]))


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = data[start : start + rng.randint(1, 100)] * rng.randint(1, 20)


def outcome(data: bytes, min_side: int | None) -> str:
    """ "stored" or the reason; anything but pixels or an ImageError is raised."""
    try:
        identify(io.BytesIO(data))
        image = decode(io.BytesIO(data), _MAX_PIXELS, min_side)
    except ImageError as error:
        return error.reason
    pixels = to_pixels(image, _PREPROCESS)
    assert image.mode == "RGB" and pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    return "stored"


def run(count: int, seed: int) -> collections.Counter[str]:
    """The tally of `count` mutations. Raises what a decoder lets through, naming the mutation."""
    tally: collections.Counter[str] = collections.Counter()
    for number in range(count):
        rng = random.Random(seed * 1_000_000_007 + number)
        name, data = mutate(rng)
        try:
            tally[outcome(data, rng.choice([None, 8]))] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}, a {name}") from error
    return tally


def _main(count: int, seed: int = 0) -> None:
    tally: collections.Counter[str] = collections.Counter()
    unaccounted, slowest_s = 0, 0.0
    start = time.monotonic()
    for number in range(count):
        rng = random.Random(seed * 1_000_000_007 + number)
        name, data = mutate(rng)
        before = time.monotonic()
        try:
            tally[outcome(data, rng.choice([None, 8]))] += 1
        except Exception as error:
            unaccounted += 1
            print(f"mutation {number}, a {name}: {type(error).__name__}: {error}")
        slowest_s = max(slowest_s, time.monotonic() - before)
    for reason, times in tally.most_common():
        print(f"{times:8} {reason}")
    print(
        f"{count} mutations in {time.monotonic() - start:.0f} s, {unaccounted} unaccounted, slowest {slowest_s:.2f} s"
    )
    print(f"peak memory {_peak_bytes() / 1e6:.0f} MB")


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    _main(*(int(argument) for argument in sys.argv[1:]))
