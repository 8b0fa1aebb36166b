"""Damaged metadata costs no picture, and pictures look as browsers show them. Expected values are computed here or by
Chromium; tests/faults/fuzz_metadata.py compares with Chromium itself."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.faults import fuzz_metadata
from tests.support import browser, shown
from tests.support.image_files import cmyk_profile, encoded, exif, jpeg_with, png_chunk, png_chunks, png_with
from utils.errors import ImageError
from utils.images.color import SRGB_CURVE, matrix_profile
from utils.images.decode import decode

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
COLOR = (200, 100, 50)
COLOR_FROM_P3 = (215, 93, 31)  # COLOR in Display P3, as sRGB. Source: colorspace equations of CSS Color 4
GRAY_FROM_LINEAR = 188  # 128 of 255 in linear light


def picture(mode: str = "RGB", side: int = 32) -> Image.Image:
    """Neither symmetric nor flat."""
    y, x = np.mgrid[0:side, 0 : side * 2]
    pixels = np.stack([x * 3, y * 5, 255 * ((x // 7 + y // 5) % 2)], -1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def data_of(image: Image.Image, format: str, **options: object) -> bytes:
    return encoded(image, format, **options).getvalue()


def pixels(data: bytes, min_side: int | None = None) -> np.ndarray:
    return np.asarray(decode(io.BytesIO(data), 1_000_000, min_side)).astype(int)


def reason(data: bytes, min_side: int | None = None) -> str:
    try:
        decode(io.BytesIO(data), 1_000_000, min_side)
    except ImageError as error:
        return error.reason
    return "stored"


def plain(format: str, **options: object) -> bytes:
    return data_of(picture(), format, **options)


def same(data: bytes, other: bytes) -> bool:
    return np.array_equal(pixels(data), pixels(other))


# --- pixels before metadata -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000))),  # as image generators write
        png_chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1), checksum=0),
        png_chunk(b"pHYs", b"\0"),
        png_chunk(b"gAMA", b""),
        png_chunk(b"tRNS", b"\0"),
        png_chunk(b"iCCP", b"name"),
        png_chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(300))[:-5]),
        png_chunk(b"tEXt", b"\xff" * 3_000_000),
        png_chunk(b"acTL", b""),
        png_chunk(b"a\0\1\xff", b"?"),
    ],
)
def test_png_chunks_that_are_long_damaged_or_short_cost_nothing(chunk):
    assert same(png_with(plain("PNG"), chunk), plain("PNG"))


def test_png_chunks_between_the_pixels_cost_nothing():
    data = plain("PNG")
    start = data.index(b"IDAT") - 4
    body = data[start + 8 : -16]
    parts = [png_chunk(b"IDAT", body[:50]), png_chunk(b"tIME", bytes(7)), png_chunk(b"IDAT", body[50:])]
    assert same(data[:start] + b"".join(parts) + data[-12:], data)


@pytest.mark.parametrize(
    "segment",
    [
        (0xED, b"Photoshop 3.0\x008BIM\x07\xdb"),
        (0xE0, b"JFIF\0"),
        (0xE0, b"JFIF\0\1"),
        (0xE1, b"Exif\0\0"),
        (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\1\1" + bytes(200)),
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xEE, b"Adobe"),
        (0xFE, b""),
    ],
)
def test_jpeg_segments_that_are_short_or_odd_cost_nothing(segment):
    assert same(jpeg_with(plain("JPEG"), segment), plain("JPEG"))


def test_jpeg_segments_of_no_length_cost_nothing():
    data = plain("JPEG")
    for length in (b"\0\0", b"\0\1"):
        assert same(data[:2] + b"\xff\xe5" + length + data[2:], data)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}])
def test_a_jpeg_that_lacks_its_end_marker_only_is_whole(options):
    data = plain("JPEG", **options)
    for end in (b"", b"\xff", b"\0\0\0"):
        assert same(data[:-2] + end, data)
        assert np.array_equal(pixels(data[:-2] + end, 5), pixels(data, 5))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
def test_a_jpeg_that_lacks_any_byte_of_its_pixels_is_truncated(options):
    data = plain("JPEG", **options)
    for n in range(3, 60):
        assert {reason(data[:-n]), reason(data[:-n], 5)} == {"truncated"}


def test_a_progressive_jpeg_that_lacks_a_whole_scan_is_truncated():
    data = plain("JPEG", progressive=True)
    assert reason(data[: data.rindex(b"\xff\xda")]) == "truncated"


def test_pictures_whose_pixels_end_early_are_truncated():
    data = png_with(plain("PNG"), png_chunk(b"pHYs", b"", checksum=0))
    assert reason(data[:-40]) == "truncated"
    assert reason(jpeg_with(plain("JPEG"), (0xEE, b"Adobe"))[:-40]) == "truncated"


def test_a_palette_is_read_as_browsers_read_it():
    red, blue, palette = [255, 0, 0], [0, 0, 255], (b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
    assert pixels(png_chunks(3, 1, 8, 3, b"\0\0\1\7", palette).getvalue()).tolist() == [[red, blue, blue]]
    early = png_chunks(2, 1, 8, 3, b"\0\0\1", (b"tRNS", b"\0"), palette).getvalue()
    long = png_chunks(2, 1, 8, 3, b"\0\0\1", palette, (b"tRNS", bytes(300))).getvalue()
    assert pixels(early).tolist() == pixels(long).tolist() == [[red, blue]]


def test_a_transparent_gray_of_few_bits_is_white():
    assert pixels(png_chunks(2, 1, 2, 0, b"\0\x60", (b"tRNS", b"\0\1")).getvalue()).tolist() == [[[255] * 3, [170] * 3]]
    assert pixels(png_chunks(2, 1, 4, 0, b"\0\x52", (b"tRNS", b"\0\5")).getvalue()).tolist() == [[[255] * 3, [34] * 3]]


def test_an_animated_png_shows_its_first_frame_and_not_its_default_image():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    assert pixels(data_of(frames[0], "PNG", **options))[0, 0].tolist() == [255, 0, 0]
    assert pixels(data_of(frames[0], "PNG", default_image=True, **options))[0, 0].tolist() == [0, 255, 0]


# --- orientation ------------------------------------------------------------------------------------------------------
def is_turned(data: bytes) -> bool:
    height, width, _ = pixels(data).shape
    return height > width


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_xmp_turns_nothing(format):
    if format == "PNG":
        data = png_with(plain(format), png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP))
    elif format == "TIFF":
        data = plain(format, tiffinfo={700: XMP})
    else:
        data = plain(format, xmp=XMP)
    assert not is_turned(data)


@pytest.mark.parametrize(
    ("segments", "turned"),
    [
        ([exif(6)], True),
        ([exif(6), exif(1)], True),
        ([exif(1), exif(6)], False),
        ([exif(6, type_=4)], False),
        ([exif(6, count=2)], False),
        ([exif(9)], False),
        ([exif(6)[:20]], True),
        ([exif(6)[:16]], False),
    ],
)
def test_the_first_exif_of_a_jpeg_turns_it_if_it_is_valid(segments, turned):
    assert is_turned(jpeg_with(plain("JPEG"), *((0xE1, b"Exif\0\0" + body) for body in segments))) == turned


def test_exif_of_a_png_counts_before_the_pixels_and_whole():
    data = plain("PNG")
    assert is_turned(png_with(data, png_chunk(b"eXIf", exif(6))))
    assert is_turned(png_with(data, png_chunk(b"eXIf", exif(6)), png_chunk(b"eXIf", exif(1))))
    assert not is_turned(png_with(data, png_chunk(b"eXIf", exif(6), checksum=0)))
    assert not is_turned(png_with(data, png_chunk(b"eXIf", b"Exif\0\0" + exif(6))))
    assert not is_turned(data[:-12] + png_chunk(b"eXIf", exif(6)) + data[-12:])


def test_avif_is_turned_by_its_own_property_and_webp_never():
    tags = Image.Exif()
    tags[0x0112] = 6
    assert not is_turned(plain("WEBP", exif=tags))
    assert not is_turned(plain("AVIF", exif=b"Exif\0\0" + exif(1)).replace(exif(1), exif(6)))
    assert is_turned(plain("AVIF", exif=tags))  # Pillow makes a property of it, and removes it from tags


# --- colors -----------------------------------------------------------------------------------------------------------
def color(format: str, mode: str = "RGB", value: object = COLOR, **options: object) -> list[int]:
    """The middle of an image of one color, decoded."""
    return pixels(data_of(Image.new(mode, (32, 32), value), format, **options))[16, 16].tolist()


def near(found: list[int], expected: object, tolerance: int = 2) -> bool:
    return bool(np.abs(np.array(found) - expected).max() <= tolerance)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_a_profile_other_than_srgb_is_converted(format):
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format in ("JPEG", "AVIF") else {}
    assert near(color(format, icc_profile=matrix_profile(P3, SRGB_CURVE), **options), COLOR_FROM_P3)


def test_a_profile_in_several_jpeg_segments_needs_all_of_them():
    profile, data = matrix_profile(P3, SRGB_CURVE), data_of(Image.new("RGB", (32, 32), COLOR), "JPEG", quality=100)
    first, second = (0xE2, b"ICC_PROFILE\0\1\2" + profile[:99]), (0xE2, b"ICC_PROFILE\0\2\2" + profile[99:])
    assert near(pixels(jpeg_with(data, first, second))[9, 9], COLOR_FROM_P3)
    assert near(pixels(jpeg_with(data, second, first))[9, 9], COLOR_FROM_P3)
    assert near(pixels(jpeg_with(data, first))[9, 9], COLOR)


def test_srgb_itself_and_damaged_profiles_change_no_pixel():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide = matrix_profile(P3, SRGB_CURVE)
    for profile in (srgb, wide[:200], wide.replace(b"acsp", b"none"), b"\xff" * 500, wide.replace(b"RGB ", b"CMYK")):
        assert same(plain("JPEG", icc_profile=profile), plain("JPEG"))


def test_gray_and_transparent_pictures_are_converted_too():
    linear = matrix_profile(P3, (1.0,))
    assert near(color("PNG", "L", 128, icc_profile=linear), GRAY_FROM_LINEAR)
    assert near(color("PNG", "LA", (128, 255), icc_profile=linear), GRAY_FROM_LINEAR)
    assert near(color("PNG", "RGBA", (128, 128, 128, 255), icc_profile=linear), GRAY_FROM_LINEAR)
    assert near(color("PNG", "RGBA", (128, 128, 128, 51), icc_profile=linear), 0.2 * GRAY_FROM_LINEAR + 0.8 * 255)


def test_cmyk_is_converted_by_its_profile_and_without_one_as_ink_on_white():
    gray = cmyk_profile((128, 128, 128))  # L* 50
    assert near(color("JPEG", "CMYK", (255, 0, 0, 0), quality=100, icc_profile=gray), 119, 3)
    assert near(color("JPEG", "CMYK", (0, 0, 0, 0), quality=100, icc_profile=gray), 255, 3)
    assert near(color("JPEG", "CMYK", (255, 0, 0, 0), quality=100), (0, 255, 255), 3)
    assert near(color("JPEG", quality=100, icc_profile=gray), COLOR, 3)  # of other channels: ignored


def png_color(*chunks: tuple[bytes, bytes]) -> list[int]:
    return pixels(png_chunks(1, 1, 8, 2, b"\0" + bytes(COLOR), *chunks).getvalue())[0, 0].tolist()


def test_chunks_of_a_png_name_its_color_space_in_the_order_of_browsers():
    p3_chunk, srgb = (b"cICP", bytes([12, 13, 0, 1])), (b"sRGB", b"\0")
    wide = (b"iCCP", b"name\0\0" + zlib.compress(matrix_profile(P3, SRGB_CURVE)))
    linear, usual = (b"gAMA", struct.pack(">I", 100_000)), (b"gAMA", struct.pack(">I", 45_455))
    primaries = (b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in P3)))
    from_linear = [229, 168, 122]  # [200, 100, 50] / 255 in linear light
    assert near(png_color(p3_chunk), COLOR_FROM_P3) and near(png_color(linear, wide, p3_chunk), COLOR_FROM_P3)
    assert near(png_color(linear, srgb, wide), COLOR_FROM_P3)
    assert png_color(linear, srgb) == png_color(usual) == png_color(primaries) == list(COLOR)
    assert near(png_color(linear), from_linear)
    assert near(png_color(usual, primaries), COLOR_FROM_P3, 8)  # gamma 2.2 is nearly sRGB's curve
    assert near(png_color((b"gAMA", b"\0"), linear, usual), from_linear)
    assert png_color((b"cICP", bytes([1, 13, 0, 1])), linear) == list(COLOR)


def test_code_points_of_an_avif_name_its_color_space():
    data = data_of(Image.new("RGB", (32, 32), COLOR), "AVIF", quality=100)
    start = data.index(b"colrnclx") + 8
    wide = data[:start] + struct.pack(">HH", 12, 13) + data[start + 4 :]
    video = data[:start] + struct.pack(">HH", 1, 1) + data[start + 4 :]
    assert near(pixels(wide)[9, 9], COLOR_FROM_P3) and near(pixels(video)[9, 9], COLOR)


# --- all of it, at random ---------------------------------------------------------------------------------------------
def test_whole_pictures_with_random_metadata_are_stored():
    for number in range(60):
        file = fuzz_metadata.make(number, seed=11)
        assert isinstance(fuzz_metadata.pixels(file.data), np.ndarray), number


@pytest.mark.skipif(browser.find() is None, reason="no Chromium")
def test_pictures_with_random_metadata_are_those_that_chromium_shows(tmp_path: Path):
    with shown.chromium(tmp_path) as show:
        judged = [(number, judgment) for number, _, judgment in fuzz_metadata.run(50, seed=12, show=show)]
    assert not [entry for entry in judged if entry[1][:3].isupper()]
