"""Read the folders of neighbor_dirs.py after a review: which images were kept or deleted, and which are undecided.

People and programs rename, copy, move, re-save, evict and partly copy files. So a listed image counts as deleted only
if no entry of its directory could still be the image:
1. A file with its id and an image extension is the image; if the file is empty, the image is unknown.
2. A sidecar with its id proves nothing, whatever its content.
3. Any other entry with its id (placeholder, partial file, lost extension) is the image if it decodes, else unknown.
4. An image without any id is identified by its digest. If this fails, its directory is not recorded while images are
   missing.
An image found outside its directory is undecided, too: neither positive nor negative.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import ids
from utils.annotation.neighbor_dirs import (
    FOLDER_FILES,
    SAMPLES,
    Samples,
    dir_name,
    file_digest,
    image_name,
    read_digests,
    read_samples,
)
from utils.annotation.records import Record
from utils.errors import ImageError
from utils.log import counted

_IMAGE_EXTENSIONS = """.apng .avif .avifs .bmp .dib .gif .heic .heics .heif .heifs .ico .j2c .j2k .jfif .jp2 .jpc .jpe
    .jpeg .jpf .jpg .jpm .jpx .jxl .mpo .pbm .pgm .png .pnm .ppm .qoi .svg .tga .tif .tiff .webp"""
_IMAGE_ENDINGS = tuple(_IMAGE_EXTENSIONS.split())
# Files beside images that contain no image, in lower case. Only these: anything else could be an image.
SIDECARS = ("._*", "*.xmp", "*.json", "*.txt", "*.aae", "*.pp3", "*_original", "*~", "thumbs*", "*_thumb*")
_is_sidecar = re.compile("|".join(map(fnmatch.translate, SIDECARS))).match
_NO_IMAGES = ("._", ".trashed-", ".fuse_hidden", ".nfs")  # AppleDouble, Android's trash, files deleted while open
# Folders that systems create anywhere, in lower case: trash cans, thumbnails, snapshots, AppleDouble files.
_SYSTEM_DIRS = frozenset(
    {"__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found"}
    | {"@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot"}
)
_PARTIAL_DIRS = frozenset({".~tmp~", ".rsync-partial"})  # hidden, but with images that rsync has not put in place
_SHORT_NAME = re.compile(r"(?<![0-9a-f])([0-9a-f]{6,})~")  # Windows' 8.3 names
_MAX_PIXELS, _MIN_SIDE = 100_000_000, 64

KINDS = {  # directories that cannot be recorded: kind -> words for one, for several
    "unknown": ("unknown folder", "unknown folders"),
    "renamed": ("renamed folder (put its id back)", "renamed folders (put their ids back)"),
    "copied": ("main image with two folders (keep one)", "main images with two folders (keep one)"),
    "moved": ("moved folder (move it back)", "moved folders (move them back)"),
    "no main": ("folder without its main image", "folders without their main images"),
    "no folder": ("folder replaced by a file (put it back)", "folders replaced by files (put them back)"),
    "no id": ("folder with an image without id (put the id back)", "folders with images without id (put the ids back)"),
    "misfit": ("folder with another run's samples.json", "folders with another run's samples.json"),
}
UNKNOWN, ASIDE, MISPLACED = "unknown", "set aside", "misplaced"  # why an image is undecided


@dataclass
class ReviewedDir:
    """One directory as it was found, ready to be recorded. Ids are in rank order, the main image first."""

    path: Path
    review: Review
    main: str
    kept: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    undecided: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> UNKNOWN, ASIDE or MISPLACED; where
    before: Record = field(default_factory=lambda: Record(pos=[], neg=[]))  # its record before this load, if any

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_untouched(self) -> bool:
        return not self.deleted and all(kind == UNKNOWN for kind, _ in self.undecided.values())


@dataclass
class Review:
    """One root as it was found. name: its absolute path.

    Ids are compared by their keys, without hyphens and in lower case, because programs change both.
    """

    root: Path
    name: str
    samples: Samples
    dirs: list[ReviewedDir] = field(default_factory=list)  # in index order
    discarded: list[ReviewedDir] = field(default_factory=list)  # deleted directories, under their original names
    skipped: list[tuple[str, str]] = field(default_factory=list)  # not recorded: (key of KINDS, message)
    misplaced: list[str] = field(default_factory=list)  # images in another directory, directories in another root
    n_empty: int = 0  # directories without any of their images
    nameless: list[str] = field(default_factory=list)  # images without an id that match no listed image

    @functools.cached_property
    def listed(self) -> dict[str, dict[str, str]]:
        """Key of main id -> key of each id of its directory -> the id; in rank order."""
        return {ids.to_key(main): {ids.to_key(id_): id_ for id_ in listed} for main, listed in self.samples.items()}

    @functools.cached_property
    def digests(self) -> dict[str, list[tuple[int, str]]]:
        """Key of main id -> (rank, digest) of each of its images, for directories that were made with these lists."""
        return {
            ids.to_key(main): [(rank, digest) for rank, digest in enumerate(by_rank) if isinstance(digest, str)]
            for main, by_rank in read_digests(self.root).items()
        }

    @functools.cached_property
    def ranks(self) -> dict[str, dict[str, int]]:
        """Key of main id -> key of id -> rank. Images that could not be loaded leave gaps, which the digests show."""
        ranks = {}
        for main, listed in self.listed.items():
            written = [rank for rank, _ in self.digests.get(main, [])]
            ranks[main] = dict(zip(listed, written if len(written) == len(listed) else range(len(listed))))
        return ranks


@dataclass(eq=False)
class _Folder:
    """A folder in a root, and the images directly in it."""

    path: Path
    review: Review
    parent: _Folder | None  # None for the root
    owner: Review  # the root that it was made for
    main: str = ""  # key of the directory's main id; "" if the folder is not a directory of a root
    in_place: set[str] = field(default_factory=set)  # keys of ids whose image is here, whole, under its rank
    files: list[_File] = field(default_factory=list)  # the others
    nameless: list[str] = field(default_factory=list)  # files without an id; after _match_digests, unmatched images

    @functools.cached_property
    def listed(self) -> dict[str, str]:
        """Key of each id that belongs here -> the id; in rank order."""
        return self.owner.listed.get(self.main, {})

    @property
    def there(self) -> set[str]:
        """Keys of all ids of its entries, whatever their state."""
        return self.in_place.union(file.id for file in self.files)

    @property
    def is_direct(self) -> bool:
        """Whether the folder is directly in the root."""
        return self.parent is not None and self.parent.parent is None

    @property
    def enclosing(self) -> str:
        """Key of the main id of this directory or, if it is not one, of the directory around it."""
        return self.main or (self.parent.enclosing if self.parent else "")


@dataclass(eq=False, slots=True)
class _File:
    """An entry of a folder that is an image or could be one. id: the key in its name, preferably one of this folder."""

    folder: _Folder
    name: str
    id: str
    state: str  # "image", "empty", "doubtful" (it is the image if it decodes) or "unclear"

    @property
    def path(self) -> Path:
        return self.folder.path / self.name

    @property
    def rank(self) -> int:
        """The number at the start of its name; -1 if it is gone. Some zips unpack to the name FOLDER\\FILE."""
        number = self.name.rpartition("\\")[2].partition("_")[0]
        return int(number) if number.isascii() and number.isdecimal() else -1

    @property
    def is_foreign(self) -> bool:
        """Whether the file is outside its directory."""
        return self.id not in self.folder.listed

    @property
    def is_stray(self) -> bool:
        """Whether the file is foreign, or has another rank than in this directory."""
        return self.is_foreign or self.rank not in (-1, self.folder.owner.ranks[self.folder.main][self.id])


_Owner = tuple[Review, str]  # a directory, listed by this root, with the key of this main id


def read_roots(roots: Sequence[Path]) -> list[Review]:
    """Read each root as it was left. All roots are read together, as images may have been moved between them.

    Raises UserError if a root or its samples.json is missing or malformed.
    """
    reviews = [Review(root, str(root.resolve()), read_samples(root)) for root in roots]
    known = {main: review for review in reversed(reviews) for main in review.listed}
    folders = [folder for review in reviews for folder in _walk(review, known)]
    _match_digests(reviews, folders)
    strays = [file for folder in folders for file in folder.files if file.is_stray]
    for review in reviews:
        _sort_out(review, folders, strays, reviews)
    _give_back(reviews, strays)
    return reviews


# --- the entries of a root --------------------------------------------------------------------------------------------
def _walk(review: Review, known: Mapping[str, Review]) -> Iterator[_Folder]:
    """Yield the root and all folders in it, parents first. Skips symbolic links and system folders.

    known: key of main id -> a root made with it, for directories that were moved between roots.
    """
    waiting = [_Folder(review.root, review, None, review)]
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder.path) as entries:
            for entry in entries:
                is_walked = entry.is_dir(follow_symlinks=False) and not _is_system_dir(entry.name)
                if is_walked:
                    waiting.append(_find_dir(Path(entry.path), folder, known))
                if folder.parent or not is_walked:
                    _read_entry(entry, folder, known)
        yield folder


def _is_system_dir(name: str) -> bool:
    return (name.startswith(".") and name not in _PARTIAL_DIRS) or name.lower() in _SYSTEM_DIRS


def _find_dir(path: Path, parent: _Folder, known: Mapping[str, Review]) -> _Folder:
    """Make a _Folder. The id in its name identifies the directory, if possible as one of this root."""
    named = ids.in_name(path.name)
    own = [(parent.review, id_) for id_ in named if id_ in parent.review.listed]
    others = [(known[id_], id_) for id_ in named if id_ in known]
    owner, main = next(iter(own + others), (parent.review, ""))
    return _Folder(path, parent.review, parent, owner, main)


def _read_entry(entry: os.DirEntry[str], folder: _Folder, known: Mapping[str, Review]) -> None:
    """Note an entry that is an image or could be one."""
    name, found, is_file = entry.name.lower(), ids.in_name(entry.name), entry.is_file(follow_symlinks=False)
    if found and is_file and name.endswith(_IMAGE_ENDINGS) and not name.startswith(_NO_IMAGES):
        state = "image" if entry.stat(follow_symlinks=False).st_size else "empty"
    elif _is_sidecar(name) or name.startswith(_NO_IMAGES) or name in FOLDER_FILES:
        return
    else:  # links are not followed; Safari downloads into folders
        state = "doubtful" if is_file else "unclear"
        found = found or (_find_parts(name, folder.listed) if is_file else [])
    here = [id_ for id_ in found if id_ in folder.listed]
    if here and state == "image" and name.startswith(f"{folder.owner.ranks[folder.main][here[0]]}_"):
        folder.in_place.add(here[0])
        return
    is_other_dir = folder.parent and not here and found and found[0] in known and entry.is_dir(follow_symlinks=False)
    if found and not is_other_dir:
        folder.files.append(_File(folder, entry.name, (here or found)[0], state))
    elif is_file:
        folder.nameless.append(entry.name)


def _find_parts(name: str, listed: Iterable[str]) -> list[str]:
    """The ids of this directory in names like 67bc12~1.jpg, and in names with more hexadecimal digits beside an id."""
    digits = name.replace("-", "")
    short = _SHORT_NAME.search(name)
    start = short[1] if short else "-"
    plain = ((id_, id_.replace("-", "")) for id_ in listed)
    return [id_ for id_, whole in plain if whole in digits or whole.startswith(start)]


def _match_digests(reviews: Sequence[Review], folders: Sequence[_Folder]) -> None:
    """Find the ids of images without an id by their digests. Images without a match stay in `nameless`."""
    if not any(folder.nameless for folder in folders):
        return
    ids_of: dict[str, dict[str, None]] = {}  # digest -> keys of ids, in order
    for review in reviews:
        for main, listed in review.listed.items():
            for id_, (_, digest) in zip(listed, review.digests.get(main, [])):
                ids_of.setdefault(digest, {})[id_] = None
    for folder in folders:
        names, folder.nameless, there = folder.nameless, [], folder.there
        for name in filter(lambda name: _could_be_image(folder.path / name), names):
            matches = list(ids_of.get(_digest(folder.path / name), ()))
            here = [id_ for id_ in matches if id_ in folder.listed]
            missing = [id_ for id_ in here if id_ not in there]
            if not matches:
                folder.nameless.append(name)
            for id_ in missing if here else matches:  # identical images of the collection share a digest
                folder.files.append(_File(folder, name, id_, "image" if len(missing) < 2 else "unclear"))


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:
        return "not readable"


def _could_be_image(path: Path) -> bool:
    return path.name.lower().endswith(_IMAGE_ENDINGS) or _decode(path) != "not_an_image"


def _decode(path: Path) -> str:
    """The reason why a file does not decode to its last pixel; "" if it does."""
    from utils.images import decode

    try:
        with path.open("rb") as file:
            decode.decode(file, _MAX_PIXELS, _MIN_SIDE)
    except OSError:
        return "not readable"
    except ImageError as error:
        return error.reason
    return ""


# --- decisions --------------------------------------------------------------------------------------------------------
def _sort_out(review: Review, folders: list[_Folder], strays: list[_File], reviews: Sequence[Review]) -> None:
    """Fill the review. A missing image counts as deleted until _give_back() finds it elsewhere."""
    inside = [folder for folder in folders if folder.review is review]
    # Includes other roots, but not a second reviewer's copy of the same directories:
    around = [folder for folder in folders if folder.review is review or folder.main not in folder.review.listed]
    strays = [file for file in strays if file.folder.review is review or file.id not in file.folder.review.listed]
    if fault := _find_misfit(review, inside, {folder.main for folder in around}, reviews):
        review.skipped.append(("misfit", f"{review.root / SAMPLES}: {fault}; copy it from the original folder"))
        return
    unknown = [folder for folder in inside if folder.is_direct and not folder.main]
    review.skipped += [("unknown", f"{folder.path.name}: not in samples.json") for folder in unknown]
    review.nameless = [str(folder.path / name) for folder in inside for name in folder.nameless]
    paths = [file.path for file in strays if file.folder.review is review and file.is_foreign and file.folder.main]
    paths += [folder.path for folder in inside if folder.main and folder.main not in review.listed]
    review.misplaced = list(map(str, paths))
    may_be_main = {file.id: file.path for file in strays if file.rank == 0 or (file.is_foreign and file.rank == -1)}
    in_root = {file.id: file.path for file in strays if file.path.parent == review.root}
    dirs: defaultdict[str, list[_Folder]] = defaultdict(list)
    unmatched: defaultdict[str, list[str]] = defaultdict(list)
    for folder in around:
        dirs[folder.main].append(folder)
        unmatched[folder.enclosing] += [str(folder.path / name) for name in folder.nameless]
    for index, main in enumerate(review.samples):
        key, name = ids.to_key(main), dir_name(index, main)
        if dirs[key]:
            _read_dir(review, main, dirs[key], unmatched[key])
        elif key in in_root and not in_root[key].name.lower().endswith(_IMAGE_ENDINGS):
            review.skipped.append(("no folder", f"{in_root[key]}: not a folder; put {name} back"))
        elif key in may_be_main:
            fault = f"no directory has this id, but its main image is {may_be_main[key]}"
            review.skipped.append(("renamed", f"{main}: {fault}; it belongs in a folder named {name}"))
        else:
            review.discarded.append(ReviewedDir(review.root / name, review, main))


def _find_misfit(review: Review, inside: Sequence[_Folder], mains: set[str], reviews: Sequence[Review]) -> str:
    """The reason why samples.json must be from another run; "" if it fits. mains: keys of main ids with a directory."""
    direct = [folder for folder in inside if folder.is_direct]
    n_strange = sum(bool(ids.in_name(folder.path.name)) and not folder.main for folder in direct)
    n_missing = len(review.listed.keys() - mains)
    if n_missing and n_strange and n_strange >= len(review.listed) - n_missing:
        return f"directories here that are not in it: {n_strange}; in it but not here: {n_missing}"
    homes = [folder for folder in direct if folder.main in review.listed]
    foreign = [{file.id for file in folder.files if file.is_foreign and file.state == "image"} for folder in homes]
    if 2 * sum(map(bool, foreign)) > len(homes) > 1:
        known = {id_ for one in reviews for listed in one.listed.values() for id_ in listed}
        if 2 * (n_other := sum(bool(found - known) for found in foreign)) > len(homes):
            return f"{n_other} directories contain images that are in none of its lists"
    if any(folder.listed.keys() - folder.there for folder in homes):
        digests = review.digests
        if n_other := sum(len(digests.get(main, listed)) != len(listed) for main, listed in review.listed.items()):
            return f"{counted(n_other, 'directory')} made with other lists"
    return ""


def _read_dir(review: Review, main: str, here: list[_Folder], unmatched: list[str]) -> None:
    """Add a directory to review.dirs, or to review.skipped if it cannot be recorded. here: all folders of `main`."""
    folder = here[0]
    found = _decide(folder, main)
    where = found.undecided.get(main, ("", "missing"))[1]
    if len(here) > 1:
        paths = " and ".join(sorted(str(folder.path) for folder in here))
        kind, message = "copied", f"{paths}: the same main image; keep one of them"
    elif not (folder.is_direct and folder.review is review):
        kind, message = "moved", f"{folder.path}: not directly in {review.root}; move it back"
    elif found.deleted and unmatched:
        could_be = f"{', '.join(unmatched)} could be these; put the ids back into the names, or move the files out"
        kind, message = "no id", f"{folder.path.name}: images are missing, and {could_be}"
    elif main not in found.kept:
        review.n_empty += not found.kept and not found.undecided
        remedy = f"restore {image_name(0, main, '')} or delete the directory to discard it"
        kind, message = "no main", f"{folder.path.name}: main image {where}; {remedy}"
    else:
        review.dirs.append(found)
        return
    review.skipped.append((kind, message))


def _decide(folder: _Folder, main: str) -> ReviewedDir:
    """Find the kept, deleted and unknown images of a directory by its entries alone."""
    whole = folder.in_place.union(file.id for file in folder.files if file.state == "image")
    others: defaultdict[str, list[_File]] = defaultdict(list)
    for file in folder.files:
        if file.id not in whole:
            others[file.id].append(file)
    found = ReviewedDir(folder.path, folder.review, main)
    for key, id_ in folder.listed.items():
        if key not in whole and key not in others:
            found.deleted.append(id_)
        elif key in whole or any(file.state == "doubtful" and not _decode(file.path) for file in others[key]):
            found.kept.append(id_)
        else:
            what = "an empty file" if others[key][-1].state == "empty" else "no whole image"
            found.undecided[id_] = (UNKNOWN, f"{what}, {others[key][-1].name}")
    return found


def _give_back(reviews: Sequence[Review], strays: Sequence[_File]) -> None:
    """Remove images found elsewhere from `deleted`: they are neither kept nor deleted."""
    made_with: defaultdict[str, list[_Owner]] = defaultdict(list)
    for review in reviews if strays else []:
        for main, listed in review.listed.items():
            for id_ in listed:
                made_with[id_].append((review, main))
    dirs = {(review.root, ids.to_key(found.main)): found for review in reviews for found in review.dirs}
    for stray in strays:
        for review, main in _find_owners(stray, made_with[stray.id]):
            found, id_ = dirs.get((review.root, main)), review.listed[main][stray.id]
            if found and id_ in found.deleted:
                found.deleted.remove(id_)
                found.undecided[id_] = (MISPLACED if stray.folder.main else ASIDE, str(stray.path))


def _find_owners(stray: _File, made_with: list[_Owner]) -> list[_Owner]:
    """The directories that a stray may come from: directories that list it at its rank or, for a foreign file, all that
    list it; of these only the directory around it, if it is one of them.

    made_with: all directories that list this image. Of copies for two reviewers, the copy in the stray's root counts.
    """
    here = {main for review, main in made_with if review is stray.folder.review}
    made_with = [owner for owner in made_with if owner[0] is stray.folder.review or owner[1] not in here]
    same_rank = [(review, main) for review, main in made_with if review.ranks[main][stray.id] == stray.rank]
    candidates = same_rank or (made_with if stray.is_foreign else [])
    return [owner for owner in candidates if owner[1] == stray.folder.enclosing] or candidates
