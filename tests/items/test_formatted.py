from __future__ import annotations

import json
import math
import uuid

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from utils.errors import ImageError
from utils.items.formatted import MAX_VALUES, REST_FIELD, item_id, restore_item, to_metadata
from utils.store import collection as collections

TEXT = st.text(st.characters(), max_size=8)  # lone surrogates and NUL included
NAMES = st.one_of(TEXT, st.sampled_from(["", "$in", "#x", "chroma:document", "_rest_json", "id", "url", "a.b"]))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXT, st.sampled_from([2**63, -(2**63), -0.0])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=5,
)
ITEMS = st.dictionaries(NAMES, VALUES, max_size=6).map(lambda item: {"url": "http://x/", **item})


def same(one: object, other: object) -> bool:
    """Equal in value and type; NaN equals NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        is_nan = math.isnan(one) and math.isnan(other)
        return is_nan or (one == other and math.copysign(1, one) == math.copysign(1, other))
    return type(one) is type(other) and one == other


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory):
    return collections.create(tmp_path_factory.mktemp("chroma"), "items", {})


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(items=st.lists(ITEMS, min_size=8, max_size=24))
@example(items=[{"url": "u", "a": None, "b": {}, "c": [], "d": [1, "x"], "e": [True, 1], "f": math.inf, "g": 2**63}])
@example(items=[{"url": "u", "a": -0.0, "b": [0.0, -0.0], "c": 5e-324}])
@example(items=[{"url": "u", "": 1, "$a": 1, "#b": 1, "chroma:c": 1, REST_FIELD: "{}", "\ud800": "\udfff", "n": "\0"}])
def test_items_survive_chroma_exactly(collection, items: list[dict]):
    ids = [str(uuid.uuid4()) for _ in items]
    vectors = np.ones((len(items), 2), np.float32)
    collection.upsert(ids=ids, embeddings=vectors, metadatas=[to_metadata(item) for item in items])
    for item, metadata in zip(items, collections.read_metadata(collection, ids)):
        assert same(restore_item(metadata), item)
    collection.delete(ids=ids)


def wide(sizes: list[int], n_fields: int) -> dict:
    """An item with lists of these sizes, each with another element type, and this many other fields."""
    elements = [lambda i: i + 0.5, lambda i: f"é{i}", lambda i: i, lambda i: i % 2 == 0]
    lists = {f"list {n}": [elements[n % 4](i) for i in range(size)] for n, size in enumerate(sizes)}
    return {f"field {i}": i for i in range(n_fields)} | lists | {"url": "http://x/"}


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.sampled_from([1, 900, MAX_VALUES - 2, MAX_VALUES, 5_462, 20_000]), max_size=3),
    n_fields=st.sampled_from([0, 1, 3_000, MAX_VALUES - 1, 5_462]),
)
@example(sizes=[5_462], n_fields=0)
@example(sizes=[], n_fields=5_462)
@example(sizes=[MAX_VALUES - 1], n_fields=0)
def test_items_with_any_number_of_values_survive_chroma_exactly(collection, sizes: list[int], n_fields: int):
    items = [wide(sizes, n_fields), {"url": "http://narrow/", "n": 1}]
    ids = [str(uuid.uuid4()) for _ in items]
    metadatas = [to_metadata(item) for item in items]
    collection.upsert(ids=ids, embeddings=np.ones((2, 2), np.float32), metadatas=metadatas)
    for item, metadata in zip(items, collections.read_metadata(collection, ids)):
        assert same(restore_item(metadata), item)
        assert metadata["url"] == item["url"], "the later stages find it without REST_FIELD"
    replaced = dict.fromkeys(metadatas[0], None) | to_metadata(wide([MAX_VALUES - 1], 0))  # as a refresh does
    collection.update(ids=ids[:1], metadatas=[replaced])
    assert collection.count() >= 2
    collection.delete(ids=ids)


def test_a_string_of_16_mb_survives_chroma_exactly(collection):
    item = {"url": "http://x/", "text": "é" * (16 << 20), "controls": "\0" * 1000}
    collection.upsert(ids=["x"], embeddings=np.ones((1, 2), np.float32), metadatas=[to_metadata(item)])
    assert restore_item(collections.read_metadata(collection, ["x"])[0]) == item
    collection.delete(ids=["x"])


def test_metadata_within_the_bound_is_its_own_and_of_wide_items_the_long_lists_go():
    metadata = to_metadata(wide([MAX_VALUES, 10], 20))
    assert set(metadata) == {"url", "list 1", REST_FIELD, *(f"field {i}" for i in range(20))}
    assert to_metadata(restore_item(metadata)) == metadata


@given(item=ITEMS)
def test_metadata_survives_json_exactly(item: dict):
    assert same(json.loads(json.dumps(to_metadata(item), ensure_ascii=False).encode()), to_metadata(item))


def test_plain_values_are_stored_under_their_own_names():
    item = {"url": "u", "a": 1, "b": 1.5, "c": True, "d": ["x", "y"]}
    assert to_metadata(item) == item


def test_the_id_is_uuid5_of_the_field_as_given():
    assert item_id({"url": "http://x/ä "}, "url") == uuid.uuid5(uuid.NAMESPACE_URL, "http://x/ä ")
    assert item_id({"url": "http://x/", "sku": 7}, "sku") == uuid.uuid5(uuid.NAMESPACE_URL, "7")


@pytest.mark.parametrize(
    "item", [None, [], "http://x/", {}, {"url": ""}, {"url": " "}, {"url": 5}, {"url": None}, {"url": "\ud800"}]
)
def test_what_has_no_usable_url_is_a_bad_record(item: object):
    with pytest.raises(ImageError, match="bad_record"):
        item_id(item, "url")
