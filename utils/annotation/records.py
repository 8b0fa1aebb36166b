"""The annotated data: a JSON list of {"pos": [ids, main first], "neg": [ids]}; read, checked, replaced as a whole."""

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
    """What a reviewer decided about one directory: similar to pos[0], itself included, and not."""

    pos: list[str]
    neg: list[str]


def read_records(path: Path) -> list[Record]:
    """The records in `path`; [] if there is no such file. Raises UserError if it is not what this module writes."""
    if not path.exists():
        return []
    records = read_json(path, "annotated data")
    if not isinstance(records, list):
        raise UserError(f"annotated data {path} is not a list; mend it, or take {backup_path(path).name}")
    for index, record in enumerate(records):
        fault = _fault(record)
        if fault:
            raise UserError(
                f"annotated data {path}, record {index}: {fault}; mend it, or take {backup_path(path).name}"
            )
    return records


def _fault(record: Any) -> str:
    if not isinstance(record, dict) or set(record) != {"pos", "neg"}:
        return 'not an object with exactly "pos" and "neg"'
    for name, ids in record.items():
        if not isinstance(ids, list) or not all(isinstance(id_, str) and is_uuid(id_) for id_ in ids):
            return f'"{name}" is not a list of uuids'
    if not record["pos"]:
        return '"pos" is empty'
    return ""


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Replace `path`, atomically; the version before stays beside it as .bak ([] before the first)."""
    with replacing(backup_path(path), binary=True) as file:
        file.write(path.read_bytes() if path.exists() else b"[]\n")
    with replacing(path) as file:  # a record a line: quick to write, and two versions compare well
        file.write("[" + ",".join("\n  " + json.dumps(record) for record in records) + "\n]\n")


def undo(path: Path) -> tuple[list[Record], list[Record]]:
    """Put the version before the last change back; what is taken back stays beside it as .undone.

    Returns the records before and after. Raises UserError if there is nothing to take back.
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
