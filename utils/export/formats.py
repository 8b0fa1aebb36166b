"""The formats in which judged groups leave for trainers and evaluators.

triplets       CSV anchor,positive,negative: every one of a group (sentence-transformers' order of columns)
flagembedding  JSON lines {"query", "pos", "neg"} (FlagEmbedding)
reranking      JSON [{"query", "positive", "negative"}] (sentence-transformers' RerankingEvaluator)
qrels          TREC `qid 0 docid rel`: 1 positive, 0 verified negative, absent unjudged; and a run beside it
pairs          CSV of every main image with every item judged, in one file, nothing left out and nothing inferred
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

PAIRS = "pairs"
QRELS = "qrels"
RUN_EXTENSION = "run"
RUN_NAME = "collection"  # last column of a run file: which system ranked
PAIR_COLUMNS = ["id_a", "id_b", "label", "similarity", "rank", "split", "group"]
_NEEDS_QUOTES = re.compile(r"""[,"\r\n]|^\s|\s$""")


@dataclass(frozen=True)
class Group:
    """What one record says, as values to be written (ids, paths, urls)."""

    query: str  # the main image
    positives: list[str]  # the others it is similar to
    negatives: list[str]

    @property
    def is_two_sided(self) -> bool:
        return bool(self.positives and self.negatives)


class Pair(NamedTuple):
    """A row of `pairs`, in the order of PAIR_COLUMNS."""

    main: str
    item: str
    label: int
    similarity: float | None  # None: not in the collection any more
    rank: int | None  # 1 = the most similar among those that the group judged
    split: str  # "": the item lies in another split than the main image
    group: int  # index of the record


def write_triplets(file: IO[str], groups: Iterable[Group]) -> int:
    file.write("anchor,positive,negative\n")
    n = 0
    for group in groups:
        starts = [f"{_cell(group.query)},{_cell(positive)}," for positive in group.positives]
        ends = [f"{_cell(negative)}\n" for negative in group.negatives]
        file.writelines(start + end for start in starts for end in ends)
        n += len(starts) * len(ends)
    return n


def _cell(value: str) -> str:
    """As csv.writer writes it; a value is in very many rows and quoted once."""
    return '"' + value.replace('"', '""') + '"' if _NEEDS_QUOTES.search(value) else value


def write_flagembedding(file: IO[str], groups: Sequence[Group]) -> int:
    for group in groups:
        file.write(json.dumps({"query": group.query, "pos": group.positives, "neg": group.negatives}) + "\n")
    return len(groups)


def write_reranking(file: IO[str], groups: Sequence[Group]) -> int:
    lines = (
        json.dumps({"query": group.query, "positive": group.positives, "negative": group.negatives}) for group in groups
    )
    file.write("[" + ",".join("\n  " + line for line in lines) + "\n]\n")
    return len(groups)


def write_qrels(file: IO[str], groups: Iterable[Group]) -> int:
    n = 0
    for group in groups:
        lines = [f"{group.query} 0 {id_} 1\n" for id_ in group.positives]
        lines += [f"{group.query} 0 {id_} 0\n" for id_ in group.negatives]
        file.writelines(lines)
        n += len(lines)
    return n


def write_run(file: IO[str], query: str, ranked: Iterable[tuple[str, float]]) -> None:
    """Add one query: (id, score), best first. Scores fall strictly, as evaluators sort by them and not by rank."""
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


class Format(NamedTuple):
    extension: str
    write: Callable[[IO[str], Sequence[Group]], int]  # returns the number of rows
    needs_both: bool  # a group without positives or without negatives yields nothing
    row: str  # what a row is


FORMATS = {  # of groups, one file a split
    "triplets": Format("csv", write_triplets, True, "triplets"),
    "flagembedding": Format("jsonl", write_flagembedding, True, "queries"),
    "reranking": Format("json", write_reranking, True, "queries"),
    QRELS: Format("txt", write_qrels, False, "judgments"),
}
NAMES = (PAIRS, *FORMATS)
