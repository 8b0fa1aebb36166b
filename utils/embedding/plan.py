"""What embedding takes, wherever it is done, and what a collection remembers of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from utils.embedding.fetcher import Result
from utils.web.download import DownloadLimits

NO_NUMBERS = "the forward pass gives no numbers"  # why an image has no vector


class Plan(NamedTuple):
    """`settled` is the precision that the collection is known to bear, "" if none is yet."""

    model: tuple[str, str, str, str]  # name, pretrained, device, precision
    settled: str
    limits: DownloadLimits
    max_pixels: int
    cache: tuple[str, int]  # folder, most bytes
    n_threads: int
    per_host: int
    batch_size: int


def encode(encoder: Any, plan: Plan, batch: list[Result]) -> np.ndarray:
    """(B, D) float32 vectors of a batch, NaN where the model fails; the first batch of a run settles the precision.

    Raises UserError if the precision that was asked for is not true enough.
    """
    pixels = np.stack([result.pixels for result in batch])
    encoder.settle_precision(pixels, may_fall_back=plan.model[-1] == "auto")
    return encoder.encode_each(pixels)


def facts(encoder: Any) -> dict[str, Any]:
    """What a collection remembers of the model besides its identity; the dimension is known once it has encoded."""
    preprocess = json.dumps(asdict(encoder.preprocess))
    return {"dimension": encoder.dimension, "precision": encoder.precision, "preprocess": preprocess}
