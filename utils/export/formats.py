"""The export formats, and the files of an export.

triplets       CSV anchor,positive,negative: all combinations of a group, in sentence-transformers' order of columns
flagembedding  JSON lines {"query", "pos", "neg"}, for FlagEmbedding
reranking      JSON [{"query", "positive", "negative"}], for sentence-transformers' RerankingEvaluator
qrels          TREC `qid 0 docid rel`: 1 positive, 0 verified negative, unjudged images absent; with a run file
pairs          CSV of every main image with every image judged against it; one file, nothing left out or inferred
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from utils.files import read_json, write_json

PAIRS = "pairs"
QRELS = "qrels"
RUN_EXTENSION = "run"
RUN_NAME = "collection"  # last column of a run file: the system that ranked
PAIR_COLUMNS = ["id_a", "id_b", "label", "similarity", "rank", "split", "group"]


@dataclass(frozen=True)
class ExportGroup:
    """One record as the values to be written: ids, paths or URLs."""

    query: str  # the main image
    positives: list[str]  # without the main image
    negatives: list[str]


class Pair(NamedTuple):
    """A row of `pairs`, in the order of PAIR_COLUMNS."""

    main: str
    item: str
    label: int
    similarity: float | None  # None: no longer in the collection
    rank: int | None  # 1 = the most similar of the images judged in this group
    split: str  # "": main image and item lie in different splits
    group: int  # index of the record


class Format(NamedTuple):
    """A format of groups, one file per split."""

    extension: str
    write: Callable[[IO[str], Sequence[ExportGroup]], int]  # returns the number of rows
    needs_both: bool  # a group needs a positive and a negative, else a positive
    row: str  # noun for the rows, plural


def write_triplets(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("anchor", "positive", "negative"))
    for group in groups:
        rows.writerows(itertools.product([group.query], group.positives, group.negatives))
    return sum(len(group.positives) * len(group.negatives) for group in groups)


def write_flagembedding(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    for group in groups:
        file.write(json.dumps({"query": group.query, "pos": group.positives, "neg": group.negatives}) + "\n")
    return len(groups)


def write_reranking(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    lines = (
        json.dumps({"query": group.query, "positive": group.positives, "negative": group.negatives}) for group in groups
    )
    file.write("[" + ",".join("\n  " + line for line in lines) + "\n]\n")
    return len(groups)


def write_qrels(file: IO[str], groups: Sequence[ExportGroup]) -> int:
    for group in groups:
        file.writelines(f"{group.query} 0 {id_} 1\n" for id_ in group.positives)
        file.writelines(f"{group.query} 0 {id_} 0\n" for id_ in group.negatives)
    return sum(len(group.positives) + len(group.negatives) for group in groups)


def write_run(file: IO[str], rankings: Iterable[tuple[str, Iterable[tuple[str, float]]]]) -> None:
    """Write (query, [(id, score), best first]) in TREC form. Written scores fall strictly: evaluators sort by score."""
    for query, ranked in rankings:
        last = float("inf")
        for rank, (id_, score) in enumerate(ranked, 1):
            last = min(score, last - 1e-9)
            file.write(f"{query} Q0 {id_} {rank} {last:.9f} {RUN_NAME}\n")


def write_pairs(file: IO[str], pairs: Iterable[Pair]) -> int:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(PAIR_COLUMNS)
    n = 0
    for pair in pairs:
        similarity = "" if pair.similarity is None else f"{pair.similarity:.6f}"
        rows.writerow(pair._replace(similarity=similarity))  # type: ignore[arg-type]
        n += 1
    return n


FORMATS = {
    "triplets": Format("csv", write_triplets, True, "triplets"),
    "flagembedding": Format("jsonl", write_flagembedding, True, "queries"),
    "reranking": Format("json", write_reranking, True, "queries"),
    QRELS: Format("txt", write_qrels, False, "judgments"),
}
NAMES = (PAIRS, *FORMATS)


@contextlib.contextmanager
def replacing_all(folder: Path, kind: str, names: Collection[str]) -> Iterator[None]:
    """For a block that writes the files `names`, each "{kind}.{...}". Removes the other files of earlier blocks.

    FOLDER/.{kind}.json lists these files. It is written before they are and shortened after the removal, so that a
    killed run leaves no file unknown to the next one. A file that is not listed is never touched.
    """
    path, listed = folder / f".{kind}.json", set()
    if path.exists():
        found = read_json(path, "list of exported files")
        listed = {str(name) for name in found if _is_own(str(name), kind)} if isinstance(found, list) else set()
    write_json(path, sorted(listed.union(names)))
    yield
    for name in listed.difference(names):
        (folder / name).unlink(missing_ok=True)
    write_json(path, sorted(names))


def _is_own(name: str, kind: str) -> bool:
    """A damaged list must not lead out of the folder."""
    return name.startswith(f"{kind}.") and not set(name) & set("/\\:")
