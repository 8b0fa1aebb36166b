"""What embedding takes, wherever it is done, and what a collection remembers of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NamedTuple

from utils.download import DownloadLimits


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


def facts(encoder: Any) -> dict[str, Any]:
    """What a collection remembers of the model besides its identity."""
    preprocess = json.dumps(asdict(encoder.preprocess))
    return {"dimension": encoder.dimension, "precision": encoder.precision, "preprocess": preprocess}
