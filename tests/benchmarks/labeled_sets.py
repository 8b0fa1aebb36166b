"""The two labeled sets on which samplers are compared, frozen: digits, and hard variations of bundled photos.

digits  scikit-learn's 1,797 images, 10 balanced classes; vectors are unit rows of the 64 pixels
photos  2,400 views of 22 photos that scikit-image bundles, 20 to 300 of each; vectors of the offline model
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from utils.images.preprocess import to_pixels

# fmt: off
PHOTOS = [
    "astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "color", "grass", "gravel",
    "hubble_deep_field", "ihc", "logo", "microaneurysms", "moon", "motorcycle_left", "page", "retina", "rocket",
    "text", "horse",
]
# fmt: on
N_PHOTO_VIEWS = 2_400
SIZE_RATIO = 15  # of the largest class to the smallest; sizes fall geometrically
SIDE, BATCH = 224, 32


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D) float32, L2-normalized, and labels (N,) of set `name`; the photos' vectors are cached."""
    vectors, labels = {"digits": _digits, "photos": _photos}[name]()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.float32), labels


def _photos() -> tuple[np.ndarray, np.ndarray]:
    cache = Path(tempfile.gettempdir()) / "bench_samplers_photos_1.npz"  # a new recipe needs a new number
    if not cache.exists():
        labels = np.repeat(np.arange(len(PHOTOS)), _class_sizes())
        vectors = _embed(_views(labels))
        np.savez(cache, vectors=vectors, labels=labels)
    with np.load(cache) as arrays:
        return arrays["vectors"], arrays["labels"]


def _class_sizes() -> np.ndarray:
    """Long-tailed; which photo is how frequent is drawn once, with a fixed seed."""
    weights = SIZE_RATIO ** -np.linspace(0, 1, len(PHOTOS))
    sizes = np.floor(weights / weights.sum() * N_PHOTO_VIEWS).astype(int)
    sizes[0] += N_PHOTO_VIEWS - sizes.sum()
    return np.random.default_rng(0).permutation(sizes)


def _views(labels: np.ndarray) -> Iterator[Image.Image]:
    """A hard view of each label's photo, one after another."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    photos = [Image.open(next(folder.glob(f"{name}.*"))).convert("RGB") for name in PHOTOS]
    rng = np.random.default_rng(1)
    for label in labels:
        yield _view(photos[label], rng)


def _view(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A small crop, rotated; then, each by chance: mirrored, gray, blurred, darker or lighter, noisy."""
    side = int(min(photo.size) * rng.uniform(0.2, 0.6))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    image = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-45, 45), Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.5, 1.5))
    noise = rng.normal(0, 255 * rng.uniform(0, 0.08), (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _embed(images: Iterable[Image.Image]) -> np.ndarray:
    """(N, 1280) image embeddings by the offline model with real weights, L2-normalized."""
    from tests.support import offline_model
    from utils.embedding import encoder

    with tempfile.TemporaryDirectory() as folder:
        model = encoder.load(f"local-dir:{offline_model.build(Path(folder))}", "", "cpu", "fp32")
    pixels = np.stack([to_pixels(image, model.preprocess) for image in images])
    return np.concatenate([model.encode(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])
