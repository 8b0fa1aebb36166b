"""The files that a command has put into a folder, so that a later run takes away those of its own, and no other."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from utils.files import read_json, write_json


@contextlib.contextmanager
def replacing_all(folder: Path, kind: str, names: Collection[str]) -> Iterator[None]:
    """For a block that writes all of `names`, each "{kind}.{...}"; those of earlier blocks that are not among them go.

    FOLDER/.{kind}.json lists what there is, from before it is written until after it is removed: a run that is killed
    anywhere leaves nothing behind that the next one does not know of, and what is not listed is never touched.
    """
    path, listed = folder / f".{kind}.json", set()
    if path.exists():
        found = read_json(path, "list of exported files")
        listed = {str(name) for name in found if _is_own(str(name), kind)} if isinstance(found, list) else set()
    write_json(path, sorted(listed.union(names)))
    yield
    for name in listed.difference(names):
        (folder / name).unlink(missing_ok=True)
    write_json(path, sorted(names))


def _is_own(name: str, kind: str) -> bool:
    """Whatever happened to the list, it never leads out of the folder."""
    return name.startswith(f"{kind}.") and not set(name) & set("/\\:")
