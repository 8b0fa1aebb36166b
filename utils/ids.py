"""Ids: uuids, found again in the names of files and folders."""

from __future__ import annotations

import re
import unicodedata

_UUID = r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}"
_WHOLE = re.compile(_UUID, re.IGNORECASE)
_INSIDE = re.compile(rf"(?<![0-9a-f]){_UUID}(?![0-9a-f])", re.IGNORECASE)


def is_uuid(text: str) -> bool:
    """Whether `text` is a uuid and nothing else, so that it is safe as a part of a file name."""
    return _WHOLE.fullmatch(text) is not None


def in_name(name: str) -> list[str]:
    """The uuids in a file name, in lower case; the name may have been through any file system (case, Unicode form)."""
    return [found.lower() for found in _INSIDE.findall(name if name.isascii() else unicodedata.normalize("NFKC", name))]
