"""ann_export.py: every format by its content and by its real consumer, and splits that do not leak."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ann_export
from tests.benchmarks import load_exports
from tests.support.annotation_data import ANNOTATED, fill_cache, id_of, make_collection, random_vectors, tree
from utils.errors import UserError
from utils.export import formats
from utils.export.formats import replacing_all
from utils.export.groups import ExportData, pairs, select_groups
from utils.export.splits import check_shares, split_items

N = 60
OUT = Path("data/export")
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
NO_EXTRAS = "tests/requirements-extra.txt is not installed"
IDS = [id_of(str(i)) for i in range(12)]


def write_annotated(records):
    ANNOTATED.parent.mkdir(parents=True, exist_ok=True)
    ANNOTATED.write_text(json.dumps(records))


def export(*flags):
    return ann_export.main(["--logs-dir-path", "", *map(str, flags)])


def rows(name):
    with (OUT / name).open(newline="") as file:
        return list(csv.DictReader(file))


def lines(name):
    return (OUT / name).read_text().splitlines()


@pytest.fixture
def ids(tmp_path, monkeypatch):
    """A collection with a full cache, and ten groups apart: 1 main, 2 positives, 2 negatives each; the last has no
    negative."""
    monkeypatch.chdir(tmp_path)
    ids = make_collection(random_vectors(N), [f"https://example.org/{i}" for i in range(N)])
    fill_cache(ids)
    groups = [ids[start : start + 5] for start in range(0, 50, 5)]
    write_annotated([{"pos": g[:3], "neg": g[3:] if g != groups[-1] else []} for g in groups])
    return ids


# --- properties -------------------------------------------------------------------------------------------------------
@st.composite
def annotations(draw):
    """Records over few ids, so that they overlap, repeat and contradict; vectors with near duplicates; ids gone."""
    records = []
    for _ in range(draw(st.integers(1, 8))):
        listed = draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=6, unique=True))
        n_kept = draw(st.integers(1, len(listed)))
        records.append({"pos": listed[:n_kept], "neg": listed[n_kept:]})
    there = sorted(draw(st.sets(st.sampled_from(IDS))))
    corners = draw(st.lists(st.integers(0, 7), min_size=len(there), max_size=len(there)))
    vectors = np.eye(8, dtype=np.float32)[corners].reshape(-1, 8)
    return records, there, vectors, draw(st.integers(0, 3))


def make_data(drawn):
    records, there, vectors, seed = drawn
    row_of = {id_: row for row, id_ in enumerate(there)}
    split_of, n_clusters = split_items(records, row_of, vectors, 0.98, SHARES, seed)
    return ExportData(records, there, row_of, vectors, {id_: id_ for id_ in there}, split_of, n_clusters)


@settings(deadline=None)
@given(annotations())
def test_pairs_reproduce_the_annotations_exactly(drawn):
    records = drawn[0]
    again = {number: {"pos": [record["pos"][0]], "neg": []} for number, record in enumerate(records)}
    file = io.StringIO()
    formats.write_pairs(file, pairs(make_data(drawn)))
    for row in csv.DictReader(io.StringIO(file.getvalue())):
        assert row["id_a"] == again[int(row["group"])]["pos"][0]
        again[int(row["group"])]["pos" if row["label"] == "1" else "neg"].append(row["id_b"])
    assert list(again.values()) == records


@settings(deadline=None)
@given(annotations())
def test_no_split_leaks(drawn):
    records, there, vectors, _ = drawn
    data = make_data(drawn)
    split_of = data.split_of
    assert set(split_of.values()) <= set(SHARES)
    for record in records:
        assert len({split_of[id_] for id_ in record["pos"]}) == 1
    for a, b in itertools.combinations([id_ for id_ in there if id_ in split_of], 2):
        if vectors[there.index(a)] @ vectors[there.index(b)] >= 0.98:
            assert split_of[a] == split_of[b]
    homes: dict[str, set[str]] = {}
    for pair in pairs(data):
        if pair.split:
            homes.setdefault(pair.id_a, set()).add(pair.split)
            homes.setdefault(pair.id_b, set()).add(pair.split)
    for split, groups in select_groups(data, needs_both=False)[0].items():
        for group in groups:
            for id_ in [group.query, *group.positives, *group.negatives]:
                homes.setdefault(id_, set()).add(split)
    assert all(len(splits) == 1 for splits in homes.values())


@settings(deadline=None)
@given(annotations())
def test_every_group_and_every_negative_is_exported_or_counted(drawn):
    data = make_data(drawn)
    of_split, left_out = select_groups(data, needs_both=False)
    groups = [group for listed in of_split.values() for group in listed]
    whole = [
        record
        for record in data.records
        if record["pos"][0] in data.row_of and set(record["pos"][1:]) & set(data.row_of)
    ]
    assert len(groups) == len(whole)
    assert sum(map(len, left_out.groups.values())) == len(data.records) - len(whole)
    split_of = data.split_of
    same_split = [
        id_
        for record in whole
        for id_ in record["neg"]
        if id_ in data.row_of and split_of[id_] == split_of[record["pos"][0]]
    ]
    assert sum(len(group.negatives) for group in groups) == len(same_split)
    there = [record for record in data.records if record["pos"][0] in data.row_of]
    elsewhere = [
        id_
        for record in there
        for id_ in record["neg"]
        if id_ in data.row_of and split_of[id_] != split_of[record["pos"][0]]
    ]
    assert left_out.other_split == len(elsewhere)


# --- the files --------------------------------------------------------------------------------------------------------
def test_splits_have_the_shares_of_the_groups(ids):
    assert export("--ann-export-format", "qrels") == 0
    sizes = Counter(
        name for name in SHARES for _ in {line.split()[0] for line in lines(f"qrels.{name}.txt") if line.strip()}
    )
    assert sizes == {"train": 8, "validation": 1, "test": 1}  # the shipped shares


def test_triplets_are_all_of_each_group_in_the_order_of_columns(ids, capsys):
    assert export("--ann-export-value", "id") == 0
    found = {tuple(row.values()) for path in OUT.iterdir() for row in rows(path.name)}
    records = json.loads(ANNOTATED.read_text())
    assert found == {(r["pos"][0], p, n) for r in records for p in r["pos"][1:] for n in r["neg"]}
    assert lines("triplets.train.csv")[0] == "anchor,positive,negative"
    assert f"1 group left out ({records[-1]['pos'][0]}): nothing was deleted" in capsys.readouterr().out


def test_values_are_paths_of_cached_images_or_urls(ids, capsys):
    lost = next(Path("data/images").rglob(f"{ids[1]}.jpg"))
    lost.unlink()
    export()
    used = {value for path in OUT.iterdir() for row in rows(path.name) for value in row.values()}
    assert used and all(Path(value).is_absolute() and Path(value).is_file() for value in used)
    assert not any(ids[1] in value for value in used)
    assert f"1 image left out ({ids[1]}): not in the image cache (IMAGE_CACHE_DIR_PATH)" in capsys.readouterr().out
    export("--ann-export-value", "url")
    assert rows("triplets.train.csv")[0]["anchor"].startswith("https://example.org/")


def test_ids_that_left_the_collection_are_reported(ids, capsys):
    gone = id_of("gone")
    write_annotated([{"pos": ids[:2], "neg": [ids[2], gone]}])
    assert export("--ann-export-format", "pairs") == 0
    row = rows("pairs.csv")[-1]
    assert (row["id_b"], row["label"], row["similarity"], row["rank"]) == (gone, "0", "", "")
    assert f"1 id kept without similarity ({gone}): no longer in collection images" in capsys.readouterr().out
    export("--ann-export-value", "id")
    assert f"1 id left out ({gone}): no longer in collection images" in capsys.readouterr().out
    assert {row["negative"] for row in rows("triplets.train.csv")} == {ids[2]}


def test_pairs_have_similarity_and_rank(ids):
    export("--ann-export-format", "pairs")
    for _, group in itertools.groupby(rows("pairs.csv"), lambda row: row["group"]):
        ranked = sorted(group, key=lambda row: int(row["rank"]))
        assert [int(row["rank"]) for row in ranked] == list(range(1, len(ranked) + 1))
        similarities = [float(row["similarity"]) for row in ranked]
        assert similarities == sorted(similarities, reverse=True)
    vectors = random_vectors(N)
    first = rows("pairs.csv")[0]
    assert float(first["similarity"]) == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


def test_records_of_other_tools_are_left_out_and_counted(ids, capsys):
    others = [{"pos": [], "neg": [ids[0]]}, {"pos": ["cat.jpg"], "neg": []}, {"label": 3}, "text", None]
    write_annotated([*others, {"pos": ids[:2], "neg": ids[2:3], "by": "another tool"}])
    assert export("--ann-export-value", "id", "--ann-export-split", '{"train": 1}') == 0
    assert [list(row.values()) for row in rows("triplets.train.csv")] == [ids[:3]]
    assert "5 records of other tools not used" in capsys.readouterr().err


def test_near_duplicates_stay_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vectors = random_vectors(40, 64)
    vectors[5::5] = vectors[0] + 0.01 * vectors[5::5]  # the main images are copies of one
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = make_collection(vectors, [str(i) for i in range(40)])
    write_annotated([{"pos": ids[i : i + 2], "neg": ids[i + 2 : i + 4]} for i in range(0, 40, 5)])
    export("--ann-export-value", "id")
    assert "triplets.train.csv: 16 triplets of 8 groups" in capsys.readouterr().out
    export("--ann-export-value", "id", "--ann-export-near-duplicate", "1.1")
    assert "triplets.train.csv: 12 triplets of 6 groups" in capsys.readouterr().out


def test_same_seed_same_files(ids):
    export()
    first = {path.name: path.read_bytes() for path in OUT.iterdir()}
    export()
    assert {path.name: path.read_bytes() for path in OUT.iterdir()} == first
    export("--ann-export-seed", "1")
    assert {path.name: path.read_bytes() for path in OUT.iterdir()} != first


def test_files_of_splits_that_are_no_more_are_removed_and_no_others(ids):
    for format_ in ("triplets", "qrels"):
        export("--ann-export-format", format_)
    own = OUT / "triplets.mine.csv"
    own.write_text("mine")
    before = tree(OUT)
    export("--ann-export-split", '{"train": 0.8, "dev": 0.2}')
    after = tree(OUT)
    assert before.keys() - after.keys() == {"triplets.test.csv"}
    assert after.keys() - before.keys() == {"triplets.dev.csv"}
    assert own.read_text() == "mine"
    export("--ann-export-format", "qrels", "--ann-export-split", '{"all": 1}')
    assert {name for name in tree(OUT) if name.startswith("qrels")} == {"qrels.all.txt", "qrels.all.run"}


def test_an_empty_split_has_no_file_and_a_reason(ids, capsys):
    def written(*flags):
        export("--ann-export-value", "id", *flags)
        return capsys.readouterr().out

    written()
    (OUT / "triplets.test.csv").write_text("of an earlier run, and in no list")
    assert f"{OUT / 'triplets.test.csv'}: not written, its share is 0" in written(
        "--ann-export-split", '{"train": 1, "test": 0}'
    )
    assert set(tree(OUT)) == {"triplets.train.csv"}
    write_annotated([{"pos": [ids[0], ids[i]], "neg": [ids[20 + i]]} for i in range(1, 11)])
    assert "triplets.validation.csv: not written, all groups are joined by shared positives or near" in written()
    write_annotated(
        [{"pos": [ids[0], ids[i]], "neg": [ids[20 + i]]} for i in range(1, 11)]
        + [{"pos": ids[40:42], "neg": ids[42:43]}]
    )
    assert "not written, 11 groups are 2 clusters, joined by" in written()
    write_annotated([{"pos": ids[:2], "neg": ids[2:3]}])
    assert "triplets.validation.csv: not written, too few groups (1)" in written()
    write_annotated([{"pos": ids[i : i + 2], "neg": []} for i in range(0, 30, 3)])
    assert "triplets.train.csv: not written, all of its groups are left out (8)" in written()
    assert tree(OUT) == {}


def test_nothing_but_the_export_lies_in_its_folder(ids):
    """FlagEmbedding's loader reads every .json and .jsonl of a folder."""
    OUT.mkdir(parents=True)
    (OUT / ".flagembedding.json").write_text('["flagembedding.dev.jsonl"]')  # an earlier version put its list there
    (OUT / "flagembedding.dev.jsonl").touch()
    export("--ann-export-format", "flagembedding")
    assert set(tree(OUT)) == {"flagembedding.train.jsonl", "flagembedding.test.jsonl"}


def test_images_that_a_trainer_would_take_for_text_are_counted(ids, capsys):
    for number, extension in ((0, ".avif"), (1, ".jp2"), (2, ".jp2"), (49, ".ico")):
        cached = next(Path("data/images").rglob(f"{ids[number]}.jpg"))
        cached.rename(cached.with_suffix(extension))
    export()
    line = "sentence-transformers would embed the name, not the pixels, of 3 images (.jp2: 2, .avif: 1): "
    assert line in capsys.readouterr().out, "the fourth is in a group that is left out"
    export("--ann-export-format", "reranking", "--ann-export-value", "url")
    assert "would embed the name, not the pixels, of 45 images (no extension: 45): " in capsys.readouterr().out
    for format_, value in (("triplets", "id"), ("flagembedding", "path"), ("qrels", "path")):
        export("--ann-export-format", format_, "--ann-export-value", value)
        assert "embedded as text" not in capsys.readouterr().out


@pytest.mark.parametrize("killed", ["while it writes", "while it removes"])
def test_a_killed_export_leaves_nothing_that_the_next_does_not_know(tmp_path, monkeypatch, killed):
    def kill(*_args, **_options):
        raise KeyboardInterrupt

    def write(name, then=lambda: None):
        with replacing_all(tmp_path, "triplets", [name]):
            (tmp_path / name).touch()
            then()

    write("triplets.a.csv")
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        if killed == "while it removes":
            patch.setattr(Path, "unlink", kill)
        write("triplets.b.csv", then=kill if killed == "while it writes" else lambda: None)
    assert {path.name for path in tmp_path.glob("triplets.*")} == {"triplets.a.csv", "triplets.b.csv"}
    write("triplets.c.csv")
    assert {path.name for path in tmp_path.glob("triplets.*")} == {"triplets.c.csv"}


def test_a_list_of_files_never_leads_out_of_the_folder(tmp_path):
    mine = tmp_path / "mine.csv"
    mine.touch()
    folder = tmp_path / "export"
    folder.mkdir()
    for path in (tmp_path / ".export.triplets.json", folder / ".triplets.json"):
        path.write_text(json.dumps(["../mine.csv", "triplets./../../mine.csv", str(mine), 5]))
    with replacing_all(folder, "triplets", []):
        pass
    assert mine.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--ann-export-format", "coco"], "use one of pairs, triplets"),
        (["--ann-export-value", "bytes"], "use one of path, url, id"),
        (["--ann-export-split", '{"train": 0.5}'], "the sum of the shares is 0.5"),
        (["--ann-export-split", '{"../x": 1}'], "not a name for a split"),
        (["--ann-export-split", '{"train": 0.5, "Train": 0.5}'], "differ in case"),
        (["--ann-export-split", '{"train": "all"}'], "number from 0 to 1"),
        (["--annotated-data-path", "none.json"], "run python ann_dirload.py first"),
    ],
)
def test_what_the_user_can_fix_is_one_line(ids, flags, words):
    with pytest.raises(UserError, match=words):
        export(*flags)
    assert not OUT.exists()


def test_shares_may_be_zero_or_whole():
    check_shares({"train": 1, "test": 0}, "X")
    assert set(
        split_items([{"pos": IDS[:1], "neg": []}], {}, np.empty((0, 0)), 0.98, {"a": 0, "b": 1}, 0)[0].values()
    ) == {"b"}


# --- real consumers ---------------------------------------------------------------------------------------------------
@pytest.fixture
def encoder(ids):
    """sentence-transformers' interface around the collection's own vectors; texts are ids."""
    transformers = pytest.importorskip("sentence_transformers", reason=NO_EXTRAS)
    import torch

    vectors = dict(zip(ids, torch.from_numpy(random_vectors(N))))

    class Lookup(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = torch.nn.Linear(16, 16, bias=False)
            torch.nn.init.eye_(self.projection.weight)

        def preprocess(self, texts, *_args, **_kwargs):
            return {"rows": torch.stack([vectors[text] for text in texts])}

        tokenize = preprocess

        def forward(self, features, **_kwargs):
            return features | {"sentence_embedding": self.projection(features["rows"])}

        def get_sentence_embedding_dimension(self):
            return 16

        def save(self, *_args, **_kwargs):
            pass

    return transformers.SentenceTransformer(modules=[Lookup()], device="cpu")


def test_sentence_transformers_trains_on_triplets(ids, encoder):
    try:
        from sentence_transformers.sentence_transformer.losses import TripletLoss
    except ImportError:  # before 6
        from sentence_transformers.losses import TripletLoss

    export("--ann-export-value", "id")
    triplets = rows("triplets.train.csv")
    features = [encoder[0].preprocess([row[name] for row in triplets]) for name in triplets[0]]  # columns as they come
    loss = TripletLoss(encoder)(features, None)
    loss.backward()
    vectors = dict(zip(ids, random_vectors(N)))
    near, far = (
        np.array([np.linalg.norm(vectors[row["anchor"]] - vectors[row[name]]) for row in triplets])
        for name in ("positive", "negative")
    )
    assert loss.item() == pytest.approx(np.maximum(near - far + 5, 0).mean(), abs=1e-4)  # 5: its default margin
    assert encoder[0].projection.weight.grad.abs().sum() > 0


def test_sentence_transformers_evaluates_reranking(ids, encoder):
    try:
        from sentence_transformers.sentence_transformer.evaluation import RerankingEvaluator
    except ImportError:  # before 6
        from sentence_transformers.evaluation import RerankingEvaluator

    export("--ann-export-format", "reranking", "--ann-export-value", "id")
    samples = json.loads((OUT / "reranking.train.json").read_text())
    found = RerankingEvaluator(samples, show_progress_bar=False, write_csv=False)(encoder)
    value = next(value for name, value in found.items() if name.endswith("map"))
    vectors = dict(zip(ids, random_vectors(N)))
    expected = [average_precision(sample, vectors) for sample in samples]
    assert value == pytest.approx(np.mean(expected), abs=1e-6)


def average_precision(sample, vectors):
    def score(id_):
        return -float(vectors[sample["query"]] @ vectors[id_])

    ranked = sorted([*sample["positive"], *sample["negative"]], key=score)
    hits = [rank for rank, id_ in enumerate(ranked, 1) if id_ in sample["positive"]]
    return np.mean([n / rank for n, rank in enumerate(hits, 1)])


def test_ir_measures_reads_qrels_and_run(ids):
    measures = pytest.importorskip("ir_measures", reason=NO_EXTRAS)
    export("--ann-export-format", "qrels")
    qrels = list(measures.read_trec_qrels(str(OUT / "qrels.train.txt")))
    run = list(measures.read_trec_run(str(OUT / "qrels.train.run")))
    assert {judgment.relevance for judgment in qrels} == {0, 1}
    found = measures.calc_aggregate([measures.AP, measures.P(judged_only=True) @ 1], qrels, run)
    vectors = dict(zip(ids, random_vectors(N)))
    expected = []
    for query in {judgment.query_id for judgment in qrels}:
        ranked = [hit.doc_id for hit in run if hit.query_id == query]
        assert query not in ranked
        assert ranked == sorted(ranked, key=lambda id_, q=query: -float(vectors[q] @ vectors[id_]))
        relevant = [j.doc_id for j in qrels if j.query_id == query and j.relevance]
        hits = [rank for rank, id_ in enumerate(ranked, 1) if id_ in relevant]
        expected.append(sum(n / rank for n, rank in enumerate(hits, 1)) / len(relevant))
    assert found[measures.AP] == pytest.approx(np.mean(expected), abs=1e-4)


def loaded(format_, name, *flags):
    export("--ann-export-format", format_, *flags)
    return load_exports.LOADERS[format_](OUT / name)


def test_datasets_loads_pairs(ids):
    pytest.importorskip("datasets", reason=NO_EXTRAS)
    table = loaded("pairs", "pairs.csv")
    assert table.num_rows == len(rows("pairs.csv"))
    assert table[0]["id_a"] == ids[0] and table[0]["label"] == 1


def test_datasets_opens_the_images_of_triplets_whatever_their_extension(ids):
    pytest.importorskip("datasets", reason=NO_EXTRAS)
    cached = next(Path("data/images").rglob(f"{ids[0]}.jpg"))
    cached.rename(cached.with_suffix(".ico"))
    table = loaded("triplets", "triplets.train.csv", "--ann-export-split", '{"train": 1}')
    assert table.num_rows == len(rows("triplets.train.csv"))
    assert {image.size for image in table[0].values()} == {(8, 8)}


def test_sentence_transformers_loads_the_images_of_reranking(ids):
    pytest.importorskip("sentence_transformers.sentence_transformer", reason=NO_EXTRAS)
    evaluator = loaded("reranking", "reranking.train.json")
    assert len(evaluator.samples) == 8
    assert evaluator.samples[0]["query"].size == (8, 8) and len(evaluator.samples[0]["negative"]) == 2


def test_ir_measures_loads_qrels(ids):
    pytest.importorskip("ir_measures", reason=NO_EXTRAS)
    assert all(0 < value < 1 for value in loaded("qrels", "qrels.train.txt").values())


def test_flagembedding_loads_its_format(ids):
    pytest.importorskip("FlagEmbedding", reason="tests/requirements-flagembedding.txt is not installed")
    data = loaded("flagembedding", "flagembedding.train.jsonl", "--ann-export-value", "url")
    samples = [json.loads(line) for line in lines("flagembedding.train.jsonl")]
    assert len(data) == len(samples)
    for sample, (query, passages, scores) in zip(samples, (data[i] for i in range(len(data)))):
        assert query == sample["query"] and passages[0] in sample["pos"] and scores is None
        assert set(passages[1:]) <= set(sample["neg"])


def test_flagembedding_has_lists_that_are_never_empty(ids):
    """As FlagEmbedding's loader asks for: it draws one of "pos", and fills up from "neg"."""
    export("--ann-export-format", "flagembedding", "--ann-export-value", "url")
    found = [json.loads(line) for line in lines("flagembedding.train.jsonl")]
    assert found
    for sample in found:
        assert list(sample) == ["query", "pos", "neg"]
        assert isinstance(sample["query"], str) and sample["pos"] and sample["neg"]


def test_every_format_has_a_loader():
    assert set(load_exports.LOADERS) == set(formats.NAMES)


def test_every_format_is_documented():
    assert all(f"\n{name} " in formats.__doc__ for name in formats.NAMES)
