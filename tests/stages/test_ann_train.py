"""ann_train.py: its results if something can be learned from the decisions, and no files if not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ann_dirrify
import ann_export
import ann_train
import embed
from tests.support.annotation_data import fill_cache, id_of, make_collection, read_samples, tree
from tests.support.chroma_server import ChromaServer
from utils.errors import UserError
from utils.store import collection, index
from utils.training.projection import project, read_projection

N, N_CLASSES, DIM = 320, 8, 16
N_GROUPS, N_SHOWN = 40, 12
MODEL = {"model_name": "some", "pretrained": "tag", "dimension": DIM}
URLS = [f"http://photos.invalid/{i}.jpg" for i in range(N)]
IDS = [id_of(url) for url in URLS]
LABELS = np.arange(N) % N_CLASSES


def make_vectors() -> np.ndarray:
    """Half of the directions say which class an image is of, the other half hide it."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(N, DIM))
    vectors[:, : DIM // 2] = 1.6 * np.eye(DIM // 2)[LABELS] + 0.35 * vectors[:, : DIM // 2]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS = make_vectors()


def real_records(n: int = N_GROUPS) -> list[dict[str, list[str]]]:
    """Folders of the main image and every third of its nearest, kept if of its class."""
    records = []
    for main in np.random.default_rng(1).permutation(N)[:n].tolist():
        shown = np.argsort(-VECTORS @ VECTORS[main])[1 : 1 + 3 * N_SHOWN : 3]
        is_kept = LABELS[shown] == LABELS[main]
        kept, deleted = ([IDS[row] for row in shown[side]] for side in (is_kept, ~is_kept))
        records.append({"pos": [IDS[main], *kept], "neg": deleted})
    return records


def shuffled_records() -> list[dict[str, list[str]]]:
    rng, records = np.random.default_rng(2), real_records()
    for record in records:
        n_kept, shown = len(record["pos"]), rng.permutation([*record["pos"][1:], *record["neg"]]).tolist()
        record["pos"][1:], record["neg"] = shown[: n_kept - 1], shown[n_kept - 1 :]
    return records


def random_records(n: int) -> list[dict[str, list[str]]]:
    rng = np.random.default_rng(3)
    groups = [rng.permutation(IDS)[: N_SHOWN + 1].tolist() for _ in range(n)]
    return [{"pos": group[:7], "neg": group[7:]} for group in groups]


class Workshop:
    """A folder with a collection of N images, and the stages run on it."""

    def __init__(self, folder: Path, records: list[dict[str, list[str]]]) -> None:
        self.folder, self.chroma = folder, folder / "chroma"
        self.projection, self.annotated = folder / "projection.npz", folder / "annotated.json"
        self.annotated.write_text(json.dumps(records))

    def flags(self, *flags: object) -> list[str]:
        paths = ["--chromadb-path", self.chroma, "--annotated-data-path", self.annotated, "--logs-dir-path", ""]
        return [str(flag) for flag in (*paths, "--ann-projection-path", self.projection, *flags)]

    def train(self, *flags: object) -> int:
        return ann_train.main(self.flags(*flags))

    def names(self) -> list[str]:
        client: Any = collection.open_client(self.chroma)
        return sorted(found.name for found in client.list_collections())

    def read(self, name: str = "images_trained") -> tuple[list[str], np.ndarray, list[dict[str, Any]], dict[str, Any]]:
        with collection.reading(self.chroma, name) as images:
            ids = collection.read_ids(images)
            vectors, items = collection.read_vectors(images, ids), collection.read_metadata(images, ids)
            return ids, vectors, items, dict(images.metadata)


def fill(folder: Path, n: int = N) -> None:
    make_collection(VECTORS[:n], URLS[:n], folder / "chroma", fields=[{"label": int(label)} for label in LABELS[:n]])
    client: Any = collection.open_client(folder / "chroma")
    client.get_collection("images", embedding_function=None).modify(metadata=MODEL)
    client.close()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    fill(folder)
    return folder


@pytest.fixture
def shop(filled: Path, tmp_path: Path) -> Workshop:
    """A collection, and nothing learned from it yet."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    return Workshop(tmp_path, real_records())


@pytest.fixture(scope="module")
def once_trained(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(filled, folder, dirs_exist_ok=True)
    assert Workshop(folder, real_records()).train() == 0
    return folder


@pytest.fixture
def trained(once_trained: Path, tmp_path: Path) -> Workshop:
    shutil.copytree(once_trained, tmp_path, dirs_exist_ok=True)
    return Workshop(tmp_path, real_records())


def precision(vectors: np.ndarray, ids: list[str], k: int = 5) -> float:
    labels = np.array([LABELS[IDS.index(id_)] for id_ in ids])
    similarity = vectors @ vectors.T - 2 * np.eye(len(ids))
    return float((labels[np.argsort(-similarity, axis=1)[:, :k]] == labels[:, None]).mean())


# --- it earns its place -----------------------------------------------------------------------------------------------
def test_real_decisions_make_a_projection_and_a_collection_with_better_neighbors(trained):
    assert trained.names() == ["images", "images_trained"]
    ids, vectors, items, facts = trained.read()
    base_ids, base_vectors, base_items, _ = trained.read("images")
    learned = read_projection(trained.projection)
    assert (ids, items) == (base_ids, base_items)
    assert vectors == pytest.approx(project(base_vectors, learned.matrix), abs=1e-5)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert {key: facts[key] for key in MODEL} == MODEL == learned.model
    assert learned.trained_on == [record["pos"][0] for record in real_records()]
    assert learned.figures["after"] - learned.figures["before"] >= 0.02
    judged = {id_ for record in real_records() for ids_ in record.values() for id_ in ids_}
    unseen = [row for row, id_ in enumerate(ids) if id_ not in judged]
    unseen_ids = [ids[row] for row in unseen]
    assert precision(vectors[unseen], unseen_ids) > precision(base_vectors[unseen], unseen_ids) + 0.05


def test_the_gain_is_printed_and_the_same_data_give_the_same_projection(trained, capsys):
    before = read_projection(trained.projection)
    assert trained.train() == 0
    after = read_projection(trained.projection)
    assert (after.matrix == before.matrix).all()
    out = capsys.readouterr().out
    assert f"{before.figures['before']:.3f} before, {before.figures['after']:.3f} after" in out
    assert f"{N} images in collection images_trained" in out


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (shuffled_records(), "no gain"),
        (random_records(N_GROUPS), "no gain"),
        (random_records(10), "too few annotated directories: 10; at least 20"),
        ([{"pos": [*record["pos"], *record["neg"]], "neg": []} for record in real_records()], "too few deletions"),
    ],
    ids=["shuffled", "random", "ten", "all kept"],
)
def test_decisions_that_teach_nothing_write_nothing_and_one_line_says_why(shop, records, reason, capsys):
    shop.annotated.write_text(json.dumps(records))
    assert shop.train() == 1
    out = capsys.readouterr().out
    assert out.startswith("nothing written: ")
    assert reason in out
    assert out.count("\n") == 1
    assert not shop.projection.exists()
    assert shop.names() == ["images"]


def test_a_refusal_leaves_what_an_earlier_run_wrote(trained):
    before, file = trained.read(), trained.projection.read_bytes()
    trained.annotated.write_text(json.dumps(shuffled_records()))
    assert trained.train() == 1
    after = trained.read()
    assert trained.projection.read_bytes() == file
    assert (after[0], after[3]) == (before[0], before[3])
    assert (after[1] == before[1]).all()


def test_nothing_annotated_is_one_line(shop):
    shop.annotated.unlink()
    with pytest.raises(UserError, match=r"nothing is annotated in .*annotated.json"):
        shop.train()


def test_images_and_groups_that_left_the_collection_are_skipped_and_groups_counted(shop, capsys):
    gone = [id_of(f"gone {i}") for i in range(9)]
    records = [{"pos": [gone[0], *IDS[:3]], "neg": IDS[3:5]}]
    records += [{"pos": [*r["pos"], gone[1]], "neg": [gone[2], *r["neg"]]} for r in real_records()]
    shop.annotated.write_text(json.dumps(records))
    assert shop.train() == 0
    assert read_projection(shop.projection).trained_on == [record["pos"][0] for record in real_records()]
    assert "1 group left out: the main image is not in collection images\n" in capsys.readouterr().out


# --- the collection ---------------------------------------------------------------------------------------------------
def test_apply_brings_the_collection_in_step_without_learning(trained):
    matrix = read_projection(trained.projection).matrix
    client: Any = collection.open_client(trained.chroma)
    images = client.get_collection("images", embedding_function=None)
    images.delete(ids=IDS[:5])
    new = np.eye(DIM, dtype=np.float32)[:2]
    images.add(ids=[id_of("new 0"), id_of("new 1")], embeddings=new, metadatas=[{"url": "a"}, {"url": "b"}])
    client.close()
    trained.annotated.unlink()
    file = trained.projection.read_bytes()
    assert trained.train("--apply") == 0
    ids, vectors, items, _ = trained.read()
    base_ids, base_vectors, base_items, _ = trained.read("images")
    assert len(ids) == N - 3
    assert (ids, items) == (base_ids, base_items)
    assert vectors == pytest.approx(project(base_vectors, matrix), abs=1e-5)
    assert trained.projection.read_bytes() == file


def test_apply_needs_a_projection_of_the_same_model(shop, trained):
    shop.projection.unlink()
    with pytest.raises(UserError, match=r"no projection in .*; run python ann_train.py"):
        shop.train("--apply")
    shop.projection.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="is damaged"):
        shop.train("--apply")


def test_apply_refuses_a_projection_of_another_model(trained):
    client: Any = collection.open_client(trained.chroma)
    client.get_collection("images", embedding_function=None).modify(metadata={**MODEL, "model_name": "other"})
    client.close()
    with pytest.raises(UserError, match="is for vectors of some tag, but collection images was made with other tag"):
        trained.train("--apply")


def test_the_trained_collection_is_neither_its_own_base_nor_anyone_else_s(trained):
    with pytest.raises(UserError, match="collection images_trained is made by ann_train"):
        trained.train("--collection-name", "images_trained", "--ann-trained-collection-name", "more")
    with pytest.raises(UserError, match="ANN_TRAINED_COLLECTION_NAME and COLLECTION_NAME are both images"):
        trained.train("--ann-trained-collection-name", "images")
    with pytest.raises(UserError, match="collection name 'x': it must have 3 to 512"):
        trained.train("--ann-trained-collection-name", "x")
    client: Any = collection.open_client(trained.chroma)
    mine = client.create_collection("mine", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
    mine.add(ids=[IDS[0]], embeddings=[[1.0, 0.0]], metadatas=[{"url": "a"}])
    client.close()
    with pytest.raises(UserError, match=r"collection mine was not made by ann_train.py"):
        trained.train("--ann-trained-collection-name", "mine")


def test_embed_refuses_to_write_into_it_and_says_why(trained, tmp_path):
    before = trained.read()
    (tmp_path / "formatted.json").write_text(json.dumps([{"url": "http://photos.invalid/new.jpg"}]))
    names = ["--formatted-data-path", tmp_path / "formatted.json", "--failed-data-path", tmp_path / "failed.json"]
    flags = ["--chromadb-path", trained.chroma, "--collection-name", "images_trained", "--logs-dir-path", "", *names]
    with pytest.raises(UserError, match=r"images_trained is derived from another by ann_train.py: embed into that one"):
        embed.main([str(flag) for flag in flags])
    after = trained.read()
    assert after[0] == before[0]
    assert after[3] == before[3]


def derive(shop: Workshop, scale: float) -> None:
    """Do what a run does that is killed before promote()."""
    facts = {**MODEL, collection.DERIVED: str(scale)}
    index.call(index.derive, shop.chroma, "images", "images_trained", Scaled(scale), facts)


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = np.linspace(1, scale, DIM, dtype=np.float32)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return vectors * self.scale


def test_a_run_killed_before_the_new_collection_has_its_name_leaves_the_old_one(trained):
    before = trained.read()
    derive(trained, 3)
    after = trained.read()
    assert (after[0], after[3]) == (before[0], before[3])
    assert trained.train("--apply") == 0
    assert trained.names() == ["images", "images_trained"]


def test_a_run_killed_between_the_two_renames_leaves_the_new_collection(trained):
    derive(trained, 3)
    client: Any = collection.open_client(trained.chroma)
    client.get_collection("images_trained", embedding_function=None).modify(name="images_trained" + collection.OLD)
    client.close()
    assert trained.read()[3][collection.DERIVED] == "3"
    assert trained.train("--apply") == 0
    assert trained.read()[3][collection.DERIVED] == read_projection(trained.projection).digest
    assert trained.names() == ["images", "images_trained"]


def test_what_a_killed_run_left_half_made_is_made_anew(trained):
    client: Any = collection.open_client(trained.chroma)
    half: Any = {"configuration": {"hnsw": {"space": "cosine"}}, "embedding_function": None}
    client.create_collection("images_trained" + collection.PART, **half).add(ids=["x"], embeddings=[[1.0] * DIM])
    client.close()
    assert trained.train("--apply") == 0
    assert trained.names() == ["images", "images_trained"]
    assert len(trained.read()[0]) == N


# --- the other stages use it ------------------------------------------------------------------------------------------
def test_the_other_stages_take_its_neighbors(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_cache(IDS, tmp_path / "cache", n_images=4)
    ids, vectors, _, _ = trained.read()
    flags = [*trained.flags()[:4], "--logs-dir-path", "", "--collection-name", "images_trained"]
    flags += ["--image-cache-dir-path", str(tmp_path / "cache")]
    where = ["--ann-dirrify-dir-path", str(tmp_path / "folders"), "--ann-history-path", ""]
    assert ann_dirrify.main([*flags, *where, "--ann-dirrify-ndirs", "2", "--ann-dirrify-show-judged"]) == 0
    for main, *listed in read_samples(tmp_path / "folders").values():
        nearest = np.argsort(-vectors @ vectors[ids.index(main)])[1:21]
        assert listed == [ids[row] for row in nearest]
    assert ann_export.main([*flags, "--ann-export-dir-path", str(tmp_path / "export")]) == 0
    assert tree(tmp_path / "export")


@pytest.fixture
def chroma(filled: Path, tmp_path: Path) -> Iterator[ChromaServer]:
    shutil.copytree(filled / "chroma", tmp_path / "served")
    with ChromaServer(tmp_path / "served") as running:
        yield running


def test_a_server_holds_it_too(chroma, tmp_path):
    shop = Workshop(tmp_path, real_records())
    assert shop.train("--chroma-server-url", chroma.url) == 0
    assert shop.train("--chroma-server-url", chroma.url, "--apply") == 0
    chroma.kill()
    shop.chroma = tmp_path / "served"
    ids, vectors, _, facts = shop.read()
    _, base_vectors, _, _ = shop.read("images")
    learned = read_projection(shop.projection)
    assert shop.names() == ["images", "images_trained"]
    assert sorted(ids) == sorted(IDS)
    assert vectors == pytest.approx(project(base_vectors, learned.matrix), abs=1e-5)
    assert facts[collection.DERIVED] == learned.digest
