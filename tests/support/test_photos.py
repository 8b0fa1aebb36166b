import io

import numpy as np
from PIL import Image

from tests.support.photos import KINDS, PHOTOS, details, precision_at, thumbnail, variations


def test_variations_are_the_same_on_every_run():
    assert list(variations(["rocket.jpg"])) == list(variations(["rocket.jpg"]))
    assert list(variations(["rocket.jpg"], seed=1)) != list(variations(["rocket.jpg"]))


def test_each_photo_comes_in_every_kind_under_a_name_of_its_own(photos):
    assert len({photo.name for photo in photos}) == len(photos) == 4 * len(KINDS)
    assert len({photo.data for photo in photos}) == len(photos)
    assert len(KINDS) >= 12


def test_names_say_the_format(photos):
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
    for photo in photos:
        extension = photo.name[photo.name.index(".") :]
        assert Image.open(io.BytesIO(photo.data)).format == formats[extension]


def test_one_view_of_each_scene():
    assert len([name for name in PHOTOS if "motorcycle" in name]) == 1


def test_precision_counts_the_others_of_the_same_photo():
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], dtype=np.float32)  # 0-1-3-2 along a quarter circle
    # nearest: 0 -> 1 (same), 1 -> 3 (other), 2 -> 3 (same), 3 -> 1 (other)
    assert precision_at(1, vectors, ["a", "a", "b", "b"]) == 0.5


def test_thumbnail_knows_light_from_dark_places_only(photos):
    values = thumbnail(photos[0].data)
    assert values.shape == (64,)
    assert np.isclose(values.mean(), 0, atol=1e-6) and np.isclose(np.linalg.norm(values), 1)


def test_details_are_the_same_on_every_run_and_differ_from_each_other():
    found = list(details(3, ["rocket.jpg"]))
    assert found == list(details(3, ["rocket.jpg"])) and found != list(details(3, ["rocket.jpg"], seed=1))
    assert len({detail.data for detail in found}) == len({detail.name for detail in found}) == 3
    assert {detail.photo for detail in found} == {"rocket"}
