"""A seeded simulator of reviewers, their file managers and sync programs, with its own model of what must be recorded.

    python -m tests.faults.reviewers [--histories 1000] [--seed 0]

The simulator follows every file from where it was made to where it ends, and never reads an id from a name. Histories
in which a person could not tell either what a name means are not played: a shared image without its rank, an edited
image without its id that leaves its directory, a part of an image with a short name in a directory that lost its id.
A decision is wrong if records or discards differ from the model, and silent if standard output does not count it:
unknown and misplaced images, directories that are not recorded, folders that may not be deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import stat
import tempfile
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ann_dirload
from tests.support.annotation_data import image_bytes, make_dir
from utils.annotation import neighbor_dirs
from utils.annotation.neighbor_dirs import DirWriter

WHOLE, EDITED, PART, EMPTY = "whole", "edited", "part", "empty"  # contents; EDITED is whole, too, with other bytes
IMAGE, OTHER, NONE = "image", "other", "none"  # names: id and image extension, id and another ending, no id

# What programs make of a name while a file is not there as a whole, or when it loses its extension.
_OTHER_NAMES = """.{name}.icloud {name}.cloud {name}.cloudf {name}.nextcloud {name}.owncloud {name}.placeholder
    {name}.part {name}.partial {name}.crdownload {name}.download {name}.opdownload {name}.filepart {name}.aria2
    {name}.!ut {name}.!sync {name}.tmp .{name}.Xy3dQz .syncthing.{name}.tmp ~syncthing~{name}.tmp .~{name}.part
    .{name}.swp {name}.lnk {name}.enc {name}.bak {name}.uploading {stem} {stem}. {stem}.jpg_ {stem}.bin"""
_SIDECAR_NAMES = """._{name} {name}.xmp {stem}.xmp {name}.XMP {name}.json {stem}.txt {stem}.AAE {name}.pp3
    {name}_original {name}~ {stem}_thumb.db Thumbs_{stem}.db .DS_Store Thumbs.db desktop.ini .directory ehthumbs.db
    notes.txt"""
OTHER_NAMES, SIDECAR_NAMES = _OTHER_NAMES.split(), _SIDECAR_NAMES.split()
NAMELESS = ["IMG_{}.jpg", "photo {}.png", "Ünbenannt {}.JPEG", "image({}).webp", "{}.tif", "DSC{}.heic"]
TRASH = [".Trash-1000/files", "#recycle", "@Recycle", "@eaDir", "#snapshot", ".stversions", "$RECYCLE.BIN/S-1"]
TRASH += ["__MACOSX", ".dropbox.cache", "lost+found"]
Records = list[dict[str, list[str]]]


@dataclass(eq=False)
class Folder:
    """A folder in a root. main: the group whose id its name holds, "" if none. parent: None for a root."""

    name: str
    parent: Folder | None
    main: str = ""
    is_strange: bool = False  # its name holds an id that nobody knows

    @property
    def path(self) -> Path:
        return self.parent.path / self.name if self.parent else Path(self.name)

    @property
    def group(self) -> str:
        """Of the directory around it, itself included."""
        return self.main or (self.parent.group if self.parent else "")

    def within(self, other: Folder) -> bool:
        return self is other or (self.parent is not None and self.parent.within(other))


@dataclass(eq=False)
class File:
    """An image: which it is, which group it was made for, where and how it is now."""

    id: str
    group: str
    name: str
    folder: Folder
    content: str = WHOLE
    named: str = IMAGE

    @property
    def path(self) -> Path:
        return self.folder.path / self.name

    @property
    def is_legible(self) -> bool:
        """Whether its id can be found: in the name, or by the bytes."""
        return self.named != NONE or self.content == WHOLE

    @property
    def is_short(self) -> bool:
        """Whether Windows' short name of it means something in its directory only."""
        return "~" in self.name and self.name.endswith(".JPG")

    @property
    def is_kept(self) -> bool:
        """Whether the file counts as the image in its own directory, and not as unknown."""
        return self.content in (WHOLE, EDITED) or (self.named == IMAGE and self.content == PART)


@dataclass
class Verdict:
    """The expected decision of a directory: recorded with these ids, or not."""

    kept: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    is_recorded: bool = True

    @property
    def record(self) -> dict[str, list[str]]:
        return {"pos": self.kept, "neg": self.deleted}

    @property
    def is_untouched(self) -> bool:
        return not self.deleted and not self.elsewhere


class Reviewer:
    """One or two roots, and the actions on them."""

    def __init__(self, rng: random.Random, prefix: str = "root") -> None:
        self.rng = rng
        self.samples: dict[str, list[str]] = {}
        self.roots: list[Folder] = []
        self.home: dict[str, Folder] = {}  # main -> the root that it was made in
        self.folders: list[Folder] = []
        self.files: list[File] = []
        self.stashed: set[str] = set()  # mains whose directory is something else now: a zip, a link, hidden
        self.bytes: dict[str, bytes] = {}
        self.rank_of: dict[str, dict[str, int]] = {}
        for number in range(self.rng.choice([1, 1, 2])):
            self._make_root(Folder(f"{prefix}{number}", None))

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def new_name(self) -> str:
        return f"{self.rng.randrange(10**6):06}"

    def _make_root(self, root: Folder) -> None:
        """Directories that share some images, each with another rank in each."""
        self.roots.append(root)
        shared = [self.new_id() for _ in range(6)]
        used: dict[str, set[int]] = {}
        with DirWriter(Path(root.name), {}, "") as writer:
            for index in range(self.rng.randint(2, 6)):
                listed: list[str | None] = [self.new_id()]
                for rank in range(1, self.rng.randint(2, 9)):
                    if self.rng.random() < 0.1:
                        listed.append(None)  # could not be loaded: a rank without an image
                        continue
                    free = [id_ for id_ in shared if id_ not in listed and rank not in used.get(id_, ())]
                    id_ = self.rng.choice(free) if free and self.rng.random() < 0.4 else self.new_id()
                    used.setdefault(id_, set()).add(rank)
                    listed.append(id_)
                self._make_dir(writer, root, index, listed)

    def _make_dir(self, writer: DirWriter, root: Folder, index: int, listed: list[str | None]) -> None:
        main = listed[0] or ""
        folder = Folder(neighbor_dirs.dir_name(index, main), root, main)
        for rank, id_ in enumerate(listed):
            if id_:
                self.bytes.setdefault(id_, image_bytes(len(self.bytes)))
                self.files.append(File(id_, main, neighbor_dirs.image_name(rank, id_, ".jpg"), folder))
        make_dir(writer, {id_ or self.new_id(): self.bytes[id_] if id_ else None for id_ in listed})
        self.samples[main], self.home[main] = [id_ for id_ in listed if id_], root
        self.rank_of[main] = {id_: rank for rank, id_ in enumerate(listed) if id_}
        self.folders.append(folder)

    def second(self) -> Reviewer:
        """Another reviewer, with copies of the same folders as they are now."""
        twin = copy.deepcopy(self)
        twin.rng = self.rng
        for root in twin.roots:
            shutil.copytree(root.name, f"second {root.name}", symlinks=True, ignore=_ignore_pipes)
            root.name = f"second {root.name}"
        return twin

    # --- what people and programs do ---------------------------------------------------------------------------------

    def act(self) -> None:
        """Do one random action; nothing if it is impossible now."""
        often = [self.delete] * 8 + [self.rename_file, self.drag, self.discard] * 2
        seldom = [self.copy, self.rotate, self.empty, self.sidecars, self.restore, self.link, self.new_folder]
        programs = [self.evict, self.evict, self.lose_id_of_file, self.short_name, self.set_aside, self.trash]
        rare = [self.rename_folder, self.nest, self.copy_folder, self.lose_id, self.take_away, self.stash, self.special]
        self.rng.choice([*often, *seldom, *programs, *rare, self.stranger, self.another_image])()

    def delete(self) -> None:
        if file := self.a_file(mains=self.rng.random() < 0.2):
            file.path.unlink()
            self.files.remove(file)

    def take_away(self) -> None:
        """Move an image out of the roots, which is the same as deleting it."""
        if file := self.a_file(mains=False):
            file.path.rename(Path(f"outside {self.new_id()}.jpg"))
            self.files.remove(file)

    def trash(self) -> None:
        """Move an image into a system folder, which is the same as deleting it."""
        if file := self.a_file(mains=False):
            target = self.rng.choice([*self.folders, *self.roots]).path / self.rng.choice(TRASH)
            target.mkdir(parents=True, exist_ok=True)
            file.path.rename(target / f"{self.new_name()} {file.name}")
            self.files.remove(file)

    def restore(self) -> None:
        """Restore an image from the trash to its directory."""
        for folder in self.group_folders():
            there = {file.id for file in self.files if file.folder is folder}
            gone = [
                id_ for id_ in self.samples[folder.main] if id_ not in there and not self.is_around(id_, folder.main)
            ]
            if gone:
                id_ = self.rng.choice(gone)
                rank = self.rank_of[folder.main][id_]
                self.add(File(id_, folder.main, neighbor_dirs.image_name(rank, id_, ".jpg"), folder))
                return

    def rename_file(self) -> None:
        """In one of the ways of people and programs; the id stays in the name, and the extension is an image's."""
        file = self.a_file()
        if file and file.folder.main == file.group and file.named == IMAGE:
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
                    lambda: f"{file.id.replace('-', '')}{extension}",
                    lambda: "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in stem) + extension,
                ]
            self.rename(file, self.rng.choice(ways)())

    def evict(self) -> None:
        """A sync program, a browser or a copy that is not finished, or a lost extension; with any content."""
        if (file := self.a_file(mains=self.rng.random() < 0.2)) and file.named == IMAGE:
            ways = [way for way in OTHER_NAMES if way.startswith("{") or not self.is_shared(file.id)]
            stem = file.name.rpartition(".")[0]
            if self.rename(file, self.rng.choice(ways).format(name=file.name, stem=stem)):
                file.named = OTHER
                self.fill(file, self.rng.choice([file.content, PART, EMPTY]))

    def lose_id_of_file(self) -> None:
        """Renamed without the id: the bytes that were written are known, others are not."""
        file = self.a_file(mains=self.rng.random() < 0.2)
        is_clear = file and not self.is_shared(file.id) and file.folder.group == file.group
        if file and is_clear and self.rename(file, self.rng.choice(NAMELESS).format(self.new_name())):
            file.named = NONE
            self.fill(file, self.rng.choice([file.content, file.content, EDITED, PART]))

    def short_name(self) -> None:
        """Give a file the short name that Windows shows to old programs."""
        file = self.a_file(mains=False)
        if file and not self.is_shared(file.id) and file.folder.main == file.group:
            n = self.rng.choice([6, 7, 8])
            if self.rename(file, f"{file.id.replace('-', '')[:n].upper()}~{self.rng.randint(1, 9)}.JPG"):
                file.named = OTHER
                self.fill(file, self.rng.choice([file.content, file.content, PART]))

    def special(self) -> None:
        """Put a pipe or a folder in the place of an image, as some programs do while they download."""
        file = self.a_file(mains=False)
        if file and file.named == IMAGE and not self.is_shared(file.id) and file.folder.main == file.group:
            file.path.unlink()
            file.named, file.content = OTHER, PART
            file.name += ".download"
            if self.rng.random() < 0.5:
                os.mkfifo(file.path)
            else:
                file.path.mkdir()
                (file.path / "Info.plist").write_bytes(b"<plist>")

    def set_aside(self) -> None:
        """Move an image into a sub-folder of its directory: the reviewer's "maybe"."""
        if (file := self.a_file(mains=False)) and file.folder.main == file.group:
            maybe = next((f for f in self.folders if f.parent is file.folder and not f.main and not f.is_strange), None)
            if maybe is None:
                maybe = Folder(f"maybe {self.new_name()}", file.folder)
                self.make_folder(maybe)
            self.move_file(file, maybe)

    def rename(self, file: File, name: str) -> bool:
        if (file.folder.path / name).exists() or (file.folder.path / name).is_symlink():
            return False
        file.path.rename(file.folder.path / name)
        file.name = name
        return True

    def drag(self) -> None:
        """Move an image into another folder: a directory, a sub-folder or the root."""
        if (file := self.a_file(mains=self.rng.random() < 0.2)) and file.is_legible:
            self.move_file(file, self.rng.choice([*self.folders, *self.roots]))

    def move_file(self, file: File, target: Folder) -> None:
        has_rank = file.named != NONE and file.name.partition("_")[0].isdecimal()
        is_ambiguous = not has_rank and self.is_shared(file.id)
        is_unclear = is_ambiguous or file.is_short
        if target is not file.folder and not (target.path / file.name).exists() and not is_unclear:
            file.path.rename(target.path / file.name)
            file.folder = target

    def copy(self) -> None:
        if (file := self.a_file()) and file.named == IMAGE:
            stem, dot, extension = file.name.rpartition(".")
            name = stem + self.rng.choice([" (1)", " - Copy", " copy 2"]) + dot + extension
            if not (file.folder.path / name).exists():
                shutil.copy(file.path, file.folder.path / name)
                self.files.append(File(file.id, file.group, name, file.folder, file.content))

    def rotate(self) -> None:
        if (file := self.a_file()) and file.content == WHOLE and file.named == IMAGE:
            self.fill(file, EDITED)

    def empty(self) -> None:
        if (file := self.a_file(mains=self.rng.random() < 0.2)) and file.named == IMAGE:
            self.fill(file, EMPTY)

    def fill(self, file: File, content: str) -> None:
        if content != file.content and file.content in (WHOLE, EDITED):
            part = self.bytes[file.id][: self.rng.randint(20, 200)]
            data = {EDITED: image_bytes(10**6 + self.rng.randrange(10**6)), PART: part, EMPTY: b""}
            file.path.write_bytes(data[content])
            file.content = content

    def sidecars(self) -> None:
        """Also beside images that are gone: what programs leave has the names of images, sometimes their bytes."""
        for folder in self.group_folders():
            for rank, id_ in enumerate(self.samples[folder.main]):
                name = neighbor_dirs.image_name(rank, id_, ".jpg")
                way = self.rng.choice(SIDECAR_NAMES).format(name=name, stem=name[:-4])
                (folder.path / way).write_bytes(self.rng.choice([b"junk", self.bytes[id_], b""]))

    def link(self) -> None:
        """Replace an image by something that could be anything."""
        if (file := self.a_file(mains=False)) and file.named == IMAGE:
            file.path.rename(Path(f"outside {self.new_id()}.jpg"))
            file.path.symlink_to(Path("outside").absolute())
            file.named, file.content = OTHER, PART

    def new_folder(self) -> None:
        parent = self.rng.choice([*self.folders, *self.roots])
        self.make_folder(Folder(f"new folder {self.new_name()}", parent))

    def stranger(self) -> None:
        """A directory with an id that nobody knows, and an image of its own in it."""
        folder = Folder(f"3_{self.new_id()}", self.rng.choice(self.roots), is_strange=True)
        self.make_folder(folder)
        (folder.path / f"0_{self.new_id()}.jpg").write_bytes(image_bytes(0))

    def another_image(self) -> None:
        """An image that has nothing to do with the collection."""
        if folder := self.a_folder():
            file = File("", "", f"holiday {self.new_name()}.jpg", folder, EDITED, NONE)
            file.path.write_bytes(image_bytes(10**6 + self.rng.randrange(10**6)))
            self.files.append(file)

    def stash(self) -> None:
        """Turn a directory into something that is not a folder: pack, hide or link it."""
        folder = self.a_folder()
        if folder and folder.main and folder.parent is self.home[folder.main] and not self.twins(folder):
            target = folder.parent.path / self.rng.choice(
                [f"{folder.name}.zip", f".{folder.name}", f"{folder.name}.lnk"]
            )
            if not any(other is not folder and other.within(folder) for other in self.folders) and not target.exists():
                shutil.rmtree(folder.path)
                self.files = [file for file in self.files if not file.folder.within(folder)]
                self.folders.remove(folder)
                self.stashed.add(folder.main)
                target.mkdir() if target.name.startswith(".") else target.write_bytes(b"PK")

    def rename_folder(self) -> None:
        if (folder := self.a_folder()) and folder.main:
            self.move(folder, self.rng.choice([f"done {folder.name}", folder.name.upper(), folder.main]), folder.parent)

    def lose_id(self) -> None:
        if (folder := self.a_folder()) and folder.main:
            inside = [file for file in self.files if file.folder.group == folder.main and file.folder.within(folder)]
            if all(file.is_legible and (file.content == WHOLE or not file.is_short) for file in inside):
                folder.main = "" if self.move(folder, f"cats {self.new_id()[:5]}", folder.parent) else folder.main

    def nest(self) -> None:
        """A directory dropped into another folder."""
        folder, target = self.a_folder(), self.rng.choice([*self.folders, *self.roots])
        if folder and not target.within(folder):
            self.move(folder, folder.name, target)

    def copy_folder(self) -> None:
        if folder := self.a_folder():
            twin = Folder(f"{folder.name} - Copy", folder.parent, folder.main, folder.is_strange)
            if not twin.path.exists() and not any(
                other is not folder and other.within(folder) for other in self.folders
            ):
                shutil.copytree(folder.path, twin.path, symlinks=True, ignore=_ignore_pipes)
                self.folders.append(twin)
                inside = [file for file in self.files if file.folder is folder]
                self.files += [
                    File(f.id, f.group, f.name, twin, f.content, f.named)
                    for f in inside
                    if (twin.path / f.name).exists() or (twin.path / f.name).is_symlink()
                ]

    def discard(self) -> None:
        if (folder := self.a_folder()) and self.rng.random() < 0.5:
            shutil.rmtree(folder.path)
            self.files = [file for file in self.files if not file.folder.within(folder)]
            self.folders = [other for other in self.folders if not other.within(folder)]

    # --- the means ---------------------------------------------------------------------------------------------------

    def a_file(self, mains: bool = True) -> File | None:
        files = [
            file
            for file in self.files
            if file.group and (mains or file.id != file.group) and file.path.is_file() and not file.path.is_symlink()
        ]
        return self.rng.choice(files) if files else None

    def a_folder(self) -> Folder | None:
        return self.rng.choice(self.folders) if self.folders else None

    def group_folders(self) -> list[Folder]:
        folders = [folder for folder in self.folders if folder.main]
        self.rng.shuffle(folders)
        return folders

    def twins(self, folder: Folder) -> list[Folder]:
        return [other for other in self.folders if other.main == folder.main and other is not folder]

    def is_shared(self, id_: str) -> bool:
        return sum(id_ in listed for listed in self.samples.values()) > 1

    def is_around(self, id_: str, group: str) -> bool:
        return any(file.id == id_ and file.group == group and file.is_legible for file in self.files)

    def add(self, file: File) -> None:
        if not file.path.exists() and not file.path.is_symlink():
            file.path.write_bytes(self.bytes[file.id])
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

    def homes(self, main: str) -> list[Folder]:
        return [folder for folder in self.folders if folder.main == main]

    def is_misfit(self, root: Folder) -> bool:
        """More unknown directories than known ones, and some of the list gone: another run's list."""
        mains = [main for main, home in self.home.items() if home is root]
        n_known = sum(bool(self.homes(main)) for main in mains)
        n_strange = sum(folder.is_strange and folder.parent is root for folder in self.folders)
        return 0 < n_strange >= n_known < len(mains)

    def is_discarded(self, main: str) -> bool:
        return not self.homes(main) and main not in self.stashed and not self.is_around(main, main)

    def verdict(self, main: str) -> Verdict | None:
        """None without a directory."""
        homes = self.homes(main)
        if len(homes) != 1 or homes[0].parent is not self.home[main]:
            return Verdict(is_recorded=False) if homes else None
        home, verdict = homes[0], Verdict()
        is_missing = False
        for id_ in self.samples[main]:
            here = [file for file in self.files if file.id == id_ and file.folder is home and file.is_legible]
            is_missing |= not here
            if any(file.is_kept for file in here):
                verdict.kept.append(id_)
            elif here:
                verdict.unknown.append(id_)
            elif self.is_around(id_, main):
                verdict.elsewhere.append(id_)
            else:
                verdict.deleted.append(id_)
        unnamed = any(not file.is_legible and file.folder.group == main for file in self.files)
        verdict.is_recorded = verdict.kept[:1] == [main] and not (is_missing and unnamed)
        return verdict


def _ignore_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if stat.S_ISFIFO(Path(folder, name).lstat().st_mode)]


class Desk:
    """The person who loads: the expected records and discards, and the states to which loads can be undone."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.records: Records = []
        self.discarded: set[str] = set()
        self.recorded_by: dict[str, str] = {}  # main -> root
        self.looks: set[str] = set()
        self.before: list[tuple[Records, set[str], dict[str, str], set[str]]] = []

    def load(self, reviewer: Reviewer) -> None:
        """Run ann_dirload.py on the roots of a reviewer as they are, and hold it against the model."""
        flags = [
            flag
            for flag, share in (("--replace", 0.2), ("--skip-untouched", 0.2), ("--dry-run", 0.1))
            if self.rng.random() < share
        ]
        out = run(*flags, *(root.name for root in reviewer.roots))
        state = copy.deepcopy((self.records, self.discarded, self.recorded_by, self.looks))
        told = self._expect(reviewer, flags)
        if "--dry-run" in flags:
            self.records, self.discarded, self.recorded_by, self.looks = state
        elif (self.records, self.discarded, self.looks) != (state[0], state[1], state[3]):
            self.before.append(state)
        check_told(out, told, "--dry-run" in flags)

    def _expect(self, reviewer: Reviewer, flags: list[str]) -> Counter[str]:
        told: Counter[str] = Counter()
        for root in reviewer.roots:
            if reviewer.is_misfit(root):
                told["not recorded"] += 1
                continue
            told["not recorded"] += sum(folder.parent is root and not folder.main for folder in reviewer.folders)
            n_before = told["not recorded"]
            is_complete = n_before == 0 or all(folder.parent is not root or folder.main for folder in reviewer.folders)
            for main in [main for main, home in reviewer.home.items() if home is root]:
                is_complete &= self._decide(reviewer, root, main, flags, told)
            is_complete &= not any(
                file.is_legible and file.folder.main and file.id not in reviewer.samples[file.folder.main]
                for file in reviewer.files
                if file.folder.within(root)
            )
            is_complete &= not any(
                f.main and reviewer.home[f.main] is not root and f.within(root) for f in reviewer.folders
            )
            told["can be deleted"] += is_complete
        return told

    def _decide(self, reviewer: Reviewer, root: Folder, main: str, flags: list[str], told: Counter[str]) -> bool:
        """Whether all decisions of the directory are in the records."""
        own = [
            r
            for r in self.records
            if main in r["pos"] and (r["pos"][0] == main or {*r["pos"], *r["neg"]} == set(reviewer.samples[main]))
        ]
        verdict = reviewer.verdict(main)
        if verdict is None and not reviewer.is_discarded(main):
            told["not recorded"] += 1
            return False
        if verdict is None:
            if not any(record["pos"][0] == main for record in self.records):
                self.discarded.add(main)
                return True
            return self.recorded_by.get(main, root.name) == root.name  # else another's decision, in no record
        if not verdict.is_recorded:
            told["not recorded"] += 1
            return False
        is_equal = bool(own) and all(set(own[0][k]) == set(verdict.record[k]) for k in ("pos", "neg"))
        skip = "--skip-untouched" in flags and verdict.is_untouched
        if own and (is_equal or "--replace" not in flags or skip):
            told["different"] += not is_equal
            if self.recorded_by.get(main, root.name) != root.name:
                told["looks"] += 1
                self.looks.add(f"{root.name} {main} {verdict.record}")
            return is_equal and not verdict.unknown and not verdict.elsewhere
        if not own and skip:
            return False
        told["unknown"] += len(verdict.unknown)
        told["elsewhere"] += len(verdict.elsewhere)
        if own:
            own[0].update(verdict.record)
        else:
            self.records.append(verdict.record)
        self.recorded_by[main] = root.name
        self.discarded.discard(main)
        return not verdict.unknown and not verdict.elsewhere

    def undo(self) -> None:
        if self.before:
            run("--undo")
            self.records, self.discarded, self.recorded_by, self.looks = self.before.pop()

    def check(self, what: str) -> None:
        path = Path("data/annotated.json")
        assert (json.loads(path.read_text()) if path.exists() else []) == self.records, f"{what}: wrong records"
        assert read_discarded() == self.discarded, f"{what}: wrong discards"


def run(*flags: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert ann_dirload.main(["--logs-dir-path", "", *flags]) == 0
    return out.getvalue()


def check_told(out: str, told: Counter[str], is_dry: bool) -> None:
    """Standard output counts everything that is undecided, not recorded, or not safe to delete."""
    found: Counter[str] = Counter()
    for line in out.splitlines():
        found["unknown"] += _number(r"^unknown: neither positive nor negative, (\d+) image", line)
        found["elsewhere"] += _number(r"^set aside: neither positive nor negative, (\d+) image", line)
        found["elsewhere"] += _number(r"^misplaced .*: neither positive nor negative, (\d+) image", line)
        found["different"] += _number(r"^(\d+) director\w+ differs? from the records", line)
        found["looks"] += _number(r"^second look at (\d+) director", line)
        found["can be deleted"] += "can be deleted" in line
        if line.startswith("not recorded: "):
            found["not recorded"] += sum(map(int, re.findall(r"(?:^not recorded: |, )(\d+) ", line)))
    if is_dry:
        found["can be deleted"] = told["can be deleted"]
        assert "--undo" not in out
    assert +found == +told, f"told {dict(+found)}, right is {dict(+told)}"


def _number(pattern: str, line: str) -> int:
    match = re.search(pattern, line)
    return int(match[1]) if match else 0


def play(folder: Path, seed: int) -> int:
    """One history: things are done, the roots are loaded, more is done, they are loaded again. Returns the records."""
    rng = random.Random(seed)
    os.chdir(folder)
    reviewers, desk = [Reviewer(rng)], Desk(rng)
    if rng.random() < 0.3:
        reviewers.append(reviewers[0].second())
    for step in range(rng.randint(1, 4)):
        reviewer = rng.choice(reviewers)
        for _ in range(rng.choice([0, 3, 10, 30, 60])):
            reviewer.act()
        try:
            desk.load(reviewer)
            desk.check("load")
            while rng.random() < 0.2:
                desk.undo()
                desk.check("undo")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, load {step}: {error}") from error
    return len(desk.records)


def read_discarded() -> set[str]:
    """As the history tells it, read here on its own: events of undone loads do not count."""
    path = Path("data/history.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    undone = {event["load"] for event in events if event.get("undone")}
    discarded: set[str] = set()
    for event in events:
        if event["load"] not in undone and ("discarded" in event or "kept" in event):
            (discarded.add if event.get("discarded") else discarded.discard)(event["main"])
    return discarded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    n_records = 0
    for seed in range(args.seed, args.seed + args.histories):
        with tempfile.TemporaryDirectory() as folder:
            n_records += play(Path(folder), seed)
            os.chdir("/")
    print(f"{args.histories} histories, {n_records} records, 0 wrong decisions, 0 silent ones")


if __name__ == "__main__":
    main()
