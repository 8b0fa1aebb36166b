"""Stage 3: read what a reviewer left in the folders of ann_dirrify.py: kept images are positive, deleted ones negative.

    python ann_dirload.py [DIR ...]

Reads the given folders (default: ANN_DIRRIFY_DIR_PATH) and adds to ANNOTATED_DATA_PATH; the version before the last
change stays beside it as .bak. A second run changes nothing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import config
from utils import cli
from utils.annotation import history
from utils.annotation.neighbor_dirs import is_unfinished
from utils.annotation.neighbor_dirs import lock_path as dirs_lock_path
from utils.annotation.records import Record, lock_path, read_records, undo, write_records
from utils.annotation.reviewed import KINDS, Review, ReviewedDir, read_roots
from utils.lock import hold
from utils.log import LOG, printable, start_log

NAMES = ["ANNOTATED_DATA_PATH", "ANN_HISTORY_PATH", "ANN_DIRRIFY_DIR_PATH", "LOGS_DIR_PATH"]
WAIT_S = 60  # for ann_dirrify.py to finish
N_NAMED = 20  # names in a message; the rest is a number


@dataclass
class Load:
    """The records after a run, and the outcome of each directory."""

    records: list[Record]
    loaded: list[ReviewedDir] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)  # of records replaced, for people
    discarded: list[ReviewedDir] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # kind, message
    gone: list[ReviewedDir] = field(default_factory=list)  # deleted after they were loaded
    is_changed: bool = False


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__, config, NAMES)
    parser.add_argument("dirs", nargs="*", metavar="DIR", help="folders of ann_dirrify.py, instead of the constant's")
    switches = parser.add_mutually_exclusive_group()
    switches.add_argument("--dry-run", action="store_true", help="show what would be recorded, and change nothing")
    switches.add_argument("--undo", action="store_true", help="take back the last load")
    parser.add_argument("--replace", action="store_true", help="replace records whose directory changed since")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_dirload", args.logs_dir_path)
    path = Path(args.annotated_data_path)
    history_path = Path(args.ann_history_path) if args.ann_history_path else None
    roots = [Path(name) for name in dict.fromkeys(args.dirs or [args.ann_dirrify_dir_path])]
    with hold(lock_path(path), f"annotated data {path}"):
        if args.undo:
            return take_back(path, history_path)
        wait_for_makers(roots)
        reviews = read_roots(roots)
        load = sort_dirs(reviews, read_records(path), args.replace)
        if not args.dry_run:
            if load.is_changed:
                write_records(path, load.records)
            record_history(history_path, load)
    log_details(reviews, load)
    print_summary(path, reviews, load, args.dry_run)
    return 0


def wait_for_makers(roots: Sequence[Path]) -> None:
    """Wait for a running ann_dirrify.py; a root that was left unfinished is read as it is."""
    for root in filter(is_unfinished, roots):
        with hold(dirs_lock_path(root), str(root), WAIT_S):
            pass


def take_back(path: Path, history_path: Path | None) -> int:
    before, after = undo(path)
    left = {record["pos"][0]: record for record in after}
    undone = [record["pos"][0] for record in before if left.get(record["pos"][0]) != record]
    time = history.now()
    history.append(history_path, ({"root": None, "main": main, "undone": True, "time": time} for main in undone))
    print(
        f"{len(undone)} records put back as before the last load: {path} holds {len(after)} records "
        f"(the version taken back is {path}.undone)"
    )
    return 0


def record_history(history_path: Path | None, load: Load) -> None:
    """Append the decisions of this run; a directory is noted as discarded once."""
    time = history.now()
    roots = {root: str(root.resolve()) for root in {folder.root for folder in [*load.loaded, *load.discarded]}}
    known = history.discarded(history.read_events(history_path)) if load.discarded else set()
    events: list[history.Event] = []
    for folder in load.loaded:
        decision = {"kept": folder.kept, "deleted": folder.deleted}
        events.append({"root": roots[folder.root], "main": folder.main, **decision, "time": time})
    for folder in load.discarded:
        if folder.main not in known:
            events.append({"root": roots[folder.root], "main": folder.main, "discarded": True, "time": time})
    history.append(history_path, events)


def sort_dirs(reviews: Sequence[Review], records: Sequence[Record], replace: bool) -> Load:
    """Decide about each directory, root by root, in index order."""
    load = Load(list(records))
    holders: dict[str, list[int]] = {}  # id -> records with it in "pos"
    for index, record in enumerate(records):
        for id_ in record["pos"]:
            holders.setdefault(id_, []).append(index)
    done: set[str] = set()
    for review in reviews:
        for folder in review.dirs:
            _sort_dir(load, folder, review.samples[folder.main], holders, replace and folder.main not in done)
            done.add(folder.main)
        for folder in review.discarded:
            is_recorded = any(load.records[index]["pos"][0] == folder.main for index in holders.get(folder.main, []))
            (load.gone if is_recorded else load.discarded).append(folder)
        load.skipped += review.skipped
    return load


def _sort_dir(
    load: Load, folder: ReviewedDir, samples: Sequence[str], holders: dict[str, list[int]], replace: bool
) -> None:
    """Record a directory, unless a record starts with its main image or holds exactly its samples."""
    new: Record = {"pos": folder.kept, "neg": folder.deleted}
    own = [index for index in holders.get(folder.main, []) if _is_record_of(load.records[index], folder.main, samples)]
    if own and (not replace or load.records[own[0]] == new):
        load.already.append(folder.name)
        return
    load.loaded.append(folder)
    load.is_changed = True
    if own:
        load.changes.append(f"{folder.name}: {len(load.records[own[0]]['pos'])} -> {len(new['pos'])} positives")
        load.records[own[0]] = new
        return
    if folder.main in holders:
        LOG.info("%s: its main image is a positive of another directory; loaded nonetheless", folder.name)
    for id_ in folder.kept:
        holders.setdefault(id_, []).append(len(load.records))
    load.records.append(new)


def _is_record_of(record: Record, main: str, samples: Sequence[str]) -> bool:
    return record["pos"][0] == main or {*record["pos"], *record["neg"]} == set(samples)


def unreviewed(review: Review, load: Load) -> list[str]:
    """Directories loaded now, at the end of a root, in which nothing was deleted: perhaps nobody looked at them."""
    names = []
    mains = {folder.main for folder in load.loaded}
    loaded = {folder.main: folder for folder in review.dirs if folder.main in mains}
    for main in reversed(review.samples):
        if main not in loaded or not loaded[main].is_untouched:
            break
        names.append(loaded[main].name)
    return names[::-1]


def log_details(reviews: Sequence[Review], load: Load) -> None:
    log_names("already annotated", load.already)
    log_names("discarded", [folder.name for folder in load.discarded])
    log_names("deleted after they were loaded, their records stay", [folder.name for folder in load.gone])
    log_names("untouched, all images positive", [folder.name for folder in load.loaded if folder.is_untouched])
    log_lines("not recorded", [message for _, message in load.skipped])
    foreign = [name for review in reviews for name in review.foreign]
    log_lines("images in a folder other than their own; move them back", foreign)
    unknown = [f"{folder.name}: {id_} is {where}" for folder in load.loaded for id_, where in folder.elsewhere.items()]
    log_lines("neither positive nor negative", unknown)


def log_names(what: str, names: Sequence[str]) -> None:
    if names:
        LOG.info("%s (%d): %s", what, len(names), ", ".join(cut(names)))


def log_lines(what: str, messages: Sequence[str]) -> None:
    for message in cut(messages):
        LOG.info("%s: %s", what, message)


def cut(names: Sequence[str]) -> Iterable[str]:
    return [*names[:N_NAMED], f"and {len(names) - N_NAMED} more"] if len(names) > N_NAMED else names


def print_summary(path: Path, reviews: Sequence[Review], load: Load, is_dry: bool) -> None:
    if is_dry:
        for folder in load.loaded:
            print(printable(f"{folder.name}: {len(folder.kept)} positives, {len(folder.deleted)} negatives"))
    n_positives = sum(len(folder.kept) for folder in load.loaded)
    n_negatives = sum(len(folder.deleted) for folder in load.loaded)
    n_untouched = sum(folder.is_untouched for folder in load.loaded)
    print(f"{'would load' if is_dry else 'loaded'} {len(load.loaded)} directories, {n_untouched} of them untouched")
    if load.changes:
        changed = "would change" if is_dry else "changed"
        print(printable(f"{len(load.changes)} records {changed}: {', '.join(cut(load.changes))}"))
    print(f"already annotated {len(load.already) + len(load.gone)}, discarded {len(load.discarded)}")
    if load.skipped:
        counts = Counter(kind for kind, _ in load.skipped).most_common()
        print(f"not recorded: {', '.join(f'{n} {KINDS[kind][n > 1]}' for kind, n in counts)}")
    if n_foreign := sum(len(review.foreign) for review in reviews):
        print(f"{n_foreign} images lie in a folder other than their own; move them back")
    holds = "would hold" if is_dry else "holds"
    print(f"positives {n_positives}, negatives {n_negatives}; {path} {holds} {len(load.records)} records")
    for review in [] if is_dry else reviews:
        print_next_step(review, load)
    for review in reviews:
        print_doubt(review, load, is_dry)


def print_next_step(review: Review, load: Load) -> None:
    if review.is_unfinished:
        print(printable(f"{review.root} is not finished: python ann_dirrify.py goes on with it"))
    elif not review.skipped:
        is_new = any(folder.root == review.root for folder in [*load.loaded, *load.discarded])
        done = f"{review.root} is loaded" if is_new else f"nothing new in {review.root}: it was recorded before"
        print(printable(f"{done}; it can be deleted and new directories generated (python ann_dirrify.py)"))


def print_doubt(review: Review, load: Load, is_dry: bool) -> None:
    names = unreviewed(review, load)
    if names:
        which = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
        remedy = "take this load back (python ann_dirload.py --undo), finish, and load again"
        print(
            printable(
                f"warning: nothing was deleted in the last {len(names)} directories of {review.root}, {which}: if they "
                f"are not reviewed yet, {'finish them before loading' if is_dry else remedy}"
            )
        )


if __name__ == "__main__":
    cli.run(main)
