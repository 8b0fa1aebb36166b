"""The export formats, and the files of an export.

triplets       CSV anchor,positive,negative: all combinations of a group, in sentence-transformers' order of columns
flagembedding  JSON lines {"query", "pos", "neg"}, for FlagEmbedding
reranking      JSON [{"query", "positive", "negative"}], for sentence-transformers' RerankingEvaluator
qrels          TREC `qid 0 docid rel`: 1 positive, 0 verified negative, unjudged images absent; with a run file
pairs          CSV of every main image with every image judged against it; one file, nothing left out or inferred

tests/benchmarks/load_exports.py loads each of them with the program it is made for.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, NamedTuple

from utils.files import read_json, write_json

PAIRS = "pairs"
QRELS = "qrels"
RUN_NAME = "collection"  # last column of a run file: the name of the ranking system
# Paths and URLs with these endings are images to sentence-transformers 6; it embeds any other string as text.
IMAGE_ENDS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")


@dataclass(frozen=True)
class ExportGroup:
    """One record, as values to write: ids, paths or URLs."""

    query: str  # the main image
    positives: list[str]  # without the main image
    negatives: list[str]


class Pair(NamedTuple):
    """A row of `pairs`; its fields are the columns."""

    id_a: str  # the main image
    id_b: str
    label: int
    similarity: str  # six decimals; "" if one is no longer in the collection
    rank: int | None  # 1 = the most similar of the images judged in this group
    split: str  # "": main image and item are in different splits
    group: int  # index of the record


class Format(NamedTuple):
    """A format of groups, one file per split."""

    extensions: tuple[str, ...]  # of a split's file, and of its run file
    write: Callable[[IO[str], Sequence[ExportGroup]], int]  # returns the number of rows
    needs_both: bool  # whether a group needs a negative in addition to a positive
    row: str  # noun for a row
    opens_images: bool = False  # its program is sentence-transformers, which opens them


def write_triplets(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    file.write("anchor,positive,negative\n")
    for group in groups:
        query, *positives = _cells([group.query, *group.positives])
        starts = [f"{query},{positive}," for positive in positives]
        file.writelines(map("".join, itertools.product(starts, [f"{cell}\n" for cell in _cells(group.negatives)])))
    return sum(len(group.positives) * len(group.negatives) for group in groups)


def _cells(values: Sequence[str]) -> list[str]:
    """The values as csv.writer writes them: each is quoted once, though it is in many rows."""
    lines: list[str] = []
    csv.writer(SimpleNamespace(write=lines.append), lineterminator="\n").writerows([value] for value in values)
    return [line[:-1] for line in lines]


def write_flagembedding(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    for group in groups:
        file.write(json.dumps({"query": group.query, "pos": group.positives, "neg": group.negatives}) + "\n")
    return len(groups)


def write_reranking(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    samples = ({"query": group.query, "positive": group.positives, "negative": group.negatives} for group in groups)
    file.write("[" + ",".join("\n  " + json.dumps(sample) for sample in samples) + "\n]\n")
    return len(groups)


def write_qrels(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    for group in groups:
        file.writelines(f"{group.query} 0 {id_} 1\n" for id_ in group.positives)
        file.writelines(f"{group.query} 0 {id_} 0\n" for id_ in group.negatives)
    return sum(len(group.positives) + len(group.negatives) for group in groups)


def write_run(file: IO[str], rankings: Iterable[tuple[str, Iterable[tuple[str, float]]]]) -> None:
    """Write (query, [(id, score), best first]) in TREC form. Written scores decrease: evaluators sort by score."""
    for query, ranked in rankings:
        last = float("inf")
        for rank, (id_, score) in enumerate(ranked, 1):
            last = min(score, last - 1e-9)
            file.write(f"{query} Q0 {id_} {rank} {last:.9f} {RUN_NAME}\n")


def write_pairs(file: IO[str], pairs: Iterable[Pair]) -> int:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(Pair._fields)
    n = 0
    for pair in pairs:
        rows.writerow(pair)
        n += 1
    return n


FORMATS = {
    "triplets": Format(("csv",), write_triplets, True, "triplet", opens_images=True),
    "flagembedding": Format(("jsonl",), write_flagembedding, True, "query"),
    "reranking": Format(("json",), write_reranking, True, "query", opens_images=True),
    QRELS: Format(("txt", "run"), write_qrels, False, "judgment"),
}
NAMES = (PAIRS, *FORMATS)


def count_texts(groups: Iterable[ExportGroup]) -> Counter[str]:
    """Extension -> number of paths or URLs that sentence-transformers would embed as text."""
    counts: Counter[str] = Counter()
    for value in {value for group in groups for value in (group.query, *group.positives, *group.negatives)}:
        is_url = value.startswith(("http://", "https://"))
        path = re.split("[?#]", value)[0].lower() if is_url else value.lower()
        if not (path.startswith("data:image/") or path.endswith(IMAGE_ENDS)) or (is_url and " " in value):
            counts[PurePosixPath(path).suffix or "no extension"] += 1
    return counts


@contextlib.contextmanager
def replacing_all(folder: Path, kind: str, names: Collection[str], unwanted: Collection[str] = ()) -> Iterator[None]:
    """For a block that writes the files `names`, each "{kind}.{...}". Removes `unwanted` and files of earlier blocks.

    A list beside the folder names these files; inside, a loader could take it for data. It is written before the files
    and shortened after the removal, so that the next run knows every file of a killed run. Other files are never
    touched.
    """
    path = folder.absolute().with_name(f".{folder.absolute().name}.{kind}.json")
    inside = folder / f".{kind}.json"  # where earlier versions put the list
    listed = {name for list_path in (path, inside) for name in _read_names(list_path, kind)}.union(unwanted)
    write_json(path, sorted(listed.union(names)))
    yield
    for name in listed.difference(names):
        (folder / name).unlink(missing_ok=True)
    inside.unlink(missing_ok=True)
    write_json(path, sorted(names))


def _read_names(path: Path, kind: str) -> set[str]:
    """The names in a list of exported files. Names that a damaged list has outside the folder are ignored."""
    found = read_json(path, "list of exported files") if path.exists() else []
    names = {str(name) for name in found} if isinstance(found, list) else set()
    return {name for name in names if name.startswith(f"{kind}.") and not set(name) & set("/\\:")}
