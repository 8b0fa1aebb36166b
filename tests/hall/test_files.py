from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import read_json, replacing, write_json


def test_the_new_version_is_there_when_the_block_ends_and_not_before(tmp_path: Path):
    path = tmp_path / "new" / "file.json"
    with replacing(path) as file:
        file.write("x")
        assert not path.exists()
    assert path.read_text() == "x"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_version_and_no_trace(tmp_path: Path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
def test_permissions_stay_and_new_files_get_the_usual_ones(tmp_path: Path):
    path = tmp_path / "file.json"
    write_json(path, 1)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    path.chmod(0o640)
    write_json(path, 2)
    assert path.stat().st_mode & 0o777 == 0o640


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_any_string_survives(tmp_path: Path):
    value = {"\ud800": ["\0", "ü", "\u2028"]}
    write_json(tmp_path / "file.json", value)
    assert (tmp_path / "file.json").read_bytes().isascii()
    assert read_json(tmp_path / "file.json", "file") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=r"the thing .* is not JSON") as raised:
        read_json(tmp_path / "file.json", "the thing")
    assert "\n" not in str(raised.value)


def test_what_is_missing_or_a_folder_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json", "the thing")
    with pytest.raises(UserError, match=r"cannot be read|does not exist"):
        read_json(tmp_path, "the thing")


def test_a_full_disk_is_named_by_the_file_that_could_not_be_written(tmp_path: Path):
    path = tmp_path / "settings.json"
    with pytest.raises(OSError, match="No space left") as error, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(path)
    with pytest.raises(OSError, match="no number"), replacing(path):
        raise OSError("no number")
    assert not list(tmp_path.iterdir())
