"""The annotated data: a JSON list of {"pos": [ids, main first], "neg": [ids]}, read and replaced as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from utils.errors import UserError
from utils.files import read_json, replacing
from utils.ids import is_uuid


class Record(TypedDict):
    """A reviewer's decision about one directory: ids similar to pos[0], itself included, and ids not similar."""

    pos: list[str]
    neg: list[str]


def read_records(path: Path) -> list[Record]:
    """The records in `path`; [] without a file. Raises UserError if the file is malformed."""
    if not path.exists():
        return []
    records = read_json(path, "annotated data")
    fault = " is not a list" if not isinstance(records, list) else ""
    for index, record in enumerate([] if fault else records):
        fault = fault or (f", record {index}: {_fault(record)}" if _fault(record) else "")
    if fault:
        raise UserError(f"annotated data {path}{fault}; the version before its last change is {backup_path(path)}")
    return records


def _fault(record: Any) -> str:
    if not isinstance(record, dict) or set(record) != {"pos", "neg"}:
        return 'not an object with exactly "pos" and "neg"'
    for name, ids in record.items():
        if not isinstance(ids, list) or not all(isinstance(id_, str) and is_uuid(id_) for id_ in ids):
            return f'"{name}" is not a list of uuids'
    return "" if record["pos"] else '"pos" is empty'


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Replace `path` atomically; the version before stays beside it as .bak ([] before the first)."""
    with replacing(backup_path(path), binary=True) as file:
        file.write(path.read_bytes() if path.exists() else b"[]\n")
    with replacing(path) as file:  # one record per line: fast to write, easy to diff
        file.write("[" + ",".join("\n  " + json.dumps(record) for record in records) + "\n]\n")


def undo(path: Path) -> tuple[list[Record], list[Record]]:
    """Restore the version before the last change; the current version becomes .undone.

    Returns the records before and after. Raises UserError if there is no version before.
    """
    backup = backup_path(path)
    if not (path.exists() and backup.exists()):
        raise UserError(f"nothing to take back: {backup} does not exist")
    before, after = read_records(path), read_records(backup)
    with replacing(path.with_name(path.name + ".undone"), binary=True) as file, path.open("rb") as current:
        shutil.copyfileobj(current, file)
    backup.replace(path)
    return before, after


def backup_path(path: Path) -> Path:
    return path.with_name(path.name + ".bak")


def lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
