"""utils/annotation/neighbor_dirs.py: the folder format, written so that a killed run can be continued."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.support.annotation_data import id_of, make_dir, names_in, tree
from utils.annotation import neighbor_dirs
from utils.annotation.neighbor_dirs import DirWriter, check, is_unfinished, read_samples
from utils.errors import UserError

MAINS = [id_of(f"main {i}") for i in range(4)]
SETTINGS = {"ANN_SEED": 0}


def fill(writer: DirWriter, main: str) -> None:
    make_dir(writer, dict.fromkeys([main, *(id_of(f"{main} {rank}") for rank in range(1, 12))], b"image"))


def make(root: Path, mains: list[str]) -> None:
    with DirWriter(root, SETTINGS, "data") as writer:
        for main in mains:
            fill(writer, main)


def leave_unfinished(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DirWriter(root, SETTINGS, "data") as writer:
        fill(writer, MAINS[0])
        raise KeyboardInterrupt


def test_a_finished_root_holds_the_directories_and_their_list_alone(tmp_path: Path):
    make(tmp_path / "root", MAINS)
    dirs = [f"{i}_{main}" for i, main in enumerate(MAINS)]
    assert names_in(tmp_path / "root") == [".digests.json", *dirs, "READ ME.txt", "samples.json"]
    assert list(read_samples(tmp_path / "root")) == MAINS
    assert not is_unfinished(tmp_path / "root")


def test_while_it_is_made_only_complete_directories_are_visible(tmp_path: Path):
    with DirWriter(tmp_path / "root", SETTINGS, "data") as writer:
        fill(writer, MAINS[0])
        writer.stage(MAINS[1]).mkdir()
        visible = [name for name in names_in(tmp_path / "root") if not name.startswith(".")]
        assert visible == [f"0_{MAINS[0]}", "READ ME.txt", "samples.json"]
        assert is_unfinished(tmp_path / "root")
        fill(writer, MAINS[2])
    dirs = [f"0_{MAINS[0]}", f"1_{MAINS[2]}"]
    assert names_in(tmp_path / "root") == [".digests.json", *dirs, "READ ME.txt", "samples.json"]


def test_an_unfinished_root_goes_on_with_what_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "root"
    make(tmp_path / "whole", MAINS)
    writer = DirWriter(root, SETTINGS, "data")  # not left: as if the process had been killed
    for main, every_s in zip(MAINS[:3], (0, 1e9, 1e9)):
        monkeypatch.setattr(neighbor_dirs, "LIST_EVERY_S", every_s)
        fill(writer, main)
    writer.stage(MAINS[3]).mkdir()
    (root / "..unfinished.json.x.tmp").touch()
    (root / f"7_{id_of('dragged here')}").mkdir()
    check(root, SETTINGS)
    with DirWriter(root, SETTINGS, "data") as writer:
        assert writer.same_data
        assert list(writer.samples) == MAINS[:1]
        for main in MAINS[1:]:
            fill(writer, main)
    (root / f"7_{id_of('dragged here')}").rmdir()
    assert tree(root) == tree(tmp_path / "whole")


def test_an_unfinished_root_whose_list_someone_removed_is_one_line_and_stays(tmp_path: Path):
    leave_unfinished(tmp_path / "root")
    (tmp_path / "root" / "samples.json").unlink()
    before = tree(tmp_path / "root")
    with pytest.raises(UserError, match=r"no samples\.json"):
        DirWriter(tmp_path / "root", SETTINGS, "data")
    assert tree(tmp_path / "root") == before


def test_an_unfinished_root_with_the_list_of_another_run_is_one_line_and_stays(tmp_path: Path):
    root = tmp_path / "root"
    with pytest.raises(KeyboardInterrupt), DirWriter(root, SETTINGS, "data") as writer:
        for main in MAINS:
            fill(writer, main)
        raise KeyboardInterrupt
    make(tmp_path / "other", [id_of("another run")])
    (root / "samples.json").write_bytes((tmp_path / "other" / "samples.json").read_bytes())
    before = tree(root)
    with pytest.raises(UserError, match="from another run"):
        DirWriter(root, SETTINGS, "data")
    assert tree(root) == before


def test_a_last_directory_whose_name_a_program_changed_is_still_listed(tmp_path: Path):
    root = tmp_path / "root"
    leave_unfinished(root)
    (root / f"0_{MAINS[0]}").rename(root / f"0_{MAINS[0].upper()}")
    with DirWriter(root, SETTINGS, "data") as writer:
        assert list(writer.samples) == MAINS[:1]
    assert (root / f"0_{MAINS[0].upper()}").is_dir()


def test_the_data_that_changed_are_noticed(tmp_path: Path):
    leave_unfinished(tmp_path / "root")
    with DirWriter(tmp_path / "root", SETTINGS, "other data") as writer:
        assert not writer.same_data


def test_other_settings_are_one_line(tmp_path: Path):
    leave_unfinished(tmp_path / "root")
    with pytest.raises(UserError, match=r"begun with ANN_SEED = 0, not 1"):
        check(tmp_path / "root", {"ANN_SEED": 1})


def test_a_damaged_marker_is_one_line(tmp_path: Path):
    leave_unfinished(tmp_path / "root")
    for content in ("", "{}", '{"settings": 3, "data": ""}'):
        (tmp_path / "root" / neighbor_dirs.MARKER).write_text(content)
        with pytest.raises(UserError):
            check(tmp_path / "root", SETTINGS)


def test_a_reviewer_who_gets_a_zip_needs_nothing_else(tmp_path: Path):
    make(tmp_path / "root", MAINS)
    text = (tmp_path / "root" / "READ ME.txt").read_bytes()
    assert text.count(b"\r\n") == text.count(b"\n") == 6
    assert text.splitlines()[-1].endswith(b": ______________________________")


def test_a_name_that_was_filled_in_stays_when_a_run_goes_on(tmp_path: Path):
    leave_unfinished(tmp_path / "root")
    (tmp_path / "root" / "READ ME.txt").write_text("return to Ada")
    with DirWriter(tmp_path / "root", SETTINGS, "data"):
        pass
    assert (tmp_path / "root" / "READ ME.txt").read_text() == "return to Ada"


def digest_of(image: bytes) -> str:
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def test_the_digests_of_the_bytes_written_are_kept_by_rank(tmp_path: Path):
    root = tmp_path / "root"
    images = {main: {main: b"main", id_of(f"gone {main}"): None, id_of(main): main.encode()} for main in MAINS}
    with DirWriter(root, SETTINGS, "data") as writer:
        for of in images.values():
            make_dir(writer, of)
    assert read_samples(root) == {main: [main, id_of(main)] for main in MAINS}
    expected = {main: [digest_of(b"main"), None, digest_of(main.encode())] for main in MAINS}
    assert neighbor_dirs.read_digests(root) == expected
    (root / ".digests.json").write_text("[")
    assert neighbor_dirs.read_digests(root) == {}


def test_a_root_in_which_nothing_was_made_vanishes(tmp_path: Path):
    with DirWriter(tmp_path / "root", SETTINGS, "data") as writer:
        writer.stage(MAINS[0]).mkdir()
        assert not writer.commit(MAINS[:2], {MAINS[1]: "digest"})
        assert writer.n_lost == 1
    assert not (tmp_path / "root").exists()


def test_the_list_is_written_for_several_directories_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neighbor_dirs, "LIST_EVERY_S", 0)
    with DirWriter(tmp_path / "root", SETTINGS, "data") as writer:
        fill(writer, MAINS[0])
        assert list(read_samples(tmp_path / "root")) == MAINS[:1]
        monkeypatch.setattr(neighbor_dirs, "LIST_EVERY_S", 1e9)
        fill(writer, MAINS[1])
        assert list(read_samples(tmp_path / "root")) == MAINS[:1]
    assert list(read_samples(tmp_path / "root")) == MAINS[:2]


@pytest.mark.parametrize(
    "samples",
    [
        [],
        {MAINS[0]: []},
        {MAINS[0]: [MAINS[1]]},
        {MAINS[0]: [MAINS[0], MAINS[0]]},
        {MAINS[0]: [MAINS[0], "../../etc/passwd"]},
        {"..": [".."]},
        {MAINS[0]: MAINS[0]},
    ],
)
def test_a_list_that_could_lead_out_of_the_root_is_refused(tmp_path: Path, samples):
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match=r"samples\.json"):
        read_samples(tmp_path)
