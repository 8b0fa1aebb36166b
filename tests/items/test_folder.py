from __future__ import annotations

import os
import unicodedata
import uuid
from pathlib import Path

import pytest

from tests.support.annotation_data import image_bytes
from utils.errors import ImageError
from utils.images import formats
from utils.items.folder import is_same_file, named_folders, note_named
from utils.items.sources import Source, open_source

JPEG, PNG, WEBP = (image_bytes(1, format_) for format_ in ("JPEG", "PNG", "WEBP"))


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def names(source: Source) -> list[str]:
    return ["/".join(filter(None, (item["folder"], item["name"]))) for item in source.read()]


def test_every_image_in_and_below_a_folder_is_an_item_told_by_its_bytes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(formats, "can_read_heif", lambda: False)
    files = {"b.jpg": JPEG, "a.txt": PNG, "no extension": WEBP, "sub/deep/c 1.JPG": JPEG, "sub/a#b%20?.png": PNG}
    others = {"note.jpg": b"text", "empty.png": b"", "sub/film.mp4": b"\0\0\0\x18ftypmp42", "x.svg": b"<svg/>"}
    hidden = {".a.jpg": JPEG, ".git/b.jpg": JPEG, "__MACOSX/c.jpg": JPEG, "sub/@eaDir/d.jpg": JPEG}
    heic = {"IMG_1.HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "sub/IMG_2.jpg": b"\0\0\0\x18ftypmif1\0\0\0\0"}
    source = open_source(fill(tmp_path / "photos", files | others | hidden | heic))
    assert names(source) == ["a.txt", "b.jpg", "no extension", "sub/a#b%20?.png", "sub/deep/c 1.JPG"]
    assert names(source) == names(source), "again"
    first, *_, last = source.read()
    path = tmp_path / "photos/sub/deep/c 1.JPG"
    facts = {"size_bytes": len(JPEG), "mtime_ns": path.stat().st_mtime_ns}
    assert last == {"url": str(path), "folder": "sub/deep", "name": "c 1.JPG", **facts}
    assert (first["folder"], first["name"]) == ("", "a.txt")
    heic_note, other_note = source.notes
    assert heic_note.startswith("2 HEIC images left out: pip install pillow-heif makes HEIC readable")
    assert other_note == "4 files left out: no image"


def test_review_copies_and_thumbnails_of_later_stages_are_not_taken_for_new_images(tmp_path: Path):
    id_ = "0b5c2a51-8f0e-5d6b-9a53-111111111111"
    made = {f"data/dirrify/12_{id_}/0_{id_}.jpg": JPEG, f"data/dirrify/12_{id_}/maybe/1_{id_}.jpg": JPEG}
    made |= {"data/report/report.json": b"{}", f"data/report/thumbnails/0b/{id_}.jpg": JPEG}
    own = {"a.jpg": JPEG, f"{id_}/b.jpg": JPEG, f"c/0_{id_}.jpg": JPEG, "thumbnails/d.jpg": JPEG}
    assert sorted(names(open_source(fill(tmp_path, made | own)))) == sorted(own)
    assert len(names(open_source(tmp_path / f"data/dirrify/12_{id_}"))) == 2, "named explicitly"


def test_the_id_is_that_of_the_relative_path_wherever_the_folder_lies(tmp_path: Path):
    name = "Straße/Mu\u0308ller.jpg"  # as a Mac writes it
    ids = []
    for place in ("one", "an other/place"):
        source = open_source(fill(tmp_path / place, {name: JPEG}), id_field="sku")
        (item,) = source.read()
        ids.append(source.identify(item))
        assert Path(item["url"]).read_bytes() == JPEG
        assert (item["folder"], item["name"]) == ("Straße", "Müller.jpg")
    assert ids == [uuid.uuid5(uuid.NAMESPACE_URL, unicodedata.normalize("NFC", name))] * 2


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="names are always Unicode there")
def test_a_name_that_is_not_unicode_is_a_bad_record(tmp_path: Path):
    (tmp_path / os.fsdecode(b"\xe4.jpg")).write_bytes(JPEG)
    source = open_source(tmp_path)
    (item,) = source.read()
    with pytest.raises(ImageError, match="bad_record: its path is not Unicode"):
        source.identify(item)


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
def test_pipes_broken_links_and_loops_of_links_do_no_harm(tmp_path: Path):
    fill(tmp_path, {"a.jpg": JPEG})
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    assert names(open_source(tmp_path)) == ["a.jpg", "gone.jpg", "link.jpg"], "the broken link fails, and is listed"


def test_a_file_that_is_added_during_a_run_changes_nothing(tmp_path: Path):
    source = open_source(fill(tmp_path, {"b.jpg": JPEG}))
    fill(tmp_path, {"a.jpg": JPEG})
    assert names(source) == ["b.jpg"]


def test_the_same_file_has_its_size_and_time(tmp_path: Path):
    one = {"size_bytes": 5, "mtime_ns": 10_000_000_123}
    assert is_same_file(one, dict(one))
    assert not is_same_file(one, {**one, "size_bytes": 6})
    assert not is_same_file(one, {**one, "mtime_ns": 10_000_000_124})
    assert is_same_file(one, {**one, "mtime_ns": 10_000_000_000}), "a file system of whole seconds"
    assert not is_same_file({}, one)
    assert not is_same_file({}, {})


def test_named_folders_are_remembered_beside_the_store(tmp_path: Path):
    assert named_folders(tmp_path / "chroma") == ()
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        note_named(tmp_path / "chroma", tmp_path / name)
    assert named_folders(tmp_path / "chroma") == (str(tmp_path / "a"), str(tmp_path / "b"))
