"""embed.py with a folder of images, and the later stages, which read its files in place."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import RunScript
from tests.stages.test_embed import summary
from tests.support.image_files import heic
from utils.items.formatted import restore_item
from utils.store import collection as collections


@pytest.fixture
def folder(tmp_path: Path, photos) -> Path:
    """Eight photos, two of them in a folder below, and one of them HEIC."""
    for number, photo in enumerate(photos[:8]):
        path = (
            tmp_path / "photos" / ("Kreta 2019" if number < 2 else "") / f"ä{number}#.{photo.name.rpartition('.')[2]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        data = heic(Image.open(io.BytesIO(photo.data)).convert("RGB")).getvalue() if number == 7 else photo.data
        path.write_bytes(data)  # a name's extension decides nothing
        os.utime(path, ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    return tmp_path / "photos"


def paths_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def stored(tmp_path: Path, store: str = "data/chroma") -> dict[str, tuple[dict, np.ndarray]]:
    """id -> item and vector."""
    with collections.reading(tmp_path / store, "images") as collection:
        ids = collections.read_ids(collection)
        items = map(restore_item, collections.read_metadata(collection, ids))
        return dict(zip(ids, zip(items, collections.read_vectors(collection, ids))))


def id_of(path: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path))


def test_a_folder_from_first_run_to_export(tmp_path: Path, run_here: RunScript, folder: Path, offline_model_name: str):
    model = ["--clip-model-name", offline_model_name, "--precision", "fp32"]
    first = run_here("embed.py", folder, *model)
    assert first.stdout.startswith(summary(8, 0, 0, 0, 0, 0)), first.stderr
    assert not (tmp_path / "data/images").exists(), "files on this machine are not copied"
    assert {item["url"] for item, _ in stored(tmp_path).values()} == {*map(str, paths_of(folder))}
    assert stored(tmp_path)[id_of("Kreta 2019/" + paths_of(folder / "Kreta 2019")[0].name)][0]["folder"] == "Kreta 2019"

    moved = folder.rename(tmp_path / "moved photos")
    lost = run_here("ann_dirrify.py")
    assert (lost.returncode, "(bad_url 8)" in lost.stdout) == (1, True), lost.stderr
    assert "What helps: python embed.py FOLDER, if the folder was moved, more images" in lost.stdout
    again = run_here("embed.py", moved, *model, "--device", "none such")
    assert again.stdout.startswith("8 files were moved; the stored url is updated\n" + summary(0, 8, 0, 0, 0, 0))
    main = paths_of(moved)[3].name
    cfg = ["--ann-sampler-name", "ids", "--ann-sampler-cfg", json.dumps({"ids": [main, "Kreta 2019/none"]})]
    made = run_here("ann_dirrify.py", "--ann-dirrify-ndirs", "1", "--ann-dirrify-nnearest", "5", *cfg)
    assert made.returncode == 0, made.stderr
    (shown,) = [path for path in (tmp_path / "data/dirrify").iterdir() if path.is_dir()]
    assert len(list(shown.iterdir())) == 6 and shown.name.endswith(id_of(main))
    for image in sorted(shown.iterdir())[4:]:
        image.unlink()
    assert run_here("ann_dirload.py").returncode == 0
    exported = run_here("ann_export.py", "--ann-export-split", '{"train": 1}')
    assert exported.returncode == 0, exported.stderr
    with (tmp_path / "data/export/triplets.train.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in list(csv.reader(file))[1:] for cell in row]
    assert cells and {Path(cell).parent for cell in cells} <= {moved, moved / "Kreta 2019"}
    report = run_here("ann_report.py")
    assert report.returncode == 0 and "shown without picture 0" in report.stdout, report.stderr


def test_a_changed_file_is_named_and_embedded_again_only_if_asked(
    tmp_path: Path, run_here: RunScript, folder: Path, photos, offline_model_name: str
):
    model = ["--clip-model-name", offline_model_name, "--precision", "fp32"]
    assert run_here("embed.py", folder, *model).returncode == 0
    before = stored(tmp_path)
    path = paths_of(folder)[4]
    path.write_bytes(photos[20].data)
    named = run_here("embed.py", folder, *model)
    finding = f"1 file differs from what was embedded under the same name; the first is {path}; --refresh-changed"
    assert finding in named.stdout and summary(0, 8, 0, 0, 0, 0) in named.stdout
    assert finding in run_here("embed.py", folder, *model, "--refresh-metadata").stdout, "it stays so"
    refreshed = run_here("embed.py", folder, *model, "--refresh-changed")
    assert "1 file changed since the last embedding, and will be embedded again" in refreshed.stdout
    assert summary(1, 7, 0, 0, 0, 0) in refreshed.stdout
    after = stored(tmp_path)
    assert after.keys() == before.keys()
    differing = {id_ for id_ in after if not np.allclose(after[id_][1], before[id_][1], atol=1e-5)}
    assert differing == {id_of(path.name)}
    assert run_here("embed.py", folder, *model).stdout.startswith(summary(0, 8, 0, 0, 0, 0))
    assert run_here("embed.py", folder, *model, "--verify").returncode == 0

    other = tmp_path / "other"
    shutil.copytree(folder / "Kreta 2019", other)  # its own files, and one of a name that is there
    (other / path.name).write_bytes(photos[21].data)
    mixed = run_here("embed.py", other, *model)
    finding = f"1 file differs from what was embedded under the same name; the first is {other / path.name};"
    assert finding in mixed.stdout and summary(2, 1, 0, 0, 0, 0) in mixed.stdout


@pytest.mark.skipif(os.name == "nt", reason="no way to make a folder that is not readable")
def test_records_of_a_folder_that_is_not_readable_are_not_pruned(
    tmp_path: Path, run_here: RunScript, folder: Path, offline_model_name: str
):
    flags = ["--clip-model-name", offline_model_name, "--precision", "fp32"]
    assert run_here("embed.py", folder, *flags).returncode == 0
    shutil.rmtree(folder / "Kreta 2019")
    parent = os.open(folder, os.O_RDONLY)
    for _ in range(25):  # the path becomes longer than the system allows, which binds root, too
        os.mkdir("x" * 200, dir_fd=parent)
        parent = os.open("x" * 200, os.O_RDONLY, dir_fd=parent)
    before = stored(tmp_path)
    pruning = run_here("embed.py", folder, *flags, "--prune")
    assert pruning.returncode == 2 and stored(tmp_path).keys() == before.keys()
    expected = "--prune would remove the records of folders that are not readable now: 1 folder left out: not readable"
    assert expected in pruning.stderr


def test_a_csv_of_the_same_files_gives_the_same_collection(
    tmp_path: Path, run_here: RunScript, folder: Path, offline_model_name: str
):
    """Of JSON forms, tests/items/test_sources.py shows that they give the same items."""
    items = [{"url": str(path), "name": path.name, "number": n} for n, path in enumerate(paths_of(folder))]
    with (tmp_path / "list").open("w", newline="", encoding="utf-16") as file:
        writer = csv.DictWriter(file, ["number", "url", "name"])
        writer.writeheader()
        writer.writerows(items)
    found = []
    for name, flags in (("photos", []), ("list", ["--download-allow-local"])):
        args = ["--chromadb-path", f"{name}.chroma", "--clip-model-name", offline_model_name, "--precision", "fp32"]
        done = run_here("embed.py", name, *args, *flags)
        assert done.stdout.startswith(summary(8, 0, 0, 0, 0, 0)), done.stderr
        found.append({item["url"]: (item, v) for item, v in stored(tmp_path, f"{name}.chroma").values()})
    for item in items:
        (of_folder, vector), (of_list, same) = (one[item["url"]] for one in found)
        assert of_list == item and of_folder["name"] == item["name"]
        assert (vector == same).all()


def test_local_files_that_embed_was_allowed_to_read_are_found_by_later_stages(
    tmp_path: Path, run_here: RunScript, folder: Path, offline_model_name: str
):
    (tmp_path / "list").write_text("\n".join(map(str, paths_of(folder))))
    model = ["--clip-model-name", offline_model_name, "--precision", "fp32"]
    assert run_here("embed.py", "list", *model, "--download-allow-local").returncode == 0
    made = run_here("ann_dirrify.py", "--ann-dirrify-ndirs", "1", "--ann-dirrify-nnearest", "5")
    assert made.returncode == 0 and made.stdout.startswith("1 directory with 6 images"), made.stdout
    (tmp_path / "more").write_text(f"{folder.parent}/other.jpg\n")
    more = run_here("embed.py", "more", *model)
    assert more.returncode == 2 and "allows them" in more.stderr, "the next list must be allowed anew"


def test_naming_a_folder_lets_no_list_reach_its_files_or_their_neighbors(
    tmp_path: Path, run_here: RunScript, folder: Path
):
    names = paths_of(folder)
    folder.rename(tmp_path / "away")
    folder.mkdir()
    assert run_here("embed.py", folder).returncode == 0, "it holds nothing, and is named"
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    (tmp_path / "list").write_text(f"{names[0]}\n{folder}/../other/a.jpg\n")
    listed = run_here("embed.py", "list")
    assert listed.returncode == 2 and "2 items on this machine" in listed.stderr
