"""The sections of the report page: figures with charts, contradictions, and a contact sheet for each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from utils.annotation.records import Record
from utils.report import charts, page, yields
from utils.report.figures import Figures, Material
from utils.report.page import paragraph, section, table

MAX_SHEETS = 2_000  # groups with pictures: what a browser still opens in seconds; the latest are shown
NEAR_SHEETS = 100  # the first ones, which a browser loads without the page's script
MAX_SHOWN = 50  # contradictions of a kind with pictures; all are in report.json
CAVEAT = """What may not be concluded: recall. Only images that the model itself had brought near were ever judged, so
similar images that it placed far away are unknown, and every figure here is about the judged ones only. Items that
one model chose favor that model in a comparison. Main images are what the samplers chose: only those of the sampler
`random` speak for the whole collection."""
HEAD = ("", "value", "from", "to", "groups")


def shown_conflicts(figures: Figures) -> list[tuple[str, ...]]:
    """Contradictions that get pictures: two ids or three."""
    pairs = [tuple(pair) for pair in figures["conflicts"]["pairs"][:MAX_SHOWN]]
    return pairs + [tuple(chain.values()) for chain in figures["conflicts"]["chains"][:MAX_SHOWN]]


def shown_records(material: Material) -> list[Record]:
    """Records that get a contact sheet."""
    return material.records[-MAX_SHEETS:]


def sections(material: Material, figures: Figures, pictured: set[str]) -> Iterator[str]:
    rows = [(name.replace("_", " "), value) for name, value in figures["progress"].items()]
    yield section("How far", table(("", "number"), rows))
    yield quality_section(figures)
    if "comparison" in figures:
        yield comparison_section(figures["comparison"])
    yield yield_section(figures["yield"])
    yield conflict_section(material, figures, pictured)
    yield from sheets(material, pictured)


def quality_section(figures: Figures) -> str:
    threshold = figures["threshold"]
    lines = [
        ("average precision, of judged items", *figures["average_precision"].values()),
        ("kept above deleted, share of pairs in a group", *figures["ordered_pairs"].values()),
    ]
    parts = [paragraph(CAVEAT), table(HEAD, lines), paragraph("From, to: 95% interval, resampling whole groups.")]
    if figures["precision_at"]:
        parts += rank_chart(figures["keep_rate_by_rank"], figures["precision_at"])
    if threshold:
        text = (
            f"Best threshold: similarity {threshold['similarity']:.3f}. {threshold['kept_above']:.1%} of the kept are "
            f"at or above it, {threshold['deleted_below']:.1%} of the deleted below. A kept item is more similar than "
            f"a deleted one with probability {threshold['auc']:.3f}, over all groups."
        )
        bins = figures["similarity_histogram"]
        series = [("positives", bins["positives"]), ("hard negatives", bins["hard_negatives"])]
        chart = charts.histogram(
            "Similarity to the main image", text, bins["edges"], series, figures["threshold"]["similarity"]
        )
        rows = zip((f"{edge:.3f}" for edge in bins["edges"]), bins["positives"], bins["hard_negatives"])
        parts += [
            chart,
            paragraph(text),
            page.details("The histogram's numbers", table(("from", "positives", "hard negatives"), rows)),
        ]
    return section("How good the neighbors are", *parts)


def rank_chart(keep_rate: Sequence[Figures], precision: Sequence[Figures]) -> list[str]:
    series = [
        charts.Curve(name, *([estimate[key] for estimate in found] for key in ("value", "low", "high")))
        for name, found in (("kept at rank j", keep_rate), ("precision@j", precision))
    ]
    ranks = range(1, len(precision) + 1)
    first, last = page.cell_text(precision[0]["value"]), page.cell_text(precision[-1]["value"])
    text = f"Precision goes from {first} at rank 1 to {last} over the first {len(precision)} ranks; bands: 95%."
    rows = [
        (j, k["value"], k["low"], k["high"], p["value"], p["low"], p["high"], p["n"])
        for j, k, p in zip(ranks, keep_rate, precision)
    ]
    head = ("rank", "kept at rank", "from", "to", "precision@j", "from", "to", "groups")
    chart = charts.curves("Keep rate by rank", text, ranks, series, "rank by similarity among the judged items")
    return [chart, paragraph(text), page.details("The chart's numbers", table(head, rows))]


def comparison_section(comparison: Figures) -> str:
    name = comparison["collection"]
    rows = [
        (f"{key.replace('_', ' ')}, {label}", *comparison[key][which].values())
        for key in ("average_precision", "ordered_pairs")
        for which, label in (("this", "this collection"), ("other", name), ("other_minus_this", "difference, paired"))
    ]
    difference = comparison["average_precision"]["other_minus_this"]
    verdict = (
        f"{name} ranks the kept above the deleted better."
        if difference["low"] > 0
        else "This collection ranks the kept above the deleted better."
        if difference["high"] < 0
        else "The difference is within chance."
    )
    return section(f"Compared with collection {name}", table(HEAD, rows), paragraph(verdict))


def yield_section(counted: Figures) -> str:
    if not counted["by_sampler"]:
        return section("Yield", paragraph("There is no history (ANN_HISTORY_PATH) to tell it from."))
    head = ("", *(name.replace("_", " ") for name in yields.COLUMNS), "positives per directory")
    tables = [
        table((title, *head[1:]), [(name, *line.values(), per_dir(line)) for name, line in counted[key].items()])
        for key, title in (("by_sampler", "sampler"), ("by_day", "day (UTC)"))
    ]
    return section("Yield", *tables)


def per_dir(line: dict[str, int]) -> float | None:
    return line["positives"] / line["loaded"] if line["loaded"] else None


def conflict_section(material: Material, figures: Figures, pictured: set[str]) -> str:
    conflicts = figures["conflicts"]
    n_pairs, n_chains = len(conflicts["pairs"]), len(conflicts["chains"])
    parts = [
        paragraph(
            f"Pairs judged similar in one record and not in another: {n_pairs:,}. Chains, in which a is like b and b "
            f"like c, but a was judged not like c: {n_chains:,}. Up to {MAX_SHOWN} of each are shown; all are in "
            "report.json."
        )
    ]
    for ids in shown_conflicts(figures):
        roles = ("a", "b: like a and like c", "c: not like a") if len(ids) == 3 else ("a", "b: like a, and not")
        parts.append(
            page.row(
                page.figure(id_, "main", role, hover(material, id_), id_ in pictured) for id_, role in zip(ids, roles)
            )
        )
        parts.append("<hr>")
    return section("Contradictions", *parts)


def sheets(material: Material, pictured: set[str]) -> Iterator[str]:
    """Contact sheets, the latest groups first."""
    n = len(material.records)
    yield "<section><h2>Groups</h2>\n" + page.FILTER
    if n > MAX_SHEETS:
        yield paragraph(f"The latest {MAX_SHEETS:,} of {n:,} groups:")
    for number in range(n - 1, max(n - MAX_SHEETS, 0) - 1, -1):
        yield sheet(material, number, pictured, is_far=n - number > NEAR_SHEETS)
    yield "</section>\n"


def sheet(material: Material, number: int, pictured: set[str], is_far: bool) -> str:
    record, group = material.records[number], material.judged[number]
    gone = [id_ for id_ in (*record["pos"][1:], *record["neg"]) if id_ not in set(group.items)]
    captions = [(record["pos"][0], "main", "main image")]
    for j, (id_, similarity, kept) in enumerate(zip(group.items, group.similarities, group.kept), 1):
        kind = "kept" if kept else "deleted"
        captions.append((id_, kind, f"{j}: {kind}, {similarity:.3f}"))
    for id_ in gone:
        kind = "kept" if id_ in record["pos"] else "deleted"
        captions.append((id_, kind, f"{kind}, no longer in the collection"))
    heading = f"Group {number}: {len(record['pos']) - 1} kept, {len(record['neg'])} deleted"
    return page.group(
        number,
        heading,
        (
            page.figure(id_, kind, caption, hover(material, id_), id_ in pictured, is_far)
            for id_, kind, caption in captions
        ),
    )


def hover(material: Material, id_: str) -> str:
    return page.hover_text(material.items.get(id_, {}))
