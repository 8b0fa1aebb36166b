"""Real photos without network: those that scikit-image ships, each in many seeded variations."""

from __future__ import annotations

import importlib.resources
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

# Files in skimage/data. Drawings and test charts are left out, and one of the two views of the motorcycle.
# fmt: off
PHOTOS = [
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "microaneurysms.png", "moon.png",
    "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
]
# fmt: on
SIDE = 512  # pixels: larger photos are made smaller first; variations stay quick, and larger than any model's input
FORMATS = (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"))  # in turn, so that all of them are met


class Variation(NamedTuple):
    """One image: its file name, the photo that it shows, how it differs from it, and its encoded bytes."""

    name: str
    photo: str
    kind: str
    data: bytes


def load(file_name: str) -> Image.Image:
    """One of PHOTOS, RGB, at most SIDE pixels wide and high."""
    with importlib.resources.files("skimage.data").joinpath(file_name).open("rb") as file:
        image = Image.open(file).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return image


def variations(photos: Sequence[str] = PHOTOS, seed: int = 0) -> Iterator[Variation]:
    """Each photo in every kind of KINDS, the original first; the same for the same seed."""
    for file_name in photos:
        photo = file_name.partition(".")[0]
        image = load(file_name)
        for index, (kind, change) in enumerate(KINDS.items()):
            rng = np.random.default_rng([seed, zlib.crc32(f"{photo}/{kind}".encode())])
            form, extension = FORMATS[index % len(FORMATS)]
            name = f"{photo}-{kind.replace(' ', '-')}{extension}"
            yield Variation(name, photo, kind, encode(change(image, rng), form))


def details(n: int, photos: Sequence[str] = PHOTOS, seed: int = 0) -> Iterator[Variation]:
    """n hard views of each photo: a small part of it, changed by chance; the same for the same seed."""
    for file_name in photos:
        photo = file_name.partition(".")[0]
        image = load(file_name)
        for number in range(n):
            rng = np.random.default_rng([seed, zlib.crc32(f"{photo}/detail {number}".encode())])
            yield Variation(
                f"{photo}-detail-{number}.jpg", photo, f"detail {number}", encode(_detail(image, rng), "JPEG")
            )


def encode(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form, quality=85)
    return file.getvalue()


def thumbnail(data: bytes, side: int = 8) -> np.ndarray:
    """The coarsest view of an image: (side * side,) float32 grays, mean 0, length 1."""
    gray = Image.open(io.BytesIO(data)).convert("L").resize((side, side), Image.Resampling.BOX)
    values = np.asarray(gray, dtype=np.float32).ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def precision_at(
    k: int, vectors: np.ndarray, photos: Sequence[str], asked: Sequence[int] | slice = slice(None)
) -> float:
    """Share of images of the same photo among each image's k nearest others; vectors (N, D), L2-normalized.

    asked: rows of the images that are asked for; all by default.
    """
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    labels = np.asarray(photos)
    return float((labels[nearest] == labels[:, None])[asked].mean())


# --- the kinds of variation: image, rng -> image ----------------------------------------------------------------------
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _crop(low: float, high: float) -> Change:
    """A part whose sides are `low` to `high` of the photo's, anywhere in it."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = (round(side * rng.uniform(low, high)) for side in image.size)
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        return image.crop((int(left), int(top), int(left) + width, int(top) + height))

    return change


def _tilt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by 15 to 40 degrees either way, and cut so that no corner stays empty."""
    angle = rng.uniform(15, 40) * rng.choice([-1, 1])
    width, height = (round(side * 0.6) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.rotate(angle, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))


def _light(low: float, high: float) -> Change:
    return lambda image, rng: ImageEnhance.Brightness(image).enhance(rng.uniform(low, high))


def _shadow(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Light from one side: a ramp from 25% to 125% in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    ramp = 0.75 + 0.5 * np.clip(x * np.cos(angle) + y * np.sin(angle), -1, 1)
    return Image.fromarray(np.clip(np.asarray(image) * ramp[..., None], 0, 255).astype(np.uint8))


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    noisy = np.asarray(image) + rng.normal(0, 15, (image.height, image.width, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _then(*changes: Change) -> Change:
    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for step in changes:
            image = step(image, rng)
        return image

    return change


def _flip(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image)


def _turn(degrees: int) -> Change:
    return lambda image, _rng: image.rotate(degrees, expand=True)


KINDS: dict[str, Change] = {
    "original": lambda image, _rng: image,
    "flip": _flip,
    "crop": _crop(0.6, 0.8),
    "close crop": _crop(0.4, 0.6),
    "flipped crop": _then(_flip, _crop(0.5, 0.7)),
    "quarter turn": _turn(90),
    "upside down": _turn(180),
    "turned crop": _then(_turn(270), _crop(0.5, 0.7)),
    "tilt": _tilt,
    "dark": _then(_crop(0.7, 0.9), _light(0.25, 0.45)),
    "bright": _then(_crop(0.7, 0.9), _light(1.4, 1.8)),
    "shadow": _then(_flip, _shadow),
    "gray": lambda image, _rng: ImageOps.grayscale(image).convert("RGB"),
    "blurred": _then(_flip, _crop(0.6, 0.8), lambda image, _rng: image.filter(ImageFilter.GaussianBlur(2))),
    "noisy": _then(_crop(0.6, 0.8), _noise),
    "squeezed": lambda image, _rng: image.resize((image.width, image.height * 2 // 3)),
}


def _detail(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of a photo, tilted, that a model easily takes for a part of another."""
    part = _tilt(_crop(0.35, 0.7)(image, rng), rng)
    for kind in ("flip", "gray", "blurred"):
        if rng.random() < 0.5:
            part = KINDS[kind](part, rng)
    return _light(0.5, 1.5)(part, rng)
