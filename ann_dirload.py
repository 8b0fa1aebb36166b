"""Stage 3: read what a reviewer left in the folders of ann_dirrify.py: what stayed is positive, what went is negative.

    python ann_dirload.py [DIR ...]

Reads the given folders (none given: ANN_DIRRIFY_DIR_PATH); adds to ANNOTATED_DATA_PATH, whose version before the last
change stays beside it as .bak. Running it again changes nothing.
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
from utils.annotation.reviewed import Group, Review, read_roots
from utils.lock import hold
from utils.log import LOG, start_log

NAMES = ["ANNOTATED_DATA_PATH", "ANN_HISTORY_PATH", "ANN_DIRRIFY_DIR_PATH", "LOGS_DIR_PATH"]
WAIT_S = 60  # for ann_dirrify.py to finish
N_NAMED = 20  # in a line of the log; the rest is a number


@dataclass
class Load:
    """What a run comes to: the records after it, and what became of each directory."""

    records: list[Record]
    loaded: list[Group] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    discarded: list[Group] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # kind, message
    gone: list[Group] = field(default_factory=list)  # deleted after they were loaded
    is_changed: bool = False


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__, config, NAMES)
    parser.add_argument("dirs", nargs="*", metavar="DIR", help="folders of ann_dirrify.py, instead of the constant's")
    switches = parser.add_mutually_exclusive_group()
    switches.add_argument("--dry-run", action="store_true", help="show what would be recorded, and change nothing")
    switches.add_argument("--undo", action="store_true", help="take back the last load")
    parser.add_argument(
        "--replace", action="store_true", help="read every directory again, and put what it says in place of its record"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_dirload", args.logs_dir_path)
    path = Path(args.annotated_data_path)
    past = Path(args.ann_history_path) if args.ann_history_path else None
    roots = [Path(name) for name in dict.fromkeys(args.dirs or [args.ann_dirrify_dir_path])]
    with hold(lock_path(path), f"annotated data {path}"):
        if args.undo:
            return take_back(path, past)
        wait_for_makers(roots)
        reviews = read_roots(roots)
        load = sort_groups(reviews, read_records(path), args.replace)
        if not args.dry_run:
            if load.is_changed:
                write_records(path, load.records)
            remember(past, load)
    tell_log(reviews, load)
    print_summary(path, reviews, load, args.dry_run)
    return 0


def wait_for_makers(roots: Sequence[Path]) -> None:
    """A folder that ann_dirrify.py is making is read when it is made; one that was left unfinished, as it is."""
    for root in filter(is_unfinished, roots):
        with hold(dirs_lock_path(root), str(root), WAIT_S):
            pass


def take_back(path: Path, past: Path | None) -> int:
    before, after = undo(path)
    left = {record["pos"][0]: record for record in after}
    undone = [record["pos"][0] for record in before if left.get(record["pos"][0]) != record]
    time = history.now()
    history.append(past, ({"root": None, "main": main, "undone": True, "time": time} for main in undone))
    print(
        f"the last load is taken back: {path} holds {len(after)} records, it held {len(before)} (now in {path}.undone)"
    )
    return 0


def remember(past: Path | None, load: Load) -> None:
    """Add to the history what was decided now; a directory once noted as discarded is not noted again."""
    time = history.now()
    roots = {root: str(root.resolve()) for root in {group.root for group in [*load.loaded, *load.discarded]}}
    known = history.discarded(history.read_events(past)) if load.discarded else set()
    events: list[history.Event] = []
    for group in load.loaded:
        decided = {"kept": group.kept, "deleted": group.deleted}
        events.append({"root": roots[group.root], "main": group.main, **decided, "time": time})
    for group in load.discarded:
        if group.main not in known:
            events.append({"root": roots[group.root], "main": group.main, "discarded": True, "time": time})
    history.append(past, events)


def sort_groups(reviews: Sequence[Review], records: Sequence[Record], replace: bool) -> Load:
    """Decide about each directory, root by root, in index order."""
    load = Load(list(records))
    holders: dict[str, list[int]] = {}  # id -> the records that have it in "pos"
    for index, record in enumerate(records):
        for id_ in record["pos"]:
            holders.setdefault(id_, []).append(index)
    done: set[str] = set()
    for review in reviews:
        for group in review.groups:
            _sort_group(load, group, review.samples[group.main], holders, replace and group.main not in done)
            done.add(group.main)
        for group in review.discarded:
            is_recorded = any(load.records[index]["pos"][0] == group.main for index in holders.get(group.main, []))
            (load.gone if is_recorded else load.discarded).append(group)
        load.skipped += review.skipped
    return load


def _sort_group(load: Load, group: Group, samples: Sequence[str], holders: dict[str, list[int]], replace: bool) -> None:
    """Record a directory, unless a record starts with its main image or consists of exactly its samples."""
    new: Record = {"pos": group.kept, "neg": group.deleted}
    own = [index for index in holders.get(group.main, []) if _is_record_of(load.records[index], group.main, samples)]
    if own and not replace:
        load.already.append(group.name)
        return
    load.loaded.append(group)
    if own:
        load.is_changed |= load.records[own[0]] != new
        load.records[own[0]] = new
        return
    if group.main in holders:
        LOG.info("%s: its main image is a positive of another directory; loaded nonetheless", group.name)
    for id_ in group.kept:
        holders.setdefault(id_, []).append(len(load.records))
    load.records.append(new)
    load.is_changed = True


def _is_record_of(record: Record, main: str, samples: Sequence[str]) -> bool:
    return record["pos"][0] == main or {*record["pos"], *record["neg"]} == set(samples)


def unreviewed(review: Review, load: Load) -> list[str]:
    """The directories at the end of a root, loaded now, in which nothing was deleted: perhaps nobody looked at them."""
    names = []
    mains = {group.main for group in load.loaded}
    loaded = {group.main: group for group in review.groups if group.main in mains}
    for main in reversed(review.samples):
        if main not in loaded or not loaded[main].is_untouched:
            break
        names.append(loaded[main].name)
    return names[::-1]


def tell_log(reviews: Sequence[Review], load: Load) -> None:
    _tell("already annotated, skipped", load.already)
    _tell("discarded", [group.name for group in load.discarded])
    _tell("deleted after they were loaded, their records stay", [group.name for group in load.gone])
    _tell("untouched, all images positive", [group.name for group in load.loaded if group.is_untouched])
    _tell("skipped, not recorded", [message for _, message in load.skipped], "\n  ")
    _tell("images where they do not belong, not recorded", [name for review in reviews for name in review.foreign])
    _tell(
        "neither positive nor negative",
        [f"{group.name}: {id_} is {where}" for group in load.loaded for id_, where in group.elsewhere.items()],
        "\n  ",
    )


def _tell(what: str, names: Iterable[str], separator: str = " ") -> None:
    names = list(names)
    if names:
        rest = [f"and {len(names) - N_NAMED} more"] if len(names) > N_NAMED else []
        LOG.info("%s (%d):%s", what, len(names), separator + f",{separator}".join(names[:N_NAMED] + rest))


def print_summary(path: Path, reviews: Sequence[Review], load: Load, is_dry: bool) -> None:
    if is_dry:
        for group in load.loaded:
            print(_plain(f"{group.name}: {len(group.kept)} positives, {len(group.deleted)} negatives"))
    n_positives = sum(len(group.kept) for group in load.loaded)
    n_negatives = sum(len(group.deleted) for group in load.loaded)
    n_untouched = sum(group.is_untouched for group in load.loaded)
    kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(kind for kind, _ in load.skipped).most_common())
    print(f"{'would load' if is_dry else 'loaded'} {len(load.loaded)} directories, {n_untouched} of them untouched")
    print(f"already annotated {len(load.already) + len(load.gone)}, discarded {len(load.discarded)}")
    print(f"skipped {len(load.skipped)}" + (f" ({kinds})" if kinds else ""))
    holds = "would hold" if is_dry else "holds"
    print(f"positives {n_positives}, negatives {n_negatives}; {path} {holds} {len(load.records)} records")
    if not is_dry:
        for review in reviews:
            print_next_step(review)
    for review in reviews:
        print_doubt(review, load)


def print_next_step(review: Review) -> None:
    if review.is_unfinished:
        print(_plain(f"{review.root} is not finished: python ann_dirrify.py goes on with it"))
    elif not review.skipped:
        print(
            _plain(f"{review.root} is loaded: it can be deleted and new directories generated (python ann_dirrify.py)")
        )


def print_doubt(review: Review, load: Load) -> None:
    names = unreviewed(review, load)
    if names:
        which = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
        print(
            _plain(
                f"warning: nothing was deleted in the last {len(names)} directories of {review.root}, {which}: if they "
                "are not reviewed yet, take this load back (python ann_dirload.py --undo), finish, and load again"
            )
        )


def _plain(text: str) -> str:
    """File names can hold what a terminal cannot show."""
    return text.encode("ascii", "backslashreplace").decode()


if __name__ == "__main__":
    cli.run(main)
