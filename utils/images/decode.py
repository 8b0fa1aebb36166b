"""Decode image bytes from unknown sources to upright RGB pixels, or raise an ImageError."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import ImageError
from utils.images.color import to_srgb
from utils.images.formats import identify, is_cut_off
from utils.images.metadata import (
    AVIF_HEAD,
    Metadata,
    avif_profile,
    has_all_scans,
    read_orientation,
    shown_icon,
    split_jpeg,
    split_png,
)

# A JPEG is decoded at the smallest scale that keeps DRAFT times the side that the caller needs. With EfficientNet-Lite0
# on 152 photo crops, 450 to 2,000 pixels high, the cosine to the full decode was below 0.999 for 39 crops with DRAFT 2
# and for 10 crops with DRAFT 3, as with Pillow's best reduction. Both decode photos of 12 megapixels at 1/4.
DRAFT = 3
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
_N_FILL = 64  # bytes appended to a JPEG without end marker
_MIN_ZEROS = 64  # this many zeros at the end of a file are not coded pixels
_MAX_SCANS = 500  # of a progressive JPEG (10 are usual): a scan of a few bytes can cost a pass over all pixels
# Words in Pillow's messages about a file that ends too early.
_CUT_OFF = ("runcated", "not enough image data", "buffer is not large enough", "Reached EOF", "but only got")


def decode(file: BinaryIO, max_pixels: int, min_side: int | None = None) -> Image.Image:
    """Decode the first frame to RGB as browsers show it: upright, sRGB, transparency on white, 16 bits scaled to 8.

    `min_side`: pixels that the caller needs on the shortest side. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size
    if DRAFT * min_side pixels are left. Raises ImageError: not_an_image, too_many_pixels, truncated, bad_image.
    """
    with _opened(file, max_pixels) as (image, metadata):
        if min_side:
            image.draft("RGB", (DRAFT * min_side, DRAFT * min_side))
        image.load()
        color, alpha = _channels(image)
        rgb = to_srgb(color, metadata.profile)
        if alpha:
            white = Image.new("RGB", rgb.size, (255, 255, 255))
            white.paste(rgb, mask=alpha)
            rgb = white
        return _upright(rgb, metadata.orientation)


def decode_within(file: BinaryIO, max_pixels: int, max_side: int) -> Image.Image:
    """Like decode(), but scaled to at most `max_side` pixels per side, and RGBA if anything is transparent."""
    with _opened(file, max_pixels) as (image, metadata):
        ratio = min(1, max_side / max(image.size))
        size = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
        image.draft("RGB", size)
        image.load()
        color, alpha = _channels(image)
        shown = to_srgb(color if color.size == size else color.resize(size, reducing_gap=2), metadata.profile)
        if alpha and alpha.getextrema() != (255, 255):
            shown.putalpha(alpha if alpha.size == size else alpha.resize(size, reducing_gap=2))
        return _upright(shown, metadata.orientation)


@contextlib.contextmanager
def _opened(file: BinaryIO, max_pixels: int) -> Iterator[tuple[Image.Image, Metadata]]:
    """Open an image without decoding its pixels. Every exception of a decoder in the block becomes an ImageError."""
    name, _ = identify(file)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd or large files; max_pixels limits the size
    try:
        yield _open_with_metadata(file, name, max_pixels)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    except MemoryError:
        raise ImageError("bad_image", f"{name}: not enough memory") from None
    except Exception as error:
        is_unknown, text = isinstance(error, UnidentifiedImageError), str(error).strip() or type(error).__name__
        text = "unreadable header" if is_unknown else text
        raise ImageError("truncated" if _is_truncated(file, error) else "bad_image", f"{name}: {text}") from None


def _open_with_metadata(file: BinaryIO, name: str, max_pixels: int) -> tuple[Image.Image, Metadata]:
    if name == "ICO":
        file = io.BytesIO(shown_icon(file.read()))
        name, _ = identify(file)
    if name == "PNG":
        data, metadata = split_png(file.read())
        file.seek(0)
        return _open(io.BytesIO(data) if data else file, name, max_pixels), metadata
    if name == "JPEG":
        return _open_jpeg(file, max_pixels)
    if name == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    image: Any = _open(file, name, max_pixels)
    image.info.pop("xmp", None)  # Pillow would rotate a TIFF by its XMP
    profile = image.info.get("icc_profile") or b""
    if name == "WEBP" and getattr(image, "is_animated", False):
        profile, image.rawmode, image._mode = b"", "RGBA", "RGBA"  # around a small first frame, all is transparent
    elif name == "GIF" and (box := image.tile[0].extents) != (0, 0, *image.size):  # the same for a GIF
        frame, image = image.convert("RGBA").crop(box), Image.new("RGBA", image.size)
        image.paste(frame, box)
    if name != "AVIF":  # browsers do not rotate WebP; Pillow rotates TIFF itself, and pillow-heif HEIC
        return image, Metadata(profile=profile)
    file.seek(0)
    exif = image.info.get("exif", b"").removeprefix(b"Exif\0\0")  # with AVIF's own rotation, which Pillow adds
    return image, Metadata(read_orientation(exif), profile or avif_profile(file.read(AVIF_HEAD)))


def _open_jpeg(file: BinaryIO, max_pixels: int) -> tuple[Image.Image, Metadata]:
    data = file.read()
    file.seek(0)
    header, start, metadata = split_jpeg(data)
    try:
        image = _open(file, "JPEG", max_pixels)
    except (OSError, ValueError, LookupError, ArithmeticError):
        if not header:
            raise
        image = _open(io.BytesIO(header + data[start:]), "JPEG", max_pixels)  # without the unreadable metadata
    _check_jpeg(data, start, image)
    if data.rfind(_END_OF_JPEG) < start and _has_all_pixels(header + data[start:]):
        image = _open(io.BytesIO(header + data[start:] + _END_OF_JPEG), "JPEG", max_pixels)
    return image, metadata


def _open(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    # This also limits images inside the file (an icon can contain PNGs). Pillow raises at twice this number.
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    image = Image.open(file, formats=[name])
    if image.width * image.height > max_pixels:
        raise ImageError("too_many_pixels", f"{image.width}x{image.height}")
    return image


def _is_truncated(file: BinaryIO, error: Exception) -> bool:
    """Whether a decoder failed because the file ends too early."""
    if isinstance(error, EOFError | struct.error) or any(words in str(error) for words in _CUT_OFF):
        return True
    position = file.tell()
    file.seek(0)
    data = file.read()
    cut_off = is_cut_off(data)
    if cut_off is None:  # other formats: the decoder needed more of the header
        return isinstance(error, UnidentifiedImageError) and position >= len(data)
    return cut_off


def _check_jpeg(jpeg: bytes, start: int, image: Image.Image) -> None:
    """Raises ImageError for bad files that the decoder accepts: files that end in zeros (preallocated; they decode to
    gray), and files with so many scans that a few megabytes take hours. `start`: position of the first scan."""
    n_zeros = len(jpeg) - len(jpeg.rstrip(b"\0"))
    if n_zeros >= _MIN_ZEROS and jpeg.rfind(_END_OF_JPEG) < start:  # zeros after the end marker are padding
        raise ImageError("truncated", f"JPEG: {n_zeros} zeros in place of its end")
    if image.info.get("progressive") and jpeg.count(_SCAN_OF_JPEG) > _MAX_SCANS:
        raise ImageError("bad_image", f"JPEG: more than {_MAX_SCANS} scans")


def _has_all_pixels(jpeg: bytes) -> bool:
    """Whether a JPEG without end marker has all its pixels: missing pixels would change with the bytes that follow."""
    if not has_all_scans(jpeg):
        return False
    digests = set()
    for byte in (0x00, 0x55, 0xAA):
        file = io.BytesIO(jpeg.removesuffix(b"\xff") + bytes([byte]) * _N_FILL + _END_OF_JPEG)
        try:
            digests.add(hashlib.sha256(Image.open(file, formats=["JPEG"]).tobytes()).digest())
        except (OSError, SyntaxError):
            return False
        if len(digests) > 1:
            return False
    return True


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _channels(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(colors as L, RGB or CMYK; alpha as L, or None if the image has no transparency)."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    is_gray = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.getchannel("R") if is_gray else rgba.convert("RGB"), rgba.getchannel("A")
    if is_gray:
        return image.convert("L"), None
    return image if image.mode in ("RGB", "CMYK") else image.convert("RGB"), None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale gray of more than 8 bits to 8 bits. Integers keep their high byte, as Pillow scales 16-bit RGB.

    32-bit integers count as 16-bit (Pillow opens 16-bit PNG and PPM as 32-bit) unless a value exceeds 65,535. The
    maximum of floats decides whether they range from 0 to 1, to 255 or to 65,535.
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
