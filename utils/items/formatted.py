"""The formatted data: items with a url and any other fields, their ids, and their metadata as Chroma can hold it."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import ImageError, UserError
from utils.files import read_list

# The one field we add: what Chroma cannot hold, as a JSON object. An item's own field of this name goes into it too.
REST_FIELD = "_rest_json"


def read_items(path: Path) -> Iterator[Any]:
    """The items of a JSON list, or of a .jsonl file, one a line, streamed. Raises UserError where it is broken.

    An item is whatever stands in the list: item_id says whether it is usable.
    """
    if not path.exists():
        raise UserError(
            f"formatted data {path} does not exist; put a JSON list there, "
            '[{"url": "https://...", "any": "metadata"}, ...], or see it all work first: python tests/demo.py'
        )
    if path.suffix == ".jsonl":
        return _read_lines(path)
    return read_list(path, "formatted data")


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # decoded line by line, so that the broken one can be named
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"formatted data {path}, line {number}, is not JSON: {error}") from None


def item_id(item: Any, id_field: str) -> uuid.UUID:
    """uuid5(NAMESPACE_URL, the field's value as given; a number as JSON writes it).

    Raises ImageError("bad_record") without a usable url or id field.
    """
    if not isinstance(item, dict):
        raise ImageError("bad_record", f"not an object but {type(item).__name__}")
    for field in dict.fromkeys(("url", id_field)):
        value = item.get(field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and field != "url"
        if not (is_number or (isinstance(value, str) and value.strip() and _is_unicode(value))):
            raise ImageError("bad_record", f"field {field!r} is {'missing' if field not in item else 'not usable'}")
    value = item[id_field]
    return uuid.uuid5(uuid.NAMESPACE_URL, value if isinstance(value, str) else json.dumps(value))


def to_metadata(item: dict[str, Any]) -> dict[str, Any]:
    """The item as Chroma can hold it: fields it takes under their own names, the others as JSON in REST_FIELD.

    A float that Chroma would round stays filterable under its name, and is exact in REST_FIELD.
    """
    exact = {name: value for name, value in item.items() if _is_name(name) and _is_value(value)}
    rest = {name: value for name, value in item.items() if name not in exact}
    rounded = {name: value for name, value in rest.items() if _is_name(name) and _is_rounded(value)}
    metadata = exact | rounded
    if rest:
        metadata[REST_FIELD] = json.dumps(rest)
    return metadata


def restore_item(metadata: dict[str, Any]) -> dict[str, Any]:
    """Exactly the item that to_metadata was given (order of the fields apart)."""
    item = {name: value for name, value in metadata.items() if name != REST_FIELD}
    return item | json.loads(metadata.get(REST_FIELD, "{}"))


def _is_name(name: str) -> bool:
    """Chroma refuses empty names and those that begin with $ or #, and silently loses its own chroma:* names."""
    return name != REST_FIELD and name != "" and not name.startswith(("$", "#", "chroma:")) and _is_unicode(name)


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        kinds = {type(element) for element in value}
        return len(kinds) == 1 and kinds <= {str, int, float, bool} and all(map(_is_value, value))
    if isinstance(value, str):
        return _is_unicode(value)
    if isinstance(value, int):  # bool included
        return -(2**63) <= value < 2**63
    return isinstance(value, float) and _is_plain(value)


def _is_rounded(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value != 0


def _is_plain(value: float) -> bool:
    """Chroma reads numbers from JSON text, quickly: exact for up to 15 digits and powers of ten up to 22, else off by
    a last bit. And -0.0 loses its sign."""
    if not math.isfinite(value) or (value == 0 and math.copysign(1, value) < 0):
        return False
    text = f"{value:.14e}"  # 15 digits
    return float(text) == value and -8 <= int(text.partition("e")[2]) <= 22


def _is_unicode(text: str) -> bool:
    """No lone surrogate (JSON can hold one, UTF-8 cannot) and no NUL, at which C code may stop reading."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
