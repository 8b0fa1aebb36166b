"""What a reviewer left of the folders that neighbor_dirs made: which images are kept, deleted, or lie elsewhere.

People and file managers rename, copy, drag, re-save; the id in the name is what counts. An image belongs where it lies
if the directory around it was made with it. One that lies where it does not belong was neither kept nor deleted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import ids
from utils.annotation.folders import Image, walk
from utils.annotation.neighbor_dirs import Samples, dir_name, image_name, is_unfinished, rank_in, read_samples


@dataclass
class Group:
    """One directory as it was found, ready to be recorded. Ids in rank order, the main image first."""

    root: Path
    name: str
    main: str
    kept: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    elsewhere: dict[str, str] = field(default_factory=dict)  # id -> the path found instead: neither kept nor deleted

    @property
    def is_untouched(self) -> bool:
        return not self.deleted and not self.elsewhere


@dataclass
class Review:
    """One root as it was found."""

    root: Path
    samples: Samples
    is_unfinished: bool
    groups: list[Group] = field(default_factory=list)  # in index order
    discarded: list[Group] = field(default_factory=list)  # directories that are gone, under the names they had
    skipped: list[tuple[str, str]] = field(default_factory=list)  # directories that cannot be recorded: kind, message
    foreign: list[str] = field(default_factory=list)  # images that lie where they do not belong


@dataclass(eq=False)
class _Place:
    """A folder in a root, and what belongs there."""

    path: Path
    review: Review
    is_direct: bool  # directly in the root
    is_home: bool  # so, and made for that root
    main: str  # of the group whose directory this is, in lower case; "" if none
    enclosing: str  # main of the group in whose directory this lies, itself included
    images: list[tuple[str, Image]]  # with the id that counts: of several in a name, one that belongs here
    ranks: dict[str, int]  # of the ids that belong here, in lower case


@dataclass(frozen=True)
class _Stray:
    """An image that does not belong where it lies, or (not is_foreign) bears the rank of another group's."""

    id: str
    path: Path
    rank: int
    enclosing: str
    is_foreign: bool


def read_roots(roots: Sequence[Path]) -> list[Review]:
    """How each root was left. All are read together, for images may have been dragged from one to another.

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


def _find_places(review: Review, known: dict[str, list[str]]) -> Iterator[_Place]:
    """known: main id -> samples of all roots, for directories are dragged from one to another, too."""
    own = {main.lower(): listed for main, listed in review.samples.items()}
    enclosing = {review.root: ""}
    for folder in walk(review.root):
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
    """Fill the review, as if a missing image had been deleted wherever it is now."""
    found: dict[str, list[_Place]] = {}
    for place in places:
        is_here = place.review is review
        if place.main and (is_here or not place.is_home):
            found.setdefault(place.main, []).append(place)
        elif not place.main and is_here and place.is_direct:
            review.skipped.append(("not in samples.json", f"{place.path.name}: not in samples.json"))
    may_be_main = [stray for stray in strays if stray.rank == 0 or (stray.is_foreign and stray.rank == -1)]
    paths = {stray.id: stray.path for stray in may_be_main}
    for index, main in enumerate(review.samples):
        here = found.get(main.lower(), [])
        if here:
            _read_group(review, main, here)
        elif main.lower() in paths:
            message = f"{main}: no directory has this id, but its main image is {paths[main.lower()]}; put it back"
            review.skipped.append(("directory missing, not its main image", message))
        else:
            review.discarded.append(Group(review.root, dir_name(index, main), main))
    foreign = [stray.path for stray in strays if stray.is_foreign]
    review.foreign = [str(path) for path in foreign if path.is_relative_to(review.root)]


def _read_group(review: Review, main: str, here: list[_Place]) -> None:
    place, listed = here[0], review.samples[main]
    if len(here) > 1:
        message = f"{' and '.join(sorted(str(place.path) for place in here))}: of one main image; keep one of them"
        review.skipped.append(("two with one main id", message))
        return
    if not (place.is_direct and place.review is review):
        message = f"{place.path}: does not lie directly in {review.root}; move it back"
        review.skipped.append(("in another directory", message))
        return
    whole = {id_ for id_, image in place.images if not image.is_empty}
    found = {id_ for id_, _ in place.images}
    kept = [id_ for id_ in listed if id_.lower() in whole]
    empty = {id_: "an empty file" for id_ in listed if id_.lower() in found - whole}
    deleted = [id_ for id_ in listed if id_.lower() not in found]
    if main in kept:
        review.groups.append(Group(review.root, place.path.name, main, kept, deleted, empty))
    else:
        remedy = f"restore {image_name(0, main, '')} or delete the directory to discard it"
        review.skipped.append(("main image missing", f"{place.path.name}: main image missing; {remedy}"))


def _give_back(reviews: list[Review], strays: list[_Stray]) -> None:
    """Take from `deleted` what was found elsewhere: neither kept nor deleted."""
    owners: dict[str, list[tuple[int, str, Group | None]]] = {stray.id: [] for stray in strays}
    for review in reviews if strays else []:
        groups = {group.main: group for group in review.groups}
        for main, listed in review.samples.items():
            for rank, id_ in enumerate(listed):
                if id_.lower() in owners:
                    owners[id_.lower()].append((rank, main.lower(), groups.get(main)))
    for stray in strays:
        for group in _owners(stray, owners[stray.id]):
            for id_ in [id_ for id_ in group.deleted if id_.lower() == stray.id]:
                group.elsewhere[id_] = str(stray.path)
                group.deleted.remove(id_)


def _owners(stray: _Stray, made_with: list[tuple[int, str, Group | None]]) -> list[Group]:
    """The groups that a stray may have come from: those in which it had this rank, else that around it, else all.

    made_with: (rank, main, group if it is to be recorded) of every group that was made with this image.
    """
    same_rank = [entry for entry in made_with if entry[0] == stray.rank]
    candidates = same_rank or (made_with if stray.is_foreign else [])
    around = [entry for entry in candidates if entry[1] == stray.enclosing]
    return [group for _, _, group in around or candidates if group]
