"""Image bytes of unknown origin -> RGB pixels, cut exactly as open_clip's own transform does, or an ImageError."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import ImageError
from utils.images.formats import ended_early, extension, identify
from utils.images.preprocess import Preprocess, to_pixels

__all__ = ["Preprocess", "decode", "extension", "to_pixels"]

# Of 152 views of photos, 450 to 2,000 pixels high, EfficientNet-Lite0 saw 39 at a cosine below 0.999 of the full
# decode with twice the size left, and 10 with three times (as many as with Pillow's best reduction; the model moves
# more if pixels move by 1 of 255). Photos of 12 megapixels are decoded at 1/4 with either.
DRAFT = 3
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_END_OF_JPEG, _SCAN_OF_JPEG = b"\xff\xd9", b"\xff\xda"  # markers; the coded pixels never hold these bytes
_ZEROS = 64  # so many at the end of a file are no pixels
_MAX_SCANS = 500  # of a progressive JPEG, usually 10: each can make the decoder pass over all pixels for a few bytes


def decode(file: BinaryIO, max_pixels: int, min_side: int | None = None) -> Image.Image:
    """The first frame as RGB: upright, on white where transparent, 16 bits scaled to 8, its ICC profile ignored.

    A caller that needs only `min_side` pixels on the shortest side gets a JPEG decoded at 1/2, 1/4 or 1/8, with
    DRAFT times that left. Raises ImageError: not_an_image, too_many_pixels, truncated, bad_image.
    """
    name, _ = identify(file)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on odd files and large ones; we have our own cap
    with _decoder_errors(file, name):
        # Also guards what plugins open inside (icons hold PNGs); Pillow raises at twice this number.
        Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
        image: Image.Image = Image.open(file, formats=[name])
        if image.width * image.height > max_pixels:
            raise ImageError("too_many_pixels", f"{image.width}x{image.height}")
        if name == "JPEG":
            _check_jpeg(file, image)
        if min_side:
            image.draft("RGB", (DRAFT * min_side, DRAFT * min_side))
        image.load()
        return _to_rgb(_upright(image))


@contextlib.contextmanager
def _decoder_errors(file: BinaryIO, name: str) -> Iterator[None]:
    """Whatever a decoder raises is the image's fault, and becomes an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    except MemoryError:
        raise ImageError("bad_image", f"{name}: not enough memory") from None
    except Exception as error:
        text = "unreadable header" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise ImageError("truncated" if ended_early(file, error) else "bad_image", f"{name}: {text}") from None


def _check_jpeg(file: BinaryIO, image: Image.Image) -> None:
    """Raises ImageError for what the decoder would take: zeros in place of the end, as preallocated files have (they
    decode to gray), and very many passes over the picture (hours in a few megabytes)."""
    position = file.tell()  # where the header ends
    file.seek(0)
    data = file.read()
    file.seek(position)
    written = data.rstrip(b"\0")
    if (
        len(data) - len(written) >= _ZEROS and _END_OF_JPEG not in written[position:]
    ):  # behind the end zeros are padding
        raise ImageError("truncated", f"JPEG: {len(data) - len(written)} zeros in place of its end")
    if image.info.get("progressive") and data.count(_SCAN_OF_JPEG) > _MAX_SCANS:
        raise ImageError("bad_image", f"JPEG: more than {_MAX_SCANS} scans")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; EXIF that cannot be read says nothing. (TIFF turns itself when loaded.)"""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the pixels are fine; viewers ignore broken EXIF, too
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits: the high byte, as Pillow itself does for 16-bit RGB. Integers of 32 bits count as
    16-bit ones (PNG and PPM come so) unless they are larger; floats as 0 to 1, unless they are larger."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        values = values * (255 if values.max() <= 1 else 1 if values.max() <= 255 else 255 / 65535)
    else:
        values = values >> (8 if image.mode.startswith("I;16") or values.max() <= 0xFFFF else 24)
    gray = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
    return gray
