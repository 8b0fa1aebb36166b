"""Kill ann_dirrify.py and ann_dirload.py repeatedly, and check each time that their files are correct.

python -m tests.faults.annotation_kills [--kills 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.annotation_data import fill_cache, image_bytes, make_collection, names_in, random_vectors, tree
from utils.annotation import history

REPOSITORY = Path(__file__).resolve().parents[2]
N, N_DIRS, N_NEAREST = 300, 25, 6
DIRRIFY = ["--ann-dirrify-ndirs", str(N_DIRS), "--ann-dirrify-nnearest", str(N_NEAREST)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each script")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for kill in (kill_dirrify, kill_dirload):
        with tempfile.TemporaryDirectory() as folder:
            print(kill.__name__, kill(Path(folder), args.kills, args.seed))


def run(folder: Path, script: str, *flags: str, kill_at: int = 0, watch: str = "") -> int:
    """The exit code; negative if the process was killed, at its `kill_at`-th change to files under `watch`."""
    killed = ["-m", "tests.faults.killed", str(kill_at), str(folder / watch)] if kill_at else []
    command = [sys.executable, *killed, str(REPOSITORY / script), *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


def make_images(folder: Path) -> None:
    """Most images are in the cache, some must be loaded, some cannot be loaded. data: URLs need no network."""
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image_bytes(i)).decode()}" for i in range(N)]
    urls[::7] = [f"data:text/html,not an image {i}" for i in range(0, N, 7)]
    ids = make_collection(random_vectors(N), urls, folder / "data/chroma")
    fill_cache([id_ for i, id_ in enumerate(ids) if i % 7 and i % 5], folder / "data/images")


def kill_dirrify(folder: Path, n_kills: int, seed: int) -> dict[str, int]:
    """Kills, and roots that were finished after some; asserts that each is what an uninterrupted run makes."""
    make_images(folder)
    assert run(folder, "ann_dirrify.py", *DIRRIFY, "--ann-dirrify-dir-path", "whole") == 0
    whole, root = tree(folder / "whole"), folder / "broken"
    rng, count = random.Random(seed), {"kills": 0, "finished": 0}
    while count["kills"] < n_kills:
        flags = [*DIRRIFY, "--ann-dirrify-dir-path", "broken"]
        code = run(folder, "ann_dirrify.py", *flags, kill_at=int(2 ** rng.uniform(0, 8)), watch="broken")
        if code < 0:
            count["kills"] += 1
            check_root(root, whole)
        if code >= 0 or count["kills"] == n_kills:
            assert code == 0 or run(folder, "ann_dirrify.py", *flags) == 0
            assert tree(root) == whole
            count["finished"] += 1
            shutil.rmtree(root)
    return count


def check_root(root: Path, whole: dict[str, bytes]) -> None:
    """All visible files are as in the uninterrupted run, and all listed directories exist."""
    visible = (
        {name: content for name, content in tree(root).items() if not name.startswith(".")} if root.exists() else {}
    )
    samples = json.loads(visible.pop("samples.json", b"{}"))
    visible.pop("READ ME.txt", None)
    assert visible.items() <= whole.items()
    for folder in {Path(name).parts[0] for name in visible}:
        assert names_in(root / folder) == sorted(Path(name).name for name in whole if name.startswith(folder))
    for index, (main, listed) in enumerate(samples.items()):
        assert [name.split("_")[1][:-4] for name in sorted(names_in(root / f"{index}_{main}"), key=_rank)] == listed


def _rank(name: str) -> int:
    return int(name.split("_")[0])


def kill_dirload(folder: Path, n_kills: int, seed: int) -> dict[str, int]:
    """Kills, and how many left the old records and how many the new; asserts that it is never anything else, that the
    next load has all of it, and that undoing that load leaves none of it."""
    make_images(folder)
    assert run(folder, "ann_dirrify.py", *DIRRIFY) == 0
    for image in [*(folder / "data/dirrify").glob("*/*")][::3]:
        if not image.name.startswith("0_"):
            image.unlink()
    shutil.rmtree(next((folder / "data/dirrify").glob("3_*")))
    annotated, backup = folder / "data/annotated.json", folder / "data/annotated.json.bak"
    annotated.write_text(old := json.dumps([{"pos": ["00000000-0000-4000-8000-000000000000"], "neg": []}]))
    assert run(folder, "ann_dirload.py") == 0
    new, discarded = annotated.read_text(), read_discarded(folder)
    assert discarded
    rng, count = random.Random(seed), {"kills": 0, "old": 0, "new": 0}
    while count["kills"] < n_kills:
        annotated.write_text(old)
        backup.write_text("[]\n")
        (folder / "data/history.jsonl").unlink(missing_ok=True)
        code = run(folder, "ann_dirload.py", kill_at=rng.randint(1, 24), watch="data")
        is_new = annotated.read_text() == new
        assert is_new or annotated.read_text() == old
        assert backup.read_text() in (("[]\n", old) if not is_new else (old,))
        if code < 0:
            count["kills"] += 1
            count["new" if is_new else "old"] += 1
        assert run(folder, "ann_dirload.py") == 0
        assert annotated.read_text() == new
        assert read_discarded(folder) == discarded
        assert run(folder, "ann_dirload.py", "--undo") == 0
        assert json.loads(annotated.read_text()) == json.loads(old)
        assert not read_discarded(folder)
    return count


def read_discarded(folder: Path) -> set[str]:
    return history.discarded(history.read_decisions(folder / "data/history.jsonl"))


if __name__ == "__main__":
    main()
