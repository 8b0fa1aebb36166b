"""The content of an export, made from records: groups per split, pairs, the collection's ranking; and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.annotation import neighbors
from utils.annotation.judgments import similarities
from utils.annotation.records import Record
from utils.export.formats import ExportGroup, Pair
from utils.log import bar

RUN_DEPTH = 100  # images ranked per query in a run file
RUN_BLOCK = 128  # queries compared at a time: 128 x N x 4 bytes


@dataclass
class ExportData:
    """The records, and the facts about their images."""

    records: Sequence[Record]
    ids: Sequence[str]  # rows of `vectors`, sorted: the judged images, or all images for a run
    row_of: Mapping[str, int]
    vectors: np.ndarray  # (N, D) float32 of unit length
    value_of: Mapping[str, str]  # id -> id, path or URL to write; without images that have none
    split_of: Mapping[str, str]  # every id in the records
    n_clusters: int  # of groups, joined by shared positives or near duplicates


@dataclass
class LeftOut:
    """The part of the records that is not in the files."""

    valueless: set[str] = field(default_factory=set)  # ids in the collection, but without a value
    other_split: int = 0  # negatives in another split than their group
    contradictory: int = 0  # negatives that are positives of the same record
    groups: dict[str, list[str]] = field(default_factory=dict)  # reason -> main images


def select_groups(data: ExportData, needs_both: bool) -> tuple[dict[str, list[ExportGroup]], LeftOut]:
    """Split -> groups with a positive (and a negative, if needs_both), in the order of the records."""
    groups: dict[str, list[ExportGroup]] = {}
    left_out = LeftOut()
    for record in data.records:
        main, group = record["pos"][0], _to_group(record, data, needs_both, left_out)
        if isinstance(group, ExportGroup):
            groups.setdefault(data.split_of[main], []).append(group)
        else:
            left_out.groups.setdefault(group, []).append(main)
    return groups, left_out


def _to_group(record: Record, data: ExportData, needs_both: bool, left_out: LeftOut) -> ExportGroup | str:
    """The record with values for ids, or the reason why it cannot be written. Counts the ids that are left out."""
    main, value_of, split_of = record["pos"][0], data.value_of, data.split_of
    listed = [id_ for id_ in (*record["pos"], *record["neg"]) if id_ in data.row_of]
    left_out.valueless.update(id_ for id_ in listed if id_ not in value_of)
    if main not in value_of:
        return "the main image is left out"
    positives = [id_ for id_ in dict.fromkeys(record["pos"]) if id_ in value_of and id_ != main]
    negatives = [id_ for id_ in dict.fromkeys(record["neg"]) if id_ in value_of]
    clear = [id_ for id_ in negatives if id_ not in record["pos"]]
    here = [id_ for id_ in clear if split_of[id_] == split_of[main]]
    left_out.contradictory += len(negatives) - len(clear)
    left_out.other_split += len(clear) - len(here)
    if not positives:
        return "no positive can be written" if len(set(record["pos"])) > 1 else "only the main image was kept"
    if needs_both and not record["neg"]:
        return "nothing was deleted"
    if needs_both and not here:
        return "all negatives are in other splits" if clear else "no negative can be written"
    return ExportGroup(value_of[main], [value_of[id_] for id_ in positives], [value_of[id_] for id_ in here])


def empty_reason(split: str, share: float, data: ExportData) -> str:
    """The reason why no group of `split` is written."""
    n_groups, n_here = len(data.records), sum(data.split_of[record["pos"][0]] == split for record in data.records)
    if share == 0:
        return "its share is 0"
    if n_here:
        return f"all of its groups are left out ({n_here})"
    if data.n_clusters == n_groups:
        return f"too few groups ({n_groups})"
    joined = (
        "all groups are joined" if data.n_clusters == 1 else f"{n_groups} groups are {data.n_clusters} clusters, joined"
    )
    return f"{joined} by shared positives or near duplicates"


def pairs(data: ExportData) -> Iterator[Pair]:
    """Yield pairs record by record, with the items in the order of the record."""
    for number, record in enumerate(data.records):
        main, items = record["pos"][0], [*record["pos"][1:], *record["neg"]]
        found = similarities(record, data.row_of, data.vectors)
        ranks = {id_: rank for rank, id_ in enumerate(found, 1)}
        for i, id_ in enumerate(items, 1):
            similarity = f"{found[id_]:.6f}" if id_ in found else ""
            split = data.split_of[id_] if data.split_of[id_] == data.split_of[main] else ""
            yield Pair(main, id_, int(i < len(record["pos"])), similarity, ranks.get(id_), split, number)


def rank_queries(
    groups: Sequence[ExportGroup], split: str, data: ExportData
) -> Iterator[tuple[str, Iterable[tuple[str, float]]]]:
    """Yield (query, [(id, cosine), best first]) of groups of ids, ranked by cosine, without images of other splits."""
    eligible = np.array([data.split_of.get(id_, split) == split for id_ in data.ids], bool)
    with bar(len(groups), f"ranking {split}", "query") as progress:
        for start in range(0, len(groups), RUN_BLOCK):
            queries = [group.query for group in groups[start : start + RUN_BLOCK]]
            rows = [data.row_of[query] for query in queries]
            for query, found in zip(queries, neighbors.nearest(data.vectors, rows, RUN_DEPTH, eligible)):
                yield query, zip((data.ids[row] for row in found.rows), found.similarities)
            progress.update(len(queries))
