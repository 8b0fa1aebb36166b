"""Stage 3: read what a reviewer left in the folders of ann_dirrify.py: kept images are positive, deleted ones negative.

    python ann_dirload.py [DIR ...]

Reads the given folders (default: ANN_DIRRIFY_DIR_PATH) and adds to ANNOTATED_DATA_PATH; the version before the last
change stays beside it as .bak. A second run changes nothing: it compares the folders with their records.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import config
from utils import cli
from utils.annotation.loads import Compared, Load, plan, save, undo
from utils.annotation.neighbor_dirs import dir_name, is_unfinished, lock_path
from utils.annotation.records import lock_path as records_lock_path
from utils.annotation.reviewed import ASIDE, KINDS, MISPLACED, UNKNOWN, Review, ReviewedDir, read_roots
from utils.lock import hold
from utils.log import LOG, printable, start_log

NAMES = ["ANNOTATED_DATA_PATH", "ANN_HISTORY_PATH", "ANN_DIRRIFY_DIR_PATH", "LOGS_DIR_PATH"]
WAIT_S = 60  # for ann_dirrify.py to finish
N_NAMED = 20  # names in a message; the rest is a number
MAX_PAUSE_S, MIN_PACE_S = 600, 1  # between two directories: a longer time is a break, a shorter one no review


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__, config, NAMES)
    parser.add_argument("dirs", nargs="*", metavar="DIR", help="folders, in place of ANN_DIRRIFY_DIR_PATH")
    switches = parser.add_mutually_exclusive_group()
    switches.add_argument(
        "--dry-run", action="store_true", help="show progress and what would be recorded, change nothing"
    )
    switches.add_argument("--undo", action="store_true", help="take back the last load")
    parser.add_argument("--replace", action="store_true", help="replace records whose directory changed since")
    parser.add_argument(
        "--skip-untouched",
        action="store_true",
        help="record only directories in which an image was deleted or set aside",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_dirload", args.logs_dir_path)
    path = Path(args.annotated_data_path)
    history_path = Path(args.ann_history_path) if args.ann_history_path else None
    roots = list(dict.fromkeys(map(Path, args.dirs or [args.ann_dirrify_dir_path])))
    with hold(records_lock_path(path), f"annotated data {path}"):
        if args.undo:
            return take_back(path, history_path)
        wait_for_makers(roots)
        reviews = read_roots(roots)
        load = plan(path, history_path, reviews, args.replace, args.skip_untouched)
        if not args.dry_run:
            save(path, history_path, load)
    log_details(reviews, load)
    print_summary(path, reviews, load, args.dry_run)
    for review in reviews:
        say(progress(review, load) if args.dry_run else [next_step(review, load)])
    say(undecided(load.loaded + [folder for folder, _ in load.replaced]))
    for review in reviews:
        say(doubts(review, load, args.dry_run))
    return 0


def wait_for_makers(roots: Sequence[Path]) -> None:
    """Wait for a running ann_dirrify.py; a root that was left unfinished is read as it is."""
    for root in filter(is_unfinished, roots):
        with hold(lock_path(root), str(root), WAIT_S):
            pass


def take_back(path: Path, history_path: Path | None) -> int:
    undone = undo(path, history_path)
    say(
        [
            f"the last load is taken back: {undone.n_removed} records removed, {undone.n_restored} records put back as "
            f"before the last load, {undone.n_discards} discards and {undone.n_second_looks} second looks forgotten; "
            f"{path} holds {len(undone.items)} records"
            + (f" (the version taken back is {path}.undone)" if undone.n_changed else "")
        ]
    )
    if undone.n_edited:
        say([f"{undone.n_edited} records were changed after that load and stay as they are"])
    return 0


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line))


def cut(names: Sequence[str], n: int = N_NAMED) -> list[str]:
    return [*names[:n], f"and {len(names) - n} more"] if len(names) > n else list(names)


def log_details(reviews: Sequence[Review], load: Load) -> None:
    log_names("equal to their records", [folder.name for folder, _ in load.already])
    log_names("discarded", [folder.name for folder in load.discarded])
    log_names("untouched, all images positive", [folder.name for folder in load.loaded if folder.is_untouched])
    log_names("untouched, left out", [folder.name for folder in load.untouched])
    log_names("loaded, though the main image is a positive of another directory", load.other_main)
    log_lines("not recorded", [message for review in reviews for _, message in review.skipped])
    foreign = [name for review in reviews for name in review.foreign]
    log_lines("in a folder other than its own; move it back", foreign)
    folders = load.loaded + [folder for folder, _ in load.replaced]
    undecided = [
        f"{folder.name}: {id_} is {where}" for folder in folders for id_, (_, where) in folder.undecided.items()
    ]
    log_lines("neither positive nor negative", undecided)


def log_names(what: str, names: Sequence[str]) -> None:
    if names:
        LOG.info("%s (%d): %s", what, len(names), ", ".join(cut(names)))


def log_lines(what: str, messages: Sequence[str]) -> None:
    for message in cut(messages):
        LOG.info("%s: %s", what, message)


def print_summary(path: Path, reviews: Sequence[Review], load: Load, is_dry: bool) -> None:
    folders = load.loaded + [folder for folder, _ in load.replaced]
    if is_dry:
        say(f"{folder.name}: {len(folder.kept)} positives, {len(folder.deleted)} negatives" for folder in folders)
    n_untouched = sum(folder.is_untouched for folder in folders)
    print(f"{'would load' if is_dry else 'loaded'} {len(folders)} directories, {n_untouched} of them untouched")
    if load.replaced:
        say([f"{len(load.replaced)} records {'would change' if is_dry else 'changed'}: {changes(load.replaced)}"])
    print(
        f"already annotated {len(load.already) + len(load.different) + len(load.gone)}, discarded {len(load.discarded)}"
    )
    if load.untouched:
        print(f"{len(load.untouched)} untouched directories left out (--skip-untouched)")
    if skipped := [kind for review in reviews for kind, _ in review.skipped]:
        counts = Counter(skipped).most_common()
        print(f"not recorded: {', '.join(f'{n} {KINDS[kind][n > 1]}' for kind, n in counts)}")
    n_positives = sum(len(folder.kept) for folder in folders)
    n_negatives = sum(len(folder.deleted) for folder in folders)
    others = f" and {load.n_foreign} of other tools" if load.n_foreign else ""
    holds = f"{'would hold' if is_dry else 'holds'} {len(load.items) - load.n_foreign} records{others}"
    say([f"positives {n_positives}, negatives {n_negatives}; {path} {holds}"])
    say(comparison(load))


def changes(compared: Sequence[Compared]) -> str:
    return ", ".join(
        cut(
            [
                f"{folder.name}: {len(record['pos'])} -> {len(folder.kept)} positives, "
                f"{len(record['neg'])} -> {len(folder.deleted)} negatives"
                for folder, record in compared
            ]
        )
    )


def comparison(load: Load) -> Iterator[str]:
    """Directories that differ from their records, and agreement with those that were recorded from another root."""
    if load.different:
        remedy = "to replace those records, run again with --replace"
        yield f"{len(load.different)} directories differ from their records; {remedy}: {changes(load.different)}"
    if load.gone:
        names = ", ".join(cut([folder.name for folder in load.gone]))
        yield (
            f"{len(load.gone)} directories are deleted here, but recorded before or from another folder; their records "
            f"stay: {names}"
        )
    if load.revived:
        names = ", ".join(cut(load.revived))
        yield f"{len(load.revived)} directories were discarded before and are records now: {names}"
    verdicts = [
        (folder.name, *verdict) for folder, record in load.second_looks for verdict in Compared(folder, record).verdicts
    ]
    if not load.second_looks:
        return
    n_alike = sum(before == after for _, _, before, after in verdicts)
    yield (
        f"second look at {len(load.second_looks)} directories: {n_alike} of {len(verdicts)} images judged alike"
        + (f" ({n_alike / len(verdicts):.0%}), Cohen's kappa {kappa(verdicts)}" if verdicts else "")
    )
    words = {True: "kept", False: "deleted"}
    yield from cut(
        [
            f"disagreement: {name}: {id_} {words[before]} in the record, {words[after]} here"
            for name, id_, before, after in verdicts
            if before != after
        ]
    )


def kappa(verdicts: Sequence[tuple[str, str, bool, bool]]) -> str:
    """Cohen's kappa: agreement beyond chance, 1 at best; undefined if both kept all or deleted all.

    Source: Cohen, A Coefficient of Agreement for Nominal Scales, 1960.
    """
    n = len(verdicts)
    observed = sum(before == after for _, _, before, after in verdicts) / n
    kept = sum(before for _, _, before, _ in verdicts) / n
    kept_again = sum(after for *_, after in verdicts) / n
    chance = kept * kept_again + (1 - kept) * (1 - kept_again)
    return f"{(observed - chance) / (1 - chance):.2f}" if chance < 1 else "undefined (one verdict only)"


def next_step(review: Review, load: Load) -> str:
    if review.is_unfinished:
        return f"{review.root} is not finished: python ann_dirrify.py goes on with it"
    kept_out = [folder for folder, _ in load.different] + load.untouched
    kept_out += [folder for folder in load.gone if load.root_of.get(folder.main, review.name) != review.name]
    is_complete = not review.skipped and not review.foreign
    is_complete &= not any(folder.undecided for folder in review.dirs)
    if not is_complete or any(folder.review is review for folder in kept_out):
        return f"some of {review.root} is not recorded yet: keep the folder until it is"
    new = [*load.loaded, *load.discarded, *(folder for folder, _ in load.replaced)]
    is_new = any(folder.review is review for folder in new)
    done = f"{review.root} is loaded" if is_new else f"nothing new in {review.root}: it was recorded before"
    return f"{done}; it can be deleted and new directories generated (python ann_dirrify.py)"


def progress(review: Review, load: Load) -> Iterator[str]:
    """How far the review is; its pace from the times at which directories were last changed."""
    reviewed = [folder for folder in review.dirs if not folder.is_untouched]
    n, n_untouched, n_gone = len(review.samples), len(review.dirs) - len(reviewed), len(review.discarded)
    share = (len(reviewed) + n_gone) / max(n, 1)
    line = f"{review.root}: {len(reviewed)} of {n} directories reviewed, {n_gone} discarded ({share:.0%})"
    line += f", {n_untouched} untouched so far"
    times = sorted(folder.path.stat().st_mtime for folder in reviewed)
    gaps = [after - before for before, after in itertools.pairwise(times) if after - before <= MAX_PAUSE_S]
    if len(gaps) >= 2 and sum(gaps) >= MIN_PACE_S * len(gaps) and n_untouched:
        pace_s = sum(gaps) / len(gaps)
        line += (
            f"; at {3600 / pace_s:.0f} an hour the rest takes about {max(1, round(n_untouched * pace_s / 60))} minutes"
        )
    yield line


def undecided(folders: Sequence[ReviewedDir]) -> Iterator[str]:
    """Images that are neither positive nor negative, by kind."""
    what = {
        UNKNOWN: "unknown: neither positive nor negative, {} images that may be incomplete",
        ASIDE: "set aside: neither positive nor negative, {} images moved into other folders",
        MISPLACED: "{} images lie in a folder other than their own, neither positive nor negative; move them back",
    }
    for kind, text in what.items():
        found = [
            f"{folder.name}: {where}" for folder in folders for of, where in folder.undecided.values() if of == kind
        ]
        if found:
            yield f"{text.format(len(found))}: {', '.join(cut(found, 5))}"


def doubts(review: Review, load: Load, is_dry: bool) -> Iterator[str]:
    """What looks like a mistake rather than a decision."""
    if review.is_misfit:
        yield f"warning: {review.root / 'samples.json'} is another run's, so nothing of {review.root} is recorded"
    if names := untouched_end(review, load):
        which = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
        undo_first = "" if is_dry else "take this load back (python ann_dirload.py --undo) and "
        finish = "finish them before loading" if is_dry else "finish them before loading again"
        yield (
            f"warning: nothing was deleted in the last {len(names)} directories of {review.root}, {which}: if they are "
            f"not reviewed yet, {undo_first}{finish}, or load with --skip-untouched"
            + (
                "; a zip unpacked over the original brings deleted images back"
                if len(names) == len(review.samples)
                else ""
            )
        )
    if gone := missing_dirs(review, load):
        yield (
            f"warning: {gone} of {review.root} are gone: discarded, if the reviewer deleted them; if the copy is not "
            f"complete, {'complete it before loading' if is_dry else 'take this load back (--undo) and complete it'}"
        )
    if review.nameless:
        shown = ", ".join(cut(review.nameless, 5))
        yield f"warning: {len(review.nameless)} images without an id match none of {review.root}: {shown}"
    if review.n_empty:
        yield f"warning: {review.n_empty} directories of {review.root} hold none of their images: is the copy complete?"
    if n_halved := halved_dirs(review, load):
        yield (
            f"warning: in {n_halved} directories of {review.root} at least the last half of the images is missing: "
            "recorded as deleted; is the copy complete?"
        )


def untouched_end(review: Review, load: Load) -> list[str]:
    """Directories loaded now, at the end of a root, in which nothing was deleted: perhaps nobody looked at them."""
    names = []
    loaded = {folder.main: folder for folder in load.loaded if folder.review is review}
    for main in reversed(review.samples):
        if main not in loaded or not loaded[main].is_untouched:
            break
        names.append(loaded[main].name)
    return names[::-1]


def missing_dirs(review: Review, load: Load) -> str:
    """All, most, or two and more directories at the end, in index order or as a program sorts names; "" if none."""
    gone = {folder.main for folder in load.discarded if folder.review is review}
    mains = list(review.samples)
    if 2 * len(gone) > len(mains):
        return f"{'all' if len(gone) == len(mains) else 'most'} directories ({len(gone)} of {len(mains)})"
    by_name = [main for _, main in sorted((dir_name(index, main), main) for index, main in enumerate(mains))]
    n_end = max(
        next((n for n, main in enumerate(reversed(order)) if main not in gone), 0) for order in (mains, by_name)
    )
    return f"the last {n_end} directories" if n_end > 1 else ""


def halved_dirs(review: Review, load: Load) -> int:
    """Directories loaded now that end early, as in a copy that was broken off, if these are most of them."""
    loaded = [folder for folder in load.loaded if folder.review is review]
    n = sum(ends_early(folder) for folder in loaded)
    return n if n > 1 and 2 * n > len(loaded) else 0


def ends_early(folder: ReviewedDir) -> bool:
    """At least half is missing, and exactly the last images, in rank order or as a program sorts names."""
    listed, n = folder.review.samples[folder.main], len(folder.deleted)
    if 2 * n < len(listed) - 1 or n < 2:
        return False
    by_name = [id_ for _, id_ in sorted((dir_name(rank, id_), id_) for rank, id_ in enumerate(listed))]
    return any(set(order[-n:]) == set(folder.deleted) for order in (listed, by_name))


if __name__ == "__main__":
    cli.run(main)
