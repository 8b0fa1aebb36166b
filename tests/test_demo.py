"""The demo as a newcomer runs it, with three photos instead of all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import demo
from tests.conftest import ROOT

FOLDER = Path("data/demo")


def run_demo(cwd, *args):
    command = [sys.executable, str(ROOT / "tests" / "demo.py"), "--photos", "3", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def done(tmp_path_factory, offline_model_path):
    """A run, and its folder, in which an earlier run has made the model."""
    cwd = tmp_path_factory.mktemp("demo")
    shutil.copytree(offline_model_path, cwd / FOLDER / demo.MODEL)
    (cwd / FOLDER / demo.MARKER).touch()
    return run_demo(cwd), cwd


@pytest.fixture
def again(done, tmp_path, monkeypatch):
    """A copy of this run's files that a test may change."""
    shutil.copytree(done[1], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def test_runs_through_and_annotates_what_the_reviewer_decided(done):
    result, cwd = done
    assert result.returncode == 0, result.stdout + result.stderr
    annotated = json.loads((cwd / FOLDER / "annotated.json").read_text())
    assert annotated
    for record in annotated:
        assert list(record) == ["pos", "neg"]
        assert record["pos"] and record["neg"]  # more neighbors than a photo has variations
    assert "precision@5" in result.stdout
    assert (cwd / FOLDER / "export" / "triplets.train.csv").read_text().startswith("anchor,positive,negative\n")
    assert (cwd / FOLDER / "report" / "report.html").exists()
    assert "embed.py --clip-model-name local-dir:data/demo/model" in result.stdout.replace("\\", "/")


def test_the_reviewer_may_be_a_person(again, capsys):
    (FOLDER / "annotated.json").unlink()
    [kept, *_] = sorted(sorted((FOLDER / "dirrify").glob("0_*"))[0].glob("[1-9]_*"))
    kept.unlink()
    assert demo.say_how_to_review(FOLDER) == 0
    subprocess.run(capsys.readouterr().out.splitlines()[-1], shell=True, check=True, capture_output=True)
    annotated = json.loads((FOLDER / "annotated.json").read_text())
    assert kept.stem.partition("_")[2] in annotated[0]["neg"]


def test_it_starts_afresh_and_leaves_what_is_not_its_own(again):
    (FOLDER / "notes.txt").write_text("mine")
    demo.start_afresh(FOLDER)
    names = {path.name for path in FOLDER.iterdir() if not path.name.startswith(".")}  # but for locks
    assert names == {"notes.txt", demo.MARKER, demo.MODEL}


def test_touches_no_folder_of_others(tmp_path):
    (tmp_path / "formatted.json").write_text("[]")
    result = run_demo(tmp_path, str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["formatted.json"]
