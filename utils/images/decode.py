"""Decode image bytes from unknown sources to upright RGB pixels, or raise an ImageError."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import ImageError
from utils.images.formats import identify, is_cut_off

# A JPEG is decoded at the smallest scale that keeps DRAFT times the side that the caller needs. With EfficientNet-Lite0
# on 152 photo crops, 450 to 2,000 pixels high, the cosine to the full decode was below 0.999 for 39 crops at 2 and for
# 10 at 3, as many as with Pillow's best reduction. Photos of 12 megapixels are decoded at 1/4 either way.
DRAFT = 3
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> the transpose that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_END_OF_JPEG, _SCAN_OF_JPEG = b"\xff\xd9", b"\xff\xda"  # markers; coded pixels never contain these bytes
_MIN_ZEROS = 64  # this many zeros at the end of a file are not coded pixels
_MAX_SCANS = 500  # of a progressive JPEG, which has about 10: each scan of a few bytes can cost a pass over all pixels
# In the messages of Pillow about a file that ends too early.
_CUT_OFF = ("runcated", "not enough image data", "buffer is not large enough", "Reached EOF", "but only got")


def decode(file: BinaryIO, max_pixels: int, min_side: int | None = None) -> Image.Image:
    """The first frame as RGB: upright, on white where transparent, 16 bits scaled to 8, its ICC profile ignored.

    `min_side`: pixels that the caller needs on the shortest side. A JPEG is then decoded at 1/2, 1/4 or 1/8, with at
    least DRAFT * min_side pixels left. Raises ImageError: not_an_image, too_many_pixels, truncated, bad_image.
    """
    name, _ = identify(file)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd or large files; max_pixels is the limit
    with _decoder_errors(file, name):
        # Also limits pictures inside the file (an icon holds PNGs); Pillow raises at twice this number.
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
    """Turns every exception of a decoder into an ImageError."""
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
        raise ImageError("truncated" if _is_truncated(file, error) else "bad_image", f"{name}: {text}") from None


def _is_truncated(file: BinaryIO, error: Exception) -> bool:
    """Whether a decoder failed because the file ends too early."""
    if isinstance(error, EOFError) or any(words in str(error) for words in _CUT_OFF):
        return True
    position = file.tell()
    file.seek(0)
    data = file.read()
    cut_off = is_cut_off(data)
    if cut_off is None:  # the decoder looked for more of the header
        return isinstance(error, UnidentifiedImageError) and position >= len(data)
    return cut_off


def _check_jpeg(file: BinaryIO, image: Image.Image) -> None:
    """Raises ImageError for files that the decoder would accept: with zeros in place of their end (a preallocated file,
    which decodes to gray), or with so many scans that a few megabytes take hours."""
    position = file.tell()  # where the header ends
    file.seek(0)
    data = file.read()
    file.seek(position)
    written = data.rstrip(b"\0")
    n_zeros = len(data) - len(written)
    if n_zeros >= _MIN_ZEROS and _END_OF_JPEG not in written[position:]:  # zeros after the end marker are padding
        raise ImageError("truncated", f"JPEG: {n_zeros} zeros in place of its end")
    if image.info.get("progressive") and data.count(_SCAN_OF_JPEG) > _MAX_SCANS:
        raise ImageError("bad_image", f"JPEG: more than {_MAX_SCANS} scans")


def _upright(image: Image.Image) -> Image.Image:
    """Rotated by its EXIF orientation; unreadable EXIF is ignored. (Pillow rotates a TIFF when it loads it.)"""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # viewers ignore broken EXIF, too
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
    """Scale gray of more than 8 bits: integers to their high byte, as Pillow scales 16-bit RGB.

    32-bit integers are taken for 16-bit ones (Pillow opens PNG and PPM so) unless a value exceeds 65,535. Floats range
    from 0 to 1, else to 255, else to 65,535, by their maximum.
    """
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
