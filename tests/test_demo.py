"""The demo as a newcomer runs it, with four photos instead of all."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.demo import FILES, MARKER


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """demo(*args): a run in one and the same folder."""
    folder = tmp_path_factory.mktemp("demo")

    def run(*args):
        command = [sys.executable, str(ROOT / "tests" / "demo.py"), "--photos", "4", *args]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        return result, folder / "data" / "demo"

    return run


def test_runs_through_and_annotates_what_the_reviewer_decided(demo):
    result, folder = demo()
    assert result.returncode == 0, result.stdout + result.stderr
    annotated = json.loads((folder / FILES["--annotated-data-path"]).read_text())
    assert annotated
    for record in annotated:
        assert list(record) == ["pos", "neg"]
        assert record["pos"] and record["neg"]  # more neighbors than a photo has variations
    assert "precision@5" in result.stdout
    assert (folder / "export" / "triplets.train.csv").read_text().startswith("anchor,positive,negative\n")
    assert (folder / "report" / "report.html").exists()
    assert "embed.py --clip-model-name local-dir:data/demo/model" in result.stdout.replace("\\", "/")


def test_second_run_starts_afresh_and_the_reviewer_may_be_a_person(demo):
    _, folder = demo("--help")
    own = folder / "notes.txt"
    own.write_text("mine")
    result, _ = demo("--review")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not (folder / FILES["--annotated-data-path"]).exists()
    assert own.read_text() == "mine"

    directory = sorted((folder / FILES["--ann-dirrify-dir-path"]).glob("0_*"))[0]
    [deleted] = directory.glob("3_*")
    deleted.unlink()
    printed = result.stdout.splitlines()[-1]
    subprocess.run(printed, shell=True, cwd=folder.parent.parent, check=True, capture_output=True)
    annotated = json.loads((folder / FILES["--annotated-data-path"]).read_text())
    assert annotated[0]["neg"] == [deleted.stem.partition("_")[2]]


def test_touches_no_folder_of_others(demo, tmp_path):
    (tmp_path / "formatted.json").write_text("[]")
    result, _ = demo(str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["formatted.json"]
    assert not (tmp_path / MARKER).exists()
