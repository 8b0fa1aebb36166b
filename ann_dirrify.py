"""Stage 2: put each main image into a folder with its nearest images, for a person to review.

    python ann_dirrify.py

Reads the collection of embed.py, the image cache and the annotated data; writes ANN_DIRRIFY_DIR_PATH.
Run it again to continue an interrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import config
import samplers
from utils import cli
from utils.annotation import history, neighbor_dirs
from utils.annotation.candidates import Candidates, read_candidates
from utils.annotation.dir_images import DirImages
from utils.annotation.groups import DrawnGroup, Groups, make_groups
from utils.annotation.neighbor_dirs import DirWriter
from utils.annotation.neighbors import Neighbors
from utils.annotation.records import read_records
from utils.errors import UserError
from utils.images.cache import ImageCache
from utils.items.folder import named_folders
from utils.items.formatted import restore_item
from utils.lock import hold, lock_path
from utils.log import LOG, bar, counted, start_log
from utils.store import collection
from utils.store.model import describe, same_model
from utils.store.server import Place, choose
from utils.training.projection import project, projection_of
from utils.web.download import DownloadLimits

if TYPE_CHECKING:
    import chromadb

SETTINGS = """CHROMADB_PATH CHROMA_SERVER_URL COLLECTION_NAME ANN_SAMPLER_NAME ANN_SAMPLER_CFG ANN_SEED
    ANN_DIRRIFY_NDIRS ANN_DIRRIFY_NNEAREST ANN_DIRRIFY_PICK ANN_DIRRIFY_PICK_AMONG ANN_DIRRIFY_POOL
    ANN_DIRRIFY_MAX_SIMILARITY ANN_DIRRIFY_WHERE ANN_DIRRIFY_NEIGHBORS_WHERE ANN_DIRRIFY_SHOW_JUDGED
    ANN_DIRRIFY_EXCLUDE_DIRS"""
PICKS = ("nearest", "informative")
RULES = """To review, open {root} in a file manager and go through its directories:
  1. Delete every image that is not similar to the main image, the one that begins with 0_.
  2. Never delete the main image alone: delete the whole directory to discard it.
  3. Kept images become positives, deleted images hard negatives. A directory without changes means: all are similar.
Then: {command}"""
REMEDIES = {  # reason why a main image could not be loaded -> what may help
    "connection": "a network, or IMAGE_CACHE_DIR_PATH",
    "timeout": "DOWNLOAD_TIMEOUT_S",
    "rate_limited": "DOWNLOAD_WORKERS_PER_HOST, or the same command later",
    "bad_url": "python embed.py FOLDER, if the folder was moved",
    "blocked_address": "DOWNLOAD_ALLOW_LOCAL",
    "opted_out": "DOWNLOAD_RESPECT_NOAI",
    "too_large": "DOWNLOAD_MAX_BYTES",
    "too_many_pixels": "MAX_IMAGE_PIXELS",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = f"""{SETTINGS} CHROMA_SERVER_HEADERS_ENV DEVICE IMAGE_CACHE_DIR_PATH DOWNLOAD_WORKERS
        DOWNLOAD_WORKERS_PER_HOST DOWNLOAD_TIMEOUT_S DOWNLOAD_ATTEMPTS DOWNLOAD_MAX_BYTES DOWNLOAD_ALLOW_LOCAL
        DOWNLOAD_RESPECT_NOAI MAX_IMAGE_PIXELS ANNOTATED_DATA_PATH ANN_HISTORY_PATH ANN_DIRRIFY_DIR_PATH
        ANN_DIRRIFY_MAX_SIDE ANN_PROJECTION_PATH LOGS_DIR_PATH"""
    args = cli.parser(__doc__, config, names.split()).parse_args(argv)
    if args.ann_dirrify_pick not in PICKS:
        raise UserError(f"ANN_DIRRIFY_PICK is {args.ann_dirrify_pick!r}; it must be {' or '.join(PICKS)}")
    if args.ann_dirrify_pool and args.ann_dirrify_pick != "nearest":
        raise UserError("ANN_DIRRIFY_POOL uses the nearest of each collection: set ANN_DIRRIFY_PICK to nearest")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_dirrify", args.logs_dir_path)
    root = Path(args.ann_dirrify_dir_path)
    settings = {name: getattr(args, name.lower()) for name in SETTINGS.split()}  # they determine the directories
    with hold(lock_path(root), str(root)):
        neighbor_dirs.check(root, settings)
        candidates = choose_candidates(args)
        with (
            DirWriter(root, settings, candidates.fingerprint()) as writer,
            open_images(args) as images,
            recording_history(writer, candidates, args),
        ):
            n_replaced = make_dirs(writer, draw_groups(candidates, writer, args), candidates, images, args)
    print_summary(writer, images, n_replaced)
    print_shortfall(writer, candidates, images, args)
    print_rules(writer, args)
    return 0 if writer.samples else 1


def choose_candidates(args: argparse.Namespace) -> Candidates:
    """Read the collection. Annotated positives, discarded main images and other reviewers' images are not drawn."""
    place, name = choose_place(args), args.collection_name
    candidates = read_candidates(place, name, args.ann_dirrify_where, args.ann_dirrify_neighbors_where)
    candidates.leave_out_annotated(read_records(Path(args.annotated_data_path)), args.ann_dirrify_show_judged)
    if not args.ann_dirrify_show_judged:
        candidates.leave_out(history.discarded(history.read_decisions(args.ann_history_path)))
    candidates.leave_out(shown_elsewhere(args))
    for other in dict.fromkeys(args.ann_dirrify_pool):
        if n_missing := candidates.add_pool(place, other):
            LOG.warning("%s left out: not in collection %s", counted(n_missing, "image"), other)
    return candidates


def shown_elsewhere(args: argparse.Namespace) -> set[str]:
    roots = [Path(name) for name in args.ann_dirrify_exclude_dirs]
    return {id_ for root in roots for listed in neighbor_dirs.read_samples(root).values() for id_ in listed}


def draw_groups(candidates: Candidates, writer: DirWriter, args: argparse.Namespace) -> Groups:
    """The groups, in the order to make them. A continued run first draws its existing groups, if the data are equal."""
    if not writer.same_data:
        LOG.warning(
            "images or decisions changed since %s was begun; the other directories are drawn from the new data",
            writer.root,
        )
        candidates.leave_out(id_ for listed in writer.samples.values() for id_ in listed)
    pool, n_nearest, name = make_pool(candidates, args), args.ann_dirrify_nnearest, args.ann_sampler_name

    def draw() -> Iterator[int]:
        try:
            return samplers.draw(name, args.ann_sampler_cfg, pool, args.ann_seed, n_nearest)
        except ValueError as error:
            raise UserError(f"{error}; set ANN_SAMPLER_NAME or ANN_SAMPLER_CFG") from None

    return Groups(draw, choose_neighbors(candidates, pool, args), candidates.allowed, repeats=name == "ids")


def choose_neighbors(
    candidates: Candidates, pool: samplers.Pool, args: argparse.Namespace
) -> Callable[[Sequence[int]], list[Neighbors]]:
    """Return a function that chooses the neighbors shown with main images, as set by ANN_DIRRIFY_PICK."""
    n_nearest, max_similarity = args.ann_dirrify_nnearest, args.ann_dirrify_max_similarity
    if args.ann_dirrify_pick == "nearest":
        return lambda mains: candidates.nearest(mains, n_nearest, max_similarity)
    choose = samplers.informative(pool, n_nearest)
    n_among = max(n_nearest, args.ann_dirrify_pick_among)

    def find(mains: Sequence[int]) -> list[Neighbors]:
        found = candidates.nearest(mains, n_among, max_similarity)
        return [near.only(choose(near.rows, near.similarities)) for near in found]

    return find


def make_pool(candidates: Candidates, args: argparse.Namespace) -> samplers.Pool:
    shown = shown_elsewhere(args) | history.shown(history.read_events(args.ann_history_path))
    read_metadata = functools.cache(lambda: collection.read_metadata(open_collection(args), candidates.ids))
    return samplers.Pool(
        candidates.ids,
        candidates.vectors,
        lambda: list(map(restore_item, read_metadata())),
        lambda prompt: read_text(prompt, candidates.model, args),
        candidates.allowed,
        candidates.annotated,
        set(candidates.rows(shown)),
        LOG.warning,
    )


def read_text(prompt: str, model: dict[str, Any], args: argparse.Namespace) -> np.ndarray:
    """Encode a prompt to (D,) with the text tower of the collection's model; project it for a trained collection."""
    from utils.embedding import encoder, weights

    if "model_name" not in model:
        raise UserError("the collection does not name its model; use a sampler other than text")
    name, tag = model["model_name"], model.get("pretrained", "")
    if not same_model(weights.find(name, tag).identity, model):
        raise UserError(f"the weights of {describe(model)} changed since the collection was made")
    projection = projection_of(model, Path(args.ann_projection_path))
    vector = encoder.load(name, tag, args.device, "fp32").encode_text(prompt)
    return vector if projection is None else project(vector[None], projection.matrix)[0]


def choose_place(args: argparse.Namespace) -> Place:
    return choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)


def open_collection(args: argparse.Namespace) -> chromadb.Collection:
    return collection.open_collection(choose_place(args), args.collection_name)


def open_images(args: argparse.Namespace) -> DirImages:
    images = functools.cache(lambda: open_collection(args))
    limits = DownloadLimits(
        args.download_timeout_s,
        args.download_attempts,
        args.download_max_bytes,
        args.download_allow_local,
        args.download_respect_noai,
        named_folders(Path(args.chromadb_path)),
    )
    return DirImages(
        ImageCache(args.image_cache_dir_path, 0),
        lambda ids: collection.read_urls(images(), ids),
        limits,
        args.max_image_pixels,
        args.download_workers,
        args.download_workers_per_host,
        args.ann_dirrify_max_side,
    )


@contextlib.contextmanager
def recording_history(writer: DirWriter, candidates: Candidates, args: argparse.Namespace) -> Iterator[None]:
    """Append the made directories to the history when the block ends, even by an error."""
    facts = {"sampler": args.ann_sampler_name, "options": args.ann_sampler_cfg, "seed": args.ann_seed}
    facts["pick"] = args.ann_dirrify_pick
    pool = [candidates.name, *candidates.pool]
    try:
        yield
    finally:
        shown = [
            {"main": main, "dir": neighbor_dirs.dir_name(index, main), "shown": candidates.cosines(listed)}
            | facts
            | ({"pool": pool, "brought": candidates.brought.get(main, {})} if candidates.pool else {})
            | {"model": candidates.model}
            for index, (main, listed) in enumerate(writer.samples.items())
        ]
        history.append_shown(args.ann_history_path, writer.root, writer.begun, shown)


def make_dirs(
    writer: DirWriter, groups: Groups, candidates: Candidates, images: DirImages, args: argparse.Namespace
) -> int:
    """Make the directories that `writer` does not have yet. Returns the number of replaced near duplicates."""
    n_before = 0 if writer.same_data else len(writer.samples)  # not drawn again
    n_replaced = 0

    def start(group: DrawnGroup) -> Callable[[], bool]:
        listed = [candidates.ids[row] for row in group.rows]
        if listed[0] in writer.samples:  # made before the run was interrupted
            return lambda: True
        wait = images.start(listed, writer.stage(listed[0]))
        return lambda: writer.commit(listed, wait())

    with bar(args.ann_dirrify_ndirs, "directories", "dir") as progress:
        progress.update(n_before)
        for group in make_groups(groups, args.ann_dirrify_ndirs - n_before, start):
            n_replaced += group.neighbors.n_dropped
            progress.update()
    return n_replaced


def print_summary(writer: DirWriter, images: DirImages, n_replaced: int) -> None:
    n_images = sum(map(len, writer.samples.values()))
    print(
        f"{counted(len(writer.samples), 'directory')} with {counted(n_images, 'image')} in {writer.root} "
        f"({images.n_copied} from the cache, {images.n_downloaded} downloaded or read in place)"
    )
    if n_replaced:
        print(f"near duplicates replaced by the next nearest image (ANN_DIRRIFY_MAX_SIMILARITY): {n_replaced}")
    if images.failures:
        reasons = ", ".join(f"{reason} {n}" for reason, n in images.failures.most_common())
        print(f"images left out because they could not be loaded: {images.failures.total()} ({reasons})")


def print_shortfall(writer: DirWriter, candidates: Candidates, images: DirImages, args: argparse.Namespace) -> None:
    """Print why there are fewer directories than ANN_DIRRIFY_NDIRS, and the settings that help."""
    samples = writer.samples
    if args.ann_sampler_name == "ids":
        print(f"{len(samples)} of {counted(len(set(args.ann_sampler_cfg['ids'])), 'named id')} used")
        return
    if len(samples) >= args.ann_dirrify_ndirs:
        return
    n_shown = len({id_ for listed in samples.values() for id_ in listed})
    n_annotated = len({row for positives, _ in candidates.annotated for row in positives})
    remedies = ["a smaller ANN_DIRRIFY_NNEAREST"] if samples else []
    remedies += ["ANN_SAMPLER_NAME, ANN_SAMPLER_CFG"] if args.ann_sampler_name != "random" else []
    remedies += ["ANN_DIRRIFY_WHERE"] if args.ann_dirrify_where else []
    remedies += ["ANN_DIRRIFY_EXCLUDE_DIRS"] if args.ann_dirrify_exclude_dirs else []
    remedies += [REMEDIES[reason] for reason in images.failures if writer.n_lost and reason in REMEDIES]
    print(
        f"only {len(samples)} of {args.ann_dirrify_ndirs} directories (ANN_DIRRIFY_NDIRS): no image is left to be a "
        f"main image. Images: {len(candidates.ids)}; annotated positives: {n_annotated}; shown in these directories: "
        f"{n_shown}; main images that could not be loaded: {writer.n_lost}. "
        f"What helps: {', '.join([*remedies, 'more images'])}"
    )


def print_rules(writer: DirWriter, args: argparse.Namespace) -> None:
    """The reviewer's three rules, and the next command with the paths given to this one."""
    if writer.samples:
        usual = parse_args([])
        where = "" if args.ann_dirrify_dir_path == usual.ann_dirrify_dir_path else f' "{writer.root}"'
        flags = "".join(
            f' --{name.replace("_", "-")} "{getattr(args, name)}"'
            for name in ("annotated_data_path", "ann_history_path")
            if getattr(args, name) != getattr(usual, name)
        )
        print(RULES.format(root=writer.root, command=f"python ann_dirload.py{where}{flags}"))


if __name__ == "__main__":
    cli.run(main)
