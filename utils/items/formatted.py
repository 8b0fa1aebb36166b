"""An item of the list: its id, and its other fields as metadata that Chroma returns unchanged."""

from __future__ import annotations

import json
import math
import re
import uuid
from typing import Any

from utils.errors import ImageError

# The only field added to an item: a JSON object of its fields that Chroma would change, or that have this name.
REST_FIELD = "_rest_json"
# Maximum number of an item's fields and list elements in Chroma's own tables. Chroma 1.5 needs six SQL variables for
# each. A record with more than 5,461 values cannot be written, and every later write to the collection fails.
MAX_VALUES = 5_000
_NO_UNICODE = re.compile("[\0\ud800-\udfff]")


def item_id(item: Any, id_field: str) -> uuid.UUID:
    """uuid5(NAMESPACE_URL, the value of `id_field` as given; a number as JSON writes it).

    Raises ImageError("bad_record") without a usable url or id field.
    """
    if isinstance(item, ImageError):
        raise item
    if not isinstance(item, dict):
        raise ImageError("bad_record", f"not an object but {type(item).__name__}")
    for field in dict.fromkeys(("url", id_field)):
        value = item.get(field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and field != "url"
        if not (is_number or (isinstance(value, str) and value.strip() and is_unicode(value))):
            flag = "--url-field" if field == "url" else "--id-field"
            problem = "not usable" if field in item else f"missing; {flag} names another field"
            raise ImageError("bad_record", f"field {field!r} is {problem}")
    value = item[id_field]
    return uuid.uuid5(uuid.NAMESPACE_URL, value if isinstance(value, str) else json.dumps(value))


def name_url(element: Any, url_field: str) -> Any:
    """Rename the field `url_field` of an element to "url", and another field "url" to "_url".

    Returns an ImageError if the field is missing.
    """
    if url_field == "url" or not isinstance(element, dict):
        return element
    if url_field not in element:
        return ImageError("bad_record", f"field {url_field!r} is missing")
    item = {"_url" if name == "url" else name: value for name, value in element.items()}
    return {"url": item.pop(url_field), **item}


def to_metadata(item: dict[str, Any]) -> dict[str, Any]:
    """Convert an item to Chroma metadata. Fields that Chroma keeps exactly stay fields; REST_FIELD has the others.

    A float that Chroma would round is in both: rounded for filters, exact in REST_FIELD. If an item has more than
    MAX_VALUES values, its longest lists are only in REST_FIELD.
    """
    exact = {name: value for name, value in item.items() if _is_name(name) and _is_value(value)}
    rounded = {name: value for name, value in item.items() if _is_name(name) and _is_rounded(value)}
    metadata = _fitting(exact | rounded)
    rest = {name: value for name, value in item.items() if name not in exact or name not in metadata}
    if rest:
        metadata[REST_FIELD] = json.dumps(rest)
    return metadata


def restore_item(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the item that was given to to_metadata(), exactly, except for the order of its fields."""
    item = {name: value for name, value in metadata.items() if name != REST_FIELD}
    return item | json.loads(metadata.get(REST_FIELD, "{}"))


def is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogate (JSON allows it, UTF-8 does not) and no NUL (C code may stop there)."""
    return not _NO_UNICODE.search(text)


def _fitting(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop the longest fields if all fields together have more than MAX_VALUES values; "url" always stays."""
    sizes = {name: len(value) if isinstance(value, list) else 1 for name, value in fields.items()}
    names = sorted(fields, key=lambda name: (name != "url", sizes[name]))
    total = 1  # for REST_FIELD
    kept = {name for name in names if (total := total + sizes[name]) <= MAX_VALUES}
    return {name: value for name, value in fields.items() if name in kept}


def _is_name(name: str) -> bool:
    """Chroma rejects empty names and names that start with $ or #, and drops chroma:* without an error."""
    return name != REST_FIELD and name != "" and not name.startswith(("$", "#", "chroma:")) and is_unicode(name)


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        kinds = {type(element) for element in value}
        return len(kinds) == 1 and kinds <= {str, int, float, bool} and all(map(_is_value, value))
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, int):  # bool included
        return -(2**63) <= value < 2**63
    return isinstance(value, float) and _is_plain(value)


def _is_rounded(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value != 0


def _is_plain(value: float) -> bool:
    """Chroma's JSON reader is exact up to 15 digits and powers of ten up to 22; beyond that, the last bit may differ.
    -0.0 loses its sign."""
    if not math.isfinite(value) or (value == 0 and math.copysign(1, value) < 0):
        return False
    text = f"{value:.14e}"  # 15 digits
    return float(text) == value and -8 <= int(text.partition("e")[2]) <= 22
