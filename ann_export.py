"""Stage 4: write what was annotated in the formats that trainers and evaluators read, split without leaks.

    python ann_export.py

Reads ANNOTATED_DATA_PATH, the collection and the image cache; writes ANN_EXPORT_DIR_PATH/{format}.{split}.{extension}
(pairs: one file, pairs.csv). utils/export/formats.py describes the formats.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import config
from utils import cli
from utils.annotation import neighbors
from utils.annotation.judgments import similarities
from utils.annotation.records import Record, read_records
from utils.errors import UserError
from utils.export import formats
from utils.export.outputs import replacing_all
from utils.export.splits import check_shares, split_items
from utils.files import replacing
from utils.images.cache import ImageCache
from utils.log import LOG, bar, start_log
from utils.store import collection
from utils.store.server import choose

VALUES = ("path", "url", "id")
N_NAMED = 20  # in a line of the log; the rest is a number
RUN_DEPTH = 100  # images ranked per query in a run file
RUN_BLOCK = 128  # queries compared at a time: 128 x N x 4 bytes


@dataclass
class Material:
    """The annotations, and what the collection knows about their images."""

    records: list[Record]
    ids: list[str]  # rows of `vectors`, sorted
    vectors: np.ndarray  # (N, D) float32 of unit length: of the judged images, for a run of all
    row_of: dict[str, int]
    split_of: dict[str, str] = field(default_factory=dict)  # every id in the records
    value_of: dict[str, str] = field(default_factory=dict)  # every judged image that has what is written for it


@dataclass
class LeftOut:
    """What the records hold and the files do not."""

    gone: set[str] = field(default_factory=set)  # ids
    valueless: set[str] = field(default_factory=set)  # ids
    other_split: int = 0  # negatives
    contradictory: int = 0  # negatives that the same record has as positives
    groups: list[str] = field(default_factory=list)  # their main images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = """ANNOTATED_DATA_PATH CHROMADB_PATH CHROMA_SERVER_URL CHROMA_SERVER_HEADERS_ENV
        COLLECTION_NAME IMAGE_CACHE_DIR_PATH ANN_EXPORT_DIR_PATH
        ANN_EXPORT_FORMAT ANN_EXPORT_VALUE ANN_EXPORT_SPLIT ANN_EXPORT_SEED ANN_EXPORT_NEAR_DUPLICATE LOGS_DIR_PATH"""
    return cli.parser(__doc__, config, names.split()).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_export", args.logs_dir_path)
    check(args)
    material = read_material(args)
    left_out = LeftOut(gone={id_ for id_ in material.split_of if id_ not in material.row_of})
    if args.ann_export_format == formats.PAIRS:
        n_rows = write_pairs(material, Path(args.ann_export_dir_path))
    else:
        n_rows = write_splits(material, left_out, args)
    print_left_out(left_out, args)
    return 0 if n_rows else 1


def check(args: argparse.Namespace) -> None:
    """What can be said to be wrong without reading anything."""
    if args.ann_export_format not in formats.NAMES:
        raise UserError(f"ANN_EXPORT_FORMAT is {args.ann_export_format!r}; known are {', '.join(formats.NAMES)}")
    if args.ann_export_value not in VALUES:
        raise UserError(f"ANN_EXPORT_VALUE is {args.ann_export_value!r}; known are {', '.join(VALUES)}")
    check_shares(args.ann_export_split, "ANN_EXPORT_SPLIT")


def read_material(args: argparse.Namespace) -> Material:
    records = read_records(Path(args.annotated_data_path))
    if not records:
        raise UserError(f"nothing is annotated in {args.annotated_data_path}; run python ann_dirload.py first")
    judged = {id_ for record in records for id_ in (*record["pos"], *record["neg"])}
    place = choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)
    with collection.reading(place, args.collection_name) as images:
        ids = collection.read_ids(images)
        if args.ann_export_format != formats.QRELS:  # a run ranks all images; else those judged are enough
            ids = [id_ for id_ in ids if id_ in judged]
        vectors = neighbors.normalize(collection.read_vectors(images, ids))
        material = Material(records, ids, vectors, {id_: row for row, id_ in enumerate(ids)})
        present = [id_ for id_ in ids if id_ in judged]
        material.value_of = dict(zip(present, read_values(images, present, args)))
    material.value_of = {id_: value for id_, value in material.value_of.items() if value}
    settings = args.ann_export_near_duplicate, args.ann_export_split, args.ann_export_seed
    material.split_of = split_items(records, material.row_of, vectors, *settings)
    return material


def read_values(images: Any, ids: Sequence[str], args: argparse.Namespace) -> Sequence[str]:
    """What stands for each image in the files; "" where there is no such thing."""
    if args.ann_export_format in (formats.PAIRS, formats.QRELS) or args.ann_export_value == "id":
        return ids
    if args.ann_export_value == "url":
        return collection.read_urls(images, ids)
    cache = ImageCache(args.image_cache_dir_path, 0)
    return [path.as_posix() if (path := cache.find(id_)) else "" for id_ in ids]


# --- pairs ------------------------------------------------------------------------------------------------------------
def write_pairs(material: Material, folder: Path) -> int:
    path = folder / f"{formats.PAIRS}.csv"
    with replacing(path) as file:
        n_rows = formats.write_pairs(file, pairs(material))
    print(f"{path}: {n_rows} pairs of {len(material.records)} groups")
    return n_rows


def pairs(material: Material) -> Iterator[formats.Pair]:
    """Record by record, the items in the record's own order."""
    for number, record in enumerate(material.records):
        main, items = record["pos"][0], [*record["pos"][1:], *record["neg"]]
        found = similarities(record, material.row_of, material.vectors)
        ranks = {id_: rank for rank, id_ in enumerate(found, 1)}
        split = material.split_of[main]
        for i, id_ in enumerate(items):
            label, is_here = int(i < len(record["pos"]) - 1), material.split_of[id_] == split
            yield formats.Pair(main, id_, label, found.get(id_), ranks.get(id_), split if is_here else "", number)


# --- the formats of groups --------------------------------------------------------------------------------------------
def write_splits(material: Material, left_out: LeftOut, args: argparse.Namespace) -> int:
    """One file a split, though it be empty; what an earlier run wrote for other splits goes, as it leaks."""
    name, folder = args.ann_export_format, Path(args.ann_export_dir_path)
    kind = formats.FORMATS[name]
    groups: dict[str, list[formats.Group]] = {split: [] for split in args.ann_export_split}
    for record in material.records:
        group = usable(record, material, left_out)
        if group is None or not (group.is_two_sided if kind.needs_both else group.positives):
            left_out.groups.append(record["pos"][0])
        else:
            groups[material.split_of[record["pos"][0]]].append(group)
    extensions = [kind.extension, *([formats.RUN_EXTENSION] if name == formats.QRELS else [])]
    with replacing_all(folder, name, [f"{name}.{split}.{extension}" for split in groups for extension in extensions]):
        return sum(write_split(name, split, of_split, material, folder) for split, of_split in groups.items())


def write_split(name: str, split: str, groups: Sequence[formats.Group], material: Material, folder: Path) -> int:
    kind = formats.FORMATS[name]
    path = folder / f"{name}.{split}.{kind.extension}"
    with replacing(path) as file:
        n_rows = kind.write(file, groups)
    if name == formats.QRELS:
        write_run(path.with_suffix(f".{formats.RUN_EXTENSION}"), groups, split, material)
    print(f"{path}: {n_rows} {kind.row} of {len(groups)} groups")
    return n_rows


def usable(record: Record, material: Material, left_out: LeftOut) -> formats.Group | None:
    """The group that a record comes to, less what is left out; None without its main image."""
    main, value_of = record["pos"][0], material.value_of
    there = [id_ for id_ in (*record["pos"], *record["neg"]) if id_ in material.row_of]
    left_out.valueless.update(id_ for id_ in there if id_ not in value_of)
    if main not in value_of:
        return None
    positives = [id_ for id_ in dict.fromkeys(record["pos"]) if id_ in value_of and id_ != main]
    negatives = [id_ for id_ in dict.fromkeys(record["neg"]) if id_ in value_of]
    clear = [id_ for id_ in negatives if id_ not in record["pos"]]
    here = [id_ for id_ in clear if material.split_of[id_] == material.split_of[main]]
    left_out.contradictory += len(negatives) - len(clear)
    left_out.other_split += len(clear) - len(here)
    return formats.Group(value_of[main], [value_of[id_] for id_ in positives], [value_of[id_] for id_ in here])


def write_run(path: Path, groups: Sequence[formats.Group], split: str, material: Material) -> None:
    """The collection's own ranking for each query, without images that belong to another split."""
    eligible = np.array([material.split_of.get(id_, split) == split for id_ in material.ids], bool)
    with replacing(path) as file, bar(len(groups), f"ranking {split}", "query") as progress:
        for start in range(0, len(groups), RUN_BLOCK):
            block = groups[start : start + RUN_BLOCK]
            mains = [material.row_of[group.query] for group in block]
            for group, found in zip(block, neighbors.nearest(material.vectors, mains, RUN_DEPTH, eligible)):
                ids = (material.ids[row] for row in found.rows)
                formats.write_run(file, group.query, zip(ids, found.similarities))
            progress.update(len(block))


# --- what is not in the files -----------------------------------------------------------------------------------------
def print_left_out(left_out: LeftOut, args: argparse.Namespace) -> None:
    where = "kept in the pairs, without similarity" if args.ann_export_format == formats.PAIRS else "left out"
    what = {"path": "without an image in the cache", "url": "without a url"}.get(args.ann_export_value, "")
    print_ids(f"ids no longer in collection {args.collection_name}, {where}", sorted(left_out.gone))
    print_ids(f"images {what}, left out", sorted(left_out.valueless))
    print_ids("groups that yield nothing, by their main images", left_out.groups)
    if left_out.other_split:
        print(f"negatives left out because they lie in another split than their group: {left_out.other_split}")
    if left_out.contradictory:
        print(f"negatives left out because the same record has them as positives: {left_out.contradictory}")


def print_ids(what: str, ids: Sequence[str]) -> None:
    if ids:
        print(f"{what}: {len(ids)}")
        rest = [f"and {len(ids) - N_NAMED} more"] if len(ids) > N_NAMED else []
        LOG.info("%s: %s", what, ", ".join([*ids[:N_NAMED], *rest]))


if __name__ == "__main__":
    cli.run(main)
