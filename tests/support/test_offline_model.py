import json

from tests.support import offline_model
from tests.support.offline_model import CONFIG_NAME, WEIGHTS_NAME


def test_built_once_and_found_built_afterwards(offline_model_path):
    times = [path.stat().st_mtime_ns for path in sorted(offline_model_path.iterdir())]
    assert offline_model.build(offline_model_path) == offline_model_path
    assert [path.stat().st_mtime_ns for path in sorted(offline_model_path.iterdir())] == times


def test_same_bytes_in_another_folder_so_that_collections_stay_valid(offline_model_path, tmp_path):
    other = offline_model.build(tmp_path / "model")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (other / name).read_bytes() == (offline_model_path / name).read_bytes()


def test_a_build_that_was_killed_is_made_up_for(offline_model_path, tmp_path):
    (tmp_path / WEIGHTS_NAME).write_bytes(b"half")
    offline_model.build(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (offline_model_path / WEIGHTS_NAME).read_bytes()


def test_says_that_it_only_looks_at_images(offline_model_path):
    assert json.loads((offline_model_path / CONFIG_NAME).read_text())["image_only"] is True
