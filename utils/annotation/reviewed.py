"""What a reviewer left of a root made by neighbor_dirs: which images are kept, deleted, or undecided.

People and programs rename, copy, drag, re-save, evict and half copy files. So a listed image counts as deleted only if
no entry of its directory could still be it:
1. A file with its id and an image extension is the image; an empty one is unknown.
2. A sidecar with its id says nothing, whatever the bytes.
3. Any other entry with its id (placeholders, partial files, lost extensions) is the image if it decodes, else unknown.
4. An image without any id is known by its digest; otherwise its directory is not recorded while images are missing.
An image found outside its directory is undecided, too: neither positive nor negative.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from utils import ids
from utils.annotation.neighbor_dirs import (
    Samples,
    dir_name,
    file_digest,
    image_name,
    is_unfinished,
    rank_in,
    read_digests,
    read_samples,
)
from utils.errors import ImageError

_IMAGE_EXTENSIONS = """.apng .avif .avifs .bmp .dib .gif .heic .heics .heif .heifs .ico .j2c .j2k .jfif .jp2 .jpc .jpe
    .jpeg .jpf .jpg .jpm .jpx .jxl .mpo .pbm .pgm .png .pnm .ppm .qoi .svg .tga .tif .tiff .webp"""
IMAGE_EXTENSIONS = frozenset(_IMAGE_EXTENSIONS.split())
# Files beside images that hold no image, in lower case. The list is closed: anything else could be an image.
SIDECARS = ("._*", "*.xmp", "*.json", "*.txt", "*.aae", "*.pp3", "*_original", "*~", "thumbs*", "*_thumb*")
_is_sidecar = re.compile("|".join(map(fnmatch.translate, SIDECARS))).match
_FOLDER_FILES = frozenset({".ds_store", "desktop.ini", ".directory", "ehthumbs.db", ".picasa.ini", "icon\r"})
# Folders that systems create anywhere, in lower case: trash cans, thumbnails, snapshots, AppleDouble files.
_SYSTEM_DIRS = frozenset(
    {"__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found"}
    | {"@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot"}
)
_SHORT_NAME = re.compile(r"(?<![0-9a-f])([0-9a-f]{6,})~", re.IGNORECASE)  # Windows' 8.3 names
_MAX_PIXELS, _MIN_SIDE = 100_000_000, 64

KINDS = {  # directories that cannot be recorded: kind -> one of them, several of them
    "unknown": ("unknown folder", "unknown folders"),
    "renamed": ("renamed folder (put its id back)", "renamed folders (put their ids back)"),
    "copied": ("main image with two folders (keep one)", "main images with two folders (keep one)"),
    "moved": ("moved folder (move it back)", "moved folders (move them back)"),
    "no main": ("without main image", "without main image"),
    "no folder": ("folder replaced by a file (put it back)", "folders replaced by files (put them back)"),
    "no id": ("with an image without id (put its id back)", "with images without id (put their ids back)"),
    "misfit": ("folder whose samples.json is another run's", "folders whose samples.json is another run's"),
}
UNKNOWN, ASIDE, MISPLACED = "unknown", "set aside", "misplaced"  # why an image is undecided


@dataclass
class ReviewedDir:
    """One directory as it was found, ready to be recorded. Ids in rank order, the main image first."""

    path: Path
    review: Review
    main: str
    kept: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    undecided: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> UNKNOWN, ASIDE or MISPLACED; where

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_untouched(self) -> bool:
        return not self.deleted and all(kind == UNKNOWN for kind, _ in self.undecided.values())


@dataclass
class Review:
    """One root as it was found. name: of the root, absolute."""

    root: Path
    name: str
    samples: Samples
    is_unfinished: bool
    dirs: list[ReviewedDir] = field(default_factory=list)  # in index order
    discarded: list[ReviewedDir] = field(default_factory=list)  # deleted directories, under their original names
    skipped: list[tuple[str, str]] = field(default_factory=list)  # not to be recorded: key of KINDS, message
    foreign: list[str] = field(default_factory=list)  # images in another directory, directories in another root
    is_misfit: bool = False  # samples.json is not of these directories
    n_empty: int = 0  # directories without any of their images
    nameless: list[str] = field(default_factory=list)  # images without an id that are none of a list

    @functools.cached_property
    def mains(self) -> dict[str, list[str]]:
        """Key of main id -> ids of its directory."""
        return {_key(main): listed for main, listed in self.samples.items()}

    @functools.cached_property
    def digests(self) -> dict[str, list[tuple[int, str]]]:
        """Main id -> (rank, digest) of each of its images, for directories that were made with these lists."""
        return read_digests(self.root)

    @functools.cached_property
    def ranks(self) -> dict[str, dict[str, int]]:
        """Key of main id -> key of id -> rank. Images that could not be loaded leave gaps, which digests tell."""
        written = {_key(main): [rank for rank, _ in by_rank] for main, by_rank in self.digests.items()}
        for main, listed in self.mains.items():
            if len(written.get(main, [])) != len(listed):
                written[main] = list(range(len(listed)))
        return {main: dict(zip(map(_key, listed), written[main])) for main, listed in self.mains.items()}


@dataclass(eq=False)
class _File:
    """An entry of a folder that is an image or could be one."""

    name: str
    ids: list[str]  # keys of the ids in its name
    state: str  # "image", "empty", "doubtful" (it is the image if it decodes), "folder" or "unclear"


@dataclass(eq=False)
class _Folder:
    """A folder in a root, and the images directly in it."""

    path: Path
    parent: _Folder | None  # None for the root
    files: list[_File] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)  # files without an id


@dataclass(eq=False)
class _Place:
    """A folder in a root, and the ids that belong in it."""

    path: Path
    review: Review
    is_direct: bool  # directly in the root
    is_home: bool  # so, and made for that root
    named: list[str]  # keys of the ids in its name
    main: str  # key of the main id of the directory; "" if the folder is none
    enclosing: str  # key of the main id of the directory around the folder, itself included
    files: list[tuple[str, _File]]  # with the id that counts: of several in a name, one that belongs here
    owner: Review  # whose directory it is
    listed: dict[str, int]  # key of each id that belongs here -> its position in the list
    nameless: list[str]  # files without an id; after _match_digests, images that are unmatched


@dataclass(frozen=True)
class _Stray:
    """An image outside its directory, or (not is_foreign) with the rank that it has in another directory."""

    review: Review
    id: str
    path: Path
    rank: int
    enclosing: str
    is_foreign: bool
    kind: str


class _Owner(NamedTuple):
    """A directory that was made with an image."""

    review: Review
    rank: int
    main: str  # key of the main id
    folder: ReviewedDir | None  # None if it is not to be recorded


def read_roots(roots: Sequence[Path]) -> list[Review]:
    """Read each root as it was left. All roots are read together: images may have been dragged between them.

    Raises UserError if a root or its samples.json is missing or malformed.
    """
    reviews = [Review(root, str(root.resolve()), read_samples(root), is_unfinished(root)) for root in roots]
    known = {main: review for review in reversed(reviews) for main in review.mains}
    places = [place for review in reviews for place in _find_places(review, known)]
    _match_digests(reviews, places)
    strays = [stray for place in places for stray in _find_strays(place)]
    for review in reviews:  # with what may come from it in other roots, copies of it for a second reviewer apart
        here = [place for place in places if place.review is review or place.main not in place.review.mains]
        may_be_mains = [one for one in strays if one.review is review or one.id not in one.review.mains]
        _sort_out(review, here, may_be_mains, reviews)
    _give_back(reviews, strays)
    return reviews


@functools.cache
def _key(id_: str) -> str:
    """Ids are compared in lower case and with hyphens; programs change both."""
    digits = id_.replace("-", "").lower()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _ids_in(name: str) -> list[str]:
    return [id_ if len(id_) == 36 else _key(id_) for id_ in ids.in_name(name)]


# --- what lies in a root ----------------------------------------------------------------------------------------------
def _walk(root: Path) -> Iterator[_Folder]:
    """`root` and all folders in it, parents first. Skips symbolic links and the systems' folders."""
    waiting = [_Folder(root, None)]
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if file := _read_image(entry):
                    folder.files.append(file)
                    continue
                is_walked = entry.is_dir(follow_symlinks=False) and not _is_system_dir(entry.name)
                if is_walked:
                    waiting.append(_Folder(Path(entry.path), folder))
                if folder.parent or not is_walked:
                    _read_other(entry, folder)
        yield folder


def _is_system_dir(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_DIRS


def _read_image(entry: os.DirEntry[str]) -> _File | None:
    """None for all but files with an id and an image extension, and for AppleDouble (._name.jpg)."""
    stem, dot, extension = entry.name.rpartition(".")
    if dot + extension.lower() not in IMAGE_EXTENSIONS or entry.name.startswith("._"):
        return None
    found = _ids_in(stem)
    if not found or not entry.is_file(follow_symlinks=False):
        return None
    is_empty = entry.stat(follow_symlinks=False).st_size == 0
    return _File(entry.name, found, "empty" if is_empty else "image")


def _read_other(entry: os.DirEntry[str], folder: _Folder) -> None:
    name = entry.name.lower()
    if _is_sidecar(name) or name in _FOLDER_FILES:
        return
    is_file = entry.is_file(follow_symlinks=False)
    if found := _ids_in(entry.name):
        is_dir = entry.is_dir(follow_symlinks=False)  # Safari downloads into folders
        state = "doubtful" if is_file else "folder" if is_dir else "unclear"  # links are not followed
        folder.files.append(_File(entry.name, found, state))
    elif is_file:
        folder.nameless.append(entry.name)


def _find_places(review: Review, known: dict[str, Review]) -> Iterator[_Place]:
    """known: key of main id -> a root made with it, for directories dragged between roots."""
    own = review.mains
    enclosing = {review.root: ""}
    for folder in _walk(review.root):
        named = _ids_in(folder.path.name) if folder.parent else []
        main = next((id_ for samples in (own, known) for id_ in named if id_ in samples), "")
        owner = review if main in own else known.get(main, review)
        listed = {_key(id_): position for position, id_ in enumerate(owner.mains.get(main, ()))}
        if folder.parent:
            enclosing[folder.path] = main or enclosing[folder.parent.path]
        _find_ids(folder, listed)
        files = [(next((id_ for id_ in file.ids if id_ in listed), file.ids[0]), file) for file in folder.files]
        is_other_dir = [f.state == "folder" and id_ in known and id_ not in listed for id_, f in files]
        files = [pair for pair, is_dir in zip(files, is_other_dir) if not (is_dir and folder.parent)]
        is_direct = folder.parent is not None and folder.parent.parent is None
        yield _Place(
            folder.path,
            review,
            is_direct,
            is_direct and main in own,
            named,
            main,
            enclosing[folder.path],
            files,
            owner,
            listed,
            folder.nameless,
        )


def _find_ids(folder: _Folder, listed: Iterable[str]) -> None:
    """Find the ids of this directory in names like 67BC12~1.JPG, and where other hexadecimal digits are beside them."""
    for name in list(folder.nameless):
        digits = name.replace("-", "").lower()
        short = _SHORT_NAME.search(name)
        start = short[1].lower() if short else "-"
        plain = ((id_, id_.replace("-", "")) for id_ in listed)
        if found := [id_ for id_, whole in plain if whole in digits or whole.startswith(start)]:
            folder.nameless.remove(name)
            folder.files.append(_File(name, found, "doubtful"))


def _match_digests(reviews: Sequence[Review], places: Sequence[_Place]) -> None:
    """Find the ids of images without one by their digests; in `nameless` stay the images without a match."""
    if not any(place.nameless for place in places):
        return
    ids_of: dict[str, dict[str, None]] = {}  # digest -> keys of ids, in order
    for review in reviews:
        for main, listed in review.samples.items():
            for id_, (_, digest) in zip(listed, review.digests.get(main, [])):
                ids_of.setdefault(digest, {})[_key(id_)] = None
    for place in places:
        images = [name for name in place.nameless if _could_be_image(place.path / name)]
        place.nameless = []
        there = {id_ for id_, _ in place.files}
        for name in images:
            matches = list(ids_of.get(_digest(place.path / name), ()))
            here = [id_ for id_ in matches if id_ in place.listed]
            missing = [id_ for id_ in here if id_ not in there]
            if not matches:
                place.nameless.append(name)
            for id_ in missing if here else matches:  # identical images of the collection share a digest
                place.files.append((id_, _File(name, [id_], "image" if len(missing) < 2 else "unclear")))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file_digest(file)
    except OSError:
        return "not readable"


def _could_be_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS or _decode(path) != "not_an_image"


def _decode(path: Path) -> str:
    """Why a file does not decode to its last pixel; "" if it does."""
    from utils.images import decode

    try:
        with path.open("rb") as file:
            decode.decode(file, _MAX_PIXELS, _MIN_SIDE)
    except OSError:
        return "not readable"
    except ImageError as error:
        return error.reason
    return ""


# --- what it means ----------------------------------------------------------------------------------------------------
def _find_strays(place: _Place) -> Iterator[_Stray]:
    if len(place.files) == len(place.listed) and place.listed == {id_: rank_in(f.name) for id_, f in place.files}:
        return  # as it was made; ranks need not be looked up
    for id_, file in place.files:
        is_foreign, rank = id_ not in place.listed, rank_in(file.name)
        if is_foreign or rank not in (-1, place.owner.ranks[place.main][id_]):
            kind = MISPLACED if place.main else ASIDE
            yield _Stray(place.review, id_, place.path / file.name, rank, place.enclosing, is_foreign, kind)


def _sort_out(review: Review, places: list[_Place], strays: list[_Stray], reviews: Sequence[Review]) -> None:
    """Fill the review; a missing image counts as deleted until _give_back finds it elsewhere."""
    found: dict[str, list[_Place]] = {}
    unmatched: dict[str, list[str]] = {}
    for place in places:
        if place.main:
            found.setdefault(place.main, []).append(place)
        for name in place.nameless:
            unmatched.setdefault(place.enclosing, []).append(str(place.path / name))
    own = review.mains
    if fault := _find_misfit(review, places, own.keys() & found.keys(), reviews):
        review.is_misfit = True
        review.skipped.append(("misfit", f"{review.root / 'samples.json'}: {fault}; copy it from the original folder"))
        return
    for place in places:
        if place.review is review and place.is_direct and not place.main:
            review.skipped.append(("unknown", f"{place.path.name}: not in samples.json"))
    may_be_main = [stray for stray in strays if stray.rank == 0 or (stray.is_foreign and stray.rank == -1)]
    paths = {stray.id: stray.path for stray in may_be_main}
    in_root = {stray.id: stray.path for stray in strays if stray.path.parent == review.root}
    for index, main in enumerate(review.samples):
        here = found.get(_key(main), [])
        if here:
            _read_dir(review, main, here, unmatched.get(_key(main), []))
        elif _key(main) in in_root and in_root[_key(main)].suffix.lower() not in IMAGE_EXTENSIONS:
            review.skipped.append(("no folder", f"{in_root[_key(main)]}: no folder; put {dir_name(index, main)} back"))
        elif _key(main) in paths:
            message = f"{main}: no directory has this id, but its main image is {paths[_key(main)]}; put the id back"
            review.skipped.append(("renamed", message))
        else:
            review.discarded.append(ReviewedDir(review.root / dir_name(index, main), review, main))
    foreign = [stray.path for stray in strays if stray.is_foreign and stray.kind == MISPLACED]
    foreign += [place.path for place in places if place.main and place.main not in own]
    review.foreign = [str(path) for path in foreign if path.is_relative_to(review.root)]
    review.nameless = [str(place.path / name) for place in places if place.review is review for name in place.nameless]


def _find_misfit(review: Review, places: Sequence[_Place], mains: set[str], reviews: Sequence[Review]) -> str:
    """Why samples.json must be another run's; "" if it fits. mains: keys of the main ids with a directory."""
    direct = [place for place in places if place.review is review and place.is_direct]
    n_strange = sum(bool(place.named) and not place.main for place in direct)
    if n_strange and n_strange >= len(mains) and len(mains) < len(review.samples):
        return f"{n_strange} directories here are not in it, {len(review.samples) - len(mains)} in it are not here"
    homes = [place for place in direct if place.is_home]
    foreign = [
        {id_ for id_, file in place.files if id_ not in place.listed and file.state == "image"} for place in homes
    ]
    if 2 * sum(map(bool, foreign)) > len(homes) > 1:
        known = {_key(id_) for one in reviews for listed in one.samples.values() for id_ in listed}
        if 2 * (n_other := sum(bool(ids_here - known) for ids_here in foreign)) > len(homes):
            return f"{n_other} directories hold images that are in no list of it"
    if any(not place.listed.keys() <= {id_ for id_, _ in place.files} for place in homes):
        n_other = sum(
            len(by_rank) != len(review.samples.get(main, by_rank)) for main, by_rank in review.digests.items()
        )
        if n_other:
            return f"{n_other} directories were made with other lists"
    return ""


def _read_dir(review: Review, main: str, here: list[_Place], unmatched: list[str]) -> None:
    place, listed = here[0], review.samples[main]
    if len(here) > 1:
        message = f"{' and '.join(sorted(str(place.path) for place in here))}: of one main image; keep one of them"
        review.skipped.append(("copied", message))
        return
    if not (place.is_direct and place.review is review):
        message = f"{place.path}: does not lie directly in {review.root}; move it back"
        review.skipped.append(("moved", message))
        return
    folder = _decide(place, main, listed)
    if folder.deleted and unmatched:
        message = f"images are missing, and {', '.join(unmatched)} could be these; put the ids back or move them out"
        review.skipped.append(("no id", f"{place.path.name}: {message}"))
    elif main not in folder.kept:
        review.n_empty += not folder.kept and not folder.undecided
        remedy = f"restore {image_name(0, main, '')} or delete the directory to discard it"
        where = folder.undecided.get(main, ("", "missing"))[1]
        review.skipped.append(("no main", f"{place.path.name}: main image {where}; {remedy}"))
    else:
        review.dirs.append(folder)


def _decide(place: _Place, main: str, listed: Sequence[str]) -> ReviewedDir:
    """kept, deleted and unknown images of a directory, by its entries alone."""
    whole = {id_ for id_, file in place.files if file.state == "image"}
    for id_, file in place.files:
        if (
            file.state == "doubtful"
            and id_ in place.listed
            and id_ not in whole
            and not _decode(place.path / file.name)
        ):
            whole.add(id_)
    found = dict(place.files)
    folder = ReviewedDir(place.path, place.review, main)
    for id_ in listed:
        if _key(id_) in whole:
            folder.kept.append(id_)
        elif _key(id_) in found:
            file = found[_key(id_)]
            what = "an empty file" if file.state == "empty" else "no whole image"
            folder.undecided[id_] = (UNKNOWN, f"{what}, {file.name}")
        else:
            folder.deleted.append(id_)
    return folder


def _give_back(reviews: list[Review], strays: list[_Stray]) -> None:
    """Remove from `deleted` the images found elsewhere: they are neither kept nor deleted."""
    owners: dict[str, list[_Owner]] = {stray.id: [] for stray in strays}
    for review in reviews if strays else []:
        dirs = {folder.main: folder for folder in review.dirs}
        for main in review.samples:
            for id_, rank in review.ranks[_key(main)].items():
                if id_ in owners:
                    owners[id_].append(_Owner(review, rank, _key(main), dirs.get(main)))
    for stray in strays:
        for folder in _find_owners(stray, owners[stray.id]):
            for id_ in [id_ for id_ in folder.deleted if _key(id_) == stray.id]:
                folder.undecided[id_] = (stray.kind, str(stray.path))
                folder.deleted.remove(id_)


def _find_owners(stray: _Stray, made_with: list[_Owner]) -> list[ReviewedDir]:
    """Directories that a stray may come from: those with it at this rank, else the one around it, else all.

    made_with: every directory made with this image. Of copies for two reviewers, the one in the stray's root counts.
    """
    here = {owner.main for owner in made_with if owner.review is stray.review}
    made_with = [owner for owner in made_with if owner.review is stray.review or owner.main not in here]
    same_rank = [owner for owner in made_with if owner.rank == stray.rank]
    candidates = same_rank or (made_with if stray.is_foreign else [])
    around = [owner for owner in candidates if owner.main == stray.enclosing]
    return [owner.folder for owner in around or candidates if owner.folder]
