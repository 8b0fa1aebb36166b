"""The projection as a file: its matrix, the model of its vectors, the groups it learned from, its figures."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import replacing
from utils.store.collection import DERIVED


class Projection(NamedTuple):
    """A learned projection: new vectors are vectors @ matrix.T, brought to unit length."""

    matrix: np.ndarray  # (D, D) float32
    model: dict[str, Any]  # of the vectors, as their collection stores it
    trained_on: list[str]  # main ids of the groups
    figures: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the matrix, which the collection made with it stores."""
        return hashlib.sha256(self.matrix.tobytes()).hexdigest()


def write_projection(path: Path, projection: Projection) -> None:
    """Replace `path`, atomically."""
    texts = {name: json.dumps(getattr(projection, name)) for name in ("model", "trained_on", "figures")}
    with replacing(path, binary=True) as file:
        np.savez(file, matrix=projection.matrix, **texts)  # type: ignore[arg-type]


def read_projection(path: Path) -> Projection:
    """Raises UserError if there is none, or it is damaged."""
    try:
        with np.load(path) as arrays:
            texts = (json.loads(str(arrays[name])) for name in ("model", "trained_on", "figures"))
            return Projection(arrays["matrix"], *texts)
    except FileNotFoundError:
        raise UserError(f"no projection in {path}; run python ann_train.py, or set ANN_PROJECTION_PATH") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"projection {path} is damaged ({error}); run python ann_train.py to make it anew") from None


def projection_of(facts: dict[str, Any], path: Path) -> Projection | None:
    """The projection that made the collection with these facts; None for a collection of embed.py.

    Raises UserError if `path` holds another one.
    """
    if DERIVED not in facts:
        return None
    projection = read_projection(path)
    if projection.digest != facts[DERIVED]:
        raise UserError(
            f"projection {path} is not the one of this collection; run python ann_train.py --apply, or set "
            "ANN_PROJECTION_PATH"
        )
    return projection
