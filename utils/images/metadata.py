"""Split PNG, JPEG and ICO files into what browsers show and the metadata that decides how they show it.

Pillow rejects a whole image for damaged metadata, so it gets files without metadata. The rules are those of browsers:
only EXIF rotates, the first of several entries counts, and damaged entries are ignored.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from utils.images.color import MAX_PROFILE_BYTES, SRGB_CURVE, is_profile, matrix_profile

_ORIENTATION, _SHORT = 0x0112, 3  # EXIF: tag and type
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD: dict[bytes, int | None] = {b"PLTE": None, b"tRNS": None, b"eXIf": None, b"iCCP": None}  # chunks of any length
_HEAD |= {b"IHDR": 13, b"cICP": 4, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32}  # chunk -> length in bytes
_SRGB_XY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue
_CICP_PRIMARIES = {  # Source: ITU-T H.273, table 2
    1: _SRGB_XY,
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
_CICP_CURVES = {8: (1.0,), 4: (2.2,), 5: (2.8,), 13: SRGB_CURVE} | dict.fromkeys((1, 6, 14, 15), (2.4,))  # table 3
AVIF_HEAD = 65_536  # an AVIF file describes its pixels within these first bytes
_GAMMA_TOLERANCE = 0.05  # a gamma this close to the one of sRGB counts as sRGB
_SOS, _EOI = 0xDA, 0xD9
_NEEDED = {*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD}  # JPEG markers of tables and frames


class Metadata(NamedTuple):
    orientation: int = 1  # EXIF: 1 to 8
    profile: bytes = b""  # ICC


def read_orientation(exif: bytes) -> int:
    """The orientation in EXIF data that begins with its TIFF header; 1 if there is none or the data is damaged."""
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            entry = struct.unpack_from(order + "HHIH", exif, at)
            if entry[:3] == (_ORIENTATION, _SHORT, 1):
                return entry[3] if 1 <= entry[3] <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


def read_layout(name: str, head: bytes) -> tuple[tuple[int, int], Metadata] | None:
    """Read ((width, height), metadata) from the first bytes of a common JPEG (no MPO), a still PNG, a GIF or a BMP.

    Returns None for all other files, and if the header is longer than `head`.
    """
    if name == "JPEG" and b"MPF\0" not in head:
        header, _, metadata = split_jpeg(head)
        for marker, start, end in _jpeg_segments(header):
            if marker in (0xC0, 0xC1, 0xC2) and end - start >= 10:  # Huffman-coded, not lossless
                depth, height, width, n_components = struct.unpack_from(">BHHB", header, start + 4)
                return ((width, height), metadata) if depth == 8 and n_components in (1, 3) else None
    elif name == "PNG" and b"acTL" not in head and (png := split_png(head))[0]:
        return struct.unpack_from(">II", head, 16), png[1]
    elif name == "GIF" and len(head) >= 10:
        return struct.unpack_from("<HH", head, 6), Metadata()
    elif name == "BMP" and len(head) >= 26 and head[14] >= 40:  # else a header of OS/2
        width, height = struct.unpack_from("<ii", head, 18)
        return (abs(width), abs(height)), Metadata()
    return None


def shown_icon(ico: bytes) -> bytes:
    """The image of an ICO file that browsers show, as a PNG or an ICO file: the largest and, among these, the deepest.

    The new ICO's directory gives a depth only to an image with alpha; the others get their transparency from the mask.
    Raises struct.error if the file is cut off.
    """
    directory = struct.iter_unpack("<BBBxHHII", ico[6 : 6 + 16 * int.from_bytes(ico[4:6], "little")])
    entry = max(directory, key=lambda e: ((e[0] or 256) * (e[1] or 256), e[4] or (e[2] or 256).bit_length()))
    size, start = entry[5:]
    image = ico[start : start + size]
    if image.startswith(_PNG):
        return image
    length, width, height, depth = struct.unpack_from("<Iii2xH", image)  # the height includes the mask
    has_alpha = depth == 32 and image[length + 3 : length + 2 * width * height : 4].strip(b"\0")
    return ico[:4] + b"\1\0" + struct.pack("<BBBxHHII", *entry[:4], 32 if has_alpha else 0, size, 22) + image


# --- PNG --------------------------------------------------------------------------------------------------------------
def split_png(data: bytes) -> tuple[bytes, Metadata]:
    """(PNG with only the header, palette, transparency and pixels of the first frame; metadata).

    The PNG is empty if the file has no header or no pixels; the decoder of the original file then names the fault.
    """
    head, control, n_controls = dict[bytes, bytes](), b"", 0
    pixels, frame = bytearray(), bytearray()
    for kind, body, checksum in _png_chunks(data):
        if kind == b"IDAT":
            pixels += body
        elif kind == b"fcTL":
            n_controls, control = n_controls + 1, control or body
        elif kind == b"fdAT" and n_controls == 1:
            frame += body[4:]
        elif not pixels and kind in _HEAD and _HEAD[kind] in (None, len(body)) and checksum == zlib.crc32(kind + body):
            head.setdefault(kind, body)  # the first intact chunk of a kind before the pixels
    header = head.get(b"IHDR", b"")
    if not pixels or not header:
        return b"", Metadata()
    if frame and control[4:20] == header[:8] + bytes(8):  # an animation that does not begin with the default image
        pixels = frame
    kept = {b"IHDR": header, **_palette(header, head), b"IDAT": bytes(pixels), b"IEND": b""}
    file = b"".join([_PNG, *(_png_chunk(kind, body) for kind, body in kept.items())])
    return file, Metadata(read_orientation(head.get(b"eXIf", b"")), _png_profile(head))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Yield (kind, body, checksum) of each chunk, up to IEND."""
    at, kind = len(_PNG), b""
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        yield kind, data[at + 8 : end - 4], int.from_bytes(data[end - 4 : end], "big")
        at = end


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    """Encode a chunk. Pixels get no checksum, because Pillow ignores it and computing it takes time."""
    checksum = 0 if kind == b"IDAT" else zlib.crc32(kind + body)
    return b"".join([struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)])


def _palette(header: bytes, head: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """PLTE and tRNS for Pillow: the last color is repeated up to 256, transparent levels are scaled to 8 bits."""
    depth, color = header[8:10]
    transparency = head.get(b"tRNS", b"")
    if color == 3 and len(palette := head.get(b"PLTE", b"")) >= 3:
        n_colors = len(palette) // 3
        before = list(head)[: list(head).index(b"PLTE")]
        kept = {b"PLTE": palette[: 3 * n_colors] + palette[3 * n_colors - 3 : 3 * n_colors] * (256 - n_colors)}
        if 0 < len(transparency) <= 256 and b"tRNS" not in before:
            kept[b"tRNS"] = transparency[:n_colors].ljust(n_colors, b"\xff")
            kept[b"tRNS"] += kept[b"tRNS"][-1:] * (256 - n_colors)
        return kept
    if color == 0 and len(transparency) >= 2:
        level = int.from_bytes(transparency[:2], "big") * {2: 85, 4: 17}.get(depth, 1)
        return {b"tRNS": level.to_bytes(4, "big")[2:]}
    if color == 2 and len(transparency) >= 6:
        start = 1 if depth == 8 else 0
        return {b"tRNS": b"".join(b"\0" + transparency[at + start : at + start + 1] for at in (0, 2, 4))}
    return {}


def _png_profile(head: dict[bytes, bytes]) -> bytes:
    """The ICC profile of the declared color space, empty for sRGB. Precedence: cICP, iCCP, sRGB, gAMA with cHRM."""
    primaries, transfer, matrix, is_full = head.get(b"cICP", bytes(4))
    if (matrix, is_full) == (0, 1) and (profile := cicp_profile(primaries, transfer)) is not None:
        return profile
    profile = _unpacked(head.get(b"iCCP", b""))
    if profile or head.get(b"sRGB", b"\xff") < b"\4" or b"gAMA" not in head:
        return profile
    gamma = int.from_bytes(head[b"gAMA"], "big") / 100_000
    xy = [value / 100_000 for value in struct.unpack(">8I", head[b"cHRM"])] if b"cHRM" in head else None
    if not gamma or (xy is None and abs(2.2 * gamma - 1) <= _GAMMA_TOLERANCE):
        return b""
    try:
        return matrix_profile(xy or _SRGB_XY, (1 / gamma,))
    except ValueError:
        return b""


def _unpacked(iccp: bytes) -> bytes:
    """The profile of an iCCP chunk; empty if the chunk is damaged or the profile too large."""
    name, _, packed = iccp.partition(b"\0")
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    is_whole = 1 <= len(name) <= 79 and packed[:1] == b"\0" and unpacker.eof
    return profile if is_whole and is_profile(profile) else b""


def avif_profile(data: bytes) -> bytes:
    """The ICC profile of the code points in the head of an AVIF file; empty for sRGB. Video curves count as sRGB."""
    start = data.find(b"colrnclx") + 8
    if start < 8 or start + 4 > len(data):
        return b""
    primaries, transfer = struct.unpack_from(">HH", data, start)
    return cicp_profile(1 if primaries == 2 else primaries, 13 if transfer in (1, 2, 6, 14, 15) else transfer) or b""


def cicp_profile(primaries: int, transfer: int) -> bytes | None:
    """The ICC profile of H.273 code points; empty for sRGB, None for unsupported code points (such as HDR)."""
    if primaries not in _CICP_PRIMARIES or transfer not in _CICP_CURVES:
        return None
    if (primaries, transfer) == (1, 13):
        return b""
    return matrix_profile(_CICP_PRIMARIES[primaries], _CICP_CURVES[transfer])


# --- JPEG -------------------------------------------------------------------------------------------------------------
def split_jpeg(data: bytes) -> tuple[bytes, int, Metadata]:
    """(header, start of the first scan, metadata). The header has only tables, the frame, and the JFIF and Adobe
    segments, which determine the colors. Without a scan, the header is empty and the start is 0."""
    kept, exif, parts, n_parts = [data[:2]], b"", dict[int, bytes](), 0
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if marker == _SOS:
            is_whole = sorted(parts) == list(range(1, n_parts + 1))
            profile = b"".join(parts[number] for number in sorted(parts)) if is_whole else b""
            return b"".join(kept), start, Metadata(read_orientation(exif), profile)
        if marker in _NEEDED or _sets_colors(marker, body):
            kept.append(data[start:end])
        elif marker == 0xE1 and body.startswith(b"Exif\0"):
            exif = exif or body[6:]
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            n_parts = n_parts or body[13]
            if body[13] == n_parts:
                parts.setdefault(body[12], body[14:])
    return b"", 0, Metadata()


def _sets_colors(marker: int, body: bytes) -> bool:
    return (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14) or (
        marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment up to the end marker; skip junk and coded pixels between them."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) <= len(data) - 4:
        marker = data[at + 1]
        if marker == _EOI:
            return
        if marker == 0xFF:
            at += 1
        elif marker <= 1 or 0xD0 <= marker <= 0xD8:  # no segment follows
            at += 2
        else:
            end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
            yield marker, at, end
            at = end


def has_all_scans(jpeg: bytes) -> bool:
    """Whether the scans contain every coefficient of every component in full precision."""
    wanted, found = set[tuple[int, int]](), set[tuple[int, int]]()
    for marker, start, end in _jpeg_segments(jpeg):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            wanted = {(component, index) for component in jpeg[start + 10 : end : 3] for index in range(64)}
        elif marker == _SOS:
            *_, first, last, precision = jpeg[start:end]
            components = jpeg[start + 5 : end - 3 : 2]
            if not precision & 15:
                found |= {(component, index) for component in components for index in range(first, last + 1)}
    return wanted <= found
