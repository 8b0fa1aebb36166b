"""The annotated data: a JSON list of {"pos": [ids, main first], "neg": [ids]}, read and replaced as a whole.

Items of other tools in the list (other keys, no positives, ids that are not uuids) are kept but not used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from utils.errors import UserError
from utils.files import replacing
from utils.ids import is_uuid
from utils.log import LOG, counted


class Record(TypedDict):
    """A reviewer's decision about one directory: ids similar to pos[0], itself included, and ids not similar."""

    pos: list[str]
    neg: list[str]


def read_records(path: Path) -> list[Record]:
    """The records in `path` without items of other tools; [] without a file. Raises UserError like read_items()."""
    items = read_items(path)
    records = [item for item in items if is_record(item)]
    if len(records) < len(items):
        LOG.info("%s: %s of other tools not used", path, counted(len(items) - len(records), "record"))
    return records


def read_annotated(path: Path) -> list[Record]:
    """Like read_records(), but raises UserError if there are no records."""
    records = read_records(path)
    if not records:
        raise UserError(f"nothing is annotated in {path}; run python ann_dirload.py first")
    return records


def read_items(path: Path) -> list[Any]:
    """All items in `path`, in UTF-8 or UTF-16; [] if there is no file. Raises UserError if it is not a JSON list."""
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
    """Replace `path` atomically. The previous version stays beside it as .bak ([] if there was none)."""
    with replacing(backup_path(path), binary=True) as file:
        file.write(path.read_bytes() if path.exists() else b"[]\n")
    _write(path, items)


def _write(path: Path, items: Sequence[Any]) -> None:
    with replacing(path) as file:  # one record per line: fast to write, easy to diff
        file.write("[" + ",".join("\n  " + json.dumps(item) for item in items) + "\n]\n")


def put_back(path: Path, items: Sequence[Any]) -> None:
    """Replace `path` by an earlier version; if .bak is this version, by its bytes. The current one becomes .undone."""
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
