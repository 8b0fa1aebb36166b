"""The annotated data: a JSON list of {"pos": [ids, main first], "neg": [ids]}, read and replaced as a whole.

Items of other tools in the list (other keys, no positives, ids that are no uuids) are kept, and not used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from utils.errors import UserError
from utils.files import replacing
from utils.ids import is_uuid
from utils.log import LOG


class Record(TypedDict):
    """A reviewer's decision about one directory: ids similar to pos[0], itself included, and ids not similar."""

    pos: list[str]
    neg: list[str]


def read_records(path: Path) -> list[Record]:
    """The records in `path`, without the items of other tools; [] without a file. Raises UserError as read_items."""
    items = read_items(path)
    records = [item for item in items if is_record(item)]
    if len(records) < len(items):
        LOG.info("%s: %d records of other tools are not used", path, len(items) - len(records))
    return records


def read_annotated(path: Path) -> list[Record]:
    """read_records() for a stage that needs some. Raises UserError if there are none."""
    records = read_records(path)
    if not records:
        raise UserError(f"nothing is annotated in {path}; run python ann_dirload.py first")
    return records


def read_items(path: Path) -> list[Any]:
    """All items in `path`, in UTF-8 or UTF-16; [] without a file. Raises UserError if it is no JSON list."""
    try:
        items = json.loads(path.read_bytes()) if path.exists() else []
        fault = "" if isinstance(items, list) else 'is not a list of {"pos": [ids], "neg": [ids]}'
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        fault = f"is not JSON: {error}"
    if fault:
        has_backup = path != backup_path(path) and backup_path(path).exists()
        remedy = f"the last good version is {backup_path(path)}" if has_backup else "there is no .bak beside it"
        raise UserError(f"annotated data {path} {fault}; {remedy}")
    return items


def is_record(item: Any) -> TypeGuard[Record]:
    return isinstance(item, dict) and bool(item.get("pos")) and _are_ids(item["pos"]) and _are_ids(item.get("neg"))


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(isinstance(id_, str) and is_uuid(id_) for id_ in ids)


def write_items(path: Path, items: Sequence[Any]) -> None:
    """Replace `path` atomically; the version before stays beside it as .bak ([] before the first)."""
    with replacing(backup_path(path), binary=True) as file:
        file.write(path.read_bytes() if path.exists() else b"[]\n")
    _write(path, items)


def _write(path: Path, items: Sequence[Any]) -> None:
    with replacing(path) as file:  # one record per line: fast to write, easy to diff
        file.write("[" + ",".join("\n  " + json.dumps(item) for item in items) + "\n]\n")


def put_back(path: Path, items: Sequence[Any]) -> None:
    """Replace `path` by an earlier version, with the bytes of .bak if it is that; the version before is .undone."""
    backup = backup_path(path)
    with replacing(path.with_name(path.name + ".undone"), binary=True) as file:
        file.write(path.read_bytes())
    if backup.exists() and read_items(backup) == items:
        backup.replace(path)
    else:
        _write(path, items)
        backup.unlink(missing_ok=True)


def backup_path(path: Path) -> Path:
    return path.with_name(path.name + ".bak")
