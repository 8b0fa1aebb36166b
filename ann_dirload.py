"""Stage 3: read what a reviewer left in the folders of ann_dirrify.py: kept images are positive, deleted ones negative.

    python ann_dirload.py [DIR ...]

Reads the given folders (default: ANN_DIRRIFY_DIR_PATH) and adds records to ANNOTATED_DATA_PATH; the version before the
last change stays beside it as .bak. A second run changes nothing: it compares the folders with their records.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import config
from utils import cli
from utils.annotation import history
from utils.annotation.loads import Load, Undone, plan, save, second_look, undo
from utils.annotation.neighbor_dirs import DIGESTS, dir_name, is_unfinished
from utils.annotation.reviewed import ASIDE, KINDS, MISPLACED, UNKNOWN, Review, ReviewedDir, read_roots
from utils.lock import hold, lock_path
from utils.log import LOG, counted, printable, start_log

NAMES = ["ANNOTATED_DATA_PATH", "ANN_HISTORY_PATH", "ANN_DIRRIFY_DIR_PATH", "LOGS_DIR_PATH"]
WAIT_S = 60  # to wait for ann_dirrify.py
N_NAMED = 20  # names in a message; further ones are only counted
MAX_PAUSE_S, MIN_PACE_S = 600, 1  # between two directories: a longer time is a break, a shorter time is not a review


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__, config, NAMES)
    parser.add_argument("dirs", nargs="*", metavar="DIR", help="folders to load instead of ANN_DIRRIFY_DIR_PATH")
    switches = parser.add_mutually_exclusive_group()
    switches.add_argument(
        "--dry-run", action="store_true", help="show the progress and what a load would record; change nothing"
    )
    switches.add_argument("--undo", action="store_true", help="undo the last load")
    parser.add_argument("--replace", action="store_true", help="replace records whose directory has changed")
    parser.add_argument(
        "--skip-untouched",
        action="store_true",
        help="record only directories in which an image was deleted or set aside",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_dirload", args.logs_dir_path)
    path, history_path = Path(args.annotated_data_path), args.ann_history_path
    roots = list(dict.fromkeys(Path(name).expanduser() for name in args.dirs or [args.ann_dirrify_dir_path]))
    with hold(lock_path(path), f"annotated data {path}"):
        if args.undo:
            say(taken_back(path, undo(path, history_path)))
            return 0
        wait_for_makers(roots)
        reviews = read_roots(roots)
        load = plan(path, history_path, reviews, args.replace, args.skip_untouched)
        if not args.dry_run:
            save(path, history_path, load)
    log_details(reviews, load)
    say(summary(path, reviews, load, args.dry_run))
    say(comparison(load))
    say(progress(review) if args.dry_run else next_step(review, load) for review in reviews)
    say(undecided(load.recorded))
    for review in reviews:
        say(doubts(review, load, args.dry_run))
    return 0


def wait_for_makers(roots: Sequence[Path]) -> None:
    """Wait for a running ann_dirrify.py. A root that it left unfinished is read as it is."""
    for root in filter(is_unfinished, roots):
        with hold(lock_path(root), str(root), WAIT_S):
            pass


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line))


def cut(names: Sequence[str], n: int = N_NAMED) -> list[str]:
    return [*names[:n], f"and {len(names) - n} more"] if len(names) > n else list(names)


def names(folders: Sequence[ReviewedDir]) -> str:
    return ", ".join(cut([folder.name for folder in folders]))


def taken_back(path: Path, undone: Undone) -> Iterator[str]:
    yield (
        f"the last load is undone: {counted(undone.n_removed, 'record')} removed, {undone.n_restored} restored to "
        f"the state before it, {counted(undone.n_discards, 'discard')} and "
        f"{counted(undone.n_second_looks, 'second look')} removed; {path} has {counted(len(undone.items), 'record')}"
        + (f" (the version with the load is {path}.undone)" if undone.n_removed or undone.n_restored else "")
    )
    if undone.n_edited:
        yield f"{counted(undone.n_edited, 'record')} of that load edited or missing since: left as found"


def log_details(reviews: Sequence[Review], load: Load) -> None:
    dirs = {
        "equal to their records": load.already,
        "discarded": load.discarded,
        "untouched, all images positive": [folder for folder in load.loaded if folder.is_untouched],
        "untouched, left out": load.untouched,
        "loaded, though the main image is a positive of another directory": load.other_main,
    }
    for what, folders in dirs.items():
        if folders:
            LOG.info("%s (%d): %s", what, len(folders), names(folders))
    images = [(folder.name, id_, where) for folder in load.recorded for id_, (_, where) in folder.undecided.items()]
    lines = {
        "not recorded": [message for review in reviews for _, message in review.skipped],
        "in another directory; move it back": [path for review in reviews for path in review.misplaced],
        "neither positive nor negative": [f"{name}: {id_}: {where}" for name, id_, where in images],
    }
    for what, messages in lines.items():
        for message in cut(messages):
            LOG.info("%s: %s", what, message)


def summary(path: Path, reviews: Sequence[Review], load: Load, is_dry: bool) -> Iterator[str]:
    folders = load.recorded
    for folder in folders if is_dry else []:
        yield f"{folder.name}: {counted(len(folder.kept), 'positive')}, {counted(len(folder.deleted), 'negative')}"
    n_untouched = sum(folder.is_untouched for folder in folders)
    n_loaded = counted(len(folders), "directory")
    yield f"{'would load' if is_dry else 'loaded'} {n_loaded}, {n_untouched} of them untouched"
    if load.replaced:
        n_replaced = counted(len(load.replaced), "record")
        yield f"{n_replaced} {'would change' if is_dry else 'changed'}: {changes(load.replaced)}"
    n_already = len(load.already) + len(load.different) + len(load.gone)
    yield f"already annotated {n_already}, discarded {len(load.discarded)}"
    if load.untouched:
        yield f"{counted(len(load.untouched), 'untouched directory')} left out (--skip-untouched)"
    if skipped := Counter(kind for review in reviews for kind, _ in review.skipped):
        yield f"not recorded: {', '.join(counted(n, *KINDS[kind]) for kind, n in skipped.most_common())}"
    n_positives = sum(len(folder.kept) for folder in folders)
    n_negatives = sum(len(folder.deleted) for folder in folders)
    others = f" and {load.n_of_other_tools} of other tools" if load.n_of_other_tools else ""
    held = counted(len(load.items) - load.n_of_other_tools, "record") + others
    yield f"positives {n_positives}, negatives {n_negatives}; {path} {'would hold' if is_dry else 'holds'} {held}"


def changes(folders: Sequence[ReviewedDir]) -> str:
    texts = [
        f"{folder.name}: {len(folder.before['pos'])} -> {len(folder.kept)} positives, "
        f"{len(folder.before['neg'])} -> {len(folder.deleted)} negatives"
        for folder in folders
    ]
    return ", ".join(cut(texts))


def comparison(load: Load) -> Iterator[str]:
    """Directories that differ from their records, and agreement with directories recorded from another root."""
    if load.different:
        what = counted(len(load.different), "directory differs", "directories differ")
        yield f"{what} from the records: {changes(load.different)}; to replace those records, run again with --replace"
    if load.gone:
        what = counted(len(load.gone), "directory")
        yield f"{what} deleted here, but recorded before or from another folder (records stay): {names(load.gone)}"
    if load.revived:
        what = counted(len(load.revived), "directory")
        yield f"{what} discarded before and recorded now: {names(load.revived)}"
    if load.second_looks:
        yield from agreement(load.second_looks)


def agreement(folders: Sequence[ReviewedDir]) -> Iterator[str]:
    judged = [
        (f"{folder.name}: {id_}", *both)
        for folder in folders
        for id_, both in history.judgments(second_look(folder)).items()
    ]
    n_alike = sum(before == after for _, before, after in judged)
    kappa = history.kappa([(before, after) for _, before, after in judged])
    beyond_chance = "undefined: all images are judged the same" if kappa is None else f"{kappa:.2f}"
    share = f" ({n_alike / len(judged):.0%}), Cohen's kappa {beyond_chance}" if judged else ""
    images = counted(len(judged), "image")
    yield f"second look at {counted(len(folders), 'directory')}: {n_alike} of {images} judged alike{share}"
    words = {True: "kept", False: "deleted"}
    yield from cut(
        [
            f"disagreement: {image} {words[before]} in the record, {words[after]} here"
            for image, before, after in judged
            if before != after
        ]
    )


def next_step(review: Review, load: Load) -> str:
    if is_unfinished(review.root):
        return f"{review.root} is not finished: run python ann_dirrify.py to continue it"
    kept_out = load.different + load.untouched
    kept_out += [folder for folder in load.gone if load.root_of.get(folder.main, review.name) != review.name]
    is_complete = not review.skipped and not review.misplaced
    is_complete &= not any(folder.undecided for folder in review.dirs)
    if not is_complete or any(folder.review is review for folder in kept_out):
        return f"some of {review.root} is not recorded yet: keep the folder as long as you may need the rest"
    is_new = any(folder.review is review for folder in load.recorded + load.discarded)
    done = f"{review.root} is loaded" if is_new else f"nothing new in {review.root}: it was recorded before"
    return f"{done}; it can be deleted and new directories generated (python ann_dirrify.py)"


def progress(review: Review) -> str:
    """The progress of a review, and its pace, from the times at which directories were last changed."""
    reviewed = [folder for folder in review.dirs if not folder.is_untouched]
    n, n_untouched, n_gone = len(review.samples), len(review.dirs) - len(reviewed), len(review.discarded)
    share = (len(reviewed) + n_gone) / max(n, 1)
    line = f"{review.root}: {len(reviewed)} of {n} directories reviewed, {n_gone} discarded ({share:.0%})"
    line += f", {n_untouched} untouched so far"
    times = sorted(folder.path.stat().st_mtime for folder in reviewed)
    gaps = [after - before for before, after in itertools.pairwise(times) if after - before <= MAX_PAUSE_S]
    if len(gaps) < 2 or sum(gaps) < MIN_PACE_S * len(gaps) or not n_untouched:
        return line
    pace_s = sum(gaps) / len(gaps)
    rest = max(1, round(n_untouched * pace_s / 60))
    return f"{line}; at {3600 / pace_s:.0f} an hour the rest takes about {counted(rest, 'minute')}"


def undecided(folders: Sequence[ReviewedDir]) -> Iterator[str]:
    """Images that are neither positive nor negative, by kind."""
    what = {
        UNKNOWN: "unknown: neither positive nor negative, {} that may be incomplete",
        ASIDE: "set aside: neither positive nor negative, {} moved into another folder",
        MISPLACED: "misplaced (move back): neither positive nor negative, {} in another directory",
    }
    images = [(folder.name, *reason) for folder in folders for reason in folder.undecided.values()]
    for kind, text in what.items():
        if found := [f"{name}: {where}" for name, of, where in images if of == kind]:
            yield f"{text.format(counted(len(found), 'image'))}: {', '.join(cut(found, 5))}"


# --- doubts -----------------------------------------------------------------------------------------------------------
def doubts(review: Review, load: Load, is_dry: bool) -> Iterator[str]:
    """Warnings about findings that look like mistakes rather than decisions."""
    root = review.root
    if any(kind == "misfit" for kind, _ in review.skipped):
        yield f"warning: {root / 'samples.json'} is from another run, so nothing of {root} is recorded"
    if untouched := untouched_end(review, load):
        first, last, n = untouched[0].name, untouched[-1].name, len(untouched)
        undo_first = "" if is_dry else "undo this load (python ann_dirload.py --undo) and "
        again = "" if is_dry else " again"
        is_all = n == len(review.samples)
        yield (
            f"warning: nothing was deleted in the last {f'{n} directories' if n > 1 else 'directory'} of {root}, "
            f"{f'{first} to {last}' if n > 1 else first}. If nobody has reviewed that part, {undo_first}review it "
            f"before loading{again}, or load with --skip-untouched"
            + (". A zip that is unpacked over the original folder also brings deleted images back" if is_all else "")
        )
    if gone := missing_dirs(review, load):
        remedy = "complete it before loading" if is_dry else "undo this load (--undo) and complete it"
        yield (
            f"warning: {gone} of {root} are missing: they are discarded if the reviewer deleted them; if the copy is "
            f"not complete, {remedy}"
        )
    if review.nameless:
        shown = ", ".join(cut(review.nameless, 5))
        remedy = (
            "" if review.digests else f"; {root / DIGESTS}, a hidden file, is missing: copy it from the original folder"
        )
        what = counted(len(review.nameless), "image without an id matches none", "images without an id match none")
        yield f"warning: {what} of {root}: {shown}{remedy}"
    if review.n_empty:
        yield f"warning: {counted(review.n_empty, 'directory')} of {root} without any image: is the copy complete?"
    loaded = [folder for folder in load.loaded if folder.review is review]
    n_halved = sum(map(ends_early, loaded))
    if n_halved > 1 and 2 * n_halved > len(loaded):
        yield (
            f"warning: in {n_halved} directories of {root} at least the last half of the images is missing: recorded "
            "as deleted; is the copy complete?"
        )


def untouched_end(review: Review, load: Load) -> list[ReviewedDir]:
    """Directories at the end of a root, loaded now, in which nothing was deleted: perhaps nobody reviewed them."""
    untouched = {folder.main: folder for folder in load.loaded if folder.review is review and folder.is_untouched}
    mains = list(review.samples)
    return [untouched[main] for main in mains[len(mains) - n_at_end(mains, untouched) :]]


def missing_dirs(review: Review, load: Load) -> str:
    """All, most, or at least the last two directories, in index order or as a program sorts names; "" if none."""
    gone = {folder.main for folder in load.discarded if folder.review is review}
    mains = list(review.samples)
    if 2 * len(gone) > len(mains):
        return f"{'all' if len(gone) == len(mains) else 'most'} directories ({len(gone)} of {len(mains)})"
    n_end = max(n_at_end(mains, gone), n_at_end(sorted_by_name(mains), gone))
    return f"the last {n_end} directories" if n_end > 1 else ""


def ends_early(folder: ReviewedDir) -> bool:
    """Whether at least half of the images are missing, and exactly the last ones, as in an interrupted copy."""
    listed, n = folder.review.samples[folder.main], len(folder.deleted)
    is_half = n > 1 and 2 * n >= len(listed) - 1
    return is_half and n in (n_at_end(listed, folder.deleted), n_at_end(sorted_by_name(listed), folder.deleted))


def n_at_end(listed: Sequence[str], marked: Collection[str]) -> int:
    """The number of marked ids at the end of a list."""
    return next((n for n, id_ in enumerate(reversed(listed)) if id_ not in marked), len(listed))


def sorted_by_name(listed: Sequence[str]) -> list[str]:
    """Sort ids as a program sorts names that begin with their numbers: 0, 1, 10, 11, 2."""
    return [id_ for _, id_ in sorted((dir_name(number, id_), id_) for number, id_ in enumerate(listed))]


if __name__ == "__main__":
    cli.run(main)
