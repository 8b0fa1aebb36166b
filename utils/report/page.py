"""The report's page: charts, contradictions and groups as values for the template report.html."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jinja2

from utils.images.copies import THUMBNAILS, thumbnail_path
from utils.report.figures import Figures, ReportData
from utils.report.reviews import dir_name

MAX_GROUPS = 2_000  # the latest groups, shown with images; a browser still opens the page in seconds
# The images of the first NEAR_GROUPS load without the page's script. The script loads the others when the reader comes
# near or prints the page, because a page with 20,000 images of `loading="lazy"` takes seconds more to open.
NEAR_GROUPS = 100
MAX_CONFLICTS = 50  # contradictions of each kind that are shown with images; report.json has all
MAX_LINE, MAX_TITLE = 200, 1_000  # characters of metadata shown on hover, of a field and of all
Judgment = tuple[str, str, Literal["pos", "neg"]]
JUDGMENTS: dict[int, list[Judgment]] = {  # number of images -> judgments in a pair, and in a chain
    2: [("a", "b", "pos"), ("a", "b", "neg")],
    3: [("a", "b", "pos"), ("b", "c", "pos"), ("a", "c", "neg")],
}
BUFFERED = 1_000  # parts of the page rendered between two writes
N_Y_TICKS, MAX_X_TICKS = 5, 20

Shown = tuple[str, str, str]  # id; main, kept or deleted; caption


class Conflict(NamedTuple):
    """A contradiction, or one directory's differences between two reviewers."""

    images: list[Shown]
    statements: list[tuple[str, list[int]]]  # a judgment in words, and the groups in which it was made


class SheetGroup(NamedTuple):
    """The contact sheet of one record."""

    number: int
    dir_name: str
    n_kept: int
    n_deleted: int
    images: Iterable[Shown]


class Chart(NamedTuple):
    """A chart that the template draws, in coordinates of the unit square."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_labels: list[str]  # evenly spaced, from 0 up
    series: list[tuple[str, str, str]]  # name, corners of the filled area, points of the line
    mark: tuple[float, str] | None = None  # place on x, label


def write_page(
    file: IO[str],
    title: str,
    data: ReportData,
    figures: Figures,
    thumbnails: Collection[str],
    originals: Mapping[str, str],
) -> None:
    """Render the page in pieces: each group is made when it is written.

    thumbnails: ids with a thumbnail. originals: id -> http(s) URL, or path relative to the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "cell": cell,
        "words": lambda name: name.replace("_", " "),
        "sha256": sha256,
        "thumbnail": lambda id_: f"{THUMBNAILS}/{thumbnail_path(id_)}" if id_ in thumbnails else "",
        "original": lambda id_: originals.get(id_, ""),
        "metadata": lambda id_: f"{metadata_text(data.items.get(id_, {}))}\n{id_}".strip(),
    }
    page = environment.get_template("report.html").stream(
        title=title,
        figures=figures,
        rank_chart=rank_chart(figures),
        threshold_chart=threshold_chart(figures),
        conflicts=contradictions(data, figures),
        disagreements=disagreements(data, figures),
        groups=sheet_groups(data),
        first_shown=max(0, len(data.records) - MAX_GROUPS),
        max_conflicts=MAX_CONFLICTS,
        max_groups=MAX_GROUPS,
        near_groups=NEAR_GROUPS,
    )
    page.enable_buffering(BUFFERED)
    file.writelines(part.encode(errors="backslashreplace").decode() for part in page)  # names may not be UTF-8


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def sha256(text: str) -> str:
    """The hash of a script, in the form that a Content-Security-Policy needs."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def metadata_text(item: Mapping[str, Any]) -> str:
    """One line per field."""
    lines = (" ".join(f"{name}: {value}".split()) for name, value in item.items())
    return "\n".join(line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…" for line in lines)[:MAX_TITLE]


# --- images -----------------------------------------------------------------------------------------------------------
def shown_ids(data: ReportData, figures: Figures) -> set[str]:
    """The ids of all images on the page."""
    of_groups = {id_ for record in data.records[-MAX_GROUPS:] for id_ in (*record["pos"], *record["neg"])}
    conflicts = itertools.chain(contradictions(data, figures), disagreements(data, figures))
    return of_groups | {id_ for conflict in conflicts for id_, _, _ in conflict.images}


def contradictions(data: ReportData, figures: Figures) -> Iterator[Conflict]:
    numbers = records_by_main(data)
    pairs, chains = (figures["conflicts"][kind][:MAX_CONFLICTS] for kind in ("pairs", "chains"))
    for ids in [*pairs, *(chain.values() for chain in chains)]:
        id_of = dict(zip("abc", ids))
        statements = []
        for x, y, key in JUDGMENTS[len(id_of)]:
            both = ((id_of[x], id_of[y]), (id_of[y], id_of[x]))
            judged = [n for main, item in both for n in numbers.get(main, []) if item in data.records[n][key]]
            statements.append((f"{x} {'like' if key == 'pos' else 'not like'} {y}", sorted(judged)))
        yield Conflict([(id_, "main", name) for name, id_ in id_of.items()], statements)


def disagreements(data: ReportData, figures: Figures) -> Iterator[Conflict]:
    numbers = records_by_main(data)
    found: dict[tuple[str, str], list[Shown]] = {}
    for one in figures["agreement"]["disagreements"]:
        shown = found.setdefault((one["main"], one["dir"]), [(one["main"], "main", "main image")])
        first, second = ("kept", "deleted") if one["kept_first"] else ("deleted", "kept")
        shown.append((one["image"], first, f"{first}, then {second}"))
    for (main, directory), shown in itertools.islice(found.items(), MAX_CONFLICTS):
        yield Conflict(shown, [(f"second look in {directory}", numbers.get(main, []))])


def records_by_main(data: ReportData) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, record in enumerate(data.records):
        numbers.setdefault(record["pos"][0], []).append(number)
    return numbers


def sheet_groups(data: ReportData) -> Iterator[SheetGroup]:
    """Contact sheets, the latest group first."""
    for number in reversed(range(len(data.records))[-MAX_GROUPS:]):
        record, (outcome, shown) = data.records[number], data.origins[number]
        name = dir_name(record["pos"][0], shown | outcome)
        yield SheetGroup(number, name, len(record["pos"]) - 1, len(record["neg"]), captions(data, number))


def captions(data: ReportData, number: int) -> Iterator[Shown]:
    """Yield the main image, the others by similarity, and then the images that are no longer in the collection."""
    record, group = data.records[number], data.judged[number]
    yield record["pos"][0], "main", "main image"
    for j, (id_, similarity, is_kept) in enumerate(group.items, 1):
        kind = "kept" if is_kept else "deleted"
        yield id_, kind, f"{j}: {kind}, {similarity:.3f}"
    present = {item.id for item in group.items}
    for kind, ids in (("kept", record["pos"][1:]), ("deleted", record["neg"])):
        yield from ((id_, kind, f"{kind}, no longer in the collection") for id_ in ids if id_ not in present)


# --- charts -----------------------------------------------------------------------------------------------------------
def rank_chart(figures: Figures) -> Chart | None:
    """Keep rate and precision over ranks, with their intervals as bands."""
    n = len(figures["precision_at"])
    places = [i / max(1, n - 1) for i in range(n)]
    series = []
    for name, key in (("kept at rank j", "keep_rate_by_rank"), ("precision@j", "precision_at")):
        known = [(x, one) for x, one in zip(places, figures[key]) if one["value"] is not None]
        band = [(x, one["high"]) for x, one in known] + [(x, one["low"]) for x, one in reversed(known)]
        series.append((name, points(band), points((x, one["value"]) for x, one in known)))
    x_ticks = [(x, str(rank)) for rank, x in enumerate(places, 1)][:: max(1, n // MAX_X_TICKS)]
    y_labels = [f"{i / N_Y_TICKS:.1f}" for i in range(N_Y_TICKS + 1)]
    return Chart("Keep rate by rank", x_ticks, y_labels, series) if n else None


def threshold_chart(figures: Figures) -> Chart | None:
    """Histograms of kept and deleted images, with the threshold as a mark."""
    if not figures["threshold"]:
        return None
    bins, threshold = figures["similarity_histogram"], figures["threshold"]["similarity"]
    first, *_, last = bins["edges"]
    places = [(edge - first) / (last - first) for edge in bins["edges"]]
    step = -(-max([1, *bins["positives"], *bins["hard_negatives"]]) // N_Y_TICKS)  # so that labels are whole numbers
    series = []
    for name, key in (("kept", "positives"), ("deleted", "hard_negatives")):
        tops = [(x, n / (step * N_Y_TICKS)) for pair, n in zip(itertools.pairwise(places), bins[key]) for x in pair]
        outline = points([(0, 0), *tops, (1, 0)])
        series.append((name, outline, outline))
    x_ticks = [(x, f"{edge:.2f}") for x, edge in zip(places, bins["edges"])][:: len(places) // 10]
    mark = ((threshold - first) / (last - first), f"{threshold:.3f}")
    y_labels = [f"{step * i:,}" for i in range(N_Y_TICKS + 1)]
    return Chart("Similarity to the main image", x_ticks, y_labels, series, mark)


def points(corners: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.4f},{y:.4f}" for x, y in corners)
