"""A seeded simulator of reviewers and their file managers, with a model of its own of what must come out.

    python -m tests.faults.reviewers [--histories 500] [--seed 0]

It follows every file from where it was made to where it ends, and never reads an id from a name. Where a name could
mean two things (a shared image of one rank in two directories, both gone), people could not tell either: not played.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import unicodedata
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ann_dirload
from tests.support.annotation_data import image_bytes
from utils.annotation import neighbor_dirs
from utils.annotation.neighbor_dirs import DirWriter

JUNK = [
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".directory",
    "._{}",
    "{}.xmp",
    "{}~",
    ".{}.swp",
    "notes.txt",
    "{}.json",
]
Records = list[dict[str, list[str]]]


@dataclass(eq=False)
class Folder:
    """A folder in a root. main: the group whose id its name holds, "" if none. parent: None for a root."""

    name: str
    parent: Folder | None
    main: str = ""

    @property
    def path(self) -> Path:
        return self.parent.path / self.name if self.parent else Path(self.name)

    def within(self, other: Folder) -> bool:
        return self is other or (self.parent is not None and self.parent.within(other))


@dataclass(eq=False)
class File:
    """An image: which it is, which group it was made for, and where it is now."""

    id: str
    group: str
    name: str
    folder: Folder
    is_empty: bool = False

    @property
    def path(self) -> Path:
        return self.folder.path / self.name


class Reviewer:
    """One or two roots, and what is done to them. `expect` says what ann_dirload.py must make of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        os.chdir(folder)
        self.samples: dict[str, list[str]] = {}
        self.roots: list[Folder] = []
        self.home: dict[str, Folder] = {}  # main -> the root that it was made in
        self.folders: list[Folder] = []
        self.files: list[File] = []
        self.records: Records = []
        self.discarded: set[str] = set()
        for number in range(self.rng.choice([1, 1, 2])):
            self._make_root(Folder(f"root{number}", None))

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def _make_root(self, root: Folder) -> None:
        """Directories that share some images, each with another rank in each."""
        self.roots.append(root)
        shared = [self.new_id() for _ in range(6)]
        used: dict[str, set[int]] = {}
        with DirWriter(Path(root.name), {}, "") as writer:
            for index in range(self.rng.randint(2, 6)):
                listed = [self.new_id()]
                for rank in range(1, self.rng.randint(2, 9)):
                    free = [id_ for id_ in shared if id_ not in listed and rank not in used.get(id_, ())]
                    id_ = self.rng.choice(free) if free and self.rng.random() < 0.4 else self.new_id()
                    used.setdefault(id_, set()).add(rank)
                    listed.append(id_)
                self._make_dir(writer, root, index, listed)
            writer.finish()

    def _make_dir(self, writer: DirWriter, root: Folder, index: int, listed: list[str]) -> None:
        main = listed[0]
        folder = Folder(neighbor_dirs.dir_name(index, main), root, main)
        writer.stage(main).mkdir()
        for rank, id_ in enumerate(listed):
            file = File(id_, main, neighbor_dirs.image_name(rank, id_, ".jpg"), folder)
            (writer.stage(main) / file.name).write_bytes(image_bytes(rank))
            self.files.append(file)
        writer.commit(main, listed)
        self.samples[main], self.home[main] = listed, root
        self.folders.append(folder)

    # --- what people do ----------------------------------------------------------------------------------------------

    def act(self) -> None:
        """One thing, at random; nothing if it cannot be done now."""
        often = [self.delete] * 8 + [self.rename_file, self.drag, self.discard] * 2
        seldom = [
            self.copy,
            self.rotate,
            self.empty,
            self.junk,
            self.restore,
            self.link,
            self.new_folder,
            self.stranger,
        ]
        rare = [self.rename_folder, self.nest, self.copy_folder, self.lose_id, self.take_away]
        self.rng.choice([*often, *seldom, *rare])()

    def delete(self) -> None:
        if file := self.a_file(mains=self.rng.random() < 0.2):
            file.path.unlink()
            self.files.remove(file)

    def take_away(self) -> None:
        """Out of the roots: the same as deleted."""
        if file := self.a_file(mains=False):
            file.path.rename(Path(f"outside {self.new_id()}.jpg"))
            self.files.remove(file)

    def restore(self) -> None:
        """From the trash, to where it was made."""
        for folder in self.group_folders():
            there = {file.id for file in self.files if file.folder is folder}
            gone = [
                id_ for id_ in self.samples[folder.main] if id_ not in there and not self.is_around(id_, folder.main)
            ]
            if gone:
                id_ = self.rng.choice(gone)
                rank = self.samples[folder.main].index(id_)
                self.add(File(id_, folder.main, neighbor_dirs.image_name(rank, id_, ".jpg"), folder))
                return

    def rename_file(self) -> None:
        """In one of the ways of people and programs; the id stays in the name, and the extension is an image's."""
        if (file := self.a_file()) and file.folder.main == file.group:
            stem, extension = os.path.splitext(file.name)  # noqa: PTH122
            ways: list[Callable[[], str]] = [
                lambda: stem + self.rng.choice([".png", ".JPG", ".jpeg", ".webp", ".heic"]),
                lambda: file.name.upper(),
                lambda: f"{stem} (1){extension}",
                lambda: f"{stem} – Kopie{extension}",
            ]
            if not self.is_shared(file.id) and file.id != file.group:
                ways += [
                    lambda: f"{unicodedata.normalize('NFD', 'schön')} {file.name}",
                    lambda: f"{file.id}{extension}",
                    lambda: "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in stem) + extension,
                ]
            self.rename(file, self.rng.choice(ways)())

    def rename(self, file: File, name: str) -> None:
        if not (file.folder.path / name).exists():
            file.path.rename(file.folder.path / name)
            file.name = name

    def drag(self) -> None:
        """Into another folder: a directory, a sub-folder, the root itself."""
        if file := self.a_file(mains=self.rng.random() < 0.2):
            target = self.rng.choice([*self.folders, *self.roots])
            if target is not file.folder and not (target.path / file.name).exists():
                file.path.rename(target.path / file.name)
                file.folder = target

    def copy(self) -> None:
        if file := self.a_file():
            stem, dot, extension = file.name.rpartition(".")
            name = stem + self.rng.choice([" (1)", " - Copy", " copy 2"]) + dot + extension
            if not (file.folder.path / name).exists():
                shutil.copy(file.path, file.folder.path / name)
                self.files.append(File(file.id, file.group, name, file.folder, file.is_empty))

    def rotate(self) -> None:
        if (file := self.a_file()) and not file.is_empty:
            file.path.write_bytes(image_bytes(self.rng.randrange(1000)))

    def empty(self) -> None:
        if file := self.a_file(mains=self.rng.random() < 0.2):
            file.path.write_bytes(b"")
            file.is_empty = True

    def junk(self) -> None:
        """Also beside images that are gone: what file managers leave looks like them."""
        for folder in self.group_folders():
            for id_ in self.samples[folder.main]:
                name = neighbor_dirs.image_name(1, id_, ".jpg")
                (folder.path / self.rng.choice(JUNK).format(name)).write_bytes(b"junk")

    def link(self) -> None:
        if (folder := self.a_folder()) and folder.main:
            id_ = self.rng.choice(self.samples[folder.main])
            link = folder.path / f"link {self.new_id()[:4]} to {id_}.jpg"
            link.symlink_to(Path("outside").absolute())

    def new_folder(self) -> None:
        parent = self.rng.choice([*self.folders, *self.roots])
        self.make_folder(Folder(f"new folder {len(self.folders)}", parent))

    def stranger(self) -> None:
        """A directory with an id that nobody knows, and an image of its own in it."""
        folder = Folder(f"3_{self.new_id()}", self.rng.choice(self.roots))
        self.make_folder(folder)
        self.add(File(self.new_id(), "", f"0_{self.new_id()}.jpg", folder))

    def rename_folder(self) -> None:
        if (folder := self.a_folder()) and folder.main:
            self.move(folder, self.rng.choice([f"done {folder.name}", folder.name.upper(), folder.main]), folder.parent)

    def lose_id(self) -> None:
        if (folder := self.a_folder()) and folder.main:
            folder.main = "" if self.move(folder, f"cats {self.new_id()[:6]}", folder.parent) else folder.main

    def nest(self) -> None:
        """A directory dropped into another folder."""
        folder, target = self.a_folder(), self.rng.choice([*self.folders, *self.roots])
        if folder and not target.within(folder):
            self.move(folder, folder.name, target)

    def copy_folder(self) -> None:
        if folder := self.a_folder():
            twin = Folder(f"{folder.name} - Copy", folder.parent, folder.main)
            if not twin.path.exists() and not any(
                other is not folder and other.within(folder) for other in self.folders
            ):
                shutil.copytree(folder.path, twin.path, symlinks=True)
                self.folders.append(twin)
                inside = [file for file in self.files if file.folder is folder]
                self.files += [File(file.id, file.group, file.name, twin, file.is_empty) for file in inside]

    def discard(self) -> None:
        if (folder := self.a_folder()) and self.rng.random() < 0.5:
            shutil.rmtree(folder.path)
            self.files = [file for file in self.files if not file.folder.within(folder)]
            self.folders = [other for other in self.folders if not other.within(folder)]

    # --- the means ---------------------------------------------------------------------------------------------------

    def a_file(self, mains: bool = True) -> File | None:
        files = [file for file in self.files if file.group and (mains or file.id != file.group)]
        return self.rng.choice(files) if files else None

    def a_folder(self) -> Folder | None:
        return self.rng.choice(self.folders) if self.folders else None

    def group_folders(self) -> list[Folder]:
        folders = [folder for folder in self.folders if folder.main]
        self.rng.shuffle(folders)
        return folders

    def is_shared(self, id_: str) -> bool:
        return sum(id_ in listed for listed in self.samples.values()) > 1

    def is_around(self, id_: str, group: str) -> bool:
        return any(file.id == id_ and file.group == group for file in self.files)

    def add(self, file: File) -> None:
        if not file.path.exists():
            file.path.write_bytes(image_bytes(0))
            self.files.append(file)

    def make_folder(self, folder: Folder) -> None:
        if not folder.path.exists():
            folder.path.mkdir()
            self.folders.append(folder)

    def move(self, folder: Folder, name: str, parent: Folder | None) -> bool:
        assert parent
        if (parent.path / name).exists():
            return False
        folder.path.rename(parent.path / name)
        folder.name, folder.parent = name, parent
        return True

    # --- the model ---------------------------------------------------------------------------------------------------

    def expect(self) -> tuple[Records, set[str]]:
        """Records and discarded main ids after ann_dirload.py has read the roots as they are."""
        for main in self.samples:
            homes = [folder for folder in self.folders if folder.main == main]
            starts = any(record["pos"][0] == main for record in self.records)
            if not homes and not starts and not self.is_around(main, main):
                self.discarded.add(main)
            if len(homes) == 1 and homes[0].parent is self.home[main]:
                self._record(main, homes[0])
        return self.records, self.discarded

    def _record(self, main: str, home: Folder) -> None:
        kept, deleted = [], []
        for id_ in self.samples[main]:
            here = [file for file in self.files if file.id == id_ and file.folder is home]
            if any(not file.is_empty for file in here):
                kept.append(id_)
            elif not here and not self.is_around(id_, main):
                deleted.append(id_)
        holders = [record for record in self.records if main in record["pos"]]
        known = any(r["pos"][0] == main or {*r["pos"], *r["neg"]} == set(self.samples[main]) for r in holders)
        if kept[:1] == [main] and not known:
            self.records.append({"pos": kept, "neg": deleted})
            self.discarded.discard(main)


def play(folder: Path, seed: int) -> int:
    """One history: things are done, the roots are loaded, more is done, they are loaded again. Returns the records."""
    reviewer = Reviewer(folder, seed)
    for _ in range(reviewer.rng.randint(1, 3)):
        for _ in range(reviewer.rng.choice([0, 3, 10, 30, 60])):
            reviewer.act()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert ann_dirload.main(["--logs-dir-path", "", *(root.name for root in reviewer.roots)]) == 0
        records, discarded = reviewer.expect()
        path = Path("data/annotated.json")
        assert (json.loads(path.read_text()) if path.exists() else []) == records, f"seed {seed}"
        assert read_discarded() == discarded, f"seed {seed}"
    return len(records)


def read_discarded() -> set[str]:
    path = Path("data/history.jsonl")
    discarded: set[str] = set()
    for event in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        (discarded.add if event.get("discarded") else discarded.discard)(event["main"])
    return discarded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    n_records = 0
    for seed in range(args.seed, args.seed + args.histories):
        with tempfile.TemporaryDirectory() as folder:
            n_records += play(Path(folder), seed)
            os.chdir("/")
    print(f"{args.histories} histories, {n_records} records, 0 wrong decisions")


if __name__ == "__main__":
    main()
