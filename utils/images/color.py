"""Convert images to sRGB from the color space that their file declares, as browsers do."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4_000_000  # larger profiles are ignored; printer profiles have 0.5 to 2.5 MB
_CHANNELS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # color space of a profile -> Pillow's mode
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC  # without black point compensation, as in browsers
_SAME = 1  # of 255: a profile that changes no color by more than this counts as sRGB and is skipped
_D50 = np.array([0.9642, 1.0, 0.8249])  # white point of every ICC profile
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an L, RGB or CMYK image to sRGB. A `profile` that is damaged or for other channels is ignored."""
    mode, transform = _transform(profile)
    if mode == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    if transform is None or image.mode != mode:
        return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies
    return ImageCms.applyTransform(image, transform) or image


def is_srgb(profile: bytes) -> bool:
    """Whether to_srgb() changes no color of an image with this profile."""
    return _transform(profile)[1] is None


@functools.lru_cache(maxsize=16)  # photos of one camera or site share a profile
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(Pillow mode of the profile's color space, "" if unusable; transform to sRGB, None if it changes nothing)."""
    if not is_profile(profile):
        return "", None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _CHANNELS.get(source.profile.xcolor_space.strip(), "")
        if not mode:
            return "", None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", _INTENT)
        sample = _sample(mode)
        moved = np.asarray(ImageCms.applyTransform(sample, transform)) - np.asarray(sample.convert("RGB"), int)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "", None
    return mode, transform if np.abs(moved).max() > _SAME else None


def _sample(mode: str) -> Image.Image:
    """An image with a grid of the colors of `mode`."""
    n = len(mode) if mode != "L" else 1
    levels = np.linspace(0, 255, 17 if n > 1 else 256).astype(np.uint8)
    return Image.frombytes(mode, (len(levels) ** n, 1), np.stack(np.meshgrid(*[levels] * n), -1).tobytes())


def is_profile(data: bytes) -> bool:
    """Whether `data` starts like an ICC profile, is not cut off, and has at most MAX_PROFILE_BYTES."""
    return data[36:40] == b"acsp" and int.from_bytes(data[:4], "big") <= len(data) <= MAX_PROFILE_BYTES


def matrix_profile(primaries: Sequence[float], curve: Sequence[float]) -> bytes:
    """Build an ICC profile for RGB.

    primaries: x and y of white, red, green and blue. curve: parameters of an ICC parametric curve, a gamma (g,) or
    (g, a, b, c, d). Raises ValueError if the primaries span no color space. Source: ICC.1:2010, 8.3 and 10.18.
    """
    x, y = np.array(primaries, float).reshape(4, 2).T
    with np.errstate(divide="raise", invalid="raise"):
        try:
            xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
            scaled = xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])
            adapt = np.linalg.solve(_BRADFORD, ((_BRADFORD @ _D50) / (_BRADFORD @ xyz[:, 0]))[:, None] * _BRADFORD)
        except (FloatingPointError, np.linalg.LinAlgError) as error:
            raise ValueError(error) from None
    tags = dict(
        zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), (b"XYZ " + bytes(4) + _fixed(c) for c in (*(adapt @ scaled).T, _D50)))
    )
    function = struct.pack(">4s4xH2x", b"para", 0 if len(curve) == 1 else 3) + _fixed(curve)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), function)
    table, bodies, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        table += struct.pack(">4sII", name, start + len(bodies), len(body))
        bodies += body
    kind = b"mntrRGB XYZ " + bytes(12) + b"acsp"
    header = struct.pack(">I4xI", start + len(bodies), 0x04000000) + kind + bytes(28) + _fixed(_D50)
    return header.ljust(128, b"\0") + table + bodies


def _fixed(values: Iterable[float]) -> bytes:
    """Encode numbers as ICC s15Fixed16."""
    return b"".join(struct.pack(">i", round(max(-32_768, min(32_767, float(value))) * 65_536)) for value in values)
