"""utils/images/copies.py: review copies. Thumbnails are tested with the report."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.image_files import encoded
from utils.errors import ImageError
from utils.images.color import SRGB_CURVE, matrix_profile
from utils.images.copies import shows_everywhere, write_review_copy

SIDE = 64
P3 = matrix_profile((0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), SRGB_CURVE)


def picture(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Red above, blue below."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = pixels[height // 2 :, :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def copy(folder: Path, data: bytes, max_side: int = SIDE) -> tuple[Path, bytes]:
    source = folder / "source"
    source.write_bytes(data)
    path = write_review_copy(source, folder / "0_id", max_side, 1_000_000)
    return path, path.read_bytes()


@pytest.mark.parametrize(
    ("image", "format", "options"),
    [
        (picture(), "JPEG", {}),
        (picture(SIDE, SIDE), "JPEG", {"progressive": True}),
        (picture(mode="L"), "JPEG", {}),
        (picture(), "JPEG", {"exif": exif(1)}),
        (picture(), "PNG", {}),
        (picture(mode="RGBA"), "PNG", {}),
        (picture(mode="P"), "GIF", {}),
        (picture(mode="P"), "GIF", {"save_all": True, "append_images": [picture(mode="P").rotate(180)]}),
        (picture(), "BMP", {}),
    ],
)
def test_what_every_file_manager_shows_is_copied_byte_for_byte(tmp_path, image, format, options):
    data = encoded(image, format, **options).getvalue()
    path, written = copy(tmp_path, data)
    assert written == data
    assert path.suffix == {"JPEG": ".jpg"}.get(format, f".{format.lower()}")
    assert shows_everywhere(io.BytesIO(data), SIDE)


@pytest.mark.parametrize(
    ("image", "format", "options"),
    [
        (picture(), "WEBP", {}),
        (picture(), "WEBP", {"save_all": True, "append_images": [picture().rotate(180)]}),
        (picture(), "AVIF", {}),
        (picture(), "TIFF", {}),
        (picture(), "JPEG2000", {}),
        (picture(), "MPO", {"save_all": True, "append_images": [picture().rotate(180)]}),
        (picture(mode="CMYK"), "JPEG", {}),
        (picture(), "PNG", {"save_all": True, "append_images": [picture().rotate(180)]}),
        (picture(), "JPEG", {"icc_profile": P3}),
        (picture(), "PNG", {"icc_profile": P3}),
        (picture().transpose(Image.Transpose.ROTATE_90), "JPEG", {"exif": exif(6)}),
        (picture().transpose(Image.Transpose.ROTATE_90), "PNG", {"exif": exif(6)}),
        (picture().transpose(Image.Transpose.ROTATE_90), "AVIF", {"exif": exif(6)}),
        (picture().transpose(Image.Transpose.ROTATE_90), "HEIF", {"exif": exif(6).tobytes()}),
        (picture(600, 400), "JPEG", {}),
        (picture(600, 400), "PNG", {}),
        (picture(600, 400, "P"), "GIF", {}),
        (picture(600, 400), "BMP", {}),
    ],
)
def test_all_else_becomes_an_upright_jpeg_within_the_side(tmp_path, image, format, options):
    data = encoded(image, format, **options).getvalue()
    assert not shows_everywhere(io.BytesIO(data), SIDE)
    path, written = copy(tmp_path, data)
    shown = Image.open(io.BytesIO(written))
    assert path.suffix == ".jpg" and shown.format == "JPEG" and shown.mode == "RGB"
    assert not {"icc_profile", "exif"} & set(shown.info)
    assert shown.width == (SIDE if max(image.size) > SIDE else 60) and shown.height == round(shown.width * 2 / 3)
    pixels = np.asarray(shown).astype(int)
    assert np.abs(pixels[3, 20] - (255, 0, 0)).max() < 30 and np.abs(pixels[-4, 20] - (0, 0, 255)).max() < 30


@pytest.mark.parametrize("format", ["WEBP", "AVIF", "TIFF", "PNG"])
def test_transparency_is_kept(tmp_path, format):
    image = picture(600, 400, "RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 300, 400))
    path, written = copy(tmp_path, encoded(image, format).getvalue())
    shown = Image.open(io.BytesIO(written))
    assert path.suffix == ".png" and shown.mode == "RGBA" and shown.size == (64, 43)
    assert shown.getpixel((3, 3))[3] == 0 and shown.getpixel((60, 3))[3] == 255


def test_an_alpha_channel_without_transparency_is_dropped(tmp_path):
    path, _ = copy(tmp_path, encoded(picture(mode="RGBA"), "WEBP").getvalue())
    assert path.suffix == ".jpg"


def test_without_a_side_originals_are_copied(tmp_path):
    data = encoded(picture(600, 400), "WEBP").getvalue()
    assert copy(tmp_path, data, 0) == (tmp_path / "0_id.webp", data)


@pytest.mark.parametrize("side", [0, 30, SIDE])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_image_is_never_copied(tmp_path, format, side):
    data = encoded(picture(), format).getvalue()
    with pytest.raises(ImageError):
        copy(tmp_path, data[: len(data) * 2 // 3], side)
    assert not list(tmp_path.glob("0_*"))
