"""ann_dirload.py: the decisions that it reads from folders after a reviewer and a file manager changed them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import ann_dirload
from tests.support.annotation_data import ANNOTATED, ROOT, id_of, image_bytes, make_dir, tree
from utils.annotation import history, loads, neighbor_dirs
from utils.annotation.neighbor_dirs import DirWriter
from utils.errors import UserError
from utils.lock import hold, lock_path

N_DIRS, N_IMAGES = 4, 5
SAMPLES = {
    id_of(f"{main}/0"): [id_of(f"{main}/{rank}") for rank in range(N_IMAGES)] for main in range(N_DIRS)
}  # no image in two directories
MAINS = list(SAMPLES)


def make_root(root: Path = ROOT, samples: dict[str, list[str]] = SAMPLES) -> None:
    with DirWriter(root, {}, "") as writer:
        for listed in samples.values():
            make_dir(writer, {id_: image_bytes(rank) for rank, id_ in enumerate(listed)})


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_root()


def folder(index: int) -> Path:
    (path,) = ROOT.glob(f"{index}_*")
    return path


def image(index: int, rank: int) -> Path:
    (path,) = folder(index).glob(f"{rank}_*")
    return path


def ids(index: int, *ranks: int) -> list[str]:
    return [SAMPLES[MAINS[index]][rank] for rank in ranks]


def dirload(*flags: object) -> list[dict[str, list[str]]]:
    assert ann_dirload.main([str(flag) for flag in flags]) == 0
    return json.loads(ANNOTATED.read_text()) if ANNOTATED.exists() else []


ALL = [{"pos": ids(index, 0, 1, 2, 3, 4), "neg": []} for index in range(N_DIRS)]


def test_what_stays_is_positive_and_what_was_deleted_negative(capsys):
    image(0, 2).unlink()
    image(0, 4).unlink()
    image(2, 1).unlink()
    expected = [
        {"pos": ids(0, 0, 1, 3), "neg": ids(0, 2, 4)},
        ALL[1],
        {"pos": ids(2, 0, 2, 3, 4), "neg": ids(2, 1)},
        ALL[3],
    ]
    assert dirload() == expected
    out = capsys.readouterr().out
    assert "loaded 4 directories, 2 of them untouched" in out
    assert "positives 17, negatives 3" in out
    assert "can be deleted" in out
    assert out.splitlines()[-1].startswith("warning: nothing was deleted in the last directory of ")


def test_a_second_run_changes_no_byte(capsys):
    image(0, 2).unlink()
    dirload()
    before = tree(Path("data"))
    capsys.readouterr()
    dirload()
    after = {name: content for name, content in tree(Path("data")).items() if not name.startswith("logs")}
    assert after == {name: content for name, content in before.items() if not name.startswith("logs")}
    assert "already annotated 4" in capsys.readouterr().out


def test_records_are_added_to_those_that_are_there():
    old = {"pos": [id_of("old")], "neg": [id_of("other")]}
    ANNOTATED.write_text(json.dumps([old]))
    assert dirload() == [old, *ALL]
    assert json.loads(Path("data/annotated.json.bak").read_text()) == [old]


def test_a_deleted_directory_is_discarded(capsys):
    shutil.rmtree(folder(1))
    assert dirload() == [ALL[0], ALL[2], ALL[3]]
    assert "discarded 1" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["delete", "empty directory", "empty file", "sub-folder"])
def test_a_directory_without_its_main_image_is_not_recorded(spoil, capsys):
    if spoil == "delete":
        image(1, 0).unlink()
    elif spoil == "empty directory":
        for rank in range(N_IMAGES):
            image(1, rank).unlink()
    elif spoil == "empty file":
        image(1, 0).write_bytes(b"")
    else:
        (folder(1) / "sub").mkdir()
        image(1, 0).rename(folder(1) / "sub" / image(1, 0).name)
    assert dirload() == [ALL[0], ALL[2], ALL[3]]
    captured = capsys.readouterr()
    assert f"not recorded: 1_{MAINS[1]}: main image " in captured.err
    assert f"; restore 0_{MAINS[1]} or delete the directory to discard it" in captured.err
    assert "not recorded: 1 folder without its main image" in captured.out
    assert "can be deleted" not in captured.out


def test_a_directory_that_is_not_listed_is_skipped_with_a_message(capsys):
    (ROOT / f"9_{id_of('stranger')}").mkdir()
    (ROOT / "notes").mkdir()
    assert dirload() == ALL
    captured = capsys.readouterr()
    assert f"9_{id_of('stranger')}: not in samples.json" in captured.err
    assert "notes: not in samples.json" in captured.err
    assert "not recorded: 2 unknown folders" in captured.out


def test_a_main_image_that_is_a_positive_elsewhere_is_loaded_with_a_message(capsys):
    old = {"pos": [id_of("old"), MAINS[1]], "neg": []}
    ANNOTATED.write_text(json.dumps([old]))
    assert dirload() == [old, *ALL]
    assert "positive of another directory" in capsys.readouterr().err


def test_a_record_of_exactly_these_samples_counts_as_loaded():
    other_order = {"pos": ids(1, 3, 0), "neg": ids(1, 4, 2, 1)}
    ANNOTATED.write_text(json.dumps([other_order]))
    assert dirload() == [other_order, ALL[0], ALL[2], ALL[3]]


def test_untouched_directories_at_the_end_are_named_last(capsys):
    image(1, 3).unlink()
    dirload()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "last 2 directories" in last
    assert f"2_{MAINS[2]} to 3_{MAINS[3]}" in last


def test_a_reviewer_who_got_to_the_end_is_not_warned(capsys):
    shutil.rmtree(folder(3))
    dirload()
    assert "warning" not in capsys.readouterr().out


JUNK = [".DS_Store", "Thumbs.db", "desktop.ini", ".directory", "ehthumbs.db", "notes.txt"]


def test_what_file_managers_leave_behind_is_no_image():
    deleted = image(0, 2)
    deleted.unlink()
    for name in [*JUNK, f"._{deleted.name}", f"{deleted.name}.xmp", f"{deleted.stem}.json", f"{deleted.name}~"]:
        (folder(0) / name).write_bytes(b"junk")
    (ROOT / ".Trash-1000" / "files").mkdir(parents=True)
    (ROOT / ".Trash-1000" / "files" / deleted.name).write_bytes(image_bytes(2))
    (ROOT / "__MACOSX" / folder(0).name).mkdir(parents=True)
    (ROOT / "__MACOSX" / folder(0).name / f"._{deleted.name}").write_bytes(b"junk")
    assert dirload()[0] == {"pos": ids(0, 0, 1, 3, 4), "neg": ids(0, 2)}


@pytest.mark.parametrize(
    "rename",
    [
        lambda path: path.with_suffix(".png"),
        lambda path: path.with_suffix(".JPEG"),
        lambda path: path.with_name(path.name.upper()),
        lambda path: path.with_name(f"good one {path.name}"),
        lambda path: path.with_name(path.name.split("_")[1]),
        lambda path: path.with_name(f"{path.stem} (1).jpg"),
        lambda path: path.with_name(f"{path.stem} - Copy.jpg"),
        lambda path: path.with_name(f"{path.stem} – Kopie.jpg"),
        lambda path: path.with_name(unicodedata.normalize("NFD", f"größer {path.name}")),
        lambda path: path.with_name("".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in path.stem) + ".jpg"),
    ],
)
def test_a_renamed_image_is_kept(rename):
    for rank in (0, 3):
        image(0, rank).rename(rename(image(0, rank)))
    assert dirload() == ALL


def test_copies_count_once_and_stand_for_the_original():
    for rank in (1, 2):
        path = image(0, rank)
        shutil.copy(path, path.with_name(f"{path.stem} (1).jpg"))
        shutil.copy(path, path.with_name(f"{path.stem} - Copy.jpg"))
        if rank == 2:
            path.unlink()
    assert dirload() == ALL


def test_a_renamed_directory_is_known_by_its_id():
    folder(1).rename(ROOT / f"zz done {MAINS[1].upper()}")
    assert dirload() == ALL


def test_symbolic_links_are_not_followed_and_could_be_anything(tmp_path, capsys):
    path = image(0, 2)
    path.rename(tmp_path / "away.jpg")
    path.symlink_to(tmp_path / "away.jpg")
    shutil.copytree(folder(1), tmp_path / "elsewhere")
    shutil.rmtree(folder(1))
    (ROOT / f"1_{MAINS[1]}").symlink_to(tmp_path / "elsewhere")
    assert dirload() == [{"pos": ids(0, 0, 1, 3, 4), "neg": []}, ALL[2], ALL[3]]
    assert "discarded 0" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["other directory", "sub-folder", "root", "empty", "folder in root"])
def test_an_image_found_elsewhere_is_neither_kept_nor_deleted(where, capsys):
    path = image(0, 2)
    if where == "empty":
        path.write_bytes(b"")
    else:
        target = {
            "other directory": folder(1),
            "sub-folder": folder(0) / "bad ones",
            "root": ROOT,
            "folder in root": ROOT / "doubtful",
        }[where]
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)
    records = dirload()
    assert records == [{"pos": ids(0, 0, 1, 3, 4), "neg": []}, *ALL[1:]]
    err = capsys.readouterr().err
    assert f"{folder(0).name}: {ids(0, 2)[0]}: " in err


def test_an_image_that_belongs_to_two_directories_is_judged_in_each(tmp_path):
    shared = id_of("shared")
    samples = {MAINS[0]: [*ids(0, 0, 1, 2), shared], MAINS[1]: [*ids(1, 0), shared, *ids(1, 1, 2)]}
    shutil.rmtree(ROOT)
    make_root(samples=samples)
    (folder(0) / f"3_{shared}.jpg").unlink()
    assert dirload() == [{"pos": ids(0, 0, 1, 2), "neg": [shared]}, {"pos": samples[MAINS[1]], "neg": []}]


def test_a_shared_image_dragged_from_one_directory_to_the_other_is_known_by_its_rank():
    shared = id_of("shared")
    samples = {MAINS[0]: [*ids(0, 0, 1, 2), shared], MAINS[1]: [*ids(1, 0), shared, *ids(1, 1, 2)]}
    shutil.rmtree(ROOT)
    make_root(samples=samples)
    (folder(0) / f"3_{shared}.jpg").rename(folder(1) / f"3_{shared}.jpg")
    assert dirload() == [{"pos": ids(0, 0, 1, 2), "neg": []}, {"pos": samples[MAINS[1]], "neg": []}]


def test_a_deleted_image_is_not_taken_for_one_that_has_its_rank_in_a_directory_with_a_gap():
    shared, main, other = id_of("shared"), MAINS[0], MAINS[1]
    shutil.rmtree(ROOT)
    with DirWriter(ROOT, {}, "") as writer:
        make_dir(writer, {main: image_bytes(0), id_of("not loaded"): None, shared: image_bytes(1)})
        make_dir(writer, {other: image_bytes(2), id_of("y"): image_bytes(3), shared: image_bytes(1)})
    image(1, 2).unlink()
    assert dirload() == [{"pos": [main, shared], "neg": []}, {"pos": [other, id_of("y")], "neg": [shared]}]


def test_a_directory_inside_another_is_reported_and_not_recorded(capsys):
    folder(1).rename(folder(0) / folder(1).name)
    assert dirload() == [ALL[0], ALL[2], ALL[3]]
    captured = capsys.readouterr()
    assert ": not directly in" in captured.err
    assert "discarded 0" in captured.out


def test_two_directories_with_one_main_image_are_reported_and_not_recorded(capsys):
    shutil.copytree(folder(1), ROOT / f"1_{MAINS[1]} - Copy")
    assert dirload() == [ALL[0], ALL[2], ALL[3]]
    assert "the same main image; keep one" in capsys.readouterr().err


def test_a_directory_that_lost_its_id_is_not_taken_for_discarded(capsys):
    folder(1).rename(ROOT / "cats")
    assert dirload() == [ALL[0], ALL[2], ALL[3]]
    captured = capsys.readouterr()
    assert "no directory has this id" in captured.err
    assert "discarded 0" in captured.out


def test_several_folders_are_loaded_together_and_images_may_move_between_them(capsys):
    half = N_DIRS // 2
    shutil.rmtree(ROOT)
    make_root(Path("a"), dict(list(SAMPLES.items())[:half]))
    make_root(Path("b"), dict(list(SAMPLES.items())[half:]))
    (moved,) = Path("a").glob("0_*/2_*")
    moved.rename(next(Path("b").glob("0_*")) / moved.name)
    assert dirload("a", "b") == [{"pos": ids(0, 0, 1, 3, 4), "neg": []}, *ALL[1:]]


# --- missing is not deleted -------------------------------------------------------------------------------------------
_PLACEHOLDERS = """.{}.icloud {}.cloud {}.nextcloud {}.owncloud {}.part {}.crdownload {}.partial {}.filepart {}.!sync
    .{}.Xy3dQz .syncthing.{}.tmp ~syncthing~{}.tmp .~{}.part {}.lnk x{}x {}abc"""
PLACEHOLDERS = _PLACEHOLDERS.split()


CONTENTS = [b"", b"placeholder", image_bytes(2)[:150], bytes(500)]


@pytest.mark.parametrize(("name", "content"), list(zip(PLACEHOLDERS, itertools.cycle(CONTENTS))))
def test_an_image_that_is_not_there_as_a_whole_is_unknown(name, content, capsys):
    path = image(0, 2)
    path.unlink()
    path.with_name(name.format(path.name)).write_bytes(content)
    assert dirload() == [{"pos": ids(0, 0, 1, 3, 4), "neg": []}, *ALL[1:]]
    out = capsys.readouterr().out
    assert f"unknown: neither positive nor negative, 1 image that may be incomplete: {folder(0).name}: " in out
    assert name.format(path.name) in out
    assert "can be deleted" not in out


@pytest.mark.parametrize("name", ["{stem}", "{stem}.", "{stem}.jpg_", ".{stem}.tmp", "{stem}.bin", "x{stem}f", "{id}"])
def test_an_image_that_lost_its_extension_is_kept_if_it_decodes_to_the_last_pixel(name, capsys):
    for rank in (0, 2):
        path = image(0, rank)
        path.rename(path.with_name(name.format(stem=path.stem, id=path.stem.split("_")[1])))
    assert dirload() == ALL
    assert "can be deleted" in capsys.readouterr().out


@pytest.mark.parametrize("n", [6, 8])
def test_the_short_names_of_windows_are_known(n):
    for rank in (1, 2):
        path = image(0, rank)
        path.rename(path.with_name(f"{ids(0, rank)[0].replace('-', '')[:n].upper()}~1.JPG"))
    path.with_name(f"{ids(0, 2)[0][:n].upper()}~1.JPG").write_bytes(image_bytes(2)[:150])
    assert dirload()[0] == {"pos": ids(0, 0, 1, 3, 4), "neg": []}


def test_what_may_hang_or_lead_away_is_not_opened(capsys):
    for rank, make in ((1, os.mkfifo), (2, os.mkdir)):
        path = image(0, rank)
        path.unlink()
        make(path.with_name(f"{path.name}.download"))
    assert dirload()[0] == {"pos": ids(0, 0, 3, 4), "neg": []}
    assert "neither positive nor negative, 2 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["._{}", "{}.xmp", "{}.XMP", "{}.json", "{}.txt", "{}.AAE", "{}.pp3", "{}_original", "{}~"]
)
def test_a_sidecar_says_nothing_whatever_its_bytes(name):
    path = image(0, 2)
    path.rename(path.with_name(name.format(path.name)))
    image(0, 3).rename(folder(0) / f"Thumbs_{image(0, 3).stem}.db")
    image(0, 4).rename(folder(0) / f"{image(0, 4).stem}_thumb.db")
    assert dirload()[0] == {"pos": ids(0, 0, 1), "neg": ids(0, 2, 3, 4)}


@pytest.mark.parametrize("trash", ["#recycle", "@Recycle", "#snapshot", "@eaDir", ".Trash-1000", "$RECYCLE.BIN"])
def test_what_lies_in_a_system_s_folder_is_deleted(trash, capsys):
    for parent in (ROOT, folder(0)):
        (parent / trash).mkdir()
    image(0, 1).rename(ROOT / trash / image(0, 1).name)
    image(0, 2).rename(folder(0) / trash / image(0, 2).name)
    assert dirload()[0] == {"pos": ids(0, 0, 3, 4), "neg": ids(0, 1, 2)}
    assert "unknown folder" not in capsys.readouterr().out


@pytest.mark.parametrize("partial", [".~tmp~", ".rsync-partial"])
def test_an_image_that_rsync_has_not_put_in_place_is_not_deleted(partial, capsys):
    (folder(0) / partial).mkdir()
    image(0, 1).rename(folder(0) / partial / image(0, 1).name)
    assert dirload()[0] == {"pos": ids(0, 0, 2, 3, 4), "neg": []}
    assert "neither positive nor negative, 1 image " in capsys.readouterr().out


def test_what_a_zip_with_backslashes_unpacks_to_is_not_discarded(capsys):
    """Windows PowerShell writes such zips; some programs then make one file "folder\\image" in the root."""
    for path in [path for index in range(N_DIRS) for path in folder(index).iterdir()]:
        path.rename(ROOT / f"{path.parent.name}\\{path.name}")
    for index in range(N_DIRS):
        next(path for path in ROOT.glob(f"{index}_*") if path.is_dir()).rmdir()
    assert dirload() == []
    assert "not recorded: 4 renamed folders" in capsys.readouterr().out
    assert read_discarded() == set()


def test_what_a_system_renames_when_it_is_deleted_is_deleted(capsys):
    """Android's trash renames in place; FUSE and NFS rename a file that a viewer has open."""
    for rank, name in enumerate(
        [f".trashed-1717000000-{image(0, 1).name}", ".fuse_hidden0000001200000001", ".nfs000a"]
    ):
        image(0, rank + 1).rename(folder(0) / name)
    image(0, 4).rename(folder(0) / f".pending-1717000000-{image(0, 4).name}")
    assert dirload()[0] == {"pos": ids(0, 0, 4), "neg": ids(0, 1, 2, 3)}
    assert "unknown" not in capsys.readouterr().out


def test_an_image_without_its_id_is_known_by_its_bytes(capsys):
    image(0, 0).rename(folder(0) / "the one.jpg")
    image(0, 2).rename(folder(0) / "DSC0001")
    image(1, 1).unlink()
    (folder(1) / "sub").mkdir()
    image(1, 2).rename(folder(1) / "sub" / "perhaps.png")
    image(2, 3).rename(ROOT / "where from.jpg")
    assert dirload() == [
        ALL[0],
        {"pos": ids(1, 0, 3, 4), "neg": ids(1, 1)},
        {"pos": ids(2, 0, 1, 2, 4), "neg": []},
        ALL[3],
    ]
    assert "set aside: neither positive nor negative, 2 images" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["edited", "cut off", "empty", "made before"])
def test_an_image_without_its_id_that_matches_none_leaves_its_directory_unrecorded(spoil, capsys):
    path = folder(0) / "IMG_1.jpg"
    image(0, 2).rename(path)
    if spoil == "made before":
        (ROOT / ".digests.json").unlink()
    else:
        path.write_bytes({"edited": image_bytes(77), "cut off": image_bytes(2)[:150], "empty": b""}[spoil])
    assert dirload() == ALL[1:]
    captured = capsys.readouterr()
    assert "not recorded: 1 folder with an image without id (put the id back)" in captured.out
    assert "can be deleted" not in captured.out
    assert ("copy it from the original folder" in captured.out) == (spoil == "made before")
    assert (
        f"{folder(0).name}: images are missing, and {path} could be these; put the ids back into the names, or "
        "move the files out" in captured.err
    )


def test_an_image_that_nobody_misses_is_no_reason_to_leave_its_directory_out(capsys):
    (folder(0) / "my dog.jpg").write_bytes(image_bytes(99))
    assert dirload() == ALL
    assert f"1 image without an id matches none of {ROOT}" in capsys.readouterr().out


def test_identical_images_of_a_collection_without_their_ids_are_unknown():
    samples = {MAINS[0]: ids(0, 0, 1, 2)}
    shutil.rmtree(ROOT)
    with DirWriter(ROOT, {}, "") as writer:
        make_dir(writer, dict(zip(samples[MAINS[0]], [image_bytes(0), image_bytes(1), image_bytes(1)])))
    image(0, 1).rename(folder(0) / "one of them.jpg")
    image(0, 2).unlink()
    assert dirload() == [{"pos": ids(0, 0), "neg": []}]


@pytest.mark.parametrize("name", ["{}.zip", ".{}", "{}.lnk", "{}.icloud"])
def test_a_directory_that_is_something_else_now_is_not_discarded(name, capsys):
    target = ROOT / name.format(folder(1).name)
    shutil.rmtree(folder(1))
    target.mkdir() if name.startswith(".") else target.write_bytes(b"PK")
    assert dirload() == [ALL[0], *ALL[2:]]
    out = capsys.readouterr().out
    assert "not recorded: 1 folder replaced by a file (put it back)" in out
    assert "discarded 0" in out
    assert "can be deleted" not in out


# --- a second look ----------------------------------------------------------------------------------------------------
def test_a_folder_loaded_too_early_is_compared_with_its_records(capsys):
    dirload()
    image(1, 2).unlink()
    image(3, 1).unlink()
    image(3, 2).rename(ROOT / image(3, 2).name)
    capsys.readouterr()
    assert dirload() == ALL
    out = capsys.readouterr().out
    assert "2 directories differ from the records: " in out
    assert f"{folder(3).name}: 5 -> 3 positives, 0 -> 1 negatives" in out
    assert "can be deleted" not in out
    assert "second look" not in out
    records = dirload("--replace")
    assert records[3] == {"pos": ids(3, 0, 3, 4), "neg": ids(3, 1)}
    assert "can be deleted" not in capsys.readouterr().out, "an image was set aside"


@pytest.mark.parametrize("at_once", [True, False])
def test_two_reviewers_of_the_same_directories_are_compared(at_once, capsys):
    for name in ("a", "b"):
        shutil.copytree(ROOT, name)
    for name, ranks in (("a", (1, 2)), ("b", (2, 3))):
        for rank in ranks:
            next(Path(name).glob(f"0_*/{rank}_*")).unlink()
    (Path("b") / folder(1).name / "maybe").mkdir()
    moved = next(Path("b").glob("1_*/4_*"))
    moved.rename(moved.parent / "maybe" / moved.name)
    expected = [{"pos": ids(0, 0, 3, 4), "neg": ids(0, 1, 2)}, *ALL[1:]]
    if not at_once:
        assert dirload("a") == expected
        assert "a is loaded; it can be deleted" in capsys.readouterr().out
    assert dirload(*(["a", "b"] if at_once else ["b"])) == expected
    out = capsys.readouterr().out
    assert "second look at 4 directories: 13 of 15 images judged alike (87%), Cohen's kappa 0.42" in out
    assert f"disagreement: {folder(0).name}: {ids(0, 1)[0]} deleted in the record, kept here" in out
    assert f"disagreement: {folder(0).name}: {ids(0, 3)[0]} kept in the record, deleted here" in out
    assert "some of b is not recorded yet" in out
    events = [json.loads(line) for line in Path("data/history.jsonl").read_text().splitlines()]
    looks = [event for event in events if "second_look" in event]
    assert looks[0]["second_look"] == {"kept": ids(0, 0, 1, 4), "deleted": ids(0, 2, 3)}
    assert looks[0]["record"] == expected[0]
    before = Path("data/history.jsonl").read_bytes()
    dirload("b")
    assert Path("data/history.jsonl").read_bytes() == before, "a look is noted once"
    assert dirload("--replace", "b")[:2] == [
        {"pos": ids(0, 0, 1, 4), "neg": ids(0, 2, 3)},
        {"pos": ids(1, 0, 1, 2, 3), "neg": []},
    ]


def test_two_reviewers_who_agree_leave_nothing_to_do(capsys):
    for name in ("a", "b"):
        shutil.copytree(ROOT, name)
        next(Path(name).glob("0_*/1_*")).unlink()
    dirload("a", "b")
    out = capsys.readouterr().out
    assert "second look at 4 directories: 16 of 16 images judged alike (100%), Cohen's kappa 1.00" in out
    assert "b: it was recorded before; it can be deleted" in out


def test_a_second_reviewer_who_returns_to_an_earlier_verdict_is_noted():
    shutil.copytree(ROOT, "b")
    dirload()
    path = next(Path("b").glob("0_*/1_*"))
    content = path.read_bytes()
    for change in (path.unlink, lambda: path.write_bytes(content), path.unlink, lambda: None):
        change()
        dirload("b")
    looks = [event for event in history.read_events("data/history.jsonl") if "second_look" in event]
    deleted = [look["second_look"]["deleted"] for look in looks if look["main"] == MAINS[0]]
    assert deleted == [ids(0, 1), [], ids(0, 1)]


def test_a_directory_that_one_reviewer_discards_and_another_keeps_is_recorded_with_a_word(capsys):
    for name in ("a", "b"):
        shutil.copytree(ROOT, name)
    shutil.rmtree(Path("a") / folder(1).name)
    shutil.rmtree(Path("b") / folder(2).name)
    assert sorted(dirload("a", "b"), key=str) == sorted(ALL, key=str)
    out = capsys.readouterr().out
    assert "2 directories deleted here, but recorded before or from another folder (records stay): " in out
    assert "can be deleted" not in out
    assert read_discarded() == set()


def test_images_set_aside_in_one_copy_are_still_deleted_in_the_other():
    for name in ("a", "b"):
        shutil.copytree(ROOT, name)
    (Path("a") / folder(0).name / "maybe").mkdir()
    moved = next(Path("a").glob("0_*/2_*"))
    moved.rename(moved.parent / "maybe" / moved.name)
    next(Path("b").glob("0_*/2_*")).unlink()
    assert dirload("b", "a")[0] == {"pos": ids(0, 0, 1, 3, 4), "neg": ids(0, 2)}


# --- doubts, progress and what is left out ----------------------------------------------------------------------------
def test_images_moved_into_a_folder_are_set_aside(capsys):
    (folder(0) / "maybe").mkdir()
    for rank in (1, 2):
        image(0, rank).rename(folder(0) / "maybe" / image(0, rank).name)
    assert dirload()[0] == {"pos": ids(0, 0, 3, 4), "neg": []}
    out = capsys.readouterr().out
    assert "set aside: neither positive nor negative, 2 images moved into another folder: " in out
    assert "can be deleted" not in out


def test_a_folder_that_is_named_twice_is_loaded_once():
    (folder(0) / "unsure").mkdir()
    image(0, 2).rename(folder(0) / "unsure" / image(0, 2).name)
    dirs = [str(ROOT), str(ROOT.absolute())]
    assert dirload(*dirs) == [{"pos": ALL[0]["pos"][:2] + ALL[0]["pos"][3:], "neg": []}, *ALL[1:]]


def test_untouched_directories_can_be_left_out(capsys):
    image(0, 1).unlink()
    (folder(2) / "maybe").mkdir()
    image(2, 1).rename(folder(2) / "maybe" / image(2, 1).name)
    image(3, 2).rename(image(3, 2).with_name(f".{image(3, 2).name}.icloud"))
    (folder(3) / f".{3}").touch()
    next(folder(3).glob(".2_*")).write_bytes(b"")
    records = dirload("--skip-untouched")
    assert records == [{"pos": ids(0, 0, 2, 3, 4), "neg": ids(0, 1)}, {"pos": ids(2, 0, 2, 3, 4), "neg": []}]
    out = capsys.readouterr().out
    assert "2 untouched directories left out (--skip-untouched)" in out
    assert "can be deleted" not in out
    assert "warning" not in out
    assert len(dirload()) == 4


@pytest.mark.parametrize(("gone", "word"), [((2, 3), "the last 2"), ((0, 1, 2), "most"), ((0, 1, 2, 3), "all")])
def test_directories_that_are_gone_in_numbers_are_discarded_with_a_doubt(gone, word, capsys):
    for index in gone:
        shutil.rmtree(folder(index))
    dirload()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"warning: {word} directories")
    assert "if the copy is not complete" in last
    assert read_discarded() == {MAINS[index] for index in gone}


def test_the_end_of_a_copy_is_also_the_end_as_a_program_sorts_names(capsys):
    many = {id_of(f"{main}"): [id_of(f"{main}"), id_of(f"{main}/1")] for main in range(12)}
    make_root(Path("many"), many)
    for index in (8, 9):
        shutil.rmtree(next(Path("many").glob(f"{index}_*")))
    for name in ("10_", "11_"):
        image_ = next(next(Path("many").glob(f"{name}*")).glob("1_*"))
        image_.unlink()
    dirload("many")
    assert "warning: the last 2 directories of many are missing" in capsys.readouterr().out


@pytest.mark.parametrize("half", ["images", "directories"])
def test_half_a_copy_is_voiced(half, capsys):
    for index in range(N_DIRS):
        for rank in (3, 4, *((0, 1, 2) if half == "directories" and index > 1 else ())):
            image(index, rank).unlink()
    dirload()
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("warning: in ")
    assert "at least the last half of the images is missing" in out[-1]
    assert any("2 directories of data/dirrify without any image" in line for line in out) == (half == "directories")


@pytest.mark.parametrize("other", ["other directories", "longer lists", "shorter lists"])
def test_the_list_of_another_run_records_nothing(other, capsys):
    samples = {
        "other directories": {id_of(f"b/{i}"): [id_of(f"b/{i}")] for i in range(4)},
        "longer lists": {main: [*listed, id_of(f"more of {main}")] for main, listed in SAMPLES.items()},
        "shorter lists": {main: listed[:3] for main, listed in SAMPLES.items()},
    }[other]
    (ROOT / "samples.json").write_text(json.dumps(samples))
    assert dirload() == []
    out = capsys.readouterr().out
    assert "not recorded: 1 folder with another run's samples.json" in out
    warning = f"warning: {ROOT / 'samples.json'} is from another run, so nothing of {ROOT} is recorded"
    assert out.splitlines()[-1] == warning
    assert "can be deleted" not in out
    assert read_discarded() == set()


def test_a_dry_run_is_the_progress_report(capsys):
    for index, seconds in ((0, 0), (1, 60), (2, 180)):
        if index:
            image(index, 1).unlink()
        else:
            (folder(0) / "maybe").mkdir()
            image(0, 1).rename(folder(0) / "maybe" / image(0, 1).name)
        os.utime(folder(index), (1_700_000_000 + seconds,) * 2)
    dirload("--dry-run")
    line = f"{ROOT}: 3 of 4 directories reviewed, 0 discarded (75%), 1 untouched so far"
    assert f"{line}; at 40 an hour the rest takes about 2 minutes" in capsys.readouterr().out.splitlines()
    shutil.rmtree(folder(0))
    dirload("--dry-run")
    assert (
        f"{ROOT}: 2 of 4 directories reviewed, 1 discarded (75%), 1 untouched so far"
        in capsys.readouterr().out.splitlines()
    )


# --- files as people's editors leave them -----------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_in_an_editor_s_encoding_are_read(encoding):
    old = {"pos": [id_of("old")], "neg": []}
    ANNOTATED.write_bytes(json.dumps([old], indent=1).replace("\n", "\r\n").encode(encoding))
    text = (ROOT / "samples.json").read_text()
    (ROOT / "samples.json").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert dirload() == [old, *ALL]


def test_records_of_other_tools_are_carried_along_and_counted(capsys):
    others = [{"pos": [], "neg": [id_of("x")]}, {"label": "cat"}, {"pos": ["img_1"], "neg": []}, "a note"]
    mine = {"pos": ids(0, 0, 1, 2, 3, 4), "neg": [], "by": "Ada"}
    ANNOTATED.write_text(json.dumps([*others, mine]))
    image(0, 1).unlink()
    assert dirload("--replace") == [*others, {**mine, "pos": ids(0, 0, 2, 3, 4), "neg": ids(0, 1)}, *ALL[1:]]
    assert "holds 4 records and 4 of other tools" in capsys.readouterr().out
    assert dirload("--undo") == [*others, mine]


def test_read_me_is_no_image_and_no_sidecar(capsys):
    assert (ROOT / "READ ME.txt").exists()
    (folder(0) / "READ ME.txt").write_text("hello")
    assert dirload() == ALL
    assert "not recorded" not in capsys.readouterr().out


def test_dry_run_changes_nothing(capsys):
    image(0, 2).unlink()
    dirload("--dry-run")
    assert not ANNOTATED.exists()
    assert f"{folder(0).name}: 4 positives, 1 negative" in capsys.readouterr().out


def test_names_are_shown_as_they_are_but_cannot_move_the_cursor(capsys):
    folder(0).rename(ROOT / f"größer \x1b[2J {MAINS[0]}")
    dirload("--dry-run")
    assert f"größer \\x1b[2J {MAINS[0]}: 5 positives" in capsys.readouterr().out


def test_messages_begin_on_lines_of_their_own(capsys):
    image(0, 0).unlink()
    image(1, 0).unlink()
    dirload()
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("not recorded: ") for line in lines) == 2
    assert not [line for line in lines if "\\n" in line]


def test_a_dry_run_advises_to_finish_and_not_to_undo(capsys):
    dirload("--dry-run")
    last = capsys.readouterr().out.splitlines()[-1]
    assert "review it before loading" in last
    assert "--undo" not in last


def test_images_in_another_directory_are_counted_with_what_to_do(capsys):
    for rank in (1, 2):
        image(0, rank).rename(folder(1) / image(0, rank).name)
    dirload()
    out = capsys.readouterr().out
    assert "misplaced (move back): neither positive nor negative, 2 images in another directory: " in out


def test_what_replace_changes_is_named(capsys):
    dirload()
    for rank in (1, 2):
        image(3, rank).unlink()
    dirload("--dry-run", "--replace")
    changed = f"{folder(3).name}: 5 -> 3 positives, 0 -> 2 negatives"
    assert f"1 record would change: {changed}" in capsys.readouterr().out


def test_nothing_new_is_said(capsys):
    dirload()
    capsys.readouterr()
    dirload()
    assert f"nothing new in {ROOT}: it was recorded before; it can be deleted" in capsys.readouterr().out


def test_a_zip_and_a_folder_without_its_list_are_told_with_the_remedy(tmp_path):
    Path("reviewed.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"reviewed.zip is a file: unzip it and give the folder"):
        dirload("reviewed.zip")
    Path("outer").mkdir()
    shutil.copytree(ROOT, "outer/dirrify")
    with pytest.raises(UserError, match=r"no samples.json in outer; .*outer.dirrify has one: give that folder"):
        dirload("outer")
    with pytest.raises(UserError, match=r"no samples.json in .*; .*dirrify has one: give that folder"):
        dirload(folder(0))
    with pytest.raises(UserError, match=r"no samples.json in empty; copy it from the original folder"):
        Path("empty").mkdir()
        shutil.rmtree(ROOT)
        dirload("empty")


def test_replace_reads_every_directory_again(capsys):
    old = {"pos": [id_of("old")], "neg": []}
    ANNOTATED.write_text(json.dumps([old]))
    dirload()
    image(1, 2).unlink()
    shutil.rmtree(folder(2))
    assert dirload() == [old, *ALL], "not without the switch"
    assert dirload("--replace") == [old, ALL[0], {"pos": ids(1, 0, 1, 3, 4), "neg": ids(1, 2)}, ALL[2], ALL[3]]
    out = capsys.readouterr().out
    assert f"1 directory deleted here, but recorded before or from another folder (records stay): 2_{MAINS[2]}" in out


def test_undo_takes_back_the_last_load_and_then_the_one_before():
    dirload()
    first = ANNOTATED.read_bytes()
    image(0, 1).unlink()
    dirload("--replace")
    second = ANNOTATED.read_bytes()
    assert dirload("--undo") == json.loads(first)
    assert ANNOTATED.read_bytes() == first
    assert Path("data/annotated.json.undone").read_bytes() == second
    assert dirload("--undo") == []
    with pytest.raises(UserError, match="nothing to undo"):
        dirload("--undo")


def test_undo_of_the_first_load_leaves_an_empty_list(capsys):
    dirload()
    assert dirload("--undo") == []
    assert "the last load is undone: 4 records removed" in capsys.readouterr().out


def read_discarded() -> set[str]:
    return history.discarded(history.read_decisions(Path("data/history.jsonl")))


def test_undo_of_a_load_that_only_discards_keeps_older_records():
    shutil.copytree(ROOT, "whole")
    shutil.rmtree(folder(3))
    shutil.rmtree(ROOT / f"3_{MAINS[3]}", ignore_errors=True)
    three = dirload()
    assert read_discarded() == {MAINS[3]}
    make_root(Path("b"), {id_of("b/0"): [id_of("b/0")], id_of("b/1"): [id_of("b/1")]})
    shutil.rmtree(Path("b") / f"0_{id_of('b/0')}")
    shutil.rmtree(Path("b") / f"1_{id_of('b/1')}")
    assert dirload("b") == three
    assert read_discarded() == {MAINS[3], id_of("b/0"), id_of("b/1")}
    assert dirload("--undo") == three
    assert read_discarded() == {MAINS[3]}
    assert dirload("--undo") == []
    assert read_discarded() == set()


def test_undo_of_a_kept_directory_that_was_discarded_before_leaves_it_discarded(capsys):
    shutil.copytree(folder(1), "aside")
    shutil.rmtree(folder(1))
    dirload()
    shutil.copytree("aside", ROOT / f"1_{MAINS[1]}")
    assert len(dirload()) == 4
    assert f"1 directory discarded before and recorded now: {folder(1).name}" in capsys.readouterr().out
    assert read_discarded() == set()
    assert len(dirload("--undo")) == 3
    assert read_discarded() == {MAINS[1]}


def test_undo_keeps_what_others_added_and_edited_since(capsys):
    dirload()
    records = json.loads(ANNOTATED.read_text())
    records[1]["neg"] = [id_of("by hand")]
    ANNOTATED.write_text(json.dumps([*records, {"label": "cat"}]))
    assert dirload("--undo") == [records[1], {"label": "cat"}]
    assert "1 record of that load edited or missing since: left as found" in capsys.readouterr().out


def test_undo_without_a_history_is_one_step():
    dirload("--ann-history-path", "")
    image(0, 1).unlink()
    dirload("--replace", "--ann-history-path", "")
    assert dirload("--undo", "--ann-history-path", "") == ALL
    with pytest.raises(UserError, match="nothing to undo"):
        dirload("--undo", "--ann-history-path", "")


def test_undo_of_a_load_that_is_not_in_the_history_leaves_the_one_before():
    dirload()
    image(0, 1).unlink()
    dirload("--replace", "--ann-history-path", "")
    assert dirload("--undo") == ALL


def test_undo_of_a_load_of_the_version_before_is_one_step():
    dirload()
    events = [json.loads(line) for line in Path("data/history.jsonl").read_text().splitlines()]
    old = [{key: event[key] for key in ("root", "main", "kept", "deleted", "time")} for event in events]
    Path("data/history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in old))
    assert dirload("--undo") == []
    with pytest.raises(UserError, match="nothing to undo"):
        dirload("--undo")


def test_two_annotated_data_with_one_history_are_undone_apart():
    dirload()
    make_root(Path("b"), {id_of("b/0"): [id_of("b/0")]})
    dirload("--annotated-data-path", "data/other.json", "b")
    assert dirload("--undo") == []
    assert len(json.loads(Path("data/other.json").read_text())) == 1


def test_a_load_that_was_interrupted_before_its_records_is_no_load(monkeypatch):
    make_root(Path("b"), {id_of("b/0"): [id_of("b/0")]})
    dirload("b")
    shutil.rmtree(folder(3))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loads, "write_items", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        dirload()
    assert len(json.loads(ANNOTATED.read_text())) == 1
    assert len(dirload()) == 4
    assert read_discarded() == {MAINS[3]}
    assert len(dirload("--undo")) == 1
    assert read_discarded() == set()
    assert dirload("--undo") == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '"x"',
    ],
)
def test_malformed_annotated_data_is_one_line_and_nothing_changes(content):
    ANNOTATED.write_text(content)
    with pytest.raises(UserError) as error:
        dirload()
    assert "\n" not in str(error.value)
    assert ANNOTATED.read_text() == content


@pytest.mark.parametrize("content", [None, "[", "[]", '{"../x": ["../x"]}', f'{{"{MAINS[0]}": ["{MAINS[1]}"]}}'])
def test_missing_or_malformed_samples_are_one_line(content):
    if content is None:
        (ROOT / "samples.json").unlink()
    else:
        (ROOT / "samples.json").write_text(content)
    with pytest.raises(UserError) as error:
        dirload()
    assert "\n" not in str(error.value)
    assert not ANNOTATED.exists()


def test_a_missing_folder_is_one_line():
    shutil.rmtree(ROOT)
    with pytest.raises(UserError, match=r"data.dirrify does not exist"):
        dirload()


def test_it_imports_nothing_heavy():
    heavy = ("numpy", "chromadb", "torch", "PIL", "requests")
    code = f"import sys, ann_dirload; print([name for name in {heavy} if name in sys.modules])"
    repository = Path(ann_dirload.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_two_at_a_time_are_one_too_many():
    with hold(lock_path(ANNOTATED), "annotated data"), pytest.raises(UserError, match=r"in use by pid \d+ on .* since"):
        dirload()
    assert not ANNOTATED.exists()


def test_a_folder_that_is_being_made_is_waited_for(monkeypatch):
    monkeypatch.setattr(ann_dirload, "WAIT_S", 0.1)
    (ROOT / neighbor_dirs.MARKER).write_text("{}")
    with hold(lock_path(ROOT), str(ROOT)), pytest.raises(UserError, match=r"dirrify is in use by pid"):
        dirload()


def test_a_folder_that_was_left_unfinished_is_read_as_it_is(capsys):
    (ROOT / neighbor_dirs.MARKER).write_text("{}")
    assert dirload() == ALL
    assert "is not finished: run python ann_dirrify.py to continue it" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(monkeypatch, call):
    dirload()
    before = ANNOTATED.read_bytes()
    image(0, 1).unlink()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "annotated.json")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, fail)
        dirload("--replace")
    assert ANNOTATED.read_bytes() == before
    assert not [path for path in Path("data").iterdir() if path.name.endswith(".tmp")]
    assert dirload("--replace")[0]["neg"] == ids(0, 1)
