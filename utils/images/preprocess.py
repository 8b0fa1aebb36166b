"""The inference transforms of open_clip and timm up to ToTensor, pixel for pixel, without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

_MAX_ASPECT = 100  # a longer image would be resized to gigabytes, only for the crop to keep one square


@dataclass(frozen=True)
class Preprocess:
    """A model's image settings: `size` is (H, W); `resize_mode` is shortest, longest or squash, as in open_clip.

    `resize` is the (H, W) before the crop to `size`, for timm; None: equal to `size`.
    """

    size: tuple[int, int]
    resize_mode: str
    interpolation: str
    fill_color: int
    resize: tuple[int, int] | None = None

    @property
    def min_side(self) -> int:
        """Pixels that the shortest side of an image should have before the resize."""
        return max(self.resize or self.size)


def to_pixels(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Resize and crop an RGB image to (H, W, 3) uint8.

    Source: open_clip.transform.image_transform_v2 and torchvision's Resize and CenterCrop, rounding included.
    """
    (height, width), (high, wide) = preprocess.size, preprocess.resize or preprocess.size
    resample = Image.Resampling.BILINEAR if preprocess.interpolation == "bilinear" else Image.Resampling.BICUBIC
    if preprocess.resize_mode == "squash":
        return np.asarray(_center_crop(_resized(image, (wide, high), resample), height, width, 0))
    if preprocess.resize_mode == "longest":
        ratio = max(image.height / high, image.width / wide)
        size = round(image.width / ratio), round(image.height / ratio)
        return np.asarray(_center_crop(_resized(image, size, resample), height, width, preprocess.fill_color))
    image = _without_extremes(image)
    if high == wide:
        short, long = min(image.size), max(image.size)
        size = (high, int(high * long / short))
        size = size if image.width <= image.height else (size[1], size[0])
    else:  # open_clip's own class for this case is always bicubic
        ratio = min(image.height / high, image.width / wide)
        size, resample = (round(image.width / ratio), round(image.height / ratio)), Image.Resampling.BICUBIC
    return np.asarray(_center_crop(_resized(image, size, resample), height, width, 0))


def _without_extremes(image: Image.Image) -> Image.Image:
    """Crop an image to its middle if one side is more than 100 times as long as the other."""
    limit = _MAX_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    left, top = max(0, image.width - limit) // 2, max(0, image.height - limit) // 2
    return image.crop((left, top, left + min(image.width, limit), top + min(image.height, limit)))


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    size = max(1, size[0]), max(1, size[1])
    return image if image.size == size else image.resize(size, resample)


def _center_crop(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    """The middle (height, width) of an image, padded with gray level `fill` where the image is smaller."""
    across, down = max(0, width - image.width), max(0, height - image.height)
    if across or down:
        border = (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2)
        image = ImageOps.expand(image, border, fill=(fill, fill, fill))
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    if image.size == (width, height):
        return image
    return image.crop((left, top, left + width, top + height))
