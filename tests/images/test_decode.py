"""utils/images/decode.py: expected pixels are worked out by hand, never by the code under test."""

from __future__ import annotations

import io
import itertools
import struct
import tempfile
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.faults import fuzz_images
from tests.faults.fault_server import photo, png, png_bomb_file
from tests.support.image_files import encoded, heic, png_chunks
from utils.errors import ImageError
from utils.images import formats
from utils.images.decode import decode
from utils.images.formats import identify
from utils.images.preprocess import Preprocess, to_pixels

CAP = 1_000_000
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def pixels(file: io.BytesIO, **options) -> list:
    image = decode(file, CAP, **options)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


# --- golden: one conversion each --------------------------------------------------------------------------------------


def test_gray_becomes_three_equal_channels():
    assert pixels(png_chunks(3, 1, 8, 0, b"\0\x00\x80\xff")) == [[[0] * 3, [128] * 3, [255] * 3]]


def test_one_bit_is_black_and_white():
    assert pixels(png_chunks(3, 1, 1, 0, b"\0\xa0")) == [[list(WHITE), list(BLACK), list(WHITE)]]


def test_16_bit_gray_keeps_its_high_byte():
    assert pixels(png_chunks(4, 1, 16, 0, b"\0" + bytes.fromhex("0000 12ff 8000 ffff"))) == [
        [[0] * 3, [0x12] * 3, [0x80] * 3, [255] * 3]
    ]


def test_16_bit_color_keeps_its_high_byte():
    assert pixels(png_chunks(1, 1, 16, 2, b"\0" + bytes.fromhex("ffff 8012 00ff"))) == [[[255, 0x80, 0]]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_in_both_byte_orders(order):
    values = np.array([[0, 0x1234, 0xFFFF]], dtype=f"{order}u2")
    mode = "I;16" if order == "<" else "I;16B"
    image = Image.frombytes(mode, (3, 1), values.tobytes())
    assert pixels(encoded(image, "TIFF")) == [[[0] * 3, [0x12] * 3, [255] * 3]]


def test_16_bit_gray_with_a_transparent_value_shows_white_there():
    rows = b"\0" + bytes.fromhex("1234 4000")
    assert pixels(png_chunks(2, 1, 16, 0, rows, (b"tRNS", b"\x12\x34"))) == [[list(WHITE), [0x40] * 3]]


def test_32_bit_integers_and_floats_find_their_range():
    wide = Image.fromarray(np.array([[0, 0x40000000, 0x7F000000]], np.int32))
    assert pixels(encoded(wide, "TIFF")) == [[[0] * 3, [0x40] * 3, [0x7F] * 3]]
    unit = Image.fromarray(np.array([[0.0, 0.2, 1.0, np.nan]], np.float32))
    assert pixels(encoded(unit, "TIFF")) == [[[0] * 3, [51] * 3, [255] * 3, [0] * 3]]
    byte = Image.fromarray(np.array([[0.0, 77.0, 255.0, -5.0]], np.float32))
    assert pixels(encoded(byte, "TIFF")) == [[[0] * 3, [77] * 3, [255] * 3, [0] * 3]]


def test_16_bit_ppm():
    assert pixels(io.BytesIO(b"P5 2 1 65535\n\x12\x34\xff\xff")) == [[[0x12] * 3, [255] * 3]]


def test_palette_gives_its_colors():
    palette = (b"PLTE", bytes([*RED, *GREEN, *BLUE]))
    assert pixels(png_chunks(3, 1, 8, 3, b"\0\2\0\1", palette)) == [[list(BLUE), list(RED), list(GREEN)]]


def test_palette_with_transparency_is_laid_on_white():
    palette, alphas = (b"PLTE", bytes([*RED, *BLUE, *GREEN])), (b"tRNS", bytes([0, 51]))
    # blue at 51/255 = 1/5 on white: 255 * 4/5 = 204 in red and green
    assert pixels(png_chunks(3, 1, 8, 3, b"\0\0\1\2", palette, alphas)) == [[list(WHITE), [204, 204, 255], list(GREEN)]]


def test_alpha_is_laid_on_white():
    rows = b"\0" + bytes([*RED, 255, *RED, 0, *BLACK, 51])
    assert pixels(png_chunks(3, 1, 8, 6, rows)) == [[list(RED), list(WHITE), [204] * 3]]


def test_gray_with_alpha_is_laid_on_white():
    assert pixels(png_chunks(3, 1, 8, 4, b"\0\x00\xff\x64\x00\x00\x33")) == [[[0] * 3, list(WHITE), [204] * 3]]


def test_a_transparent_color_is_laid_on_white():
    rows = b"\0" + bytes([*RED, *GREEN])
    assert pixels(png_chunks(2, 1, 8, 2, rows, (b"tRNS", bytes.fromhex("00ff 0000 0000")))) == [
        [[255] * 3, list(GREEN)]
    ]
    assert pixels(png_chunks(2, 1, 8, 0, b"\0\x07\x08", (b"tRNS", b"\0\x07"))) == [[[255] * 3, [8] * 3]]
    assert pixels(png_chunks(2, 1, 1, 0, b"\0\x40", (b"tRNS", b"\0\0"))) == [[[255] * 3, [255] * 3]]


def test_cmyk_tiff_is_ink_on_white():
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 51)]
    image = Image.frombytes("CMYK", (5, 1), bytes(itertools.chain(*inks)))
    assert pixels(encoded(image, "TIFF")) == [[list(WHITE), [0, 255, 255], list(RED), list(BLACK), [204] * 3]]


def test_cmyk_jpeg_as_adobe_writes_it_inverted():
    """An all-cyan picture: Adobe's files store 255 - ink, with a marker that says so."""
    file = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in file.getvalue()[:100]
    assert np.abs(np.array(pixels(file)) - (0, 255, 255)).max() <= 2


# Where the red first pixel of a file is when shown upright. Source: EXIF 2.3, tag 0x0112.
SHOWN = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})],
)
def test_exif_orientation(format, options, orientation):
    unit = 16 if format == "JPEG" else 1  # whole blocks, so that colors survive
    stored = np.full((2 * unit, 3 * unit, 3), BLUE, np.uint8)
    stored[:unit, :unit] = RED
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(stored)
    file = encoded(image, format, exif=exif, **options)
    shown = np.array(pixels(file))
    assert shown.shape[:2] == ((2 * unit, 3 * unit) if orientation < 5 else (3 * unit, 2 * unit))
    row, column = SHOWN[orientation]
    assert np.abs(shown[row, column] - RED).max() < 30
    assert (np.abs(shown - RED).max(axis=2) < 30).sum() == unit * unit


def test_avif_orientation():
    stored = np.full((32, 64, 3), BLUE, np.uint8)
    stored[:16, :16] = RED
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = np.array(pixels(encoded(Image.fromarray(stored), "AVIF", exif=exif, quality=100)))
    assert shown.shape[:2] == (64, 32)
    assert np.abs(shown[2, -3] - RED).max() < 40


def test_broken_exif_changes_nothing():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = bytearray(photo_with(exif))
    start = data.index(b"Exif\0\0") + 6
    data[start : start + 4] = b"nope"
    assert decode(io.BytesIO(bytes(data)), CAP).size == (96, 64)


def photo_with(exif: Image.Exif) -> bytes:
    return encoded(Image.open(io.BytesIO(photo())), "JPEG", exif=exif).getvalue()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_the_first_frame_of_several(format):
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.abs(np.array(pixels(file))[16, 16] - RED).max() < 4


def test_a_gif_with_a_transparent_color_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    assert pixels(encoded(image, "GIF", transparency=0)) == [[list(WHITE), list(BLUE)]]


def test_an_icon_shows_its_largest_picture_on_white():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.putpixel((0, 0), (*RED, 255))
    for options in ({}, {"bitmap_format": "bmp"}):
        shown = np.array(pixels(encoded(image, "ICO", sizes=[(16, 16), (32, 32)], **options)))
        assert shown.shape == (32, 32, 3)
        assert shown[0, 0].tolist() == list(RED) and shown[5, 5].tolist() == list(WHITE)


def icon(*images: tuple[int, int, bytes]) -> io.BytesIO:
    """An ICO file of images (side, bits per pixel as its directory says, data)."""
    directory, start = struct.pack("<HHH", 0, 1, len(images)), 6 + 16 * len(images)
    for side, bits, data in images:
        directory += struct.pack("<BBBBHHII", side, side, 0, 0, 1, bits, len(data), start)
        start += len(data)
    return io.BytesIO(directory + b"".join(data for _, _, data in images))


def icon_bitmap(side: int, bits: int, color: bytes, mask: bytes = b"") -> bytes:
    """All pixels of one color, as 32 bits, or as 8 bits with a palette of one color. `mask`: four bytes per row."""
    head = struct.pack("<IiiHHIIiiII", 40, side, 2 * side, 1, bits, 0, 0, 0, 0, 256 if bits == 8 else 0, 0)
    pixels = color * side * side if bits == 32 else color * 256 + bytes(side * side)
    return head + pixels + (mask or bytes(4)) * side


def test_of_an_icons_images_the_largest_and_deepest_is_shown_whatever_its_directory_says():
    blue, half_red, red = b"\xff\0\0\0", b"\0\0\xff\x80", b"\0\0\xff\0"
    deep, shallow = icon_bitmap(16, 32, half_red), icon_bitmap(16, 8, blue)
    for images in ([(16, 8, shallow), (16, 32, deep)], [(16, 32, deep), (16, 4, shallow)], [(16, 0, deep)]):
        assert np.unique(pixels(icon((8, 32, icon_bitmap(8, 32, blue)), *images))).tolist() == [127, 255]
    without_alpha = pixels(icon((16, 32, icon_bitmap(16, 32, red, b"\xff\0\0\0"))))
    assert (without_alpha[0][7], without_alpha[0][8]) == (list(WHITE), list(RED))
    wide = png_chunks(1, 1, 8, 2, b"\0\xc8\x64\x32", (b"cICP", bytes([12, 13, 0, 1]))).getvalue()
    assert pixels(icon((16, 32, deep), (64, 32, wide))) == pixels(io.BytesIO(wide))
    with pytest.raises(ImageError, match="truncated"):
        decode(io.BytesIO(icon((16, 32, deep)).getvalue()[:30]), CAP)


def test_around_a_first_frame_that_is_smaller_than_the_image_is_white():
    gif = struct.pack("<6sHHBBB", b"GIF89a", 3, 2, 0x80, 0, 0) + bytes([*RED, *BLUE])
    gif += struct.pack("<sHHHHB", b",", 1, 1, 1, 1, 0) + b"\2\2\x44\1\0;"
    assert pixels(io.BytesIO(gif)) == [[list(WHITE)] * 3, [list(WHITE), list(RED), list(WHITE)]]

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body

    frame = encoded(Image.new("RGB", (2, 2), RED), "WEBP", lossless=True).getvalue()[12:]
    frame = bytes(6) + b"\1\0\0\1\0\0" + bytes(4) + frame  # at the left top, 2 x 2
    body = b"WEBP" + chunk(b"VP8X", b"\2\0\0\0\2\0\0\1\0\0") + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", frame) * 2
    assert pixels(io.BytesIO(chunk(b"RIFF", body))) == [[list(RED), list(RED), list(WHITE)]] * 2


def test_heic_is_upright_and_on_white_where_transparent():
    left_red = Image.new("RGB", (64, 32), "blue")
    left_red.paste("red", (0, 0, 32, 32))
    for image in (left_red, left_red.convert("RGBA")):
        shown = np.asarray(decode(heic(image, orientation=6), CAP)).astype(int)  # to be turned by 90 degrees clockwise
        assert shown.shape == (64, 32, 3)
        assert np.abs(shown[8, 16] - (255, 0, 0)).max() < 20 and np.abs(shown[56, 16] - (0, 0, 255)).max() < 20
    clear = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    assert np.asarray(decode(heic(clear), CAP)).min() > 250
    assert reason(heic(left_red).getvalue(), 64 * 32 - 1) == "too_many_pixels"
    assert reason(heic(left_red).getvalue()[:-9]) == "truncated"
    with pytest.raises(ImageError) as raised:
        decode(io.BytesIO(heic(left_red).getvalue()[:-9]), CAP)
    assert "\n" not in raised.value.detail


# --- what does not become pixels --------------------------------------------------------------------------------------


def reason(data: bytes, max_pixels: int = CAP, min_side: int | None = None) -> str:
    try:
        decode(io.BytesIO(data), max_pixels, min_side)
    except ImageError as error:
        return error.reason
    return "stored"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf \n<!DOCTYPE html><html>", "HTML"),
        (b"<head><title>404</title>", "HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?><!-- x --><svg/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b'{"error": 1}', "JSON"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "video"),
        (b"8BPS\0\1", "Photoshop"),
        (b"P100 ways to cook", "unknown"),
        (bytes(100), "unknown"),
    ],
)
def test_what_is_no_image_says_what_it_is(data, kind):
    with pytest.raises(ImageError, match=f"not_an_image: .*{kind}"):
        decode(io.BytesIO(data), CAP)
    with pytest.raises(ImageError, match="not_an_image"):
        identify(io.BytesIO(data))


def test_heic_without_pillow_heif_names_the_remedy(monkeypatch):
    monkeypatch.setattr(formats, "can_read_heif", lambda: False)
    with pytest.raises(ImageError, match="not_an_image: HEIC; pip install pillow-heif makes it readable"):
        decode(heic(), CAP)


@pytest.mark.parametrize("format", ["PCX", "TGA", "EPS", "SGI", "IM", "ICNS", "DDS", "PDF"])
def test_other_formats_that_pillow_reads_are_refused(format):
    assert reason(encoded(Image.new("RGB", (16, 16)), format).getvalue()) == "not_an_image"


def test_the_pixel_cap_is_exact_and_comes_before_decoding():
    assert reason(photo("PNG", (10, 10)), max_pixels=100) == "stored"
    assert reason(photo("PNG", (10, 10)), max_pixels=99) == "too_many_pixels"
    assert reason(photo("PNG", (101, 1)), max_pixels=100) == "too_many_pixels"
    assert reason(photo("JPEG"), max_pixels=96 * 64 - 1, min_side=8) == "too_many_pixels"
    assert reason(png(50_000, 50_000, b""), 100_000_000) == "too_many_pixels"
    assert reason(png_bomb_file(), 100_000_000) == "too_many_pixels"


def test_a_picture_hidden_in_an_icon_counts_too():
    icon = bytearray(encoded(Image.new("RGB", (32, 32)), "ICO", sizes=[(32, 32)]).getvalue())
    start = icon.index(b"\x89PNG")
    hidden = png(50_000, 50_000, zlib.compress(bytes(1000)))
    icon[14:18] = struct.pack("<I", len(hidden))
    assert reason(bytes(icon[:start]) + hidden) == "too_many_pixels"


def test_images_above_pillows_own_warning_pass_without_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = png(12_000, 12_000, b"")  # 144 million, cut off: only the header is looked at
        assert reason(data, 200_000_000) == "truncated"


def test_a_compressed_profile_cannot_fill_the_memory():
    bomb = zlib.compress(bytes(80_000_000), 9)
    for kind in (b"iCCP", b"zTXt"):
        data = png_chunks(1, 1, 8, 0, b"\0\0", (kind, b"x\0\0" + bomb)).getvalue()
        tracemalloc.start()
        assert reason(data) == "stored"
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


def test_a_jpeg_of_a_thousand_scans_is_refused():
    data = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True).getvalue()
    start = data.rindex(b"\xff\xda")
    assert reason(data) == "stored"
    assert reason(data[:start] + data[start:-2] * 1000 + data[-2:]) == "bad_image"


@pytest.mark.parametrize("name", fuzz_images.SEEDS)
def test_a_file_cut_anywhere_fails_and_says_truncated(name):
    data = fuzz_images.SEEDS[name]()
    assert reason(data) == "stored"
    several = name == "mpo" or name.endswith("animated")  # only the first frame has to be whole
    for part in (0.05, 0.2) if several else (0.05, 0.3, 0.5, 0.8, 0.95):
        cut = data[: max(12, int(len(data) * part))]
        assert reason(cut) == "truncated" or (name == "tiff_jpeg" and reason(cut) == "bad_image")


def test_a_jpeg_cut_off_fails_at_every_scale():
    data = photo("JPEG", (800, 600))
    for min_side in (None, 300, 100, 30):
        assert reason(data[:-500], min_side=min_side) == "truncated"


def test_a_jpeg_whose_end_was_never_written_fails():
    data = photo("JPEG", (800, 600))
    assert reason(data[: len(data) // 2] + bytes(len(data) // 2)) == "truncated"
    assert reason(data + bytes(100_000)) == "stored"  # padding behind the end is common, and harmless


def test_every_kind_of_failure_inside_pillow_is_the_images(monkeypatch):
    for error in (MemoryError(), RecursionError("deep"), ZeroDivisionError(), KeyError("x"), OSError(5, "I/O")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(Image, "open", fail)
        assert reason(photo()) == "bad_image"


def test_mutations_end_in_an_image_or_an_error():
    tally = fuzz_images.run(count=400, seed=1)
    assert sum(tally.values()) == 400
    assert tally["stored"] and tally["truncated"] and tally["bad_image"]


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[("jpeg", ".jpg"), ("mpo", ".jpg"), ("png", ".png"), ("webp", ".webp"), ("gif", ".gif"), ("bmp", ".bmp")],
        *[("tiff", ".tif"), ("avif", ".avif"), ("ico", ".ico"), ("ppm", ".ppm"), ("jp2", ".jp2"), ("j2k", ".jp2")],
    ],
)
def test_extensions_come_from_the_content(name, expected):
    assert identify(io.BytesIO(fuzz_images.SEEDS[name]()))[1] == expected


def test_spooled_bodies_are_read_in_memory_and_on_disk():
    for name in fuzz_images.SEEDS:
        for limit in (0, 1):  # 0: never on disk
            with tempfile.SpooledTemporaryFile(max_size=limit) as file:
                file.write(fuzz_images.SEEDS[name]())
                assert decode(file, CAP).mode == "RGB"


def test_a_draft_keeps_three_times_the_side_and_the_picture():
    data = photo("JPEG", (1600, 1200))
    full = decode(io.BytesIO(data), 10 * CAP)
    for min_side, size in ((200, (800, 600)), (100, (400, 300)), (201, (1600, 1200)), (None, (1600, 1200))):
        draft = decode(io.BytesIO(data), 10 * CAP, min_side)
        assert draft.size == size
        preprocess = Preprocess((min_side or 64,) * 2, "shortest", "bicubic", 0)
        difference = to_pixels(draft, preprocess).astype(int) - to_pixels(full, preprocess)
        assert np.abs(difference).max() <= 6


SIZES = [
    (1, 1),
    (2, 1),
    (1, 2),
    (31, 33),
    (100, 63),
    (63, 100),
    (32, 32),
    (64, 64),
    (24, 40),
    (40, 24),
    (900, 10),
    (10, 900),
]


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(32, 32), (33, 33), (40, 24), (24, 40)])
def test_pixels_are_those_of_open_clips_own_transform(resize_mode, interpolation, target):
    transform = pytest.importorskip("open_clip.transform")
    config = transform.PreprocessCfg(
        size=target[0] if target[0] == target[1] else target,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation=interpolation,
        resize_mode=resize_mode,
        fill_color=77,
    )
    theirs = transform.image_transform_v2(config, is_train=False)
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        ours = to_pixels(image, Preprocess(target, resize_mode, interpolation, 77))
        assert ours.shape == (*target, 3) and ours.dtype == np.uint8
        if resize_mode == "longest" and max(width, height) == 900:
            continue  # theirs fails: the short side comes to 0 pixels
        expected = (theirs(image) * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(ours, expected), (width, height)


def test_an_extreme_aspect_costs_no_gigabytes():
    image = Image.new("RGB", (1_000_000, 1), RED)
    for size in ((224, 224), (224, 336)):
        shown = to_pixels(image, Preprocess(size, "shortest", "bicubic", 0))
        assert shown.shape == (*size, 3) and (shown == RED).all()


def test_mutations_are_reproducible():
    assert fuzz_images.run(count=30, seed=7) == fuzz_images.run(count=30, seed=7)
