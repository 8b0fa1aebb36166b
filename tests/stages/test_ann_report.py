"""ann_report.py: its figures against hand-computed ones, and its page in a real browser."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import ann_dirload
import ann_dirrify
import ann_report
from tests.support import browser
from tests.support.annotation_data import ANNOTATED, fill_cache, id_of, image_bytes, make_collection, random_vectors
from utils.annotation.judgments import Chain, Item, Judged, contradictions
from utils.errors import UserError
from utils.report import statistics
from utils.training.projection import Projection, write_projection

N_GROUPS, SIZE = 40, 5
REPORT = Path("data/report")
SCRIPT_TAG = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
OPEN_LIMIT_S = 3.0


def report(*flags):
    return ann_report.main(["--logs-dir-path", "", *map(str, flags)])


def figures():
    return json.loads((REPORT / "report.json").read_text())


@pytest.fixture
def ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return annotate()


def annotate():
    """Groups of a main image, two kept and two deleted; titles as users write them."""
    n = N_GROUPS * SIZE
    fields = [{"title": f"{SCRIPT_TAG} number {i}" if i % SIZE == 0 else f"item-{i}."} for i in range(n)]
    ids = make_collection(random_vectors(n), [f"https://example.org/{i}" for i in range(n)], fields=fields)
    fill_cache(ids, n_images=10, side=200)
    records = [{"pos": ids[i : i + 3], "neg": ids[i + 3 : i + SIZE]} for i in range(0, n, SIZE)]
    ANNOTATED.parent.mkdir(parents=True, exist_ok=True)
    ANNOTATED.write_text(json.dumps(records))
    return ids


# --- figures ----------------------------------------------------------------------------------------------------------
def judged(kept, similarities=None):
    similarities = similarities or [1 - i / 10 for i in range(len(kept))]
    return Judged(0, "m", [Item(str(i), *pair) for i, pair in enumerate(zip(similarities, kept))])


def test_average_precision_and_ordered_share_by_hand():
    assert statistics.average_precision(judged([True, False, True])) == pytest.approx((1 + 2 / 3) / 2)
    assert statistics.ordered_share(judged([True, False, True, False])) == 3 / 4
    assert statistics.ordered_share(judged([True, False], [0.5, 0.5])) == 0.5


def test_keep_rate_and_precision_by_hand():
    keep_rate, precision = statistics.by_rank([judged([True, False]), judged([True, True, False])])
    assert [estimate["value"] for estimate in keep_rate] == [1, 0.5, 0]
    assert [estimate["value"] for estimate in precision] == [1, 0.75, pytest.approx(2 / 3, abs=1e-6)]
    assert [estimate["n"] for estimate in precision] == [2, 2, 1]


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        estimate = statistics.mean(rng.normal(0.5, 0.2, 40).tolist())
        hits += estimate["low"] <= 0.5 <= estimate["high"]
    assert 51 <= hits <= 60


def test_threshold_separates_best():
    found = statistics.best_threshold(np.array([0.9, 0.8, 0.7]), np.array([0.75, 0.3, 0.2]))
    assert found["similarity"] in (0.7, 0.8)
    assert found["kept_above"] + found["deleted_below"] == pytest.approx(5 / 3, abs=1e-5)
    assert found["auc"] == pytest.approx(8 / 9, abs=1e-5)
    assert statistics.best_threshold(np.array([0.9]), np.array([])) is None


def test_contradictions_are_pairs_and_chains():
    a, b, c, d = "abcd"
    records = [{"pos": [a, b], "neg": [c, d]}, {"pos": [b, c], "neg": [a]}, {"pos": [d], "neg": [b]}]
    assert contradictions(records) == ([(a, b)], [Chain(a, b, c)])
    assert contradictions([{"pos": [a, b], "neg": [c]}]) == ([], [])


def write_history(events):
    Path("data/history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def reported_yield(events):
    write_history(events)
    report()
    return figures()["yield"]


def shown(root, main, sampler="random", day="2026-01-01", **facts):
    time = f"{day}T00:00:00Z"
    return {"root": root, "main": main, "shown": {main: 1.0}, "sampler": sampler, "time": time, **facts}


def loaded(root, main, kept, deleted, day="2026-01-02"):
    return {"root": root, "main": main, "kept": kept, "deleted": deleted, "time": f"{day}T00:00:00Z"}


def counts(*numbers):
    return dict(zip(("shown", "loaded", "discarded", "positives", "negatives"), numbers))


def test_yield_counts_the_last_outcome_of_each_directory(ids):
    found = reported_yield(
        [
            *(shown("r", main) for main in "abc"),
            loaded("r", "a", ["a", "x", "y"], ["z"]),
            loaded("r", "a", ["a", "x"], ["y", "z"]),
            {"root": "r", "main": "b", "discarded": True, "time": "2026-01-02T00:00:00Z"},
            loaded("r", "c", ["c"], [], day="2026-01-01"),
            {"root": None, "main": "c", "undone": True, "time": "2026-01-01T00:00:00Z"},
        ]
    )
    assert found["by_sampler"] == {"random": counts(3, 1, 1, 2, 2)}
    assert found["by_day"] == {"2026-01-01": counts(3, 0, 0, 0, 0), "2026-01-02": counts(0, 1, 1, 2, 2)}


def test_yield_credits_the_sampler_of_the_reviewed_directory(ids):
    """A later directory with the same main image, which nobody has reviewed, is not the origin."""
    found = reported_yield(
        [shown("first", "a"), shown("second", "a", "herding"), loaded("first", "a", ["a", "x"], ["y"])]
    )
    assert found["by_sampler"] == {"random": counts(1, 1, 0, 2, 1), "herding": counts(1, 0, 0, 0, 0)}


def test_yield_finds_the_sampler_of_a_directory_that_was_moved(ids):
    found = reported_yield(
        [
            *(shown("here", main) for main in "ab"),
            shown("elsewhere", "b", "herding"),
            *(loaded("moved", main, [main], ["y"]) for main in "ab"),
        ]
    )
    assert found["by_sampler"]["random"]["loaded"] == 1
    assert found["by_sampler"]["unknown"]["loaded"] == 1, "two directories had this main image"


def test_an_undone_load_gives_way_to_the_one_before(ids):
    undone = {"root": None, "main": "a", "undone": True, "time": "2026-01-03T00:00:00Z"}
    found = reported_yield(
        [shown("r", "a"), loaded("r", "a", ["a", "x"], ["y"]), loaded("r", "a", ["a"], ["x", "y"]), undone]
    )
    assert found["by_sampler"] == {"random": counts(1, 1, 0, 2, 1)}


def test_positives_are_the_ids_in_pos_in_every_count(ids):
    found = reported_yield([shown("r", ids[0]), loaded("r", ids[0], ids[:3], ids[3:5])])
    assert found["by_sampler"]["random"]["positives"] == 3
    assert figures()["progress"]["positives"] == 3 * N_GROUPS
    head = '<th scope="(?:col|row)">positives, main images included</th>'
    assert len(re.findall(head, (REPORT / "report.html").read_text())) == 3


def second_look(main, record, kept, deleted, root="b"):
    looks = {"second_look": {"kept": kept, "deleted": deleted}, "record": record}
    return {"root": root, "main": main, "dir": f"7_{main}", "time": "2026-01-05T00:00:00Z", **looks}


def test_figures_that_assume_the_nearest_leave_other_picks_out(ids, capsys):
    mains = ids[::SIZE]
    write_history(
        [
            shown("r", mains[0], pick="informative"),
            shown("r", mains[1], pick="nearest", pool=["images", "other"]),
            shown("r", mains[2], pick="nearest", pool=["images"]),
            shown("r", mains[3], pick="informative"),  # a directory that nobody reviewed; the record is of the next one
            shown("s", mains[3], pick="nearest"),
            loaded("s", mains[3], ids[15:18], ids[18:20]),
        ]
    )
    report()
    found = figures()
    assert found["not_nearest"] == {"informative": 1, "pooled": 1}
    assert [found[key]["n"] for key in ("average_precision", "ordered_pairs")] == [N_GROUPS - 2, N_GROUPS]
    assert [found[key][0]["n"] for key in ("precision_at", "keep_rate_by_rank")] == [N_GROUPS - 2] * 2
    assert "informative 1, pooled 1" in capsys.readouterr().out
    page = " ".join((REPORT / "report.html").read_text().split())
    assert "Groups left out: 1 with images picked to be informative, 1 with images of several collections" in page


def test_a_comparison_says_whether_the_pool_was_shared(ids, capsys):
    from utils.store.collection import open_client

    vectors = random_vectors(len(ids), seed=1)
    other = open_client(Path("data/chroma")).create_collection(
        "other", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    other.add(ids=ids, embeddings=vectors, metadatas=[{"url": "x"}] * len(ids))

    def compared(events):
        write_history(events)
        report("--compare-collection", "other")
        assert "with images of both " in capsys.readouterr().out
        text = " ".join((REPORT / "report.html").read_text().split())
        return text, figures()["comparison"]

    mains = ids[::SIZE]
    text, found = compared([shown("r", mains[0], pick="informative"), shown("r", mains[1], pool=["images", "third"])])
    assert (found["groups"], found["pooled"]) == (N_GROUPS - 1, 0)
    assert (
        "The pool was not shared" in text and "Groups left out: 1 with images picked to be informative, 0 that" in text
    )
    text, found = compared([shown("r", mains[1], pool=["images", "other"])])
    assert (found["groups"], found["pooled"]) == (N_GROUPS, 1)
    assert f"Compared groups that show images of both collections: 1 of {N_GROUPS}." in text
    text, found = compared([shown("r", main, pool=["images", "other"]) for main in mains])
    assert "All compared groups show images of both collections" in text
    with pytest.raises(UserError, match="in collection other; review directories of ANN_DIRRIFY_PICK nearest"):
        compared([shown("r", main, pick="informative") for main in mains])


@pytest.mark.parametrize("is_base", [False, True], ids=["compared with", "compared"])
def test_a_comparison_leaves_out_the_groups_that_a_collection_was_trained_on(is_base, ids, capsys):
    """If it was trained on all groups, the report says so."""
    from utils.store.collection import DERIVED, open_client

    def compared(trained_on):
        learned = Projection(np.eye(16, dtype=np.float32), {}, trained_on, {})
        write_projection(Path("data/projection.npz"), learned)
        client, name = open_client(Path("data/chroma")), f"trained{len(trained_on)}"
        trained = client.create_collection(
            name,
            configuration={"hnsw": {"space": "cosine"}},
            embedding_function=None,
            metadata={DERIVED: learned.digest},
        )
        trained.add(ids=ids, embeddings=random_vectors(len(ids)), metadatas=[{"url": "x"}] * len(ids))
        names = (name, "images") if is_base else ("images", name)
        report("--collection-name", names[0], "--compare-collection", names[1])
        return figures()["comparison"]

    found = compared(ids[: 3 * SIZE : SIZE])
    assert (found["groups"], found["left_out"]["trained_on"], found["is_trained_on"]) == (N_GROUPS - 3, 3, False)
    assert "trained on 3" in capsys.readouterr().out
    found = compared(ids[::SIZE])
    assert (found["groups"], found["left_out"]["trained_on"], found["is_trained_on"]) == (N_GROUPS, 0, True)
    assert "was trained on all compared groups" in capsys.readouterr().out
    text = (REPORT / "report.html").read_text()
    assert "was trained on every compared group" in text and ("Made by ann_train.py" in text) == is_base


def test_records_of_other_tools_are_left_out_and_counted(ids, capsys):
    ANNOTATED.write_text(json.dumps([{"pos": [], "neg": []}, {"pos": ["a"]}, 5, {"pos": ids[:3], "neg": ids[3:5]}]))
    assert report() == 0
    assert (figures()["progress"]["groups"], figures()["progress"]["annotated"]) == (1, 5)
    assert "3 records of other tools not used" in capsys.readouterr().err


def test_events_of_an_undone_load_do_not_count(ids):
    record = {"pos": ids[:3], "neg": ids[3:5]}
    load = {"load": "1", "records": "annotated.json"}
    found = reported_yield(
        [
            shown("r", ids[0]),
            loaded("r", ids[0], ids[:3], ids[3:5]),
            loaded("r", ids[0], ids[:1], ids[1:5]) | load,
            second_look(ids[0], record, ids[:2], ids[2:5]) | load,
            {"root": None, "main": ids[0], "undone": True, "time": "2026-01-06T00:00:00Z"} | load,
        ]
    )
    assert found["by_sampler"]["random"]["positives"] == 3
    assert figures()["agreement"]["directories"] == 0


def test_agreement_of_two_reviewers_by_hand(ids, capsys):
    """Of six images two are judged otherwise; both reviewers keep half: chance alone is 0.5."""
    first, other = {"pos": ids[:3], "neg": ids[3:5]}, {"pos": ids[5:8], "neg": ids[8:10]}
    write_history(
        [
            second_look(ids[0], first, ids[:1], ids[1:5]),  # looked at once more since
            second_look(ids[0], first, [ids[0], ids[1], ids[3]], [ids[2]]),  # one image is unknown to the second look
            second_look(ids[5], other, [ids[5], ids[7]], [ids[6], ids[8]]),
        ]
    )
    report()
    found = figures()["agreement"]
    assert (found["directories"], found["images"]) == (2, 6)
    assert found["equal"]["value"] == pytest.approx(3 / 6)
    # kept by the first: 4 of 6, by the second: 3 of 6; alike by chance: 4/6 * 3/6 + 2/6 * 3/6 = 1/2
    assert found["kappa"] == pytest.approx((3 / 6 - 1 / 2) / (1 - 1 / 2), abs=1e-6)
    differences = {one["image"]: one["kept_first"] for one in found["disagreements"]}
    assert differences == {ids[2]: True, ids[3]: False, ids[6]: True}
    assert "second looks 2, share of images judged alike 0.500" in capsys.readouterr().out
    page = (REPORT / "report.html").read_text()
    assert f"second look in b/7_{ids[0]}" in page and "deleted, then kept" in page


def test_the_stages_write_the_history_that_the_report_reads(ids, capsys):
    """Directories pooled from two collections, reviewed, and reviewed again elsewhere."""
    from utils.store.collection import open_client

    other = open_client(Path("data/chroma")).create_collection(
        "other", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    other.add(ids=ids, embeddings=random_vectors(len(ids), seed=1), metadatas=[{"url": "x"}] * len(ids))
    ANNOTATED.unlink()
    flags = ["--logs-dir-path", ""]
    sizes = ["--ann-dirrify-ndirs", "3", "--ann-dirrify-nnearest", "6", "--ann-dirrify-pool", '["other"]']
    assert ann_dirrify.main([*flags, *sizes]) == 0

    def review(root, rank):
        for path in list(root.glob(f"*/{rank}_*")):
            path.unlink()
        assert ann_dirload.main([*flags, str(root)]) == 0

    review(Path("data/dirrify"), 1)
    shutil.copytree("data/dirrify", "data/again")
    review(Path("data/again"), 3)
    report("--compare-collection", "other")
    found = figures()
    assert (found["comparison"]["groups"], found["comparison"]["pooled"], found["not_nearest"]["pooled"]) == (3, 3, 3)
    assert found["agreement"]["directories"] == 3 and found["agreement"]["equal"]["value"] == pytest.approx(5 / 6)
    main = json.loads(ANNOTATED.read_text())[0]["pos"][0]
    page = (REPORT / "report.html").read_text()
    assert f">dirrify/0_{main}<" in page and f"second look in again/0_{main}" in page


def test_an_image_links_to_its_original_and_to_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside, outside = REPORT / "my photos" / "a:b#.jpg", Path("data/c.jpg")
    urls = [
        "HTTPS://example.org/a?b=<c>&d",
        "javascript:alert(1)",
        "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
        str(inside),
        inside.resolve().as_uri(),
        str(outside),
        "\u0001https://example.org/trimmed",
        "ftp://example.org/d.jpg",
        "//example.org/e.jpg",
    ]
    ids = make_collection(random_vectors(len(urls)), urls)
    for path in (inside, outside):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(0))
    ANNOTATED.write_text(json.dumps([{"pos": ids[:2], "neg": ids[2:]}]))
    report()
    links = re.findall('<a href="([^"#]+)"', (REPORT / "report.html").read_text())
    near = "./my%20photos/a%3Ab%23.jpg"
    assert sorted(map(html.unescape, links)) == sorted([urls[0], near, near, urls[6]])
    fill_cache(ids, REPORT / "cache")
    report("--image-cache-dir-path", str(REPORT / "cache"))
    links = re.findall('<a href="([^"#]+)"', (REPORT / "report.html").read_text())
    assert f"./cache/{ids[1][:2]}/{ids[1]}.jpg" in links and len(links) == len(ids)


def test_each_group_names_its_directory(ids):
    write_history([shown(r"C:\photos\dirrify", ids[0], dir=f"18_{ids[0]}"), shown("/data/dirrify/", ids[5])])
    report()
    page = (REPORT / "report.html").read_text()
    assert f">dirrify/18_{ids[0]}<" in page
    assert f">dirrify/*_{ids[5]}<" in page, "an older history does not say the number"
    assert f">*_{ids[10]}<" in page


def test_a_name_that_is_not_utf_8_is_shown_with_its_bytes(ids):
    """A zip that Windows made may bring such names."""
    write_history([shown("/data/dirrify", ids[0], dir=f"18_{ids[0]} sch\udcf6n")])
    assert report() == 0
    assert rf"18_{ids[0]} sch\udcf6n<" in (REPORT / "report.html").read_text()


def test_report_counts_what_is_annotated(ids, capsys):
    assert report() == 0
    progress = figures()["progress"]
    assert (progress["images"], progress["annotated"], progress["groups"]) == (200, 200, N_GROUPS)
    assert (progress["positives"], progress["hard_negatives"]) == (3 * N_GROUPS, 2 * N_GROUPS)
    estimate = figures()["average_precision"]
    assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["n"] == N_GROUPS
    assert "report.html" in capsys.readouterr().out


def test_another_collection_is_judged_by_the_same_annotations(ids, monkeypatch):
    """A model that places kept images near their main image wins over random vectors."""
    vectors = random_vectors(len(ids))
    vectors = np.stack([vectors[i - i % SIZE] if i % SIZE < 3 else vector for i, vector in enumerate(vectors)])
    from utils.store.collection import open_client

    better = open_client(Path("data/chroma")).create_collection(
        "better", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    better.add(ids=ids, embeddings=vectors, metadatas=[{"url": "x"}] * len(ids))
    report("--compare-collection", "better")
    found = figures()["comparison"]["average_precision"]
    assert found["other"]["value"] == 1
    assert found["other_minus_this"]["low"] > 0
    assert found["other_minus_this"]["value"] == pytest.approx(1 - found["this"]["value"], abs=1e-5)
    assert "is better at ranking kept images above deleted images" in (REPORT / "report.html").read_text()


def test_odd_annotations_are_reported_too(ids):
    """No negatives, nothing but a main image, ids that are gone, images without a cached file."""
    records = [{"pos": ids[:3], "neg": []}, {"pos": ids[5:6], "neg": []}, {"pos": [id_of("gone")], "neg": ids[6:8]}]
    ANNOTATED.write_text(json.dumps(records))
    shutil.rmtree("data/images")
    assert report() == 0
    assert figures()["average_precision"]["value"] is None and figures()["threshold"] is None
    assert figures()["progress"]["annotated_no_longer_in_collection"] == 1
    assert "no image in the cache" in (REPORT / "report.html").read_text()


def test_thumbnails_that_are_not_shown_any_more_are_removed(ids):
    report()
    folder = REPORT / "thumbnails"
    own, half = folder / ids[0][:2] / "notes.jpg", folder / ids[1][:2] / f".{ids[1]}.jpg.tmp"
    own.touch(), half.touch()
    ANNOTATED.write_text(json.dumps([{"pos": ids[:3], "neg": ids[3:4]}]))
    report()
    assert {path.stem for path in folder.rglob("*.*")} == {*ids[:4], "notes"}


def test_nothing_annotated_is_one_line(ids):
    ANNOTATED.unlink()
    with pytest.raises(UserError, match=r"run python ann_dirload\.py first"):
        report()


# --- the page in a browser --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A browser, and a report that was moved elsewhere."""
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium or Chrome on this machine")
    pytest.importorskip("websockets.sync.client", reason="websockets is not installed")
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("utils.report.page.NEAR_GROUPS", N_GROUPS // 2)
        annotate()
        report()
    shutil.move(folder / REPORT, folder / "moved elsewhere")
    with browser.opened(program, folder / "profile") as tab:
        yield tab, (folder / "moved elsewhere" / "report.html").as_uri()


@pytest.fixture
def page(tab):
    page, address = tab
    page.open(address)
    yield page
    assert not page.complaints
    assert not [url for url in page.requests if not url.startswith(("file:", "data:"))]


def test_page_opens_quickly_and_user_text_is_text(page):
    assert page.run("document.title") == "Annotations of images"
    assert page.run("performance.timing.loadEventEnd - performance.timing.navigationStart") < 1000 * OPEN_LIMIT_S
    assert page.run("document.querySelectorAll('script').length") == 1
    assert SCRIPT_TAG in page.run("document.querySelector('#group0 .main').title")
    described = "[...document.querySelectorAll('svg[role=img]')].filter(svg => svg.querySelector('title + desc'))"
    assert page.run(f"{described}.length") == 2
    labels = page.run(
        "[...document.querySelectorAll('svg:last-of-type text[text-anchor=end]')].map(t => t.textContent)"
    )
    tops = [float(label) for label in labels if "." not in label]
    assert len(tops) == 6 and len(set(np.diff(tops))) == 1, "counts at even distances"


@pytest.fixture
def contradictory_page(tab, tmp_path, monkeypatch):
    """A page on which one pair and one directory are judged in two ways, open on a telephone."""
    monkeypatch.chdir(tmp_path)
    ids = annotate()
    records = json.loads(ANNOTATED.read_text())
    ANNOTATED.write_text(json.dumps([*records, {"pos": [ids[1]], "neg": [ids[0]]}]))
    write_history([second_look(ids[5], records[1], ids[5:6], ids[6:10])])
    report()
    page, _ = tab
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    page.open((tmp_path / REPORT / "report.html").as_uri())
    yield page
    page.call("Emulation.clearDeviceMetricsOverride")
    assert not page.complaints


def test_contradictions_link_to_their_groups_below_the_filter(contradictory_page):
    page = contradictory_page
    links = "[...document.querySelectorAll('li a')].map(link => link.hash).join()"
    assert page.run(links) == "#group0,#group40,#group1"
    page.run("document.getElementById('filter').focus()")
    page.type("group 3")
    gap = """new Promise(resolve => setTimeout(() => resolve(
        document.querySelector(location.hash).getBoundingClientRect().top -
        document.querySelector('.filter').getBoundingClientRect().bottom), 300))"""
    for group in ("0", "1", "40"):
        page.run(f"document.querySelector('li a[href=\"#group{group}\"]').click()")
        assert 0 <= page.run(gap) < (400 if group == "0" else 100), "the last one cannot be scrolled to the top"
    assert page.run("document.querySelectorAll('.group[hidden]').length") == 0


def test_page_is_readable_at_390_pixels(contradictory_page):
    page = contradictory_page
    page.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.run("document.documentElement.scrollWidth") == 390
    wide = """[...document.querySelectorAll('main *')].filter(element =>
        element.getBoundingClientRect().right > 391 || /auto|scroll/.test(getComputedStyle(element).overflowX))"""
    assert page.run(f"{wide}.map(element => element.outerHTML).join()") == ""
    small = """[...document.querySelectorAll('p, td, th, li, figcaption, input, summary')].filter(element =>
        parseFloat(getComputedStyle(element).fontSize) < 16)"""
    assert page.run(f"{small}.map(element => element.outerHTML).join()") == ""
    broken = """[...document.querySelectorAll('.plain td')].filter(cell => {
        const text = document.createRange();
        cell.textContent = '1,234,567';
        text.selectNodeContents(cell);
        return text.getClientRects().length > 1;
    })"""
    assert page.run(f"{broken}.length") == 0, "a number of several lines"
    boxes = "[...document.querySelectorAll('svg text')].map(text => [text.getBoundingClientRect(), text.textContent])"
    found = [
        (*(box[side] for side in ("left", "top", "right", "bottom")), text)
        for box, text in json.loads(page.run(f"JSON.stringify({boxes})"))
        if box["height"]
    ]
    assert min(bottom - top for _, top, _, bottom, _ in found) >= 12
    for one, other in itertools.combinations(found, 2):
        is_apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] + 4 or other[3] <= one[1] + 4
        assert is_apart, (one, other)


def test_images_load_when_they_come_into_view(page):
    loaded = "[...document.querySelectorAll('.group img')].filter(image => image.naturalWidth).length"
    first = page.run(loaded)
    assert first < N_GROUPS * SIZE
    shown = page.run(
        "new Promise(resolve => { const image = document.querySelector('#group0 img');"
        "image.onload = () => resolve(image.naturalWidth); image.scrollIntoView(); })"
    )
    assert shown == 128


def test_a_print_has_the_images_of_all_groups(page):
    waiting = "document.querySelectorAll('.group img[data-src]:not([src])').length"
    assert page.run(waiting)
    page.call("Page.printToPDF", scale=0.1)
    assert not page.run(waiting)


def test_filter_finds_groups_by_metadata_number_and_id(page):
    ids = [id_of(f"https://example.org/{i}") for i in range(N_GROUPS * SIZE)]

    def found(text):
        page.run("document.getElementById('filter').focus(), document.getElementById('filter').select()")
        page.type(text)
        return page.run("[...document.querySelectorAll('.group:not([hidden])')].map(group => group.id).join()")

    assert found("ITEM-7. https://example.org/8") == "group1"
    assert page.run("document.getElementById('count').textContent") == f"1 of {N_GROUPS} groups"
    assert found("item-7. nowhere") == ""
    assert found("number").count("group") == N_GROUPS
    assert found("group 3") == found("#3") == "group3"
    assert found(ids[12][:8]) == found(ids[12].upper()) == "group2"
    assert found(ids[12][1:9]) == "", "the middle of an id is chance"
    assert found("  ").count("group") == N_GROUPS


def test_metadata_is_reached_by_keyboard(page):
    def pressed(key):
        for type_ in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=type_, key=key)
        return page.run("(about => about.hidden ? '' : about.textContent)(document.getElementById('about'))")

    page.run(
        "new Promise(resolve => { const image = document.querySelector('#group0 img');"
        "image.onload = resolve; image.scrollIntoView(); })"
    )
    assert pressed("Shift") == ""
    page.run("document.querySelector('#group0 figure').focus()")
    assert SCRIPT_TAG in page.run("document.getElementById('about').textContent")
    assert "item-1." in pressed("ArrowRight")
    assert SCRIPT_TAG in pressed("ArrowLeft")
    page.run("addEventListener('click', event => { event.preventDefault(); window.opened = event.target.href; })")
    pressed("Enter")
    assert page.run("window.opened") == "https://example.org/0"
    assert pressed("Escape") == ""
    assert page.run("document.querySelectorAll('#group0 [tabindex=\"0\"]').length") == 1
