"""What a reviewer left of a root made by neighbor_dirs: which images are kept, deleted, or found elsewhere.

People and file managers rename, copy, drag and re-save, so only the id in a name counts. An image belongs in a
directory that was made with it. An image found outside such a directory is neither kept nor deleted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import ids
from utils.annotation.neighbor_dirs import Samples, dir_name, image_name, is_unfinished, rank_in, read_samples

_IMAGE_EXTENSIONS = """.apng .avif .avifs .bmp .dib .gif .heic .heics .heif .heifs .ico .j2c .j2k .jfif .jp2 .jpc .jpe
    .jpeg .jpf .jpg .jpm .jpx .jxl .mpo .pbm .pgm .png .pnm .ppm .qoi .svg .tga .tif .tiff .webp"""
IMAGE_EXTENSIONS = frozenset(_IMAGE_EXTENSIONS.split())
# Folders that systems create anywhere: trash cans, thumbnails, AppleDouble files.
_SYSTEM_DIRS = frozenset({"__macosx", "$recycle.bin", "recycler", "system volume information", "@eadir", "lost+found"})

KINDS = {  # directories that cannot be recorded: kind -> one of them, several of them
    "unknown": ("unknown folder", "unknown folders"),
    "renamed": ("renamed folder (put its id back)", "renamed folders (put their ids back)"),
    "copied": ("main image with two folders (keep one)", "main images with two folders (keep one)"),
    "moved": ("moved folder (move it back)", "moved folders (move them back)"),
    "no main": ("without main image", "without main image"),
}


@dataclass
class ReviewedDir:
    """One directory as it was found, ready to be recorded. Ids in rank order, the main image first."""

    root: Path
    name: str
    main: str
    kept: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    elsewhere: dict[str, str] = field(default_factory=dict)  # id -> where it was found: neither kept nor deleted

    @property
    def is_untouched(self) -> bool:
        return not self.deleted and not self.elsewhere


@dataclass
class Review:
    """One root as it was found."""

    root: Path
    samples: Samples
    is_unfinished: bool
    dirs: list[ReviewedDir] = field(default_factory=list)  # in index order
    discarded: list[ReviewedDir] = field(default_factory=list)  # deleted directories, under their original names
    skipped: list[tuple[str, str]] = field(default_factory=list)  # not to be recorded: key of KINDS, message
    foreign: list[str] = field(default_factory=list)  # images outside the directories that they belong to


@dataclass(frozen=True)
class _Image:
    """A file with an image's extension and ids (utils.ids.in_name) in its name."""

    name: str
    ids: list[str]
    is_empty: bool


@dataclass(eq=False)
class _Folder:
    """A folder in a root, and the images directly in it."""

    path: Path
    parent: _Folder | None  # None for the root
    images: list[_Image] = field(default_factory=list)


@dataclass(eq=False)
class _Place:
    """A folder in a root, and the ids that belong in it."""

    path: Path
    review: Review
    is_direct: bool  # directly in the root
    is_home: bool  # so, and made for that root
    main: str  # main id of the directory, in lower case; "" if the folder is none
    enclosing: str  # main id of the directory around the folder, itself included
    images: list[tuple[str, _Image]]  # with the id that counts: of several in a name, one that belongs here
    ranks: dict[str, int]  # of the ids that belong here, in lower case


@dataclass(frozen=True)
class _Stray:
    """An image outside its directory, or (not is_foreign) with the rank that it has in another directory."""

    id: str
    path: Path
    rank: int
    enclosing: str
    is_foreign: bool


def read_roots(roots: Sequence[Path]) -> list[Review]:
    """Read each root as it was left. All roots are read together: images may have been dragged between them.

    Raises UserError if a root or its samples.json is missing or malformed.
    """
    reviews = [Review(root, read_samples(root), is_unfinished(root)) for root in roots]
    known = {main.lower(): listed for review in reversed(reviews) for main, listed in review.samples.items()}
    places = [place for review in reviews for place in _find_places(review, known)]
    strays = [stray for place in places for stray in _find_strays(place)]
    for review in reviews:
        _sort_out(review, places, strays)
    _give_back(reviews, strays)
    return reviews


def _walk(root: Path) -> Iterator[_Folder]:
    """`root` and all folders in it, parents first. Skips symbolic links and the systems' folders."""
    waiting = [_Folder(root, None)]
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if image := _read_image(entry):
                    folder.images.append(image)
                elif entry.is_dir(follow_symlinks=False) and not _is_system_dir(entry.name):
                    waiting.append(_Folder(Path(entry.path), folder))
        yield folder


def _is_system_dir(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_DIRS


def _read_image(entry: os.DirEntry[str]) -> _Image | None:
    """None for files that file managers, cameras and people leave beside images, and for AppleDouble (._name.jpg)."""
    stem, dot, extension = entry.name.rpartition(".")
    if dot + extension.lower() not in IMAGE_EXTENSIONS or entry.name.startswith("._"):
        return None
    found = ids.in_name(stem)
    if not found or not entry.is_file(follow_symlinks=False):
        return None
    return _Image(entry.name, found, entry.stat(follow_symlinks=False).st_size == 0)


def _find_places(review: Review, known: dict[str, list[str]]) -> Iterator[_Place]:
    """known: main id -> samples of all roots, for directories dragged between roots."""
    own = {main.lower(): listed for main, listed in review.samples.items()}
    enclosing = {review.root: ""}
    for folder in _walk(review.root):
        named = ids.in_name(folder.path.name) if folder.parent else []
        main = next((id_ for samples in (own, known) for id_ in named if id_ in samples), "")
        ranks = {id_.lower(): rank for rank, id_ in enumerate(own.get(main) or known.get(main, []))}
        if folder.parent:
            enclosing[folder.path] = main or enclosing[folder.parent.path]
        images = [(next((id_ for id_ in image.ids if id_ in ranks), image.ids[0]), image) for image in folder.images]
        is_direct = folder.parent is not None and folder.parent.parent is None
        is_home = is_direct and main in own
        yield _Place(folder.path, review, is_direct, is_home, main, enclosing[folder.path], images, ranks)


def _find_strays(place: _Place) -> Iterator[_Stray]:
    for id_, image in place.images:
        is_foreign, rank = id_ not in place.ranks, rank_in(image.name)
        if is_foreign or rank not in (-1, place.ranks[id_]):
            yield _Stray(id_, place.path / image.name, rank, place.enclosing, is_foreign)


def _sort_out(review: Review, places: list[_Place], strays: list[_Stray]) -> None:
    """Fill the review; a missing image counts as deleted until _give_back finds it elsewhere."""
    found: dict[str, list[_Place]] = {}
    for place in places:
        is_here = place.review is review
        if place.main and (is_here or not place.is_home):
            found.setdefault(place.main, []).append(place)
        elif not place.main and is_here and place.is_direct:
            review.skipped.append(("unknown", f"{place.path.name}: not in samples.json"))
    may_be_main = [stray for stray in strays if stray.rank == 0 or (stray.is_foreign and stray.rank == -1)]
    paths = {stray.id: stray.path for stray in may_be_main}
    for index, main in enumerate(review.samples):
        here = found.get(main.lower(), [])
        if here:
            _read_dir(review, main, here)
        elif main.lower() in paths:
            message = f"{main}: no directory has this id, but its main image is {paths[main.lower()]}; put the id back"
            review.skipped.append(("renamed", message))
        else:
            review.discarded.append(ReviewedDir(review.root, dir_name(index, main), main))
    foreign = [stray.path for stray in strays if stray.is_foreign]
    review.foreign = [str(path) for path in foreign if path.is_relative_to(review.root)]


def _read_dir(review: Review, main: str, here: list[_Place]) -> None:
    place, listed = here[0], review.samples[main]
    if len(here) > 1:
        message = f"{' and '.join(sorted(str(place.path) for place in here))}: of one main image; keep one of them"
        review.skipped.append(("copied", message))
        return
    if not (place.is_direct and place.review is review):
        message = f"{place.path}: does not lie directly in {review.root}; move it back"
        review.skipped.append(("moved", message))
        return
    whole = {id_ for id_, image in place.images if not image.is_empty}
    found = {id_ for id_, _ in place.images}
    kept = [id_ for id_ in listed if id_.lower() in whole]
    empty = {id_: "an empty file" for id_ in listed if id_.lower() in found - whole}
    deleted = [id_ for id_ in listed if id_.lower() not in found]
    if main in kept:
        review.dirs.append(ReviewedDir(review.root, place.path.name, main, kept, deleted, empty))
    else:
        remedy = f"restore {image_name(0, main, '')} or delete the directory to discard it"
        review.skipped.append(("no main", f"{place.path.name}: main image missing; {remedy}"))


def _give_back(reviews: list[Review], strays: list[_Stray]) -> None:
    """Remove from `deleted` the images found elsewhere: they are neither kept nor deleted."""
    owners: dict[str, list[tuple[int, str, ReviewedDir | None]]] = {stray.id: [] for stray in strays}
    for review in reviews if strays else []:
        dirs = {folder.main: folder for folder in review.dirs}
        for main, listed in review.samples.items():
            for rank, id_ in enumerate(listed):
                if id_.lower() in owners:
                    owners[id_.lower()].append((rank, main.lower(), dirs.get(main)))
    for stray in strays:
        for folder in _owners(stray, owners[stray.id]):
            for id_ in [id_ for id_ in folder.deleted if id_.lower() == stray.id]:
                folder.elsewhere[id_] = str(stray.path)
                folder.deleted.remove(id_)


def _owners(stray: _Stray, made_with: list[tuple[int, str, ReviewedDir | None]]) -> list[ReviewedDir]:
    """Directories that a stray may come from: those with it at this rank, else the one around it, else all.

    made_with: (rank, main, directory if it is to be recorded) of every directory that was made with this image.
    """
    same_rank = [entry for entry in made_with if entry[0] == stray.rank]
    candidates = same_rank or (made_with if stray.is_foreign else [])
    around = [entry for entry in candidates if entry[1] == stray.enclosing]
    return [folder for _, _, folder in around or candidates if folder]
