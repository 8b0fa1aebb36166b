"""Ids are uuids: as text, as arrays of 16 bytes each, and inside file names that people and tools may have changed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_UUID = r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}"
_WHOLE = re.compile(_UUID, re.IGNORECASE)
_INSIDE = re.compile(rf"(?<![0-9a-f]){_UUID}(?![0-9a-f])", re.IGNORECASE)


def is_uuid(text: str) -> bool:
    """Whether `text` is exactly one uuid, and therefore safe in a file name."""
    return _WHOLE.fullmatch(text) is not None


def to_key(id_: str) -> str:
    """The 32 digits of a uuid, in lower case: equal for every way to write it."""
    return id_.replace("-", "").lower()


def in_name(name: str) -> list[str]:
    """The uuids in a file name, as to_key() writes them. A file system may have changed its case and Unicode form."""
    return [to_key(found) for found in _INSIDE.findall(name if name.isascii() else unicodedata.normalize("NFKC", name))]


def to_ids(texts: Sequence[str]) -> np.ndarray:
    """Lower-case uuids with hyphens -> (n,) V16. Raises ValueError for any other text."""
    import numpy as np  # not needed to start ann_dirload.py

    digits = "".join(texts).replace("-", "")
    ids = np.frombuffer(bytes.fromhex(digits) if len(digits) == 32 * len(texts) else b"", "V16")
    if from_ids(ids) != list(texts):
        raise ValueError("an id is not a lower-case uuid with hyphens")
    return ids


def from_ids(ids: np.ndarray) -> list[str]:
    """(n,) V16 -> lower-case uuids with hyphens."""
    digits = ids.tobytes().hex()
    parts = (digits[i : i + 32] for i in range(0, len(digits), 32))
    return [f"{d[:8]}-{d[8:12]}-{d[12:16]}-{d[16:20]}-{d[20:]}" for d in parts]
