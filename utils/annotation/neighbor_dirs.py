"""The folders that a reviewer works in: ROOT/{index}_{main id}/{rank}_{id}{extension}, and what says how they stand.

ROOT/samples.json says what each directory was made with: {main id: [main id, id of rank 1, ...]}, in index order.
A directory is filled under a hidden name, renamed when complete, then listed there; a hidden marker file stays in ROOT
until the last one is. So whatever is listed is complete, wherever the run that made it was killed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import ids
from utils.errors import UserError
from utils.files import read_json, replacing, write_json

SAMPLES = "samples.json"
MARKER = ".unfinished.json"  # {"settings": of the run that makes the root, "data": fingerprint, "begun": time}
PART_SUFFIX = ".part"

Samples = dict[str, list[str]]


def image_name(rank: int, id_: str, extension: str) -> str:
    """Plain numbers, as file managers sort them naturally; nothing but our own ids and a known extension."""
    return f"{rank}_{id_}{extension}"


def rank_in(name: str) -> int:
    """The number that image_name put before the id; -1 if people took it away."""
    number = name.partition("_")[0]
    return int(number) if number.isascii() and number.isdecimal() else -1


def dir_name(index: int, main: str) -> str:
    return f"{index}_{main}"


def part_path(root: Path, main: str) -> Path:
    """Where a directory is filled; nobody sees it, for its name begins with a dot."""
    return root / f".{main}{PART_SUFFIX}"


def lock_path(root: Path) -> Path:
    """Beside the root, never in it: a reviewer sees nothing but images."""
    root = root.absolute()
    return root.with_name(f".{root.name}.lock")


def read_samples(root: Path) -> Samples:
    """What is listed in `root`, in index order. Raises UserError if there is no such list, or it cannot be trusted."""
    if not root.is_dir():
        raise UserError(f"{root} does not exist; run python ann_dirrify.py first, or set ANN_DIRRIFY_DIR_PATH")
    samples = read_json(root / SAMPLES, "the list of samples")
    if not isinstance(samples, dict) or not all(map(_is_entry, samples.items())):
        raise UserError(f"{root / SAMPLES} is not {{main id: [main id, other ids]}}; put the file back as it was")
    return samples


def _is_entry(entry: tuple[Any, Any]) -> bool:
    main, listed = entry
    if not isinstance(listed, list) or not all(isinstance(id_, str) and ids.is_uuid(id_) for id_ in listed):
        return False
    return listed[:1] == [main] and len(set(listed)) == len(listed)


def write_samples(root: Path, samples: Samples) -> None:
    with replacing(root / SAMPLES) as file:  # a directory a line
        rows = (f"\n  {json.dumps(main)}: {json.dumps(listed)}" for main, listed in samples.items())
        file.write("{" + ",".join(rows) + "\n}\n")


def is_unfinished(root: Path) -> bool:
    return (root / MARKER).exists()


def read_marker(root: Path) -> dict[str, Any]:
    marker = read_json(root / MARKER, "the marker")
    if not isinstance(marker, dict) or set(marker) != {"settings", "data", "begun"}:
        raise UserError(f"{root / MARKER} is damaged; delete {root}")
    return marker


def write_marker(root: Path, settings: dict[str, Any], data: str, begun: str) -> None:
    write_json(root / MARKER, {"settings": settings, "data": data, "begun": begun})


def check(root: Path, settings: dict[str, Any]) -> None:
    """Raises UserError, touching nothing, if `root` holds anything but an unfinished run with the same settings."""
    if not is_unfinished(root):
        if not all(map(_is_left_over, _names(root))):
            raise UserError(
                f"{root} is not empty; load it (python ann_dirload.py) and delete it, or set ANN_DIRRIFY_DIR_PATH"
            )
        return
    begun_with = read_marker(root)["settings"]
    for name, value in settings.items():
        was = begun_with.get(name) if isinstance(begun_with, dict) else None
        if was != value:
            raise UserError(
                f"{root} is not finished and was begun with {name} = {json.dumps(was)}, not {json.dumps(value)}; "
                "finish it with that, or delete it"
            )


def remove_parts(root: Path) -> None:
    """What a run that was stopped left half done."""
    for name in _names(root):
        if name.startswith(".") and name.endswith(PART_SUFFIX):
            shutil.rmtree(root / name, ignore_errors=True)  # a download may be writing into it to the last
        elif _is_left_over(name):
            (root / name).unlink()


def _is_left_over(name: str) -> bool:
    """A temporary file of utils.files.replacing, whose process was killed."""
    return name.startswith((f".{MARKER}.", f".{SAMPLES}."))


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()] if root.exists() else []


def read_complete(root: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(index, main id, ids by rank) of the directories that bear the names that they are given when complete."""
    for name in _names(root):
        match = re.fullmatch(r"(\d+)_(.+)", name)
        if match and ids.is_uuid(match[2]) and (root / name).is_dir():
            files = [re.fullmatch(r"(\d+)_(.+)(\.\w+)", file) for file in _names(root / name)]
            listed = dict(sorted((int(file[1]), file[2]) for file in files if file and ids.is_uuid(file[2])))
            if listed.get(0) == match[2]:
                yield int(match[1]), match[2], list(listed.values())
