"""utils/store/collection.py: reading in the requested order, in pages that Chroma can process, faults in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.annotation_data import CHROMA, id_of, make_collection, random_vectors
from utils.errors import UserError
from utils.lock import hold, lock_path
from utils.store import collection
from utils.store.store import Store

N = 120


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collection, "PAGE", 50)
    return random_vectors(N)


@pytest.fixture
def ids(vectors: np.ndarray) -> list[str]:
    return make_collection(vectors, [f"u{i}" for i in range(N)], fields=[{"odd": i % 2} for i in range(N)])


def test_everything_comes_in_the_order_of_the_ids_asked_for(vectors, ids):
    images = collection.open_collection(CHROMA, "images")
    assert collection.read_ids(images) == sorted(ids)
    backwards = ids[::-1]
    read = collection.read_vectors(images, backwards)
    assert np.allclose(read, vectors[::-1], atol=1e-6)
    assert read.dtype == np.float32
    assert (collection.spool_vectors(images, backwards)() == read).all()
    assert [item["url"] for item in collection.read_metadata(images, backwards)] == [f"u{i}" for i in range(N)][::-1]


def test_ids_can_be_filtered(ids):
    images = collection.open_collection(CHROMA, "images")
    assert collection.read_ids(images, {"odd": 1}) == sorted(ids[1::2])
    for where in ({"$odd": 1}, {"odd": {"one": 1}}, {"odd": None}):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            collection.read_ids(images, where)


def test_an_id_that_is_not_there_is_a_key_error_and_has_no_url(ids):
    images = collection.open_collection(CHROMA, "images")
    for read in (collection.read_vectors, collection.read_metadata):
        with pytest.raises(KeyError):
            read(images, [ids[0], id_of("nowhere")])
    assert collection.read_urls(images, [id_of("nowhere"), ids[3]]) == ["", "u3"]


def test_reading_waits_for_the_writer_and_says_who_it_is(ids, monkeypatch):
    monkeypatch.setattr(collection, "WAIT_S", 0.1)
    in_use = pytest.raises(UserError, match=r"in use by pid \d+")
    with hold(lock_path(CHROMA), "the store"), in_use, collection.reading(CHROMA, "images"):
        pass
    with collection.reading(CHROMA, "images") as images:
        assert images.count() == N
    with collection.reading(CHROMA / ".." / "chroma", "images") as images:
        assert images.count() == N, "it can be opened again"


def test_an_existing_collection_is_opened_by_reading(ids, monkeypatch):
    monkeypatch.delattr("chromadb.api.client.Client.get_or_create_collection")
    assert collection.create(CHROMA, "images", {}).count() == N


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("nowhere", "images", "no Chroma database in nowhere"),
        (CHROMA, "other", "no collection other"),
        (CHROMA, "?", "no "),
    ],
)
def test_a_missing_collection_is_one_line_and_nothing_is_made(ids, path, name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        collection.open_collection(Path(path), name)
    assert not Path("nowhere").exists()


def test_an_empty_collection_is_one_line(vectors):
    make_collection(vectors[:0], [])
    with pytest.raises(UserError, match="is empty"):
        collection.open_collection(CHROMA, "images")


@pytest.mark.parametrize("size", [0, 1000])
def test_a_torn_index_is_one_line(vectors, size):
    make_collection(vectors, [f"u{i}" for i in range(N)], hnsw={"sync_threshold": 20, "batch_size": 10})
    (index,) = CHROMA.glob("*/data_level0.bin")
    index.write_bytes(index.read_bytes()[:size])
    read = "with c.reading(Path('data/chroma'), 'images') as i: c.read_vectors(i, c.read_ids(i))"
    imports = "from pathlib import Path\nfrom utils import cli\nfrom utils.store import collection as c"
    code = f"{imports}\ndef main():\n    {read}\ncli.run(main)"
    environment = {"PYTHONPATH": str(Path(collection.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, json.dumps(done.stderr)
    assert "python embed.py repairs it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["a b", "ab", "größe", "_images", "images.", "x" * 513])
def test_a_name_that_chroma_rejects_is_refused_before_anything_is_embedded(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"collection name .* 3 to 512 characters"):
        Store(tmp_path / "chroma", name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"collection name .* 3 to 512 characters"):
        collection.create(tmp_path / "chroma", name, {})
