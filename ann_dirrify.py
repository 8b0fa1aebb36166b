"""Stage 2: put each of some main images into a folder with the images nearest to it, for a person to review.

    python ann_dirrify.py

Reads the collection that embed.py made, the image cache and the annotated data; writes ANN_DIRRIFY_DIR_PATH.
Run it again to finish what was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import config
import samplers
from utils import cli
from utils.annotation import history, neighbor_dirs
from utils.annotation.candidates import Material, read_material
from utils.annotation.dir_images import Originals
from utils.annotation.dir_writer import DirWriter
from utils.annotation.groups import Group, Groups, make_groups
from utils.annotation.neighbors import Neighbors
from utils.annotation.records import read_records
from utils.errors import UserError
from utils.images.cache import ImageCache
from utils.items.formatted import restore_item
from utils.lock import hold
from utils.log import LOG, bar, start_log
from utils.store import collection
from utils.store.model import describe, same_model
from utils.store.server import Place, choose
from utils.web.download import DownloadLimits

if TYPE_CHECKING:
    import chromadb

SETTINGS = """CHROMADB_PATH CHROMA_SERVER_URL COLLECTION_NAME ANN_SAMPLER_NAME ANN_SAMPLER_CFG ANN_SEED
    ANN_DIRRIFY_NDIRS ANN_DIRRIFY_NNEAREST ANN_DIRRIFY_MAX_SIMILARITY ANN_DIRRIFY_WHERE ANN_DIRRIFY_NEIGHBORS_WHERE
    ANN_DIRRIFY_SHOW_JUDGED ANN_DIRRIFY_EXCLUDE_DIRS"""
RULES = """To review, open {root} in a file manager and go through its directories:
  1. Delete every image that is not similar to the main image, the one that begins with 0_.
  2. Never delete the main image alone: delete the whole directory to discard it.
  3. What stays becomes a positive, what you deleted a hard negative; a directory left as it is means: all similar.
Then: {command}"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = f"""{SETTINGS} CHROMA_SERVER_HEADERS_ENV DEVICE IMAGE_CACHE_DIR_PATH DOWNLOAD_WORKERS
        DOWNLOAD_WORKERS_PER_HOST DOWNLOAD_TIMEOUT_S DOWNLOAD_ATTEMPTS DOWNLOAD_MAX_BYTES DOWNLOAD_ALLOW_LOCAL
        DOWNLOAD_RESPECT_NOAI MAX_IMAGE_PIXELS ANNOTATED_DATA_PATH ANN_HISTORY_PATH ANN_DIRRIFY_DIR_PATH
        LOGS_DIR_PATH"""
    args = cli.parser(__doc__, config, names.split()).parse_args(argv)
    if args.ann_dirrify_ndirs < 1 or args.ann_dirrify_nnearest < 1 or args.download_workers < 1:
        raise UserError("ANN_DIRRIFY_NDIRS, ANN_DIRRIFY_NNEAREST and DOWNLOAD_WORKERS must be 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_dirrify", args.logs_dir_path)
    root = Path(args.ann_dirrify_dir_path)
    settings = {name: getattr(args, name.lower()) for name in SETTINGS.split()}  # what decides which are made
    with hold(neighbor_dirs.lock_path(root), str(root)):
        neighbor_dirs.check(root, settings)
        material = choose_material(args)
        with (
            DirWriter(root, settings, material.fingerprint()) as writer,
            open_originals(args) as originals,
            remembering(writer, material, args),
        ):
            made = make_dirs(writer, draw_groups(material, writer, args), material, originals, args)
            writer.finish()
    print_summary(root, writer.samples, originals, made)
    print_shortfall(writer.samples, material, made, args)
    print_rules(root, writer.samples, args)
    return 0 if writer.samples else 1


def choose_material(args: argparse.Namespace) -> Material:
    """The collection, less what annotations, discarded directories and other reviewers' folders take from it."""
    place, name = choose_place(args), args.collection_name
    material = read_material(place, name, args.ann_dirrify_where, args.ann_dirrify_neighbors_where)
    material.leave_out_annotated(read_records(Path(args.annotated_data_path)), args.ann_dirrify_show_judged)
    if not args.ann_dirrify_show_judged:
        material.leave_out(history.discarded(history.read_events(history_path(args))))
    material.leave_out(shown_elsewhere(args))
    return material


def shown_elsewhere(args: argparse.Namespace) -> set[str]:
    roots = [Path(name) for name in args.ann_dirrify_exclude_dirs]
    return {id_ for root in roots for listed in neighbor_dirs.read_samples(root).values() for id_ in listed}


def history_path(args: argparse.Namespace) -> Path | None:
    return Path(args.ann_history_path) if args.ann_history_path else None


def draw_groups(material: Material, writer: DirWriter, args: argparse.Namespace) -> Groups:
    """Groups in the order to be made. A run that is continued draws those it has again, first, unless it cannot."""
    if not writer.same_data:
        LOG.warning("images or decisions changed since %s was begun; it gets other directories now", writer.root)
        material.leave_out(id_ for listed in writer.samples.values() for id_ in listed)
    pool, n_nearest, name = make_pool(material, args), args.ann_dirrify_nnearest, args.ann_sampler_name

    def draw() -> Iterator[int]:
        try:
            return samplers.draw(name, args.ann_sampler_cfg, pool, args.ann_seed, n_nearest)
        except ValueError as error:
            raise UserError(f"{error}; set ANN_SAMPLER_NAME or ANN_SAMPLER_CFG") from None

    def find(mains: Sequence[int]) -> list[Neighbors]:
        return material.nearest(mains, n_nearest, args.ann_dirrify_max_similarity)

    return Groups(draw, find, material.allowed, repeats=name == "ids")


def make_pool(material: Material, args: argparse.Namespace) -> samplers.Pool:
    shown = shown_elsewhere(args) | history.shown(history.read_events(history_path(args)))
    return samplers.Pool(
        material.ids,
        lambda: material.vectors,
        functools.cache(lambda: read_items(material.ids, args)),
        material.allowed,
        material.annotated,
        set(material.rows(shown)),
        lambda prompt: read_text(prompt, material.model, args.device),
        LOG.warning,
    )


def read_items(ids: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    return [restore_item(metadata) for metadata in collection.read_metadata(open_images(args), ids)]


def read_text(prompt: str, model: dict[str, Any], device: str) -> np.ndarray:
    """(D,) embedding of a prompt by the text tower of the collection's own model."""
    from utils.embedding import encoder, weights

    if "model_name" not in model:
        raise UserError("the collection does not say which model made it; take another ANN_SAMPLER_NAME than text")
    name, tag = model["model_name"], model.get("pretrained", "")
    if not same_model(weights.identify(name, tag), model):
        raise UserError(f"the weights of {describe(model)} are not those any more that made the collection")
    return encoder.load(name, tag, device, "fp32").encode_text(prompt)


def choose_place(args: argparse.Namespace) -> Place:
    return choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)


def open_images(args: argparse.Namespace) -> chromadb.Collection:
    return collection.open_collection(choose_place(args), args.collection_name)


def open_originals(args: argparse.Namespace) -> Originals:
    images = functools.cache(lambda: open_images(args))
    limits = DownloadLimits(
        args.download_timeout_s,
        args.download_attempts,
        args.download_max_bytes,
        args.download_allow_local,
        args.download_respect_noai,
    )
    return Originals(
        ImageCache(args.image_cache_dir_path, 0),
        lambda ids: collection.read_urls(images(), ids),
        limits,
        args.max_image_pixels,
        args.download_workers,
        args.download_workers_per_host,
    )


@contextlib.contextmanager
def remembering(writer: DirWriter, material: Material, args: argparse.Namespace) -> Iterator[None]:
    """Add to the history what is there at the end, however that comes."""
    facts = {"sampler": args.ann_sampler_name, "options": args.ann_sampler_cfg, "seed": args.ann_seed}
    try:
        yield
    finally:
        cosines = {main: material.cosines(listed) for main, listed in writer.samples.items()}
        facts["model"] = material.model
        history.append_shown(history_path(args), writer.root, writer.begun, cosines, facts)


@dataclass
class Made:
    """What a run counts: main images that could not be loaded, and near duplicates that gave way to others."""

    n_lost: int = 0
    n_dropped: int = 0


def make_dirs(
    writer: DirWriter, groups: Groups, material: Material, originals: Originals, args: argparse.Namespace
) -> Made:
    """Make what `writer` does not have yet."""
    made = Made()
    n_before = 0 if writer.same_data else len(writer.samples)  # these are not drawn again
    with bar(args.ann_dirrify_ndirs, "directories", "dir") as progress:
        progress.update(n_before)

        def start(group: Group) -> Callable[[], bool]:
            listed = [material.ids[row] for row in group.rows]
            is_there = listed[0] in writer.samples  # made before the run was interrupted
            wait = None if is_there else originals.start(listed, writer.stage(listed[0]))
            return lambda: complete(group, listed[0], wait)

        def complete(group: Group, main: str, wait: Callable[[], list[str]] | None) -> bool:
            there = wait() if wait else [main]
            if main not in there:
                made.n_lost += 1
                writer.drop(main)
                return False
            if wait:
                writer.commit(main, there)
            made.n_dropped += group.neighbors.n_dropped
            progress.update()
            return True

        make_groups(groups, args.ann_dirrify_ndirs - n_before, start)
    return made


def print_summary(root: Path, samples: neighbor_dirs.Samples, originals: Originals, made: Made) -> None:
    n_images = sum(map(len, samples.values()))
    print(
        f"{len(samples)} directories with {n_images} images in {root} "
        f"({originals.n_copied} from the cache, {originals.n_downloaded} downloaded)"
    )
    if made.n_dropped:
        print(f"near duplicates that gave their place to the next (ANN_DIRRIFY_MAX_SIMILARITY): {made.n_dropped}")
    if originals.failures:
        told = ", ".join(f"{reason} {n}" for reason, n in originals.failures.most_common())
        print(f"images that could not be loaded and were left out: {originals.failures.total()} ({told})")


def print_shortfall(samples: neighbor_dirs.Samples, material: Material, made: Made, args: argparse.Namespace) -> None:
    """Say why fewer directories came out than were asked for, and what changes it."""
    if args.ann_sampler_name == "ids":
        print(f"{len(samples)} of {len(set(args.ann_sampler_cfg['ids']))} named ids used")
        return
    if len(samples) >= args.ann_dirrify_ndirs:
        return
    n_shown = len({id_ for listed in samples.values() for id_ in listed})
    n_annotated = len({row for positives, _ in material.annotated for row in positives})
    remedies = ["a smaller ANN_DIRRIFY_NNEAREST"]
    remedies += ["ANN_SAMPLER_NAME, ANN_SAMPLER_CFG"] if args.ann_sampler_name != "random" else []
    remedies += ["ANN_DIRRIFY_WHERE"] if args.ann_dirrify_where else []
    remedies += ["ANN_DIRRIFY_EXCLUDE_DIRS"] if args.ann_dirrify_exclude_dirs else []
    remedies += ["DOWNLOAD_ALLOW_LOCAL"] if made.n_lost and not args.download_allow_local else []
    print(
        f"only {len(samples)} of {args.ann_dirrify_ndirs} directories (ANN_DIRRIFY_NDIRS): no image is left to be a "
        f"main image. Of {len(material.ids)} images {n_annotated} are annotated positives, {n_shown} are shown in "
        f"these directories, {made.n_lost} main images could not be loaded. "
        f"What changes it: {', '.join([*remedies, 'more images'])}"
    )


def print_rules(root: Path, samples: neighbor_dirs.Samples, args: argparse.Namespace) -> None:
    """The reviewer's three rules and the next command, with what was given to this one."""
    if samples:
        usual = parse_args([])
        where = "" if args.ann_dirrify_dir_path == usual.ann_dirrify_dir_path else f' "{root}"'
        flags = "".join(
            f' --{name.replace("_", "-")} "{getattr(args, name)}"'
            for name in ("annotated_data_path", "ann_history_path")
            if getattr(args, name) != getattr(usual, name)
        )
        print(RULES.format(root=root, command=f"python ann_dirload.py{where}{flags}"))


if __name__ == "__main__":
    cli.run(main)
