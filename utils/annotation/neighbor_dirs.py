"""The folders of a reviewer, ROOT/{index}_{main id}/{rank}_{id}{extension}, and the files that describe them.

ROOT/samples.json lists the images of each directory: {main id: [main id, id of rank 1, ...]}, in index order.
A directory is filled under a hidden name, renamed when it is complete, and then listed. A hidden marker stays in ROOT
until the last directory is listed. So every listed directory is complete, even after a kill; directories of the last
second that a killed run did not list are made again.
ROOT/.digests.json has the digests of the written files, {main id: [digest by rank, null if the image could not be
loaded]}. They identify an image without its name. ROOT/READ ME.txt has the rules for a reviewer.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import ids
from utils.annotation.history import now
from utils.errors import UserError
from utils.files import read_json, replacing, write_json
from utils.log import LOG

SAMPLES = "samples.json"
DIGESTS = ".digests.json"
MARKER = ".unfinished.json"  # {"settings": of the run that makes the root, "data": fingerprint, "begun": time}
PART_SUFFIX = ".part"
README = "READ ME.txt"
README_TEXT = """\
In each folder, compare the images with the main image, whose name begins with 0_. Go through the folders from 0 up:
1. Delete every image that is not similar to the main image.
2. Not sure? Make a new folder inside that folder and move the image there.
3. Never delete the main image alone. If it is useless, delete its whole folder.
4. Do not rename anything. A folder that you leave unchanged means that all its images are similar.
When you are done, return everything, including this file, to: ______________________________
"""
# Files that systems create in folders, in lower case.
FOLDER_FILES = frozenset(
    {".ds_store", "desktop.ini", ".directory", "ehthumbs.db", ".picasa.ini", "icon\r", "thumbs.db"}
)
LIST_EVERY_S = 1.0  # each time, all of samples.json is rewritten: one megabyte for a thousand directories

Samples = dict[str, list[str]]


def image_name(rank: int, id_: str, extension: str) -> str:
    """The rank is not zero-padded, because file managers sort numbers in names by value."""
    return f"{rank}_{id_}{extension}"


def dir_name(index: int, main: str) -> str:
    return f"{index}_{main}"


def file_digest(path: Path) -> str:
    """The 16-byte BLAKE2b of a file, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_samples(root: Path) -> Samples:
    """Read samples.json of `root`, in index order. Raises UserError if it is missing or malformed."""
    if root.is_file():
        raise UserError(f"{root} is a file: unzip it and give the folder")
    if not root.is_dir():
        names = "ANN_DIRRIFY_DIR_PATH or ANN_DIRRIFY_EXCLUDE_DIRS"
        raise UserError(f"{root} does not exist; run python ann_dirrify.py first, or correct the path ({names})")
    if not (root / SAMPLES).exists():
        raise UserError(_say_missing(root))
    samples = read_json(root / SAMPLES, "the list of samples")
    if not isinstance(samples, dict) or not all(map(_is_entry, samples.items())):
        raise UserError(
            f"{root / SAMPLES} is not {{main id: [main id, other ids]}}; copy it again from the original folder"
        )
    return samples


def _say_missing(root: Path) -> str:
    """The usual mistake after unzipping is to give the folder above or below."""
    near = [root.absolute().parent, *sorted(path for path in root.iterdir() if path.is_dir())]
    found = next((path for path in near if (path / SAMPLES).exists()), None)
    remedy = f"{found} has one: give that folder" if found else "copy it from the original folder"
    return f"no {SAMPLES} in {root}; {remedy}"


def _is_entry(entry: tuple[Any, Any]) -> bool:
    main, listed = entry
    if not isinstance(listed, list) or not all(isinstance(id_, str) and ids.is_uuid(id_) for id_ in listed):
        return False
    return listed[:1] == [main] and len(set(listed)) == len(listed)


def read_digests(root: Path) -> dict[str, list[str | None]]:
    """{main id: digests by rank, None if the image could not be loaded}; {} if there is no readable file."""
    try:
        digests = read_json(root / DIGESTS, "the digests")
    except UserError:
        return {}
    lists = digests.items() if isinstance(digests, dict) else ()
    return {main: by_rank for main, by_rank in lists if isinstance(by_rank, list)}


def _write_lists(path: Path, lists: Mapping[str, Sequence[str | None]]) -> None:
    with replacing(path) as file:  # one directory per line
        rows = (f"\n  {json.dumps(main)}: {json.dumps(listed)}" for main, listed in lists.items())
        file.write("{" + ",".join(rows) + "\n}\n")


def is_unfinished(root: Path) -> bool:
    return (root / MARKER).exists()


def check(root: Path, settings: dict[str, Any]) -> None:
    """Raises UserError if `root` has anything except an unfinished run with the same settings. Changes nothing."""
    if not is_unfinished(root):  # hidden files stay if someone deletes all that a file manager shows
        if not all(_is_temporary(name) or name == DIGESTS or name.lower() in FOLDER_FILES for name in _names(root)):
            raise UserError(
                f"{root} is not empty; load it (python ann_dirload.py) and delete it, or set ANN_DIRRIFY_DIR_PATH"
            )
        return
    begun_with = _read_marker(root)["settings"]
    for name, value in settings.items():
        if (was := begun_with.get(name)) != value:
            raise UserError(
                f"{root} is not finished and was begun with {name} = {json.dumps(was)}, not {json.dumps(value)}; "
                "finish it with that value, or delete it"
            )


class DirWriter:
    """Makes a root, or continues an unfinished one. A context manager: an error in the block keeps the marker.

    samples: complete directories, listed now or soon. n_lost: main images that could not be loaded.
    same_data: False if an unfinished run continues with other data, so that its main images may differ.
    begun: start of the first run on this root, UTC, ISO 8601.
    """

    def __init__(self, root: Path, settings: dict[str, Any], data: str) -> None:
        """`root` must have passed check(). data: fingerprint of the candidates."""
        self.root = root
        self.samples: Samples = {}
        self._digests: dict[str, list[str | None]] = {}  # by rank
        self.n_lost, self.same_data, self.begun = 0, True, now()
        self._n_listed, self._listed_at = -1, time.monotonic()
        root.mkdir(parents=True, exist_ok=True)
        _remove_parts(root)
        if is_unfinished(root):
            marker = _read_marker(root)
            self.same_data, self.begun = marker["data"] == data, marker["begun"]
            self._resume()
        else:
            write_json(root / MARKER, {"settings": settings, "data": data, "begun": self.begun})
        self._list()
        if not (root / README).exists():  # keep the name that someone filled in
            with replacing(root / README, binary=True) as file:
                file.write(README_TEXT.replace("\n", "\r\n").encode())

    def __enter__(self) -> DirWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        _remove_parts(self.root)  # first, because on a full disk the list needs the space
        self._list()
        if not self.samples:  # leave no trace: the next run may have other settings
            for name in (SAMPLES, DIGESTS, README, MARKER):
                (self.root / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.root.rmdir()
        elif error is None:
            (self.root / MARKER).unlink()
        else:
            LOG.warning("%s is not finished (directories: %d); run again to continue", self.root, len(self.samples))

    def stage(self, main: str) -> Path:
        """The hidden folder in which a directory is made. Its parent exists; the folder does not."""
        return self.root / f".{main}{PART_SUFFIX}"

    def commit(self, listed: Sequence[str], digests: Mapping[str, str]) -> bool:
        """Rename the staged folder of the main image, listed[0]. Without a main image, remove it and return False.

        listed: ids by rank. digests: id -> file_digest of its image, without images that could not be loaded. Images
        are not fsynced: a power cut may leave empty files, which ann_dirload.py counts as unknown. The directory is
        listed within LIST_EVERY_S, or at the end of the context.
        """
        main = listed[0]
        if main not in digests:
            shutil.rmtree(self.stage(main))
            self.n_lost += 1
            return False
        os.replace(self.stage(main), self.root / dir_name(len(self.samples), main))
        self.samples[main] = [id_ for id_ in listed if id_ in digests]
        self._digests[main] = [digests.get(id_) for id_ in listed]
        if time.monotonic() - self._listed_at > LIST_EVERY_S:
            self._list()
        return True

    def _list(self) -> None:
        self._listed_at = time.monotonic()
        if len(self.samples) > self._n_listed:
            _write_lists(self.root / DIGESTS, self._digests)
            _write_lists(self.root / SAMPLES, self.samples)
            self._n_listed = len(self.samples)

    def _resume(self) -> None:
        """Continue after the listed directories; remove the directories that a killed run did not list."""
        if not (self.root / SAMPLES).exists() and not any(self.root.glob("0_*")):  # killed before the first directory
            return
        self.samples, digests = read_samples(self.root), read_digests(self.root)
        self._digests = {main: digests[main] for main in self.samples if main in digests}
        self._n_listed = len(self.samples)
        last = self._dirs_at(self._n_listed - 1)
        if last and not last.keys() & set(map(ids.to_key, self.samples)):
            raise UserError(f"{self.root / SAMPLES} is from another run; copy it from the original folder")
        for index in itertools.count(self._n_listed):
            if not (unlisted := self._dirs_at(index)):
                break
            for path in unlisted.values():
                shutil.rmtree(path)

    def _dirs_at(self, index: int) -> dict[str, Path]:
        """Key of main id -> directory, of all directories with this index."""
        dirs = {path.name.partition("_")[2]: path for path in self.root.glob(f"{index}_*")}
        return {ids.to_key(main): path for main, path in dirs.items() if ids.is_uuid(main)}


def _read_marker(root: Path) -> dict[str, Any]:
    marker = read_json(root / MARKER, "the marker")
    if not isinstance(marker, dict) or set(marker) != {"settings", "data", "begun"}:
        raise UserError(f"{root / MARKER} is damaged; delete {root}")
    return marker


def _remove_parts(root: Path) -> None:
    """Remove incomplete folders and temporary files of a stopped run."""
    for name in _names(root):
        if name.startswith(".") and name.endswith(PART_SUFFIX):
            shutil.rmtree(root / name, ignore_errors=True)  # a download may still be writing into it
        elif _is_temporary(name):
            (root / name).unlink()


def _is_temporary(name: str) -> bool:
    """Whether a file is a temporary file of utils.files.replacing(), left by a killed process."""
    return name.startswith(tuple(f".{written}." for written in (MARKER, SAMPLES, DIGESTS, README)))


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()] if root.exists() else []
