"""An encoder that needs no torch and no time, so that a kill interrupts storing and not seconds of imports."""

from __future__ import annotations

from typing import Any

import numpy as np

from utils.embedding import encoder
from utils.images.preprocess import Preprocess


class LightEncoder:
    """Vectors are pixels, a few of them."""

    device, dimension, streams, has_choice, has_chosen = "cpu", 192, 1, False, False
    preprocess = Preprocess((32, 32), "shortest", "bicubic", 0)

    def take_share(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return {"dimension": self.dimension, "precision": "fp32"}

    def encode_each(self, pixels: np.ndarray) -> np.ndarray:
        vectors = pixels[:, ::4, ::4].reshape(len(pixels), -1).astype(np.float32) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def install() -> None:
    """Replace the encoder that embed.py loads."""
    encoder.load = lambda *_: LightEncoder()  # type: ignore
