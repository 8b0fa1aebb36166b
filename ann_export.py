"""Stage 4: write the annotations in the formats of trainers and evaluators, split without leaks.

    python ann_export.py

Reads ANNOTATED_DATA_PATH, the collection and the image cache; writes ANN_EXPORT_DIR_PATH/{format}.{split}.{extension}
(pairs: one file, pairs.csv). utils/export/formats.py describes the formats.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import config
from utils import cli
from utils.annotation import neighbors
from utils.annotation.records import read_annotated
from utils.errors import UserError
from utils.export import formats
from utils.export.groups import ExportData, LeftOut, empty_reason, pairs, rank_queries, select_groups
from utils.export.splits import check_shares, split_items
from utils.files import replacing
from utils.images.cache import ImageCache
from utils.log import LOG, counted, start_log
from utils.store import collection
from utils.store.server import choose
from utils.web.urls import find_files

# ANN_EXPORT_VALUE -> why it may be missing
NO_VALUE = {"path": "not in the image cache (IMAGE_CACHE_DIR_PATH)", "url": "no url", "id": ""}
N_NAMED = 3  # ids in a line on stdout; the log file has all


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = """ANNOTATED_DATA_PATH CHROMADB_PATH CHROMA_SERVER_URL CHROMA_SERVER_HEADERS_ENV
        COLLECTION_NAME IMAGE_CACHE_DIR_PATH ANN_EXPORT_DIR_PATH
        ANN_EXPORT_FORMAT ANN_EXPORT_VALUE ANN_EXPORT_SPLIT ANN_EXPORT_SEED ANN_EXPORT_NEAR_DUPLICATE LOGS_DIR_PATH"""
    return cli.parser(__doc__, config, names.split()).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_export", args.logs_dir_path)
    check(args)
    data = read_data(args)
    gone = sorted(id_ for id_ in data.split_of if id_ not in data.row_of)
    if args.ann_export_format == formats.PAIRS:
        print_ids("id", gone, "kept without similarity", f"no longer in collection {args.collection_name}")
        n_rows = write_pairs(data, Path(args.ann_export_dir_path))
    else:
        print_ids("id", gone, "left out", f"no longer in collection {args.collection_name}")
        n_rows = write_splits(data, args)
    return 0 if n_rows else 1


def check(args: argparse.Namespace) -> None:
    """Raises UserError for settings that are wrong for any data."""
    for constant, value, known in (
        ("ANN_EXPORT_FORMAT", args.ann_export_format, formats.NAMES),
        ("ANN_EXPORT_VALUE", args.ann_export_value, NO_VALUE),
    ):
        if value not in known:
            raise UserError(f"{constant} is {value!r}; use one of {', '.join(known)}")
    check_shares(args.ann_export_split, "ANN_EXPORT_SPLIT")


def read_data(args: argparse.Namespace) -> ExportData:
    records = read_annotated(Path(args.annotated_data_path))
    judged = {id_ for record in records for id_ in (*record["pos"], *record["neg"])}
    place = choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)
    with collection.reading(place, args.collection_name) as images:
        ids = collection.read_ids(images)
        present = [id_ for id_ in ids if id_ in judged]
        if args.ann_export_format != formats.QRELS:  # only a run file ranks unjudged images
            ids = present
        vectors = neighbors.normalize(collection.read_vectors(images, ids))
        values = read_values(images, present, args)
    row_of = {id_: row for row, id_ in enumerate(ids)}
    settings = args.ann_export_near_duplicate, args.ann_export_split, args.ann_export_seed
    split_of, n_clusters = split_items(records, row_of, vectors, *settings)
    value_of = {id_: value for id_, value in zip(present, values) if value}
    return ExportData(records, ids, row_of, vectors, value_of, split_of, n_clusters)


def read_values(images: Any, ids: Sequence[str], args: argparse.Namespace) -> Sequence[str]:
    """The text to write for each image; "" for an image without a cached file or url."""
    if args.ann_export_format in (formats.PAIRS, formats.QRELS) or args.ann_export_value == "id":
        return ids
    if args.ann_export_value == "url":
        return collection.read_urls(images, ids)
    folder = args.image_cache_dir_path and str(Path(args.image_cache_dir_path).absolute())  # once for all images
    cache = ImageCache(folder, 0)
    found = {id_: path for id_ in ids if (path := cache.find(id_))}
    others = [id_ for id_ in ids if id_ not in found]
    found |= find_files(dict(zip(others, collection.read_urls(images, others))), None)
    return [found[id_].absolute().as_posix() if id_ in found else "" for id_ in ids]


def write_pairs(data: ExportData, folder: Path) -> int:
    path = folder / f"{formats.PAIRS}.csv"
    with replacing(path) as file:
        n_rows = formats.write_pairs(file, pairs(data))
    print(f"{path}: {counted(n_rows, 'pair')} of {counted(len(data.records), 'group')}")
    return n_rows


def write_splits(data: ExportData, args: argparse.Namespace) -> int:
    """Write one file per split that has groups; remove files of the other splits, because old files would leak."""
    name, folder, shares = args.ann_export_format, Path(args.ann_export_dir_path), args.ann_export_split
    kind = formats.FORMATS[name]
    groups, left_out = select_groups(data, kind.needs_both)
    names = {split: [f"{name}.{split}.{extension}" for extension in kind.extensions] for split in shares}
    wanted = [file for split in groups for file in names[split]]
    with formats.replacing_all(folder, name, wanted, [file for listed in names.values() for file in listed]):
        n_rows = sum(write_split(name, split, groups[split], data, folder) for split in shares if split in groups)
    for split in shares:
        if split not in groups:
            print(f"{folder / names[split][0]}: not written, {empty_reason(split, shares[split], data)}")
    print_left_out(left_out, NO_VALUE[args.ann_export_value])
    if kind.opens_images and args.ann_export_value != "id":
        print_texts(formats.count_texts(group for listed in groups.values() for group in listed))
    return n_rows


def write_split(name: str, split: str, groups: Sequence[formats.ExportGroup], data: ExportData, folder: Path) -> int:
    kind = formats.FORMATS[name]
    path, *run_paths = (folder / f"{name}.{split}.{extension}" for extension in kind.extensions)
    with replacing(path) as file:
        n_rows = kind.write(file, groups)
    for run_path in run_paths:
        with replacing(run_path) as file:
            formats.write_run(file, rank_queries(groups, split, data))
    print(f"{path}: {counted(n_rows, kind.row)} of {counted(len(groups), 'group')}")
    return n_rows


def print_left_out(left_out: LeftOut, no_value: str) -> None:
    print_ids("image", sorted(left_out.valueless), "left out", no_value)
    for reason, mains in left_out.groups.items():
        print_ids("group", mains, "left out", reason)
    if left_out.other_split:
        print(f"{counted(left_out.other_split, 'negative')} left out: in a different split from the group")
    if left_out.contradictory:
        print(f"{counted(left_out.contradictory, 'negative')} left out: also a positive of the same record")


def print_texts(counts: Counter[str]) -> None:
    if counts:
        listed = ", ".join(f"{extension}: {n}" for extension, n in counts.most_common())
        print(
            f"sentence-transformers would embed the name, not the pixels, of {counted(counts.total(), 'image')} "
            f"({listed}): open the images yourself, as tests/benchmarks/load_exports.py does"
        )


def print_ids(noun: str, ids: Collection[str], fate: str, reason: str) -> None:
    if ids:
        line = f"{counted(len(ids), noun)} {fate} ({{}}): {reason}"
        print(line.format(", ".join([*ids][:N_NAMED]) + (", ..." if len(ids) > N_NAMED else "")))
        LOG.debug(line.format(", ".join(ids)))


if __name__ == "__main__":
    cli.run(main)
