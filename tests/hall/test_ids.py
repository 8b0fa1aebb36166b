from __future__ import annotations

import uuid

import pytest

from utils.ids import from_ids, to_ids


def test_ids_are_packed_and_unpacked():
    texts = [str(uuid.uuid4()) for _ in range(5)]
    assert from_ids(to_ids(texts)) == texts
    with pytest.raises(ValueError):
        to_ids(["x"])
    with pytest.raises(ValueError):
        to_ids(["A" + texts[0][1:].upper()])
