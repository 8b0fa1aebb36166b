"""The report's page: charts, contradictions and groups as values for the template report.html."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jinja2

from utils.images.copies import thumbnail_path
from utils.report.figures import Figures, ReportData
from utils.report.reviews import dir_name

THUMBNAILS = "thumbnails"  # folder beside the page
MAX_GROUPS = 2_000  # groups with pictures, the latest: a browser still opens the page in seconds
NEAR_GROUPS = 100  # the first of these load without the page's script, which loads the others on approach: a page with
# 20,000 images of `loading="lazy"` takes seconds more to open
MAX_CONFLICTS = 50  # contradictions of a kind with pictures; report.json has all
MAX_LINE, MAX_TITLE = 200, 1_000  # characters of metadata shown on hover, of a field and of all
JUDGMENTS: dict[
    int, tuple[tuple[str, str, Literal["pos", "neg"]], ...]
] = {  # of a pair, and of a chain, by their images
    2: (("a", "b", "pos"), ("a", "b", "neg")),
    3: (("a", "b", "pos"), ("b", "c", "pos"), ("a", "c", "neg")),
}
BUFFERED = 1_000  # parts of the page rendered between two writes
LEFT, RIGHT, TOP, BOTTOM = 72, 704, 36, 268  # a chart's plot within 720 x 340 units
MAX_X_TICKS, N_Y_TICKS = 20, 5
N_MAJOR = 6  # labels on x that a narrow screen has room for


class Image(NamedTuple):
    """One picture with its caption."""

    kind: str  # main, kept or deleted
    caption: str
    title: str  # metadata, shown on hover; the last line is the id
    source: str  # relative path of the thumbnail, "" if there is none
    original: str  # http(s) URL, or path relative to the page; "" if there is neither


class Statement(NamedTuple):
    """A judgment of a contradiction, with the groups in which it was made."""

    words: str
    groups: list[int]


class Conflict(NamedTuple):
    """A contradiction, or one directory's differences between two reviewers."""

    images: list[Image]
    statements: list[Statement]


class SheetGroup(NamedTuple):
    """The contact sheet of one record."""

    number: int
    dir_name: str
    n_kept: int
    n_deleted: int
    images: list[Image]
    is_far: bool


@dataclass
class Pictures:
    """What the page can show of an image and link to."""

    thumbnails: Collection[str]  # ids that have one
    originals: Mapping[str, str]  # id -> http(s) URL, or path relative to the page


class Series(NamedTuple):
    """Points in a chart's units: a filled area and a line."""

    name: str
    area: str
    line: str


class Chart(NamedTuple):
    """What the template draws."""

    title: str
    x_ticks: list[tuple[float, str, bool]]  # whether a narrow screen shows it
    y_ticks: list[tuple[float, str]]
    series: list[Series]
    mark: tuple[float, str] | None = None


def write_page(file: IO[str], title: str, data: ReportData, figures: Figures, pictures: Pictures) -> None:
    """Render the page piece by piece: groups are made as they are written."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": cell, "words": lambda name: name.replace("_", " "), "sha256": sha256}
    page = environment.get_template("report.html").stream(
        title=title,
        figures=figures,
        rank_chart=rank_chart(figures),
        threshold_chart=threshold_chart(figures),
        conflicts=contradictions(data, figures, pictures),
        disagreements=disagreements(data, figures, pictures),
        groups=sheet_groups(data, pictures),
        first_shown=max(0, len(data.records) - MAX_GROUPS),
        max_conflicts=MAX_CONFLICTS,
        max_groups=MAX_GROUPS,
    )
    page.enable_buffering(BUFFERED)
    file.writelines(page)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def sha256(text: str) -> str:
    """Of a script, as a Content-Security-Policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- images -----------------------------------------------------------------------------------------------------------
def shown_conflicts(figures: Figures) -> list[tuple[str, ...]]:
    """Contradictions that get pictures: two ids or three."""
    pairs = [tuple(pair) for pair in figures["conflicts"]["pairs"][:MAX_CONFLICTS]]
    return pairs + [tuple(chain.values()) for chain in figures["conflicts"]["chains"][:MAX_CONFLICTS]]


def shown_disagreements(figures: Figures) -> dict[tuple[str, str], dict[str, bool]]:
    """(main image, directory) of a second look -> image -> whether the first look kept it; these get pictures."""
    found: dict[tuple[str, str], dict[str, bool]] = {}
    for one in figures["agreement"]["disagreements"]:
        found.setdefault((one["main"], one["dir"]), {})[one["image"]] = one["kept_first"]
    return dict(list(found.items())[:MAX_CONFLICTS])


def shown_ids(data: ReportData, figures: Figures) -> set[str]:
    """Images on the page."""
    ids = {id_ for record in data.records[-MAX_GROUPS:] for id_ in (*record["pos"], *record["neg"])}
    for (main, _), images in shown_disagreements(figures).items():
        ids |= {main, *images}
    return ids.union(*shown_conflicts(figures))


def contradictions(data: ReportData, figures: Figures, pictures: Pictures) -> Iterator[Conflict]:
    numbers = records_by_main(data)
    for ids in shown_conflicts(figures):
        id_of = dict(zip("abc", ids))
        statements = []
        for x, y, key in JUDGMENTS[len(ids)]:
            both = ((id_of[x], id_of[y]), (id_of[y], id_of[x]))
            judged = [n for main, item in both for n in numbers.get(main, []) if item in data.records[n][key]]
            statements.append(Statement(f"{x} {'like' if key == 'pos' else 'not like'} {y}", sorted(judged)))
        yield Conflict([image(data, id_, "main", name, pictures) for name, id_ in id_of.items()], statements)


def disagreements(data: ReportData, figures: Figures, pictures: Pictures) -> Iterator[Conflict]:
    numbers = records_by_main(data)
    for (main, directory), images in shown_disagreements(figures).items():
        shown = [image(data, main, "main", "main image", pictures)]
        for id_, was_kept in images.items():
            first, second = ("kept", "deleted") if was_kept else ("deleted", "kept")
            shown.append(image(data, id_, first, f"{first}, then {second}", pictures))
        yield Conflict(shown, [Statement(f"second look in {directory}", numbers.get(main, []))])


def records_by_main(data: ReportData) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, record in enumerate(data.records):
        numbers.setdefault(record["pos"][0], []).append(number)
    return numbers


def sheet_groups(data: ReportData, pictures: Pictures) -> Iterator[SheetGroup]:
    """Contact sheets, the latest group first."""
    n = len(data.records)
    for number in range(n - 1, max(n - MAX_GROUPS, 0) - 1, -1):
        record, (outcome, shown) = data.records[number], data.origins[number]
        images = [image(data, *listed, pictures) for listed in captions(data, number)]
        name = dir_name(record["pos"][0], shown | outcome)
        n_kept, n_deleted = len(record["pos"]) - 1, len(record["neg"])
        yield SheetGroup(number, name, n_kept, n_deleted, images, n - number > NEAR_GROUPS)


def captions(data: ReportData, number: int) -> Iterator[tuple[str, str, str]]:
    """(id, kind, caption) of a group: the main image, then by similarity, then what left the collection."""
    record, group = data.records[number], data.judged[number]
    yield record["pos"][0], "main", "main image"
    for j, (id_, similarity, is_kept) in enumerate(zip(group.items, group.similarities, group.kept), 1):
        kind = "kept" if is_kept else "deleted"
        yield id_, kind, f"{j}: {kind}, {similarity:.3f}"
    present = set(group.items)
    for kind, ids in (("kept", record["pos"][1:]), ("deleted", record["neg"])):
        yield from ((id_, kind, f"{kind}, no longer in the collection") for id_ in ids if id_ not in present)


def image(data: ReportData, id_: str, kind: str, caption: str, pictures: Pictures) -> Image:
    metadata = metadata_text(data.items.get(id_, {}))[:MAX_TITLE]
    source = f"{THUMBNAILS}/{thumbnail_path(id_)}" if id_ in pictures.thumbnails else ""
    return Image(kind, caption, f"{metadata}\n{id_}".strip(), source, pictures.originals.get(id_, ""))


def metadata_text(item: Mapping[str, Any]) -> str:
    """One line per field."""
    lines = (" ".join(f"{name}: {value}".split()) for name, value in item.items())
    return "\n".join(line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…" for line in lines)


# --- charts -----------------------------------------------------------------------------------------------------------
def rank_chart(figures: Figures) -> Chart | None:
    """Keep rate and precision over ranks, with their intervals as bands."""
    found = (("kept at rank j", figures["keep_rate_by_rank"]), ("precision@j", figures["precision_at"]))
    n = len(figures["precision_at"])
    if not n:
        return None
    step = (RIGHT - LEFT) / max(1, n - 1)
    x_ticks = [(round(LEFT + i * step, 1), str(i + 1)) for i in range(n)]
    series = []
    for name, estimates in found:
        known = [(LEFT + i * step, one) for i, one in enumerate(estimates) if one["value"] is not None]
        band = [(x, one["high"]) for x, one in known] + [(x, one["low"]) for x, one in reversed(known)]
        series.append(Series(name, points(band, 1), points([(x, one["value"]) for x, one in known], 1)))
    return Chart("Keep rate by rank", thinned(x_ticks, MAX_X_TICKS), y_ticks(1, "{:.1f}".format), series)


def threshold_chart(figures: Figures) -> Chart | None:
    """Histograms of the kept and the deleted, with the threshold as a mark."""
    if not figures["threshold"]:
        return None
    bins, threshold = figures["similarity_histogram"], figures["threshold"]["similarity"]
    edges = bins["edges"]
    scale = (RIGHT - LEFT) / (edges[-1] - edges[0])
    across = [LEFT + (edge - edges[0]) * scale for edge in edges]
    top = -(-max([1, *bins["positives"], *bins["hard_negatives"]]) // N_Y_TICKS) * N_Y_TICKS  # whole numbers as labels
    series = []
    for name, counts in (("kept", bins["positives"]), ("deleted", bins["hard_negatives"])):
        steps = [(x, count) for pair, count in zip(itertools.pairwise(across), counts) for x in pair]
        outline = points([(across[0], 0), *steps, (across[-1], 0)], top)
        series.append(Series(name, outline, outline))
    x_ticks = thinned([(round(x, 1), f"{edge:.2f}") for x, edge in zip(across, edges)], 10)
    mark = (round(LEFT + (threshold - edges[0]) * scale, 1), f"{threshold:.3f}")
    return Chart("Similarity to the main image", x_ticks, y_ticks(top, "{:,.0f}".format), series, mark)


def y_ticks(top: float, label: Callable[[float], str]) -> list[tuple[float, str]]:
    return [(round(height(top * i / N_Y_TICKS, top), 1), label(top * i / N_Y_TICKS)) for i in range(N_Y_TICKS + 1)]


def thinned(ticks: list[tuple[float, str]], n: int) -> list[tuple[float, str, bool]]:
    """About n of the ticks, N_MAJOR of them for narrow screens."""
    some = ticks[:: max(1, len(ticks) // n)]
    every = -(-len(some) // N_MAJOR)
    return [(x, label, i % every == 0) for i, (x, label) in enumerate(some)]


def height(value: float, top: float) -> float:
    return BOTTOM - value / top * (BOTTOM - TOP)


def points(corners: Sequence[tuple[float, float]], top: float) -> str:
    return " ".join(f"{x:.1f},{height(value, top):.1f}" for x, value in corners)
