"""ann_dirrify.py: the folders that it makes, and the causes for an error or for other images."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

import ann_dirrify
from tests.support.annotation_data import (
    ANNOTATED,
    CACHE,
    CHROMA,
    ROOT,
    fill_cache,
    id_of,
    image_bytes,
    make_collection,
    names_in,
    random_vectors,
    read_samples,
    tree,
)
from tests.support.servers import PhotoServer
from utils.annotation import dir_images, history
from utils.annotation.neighbor_dirs import DirWriter, read_digests
from utils.errors import UserError
from utils.lock import hold, lock_path
from utils.store.collection import open_client

N = 60


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.chdir(tmp_path)
    return random_vectors(N)


@pytest.fixture
def ids(vectors: np.ndarray) -> list[str]:
    """Ids of a collection of N images, all in the cache."""
    ids = make_collection(vectors, [f"http://photos.invalid/{i}.jpg" for i in range(N)])
    fill_cache(ids)
    return ids


@pytest.fixture
def server() -> Iterator[PhotoServer]:
    with PhotoServer({f"{i}.jpg": image_bytes(i) for i in range(N)}) as server:
        yield server


@pytest.fixture
def web_ids(vectors: np.ndarray, server: PhotoServer) -> list[str]:
    """Ids of a collection of N images, none in the cache."""
    return make_collection(vectors, [f"{server.url}/{i}.jpg" for i in range(N)])


def dirrify(*flags: object, n_dirs: int = 4, n_nearest: int = 5) -> int:
    counts = ["--ann-dirrify-ndirs", n_dirs, "--ann-dirrify-nnearest", n_nearest]
    return ann_dirrify.main([str(flag) for flag in [*counts, "--download-allow-local", *flags]])


def test_directories_hold_the_main_image_and_the_true_nearest_in_rank_order(vectors, ids):
    assert dirrify() == 0
    samples = read_samples()
    assert len(samples) == 4
    for index, (main, listed) in enumerate(samples.items()):
        similarities = vectors @ vectors[ids.index(main)]
        nearest = sorted(range(N), key=lambda row: (ids[row] != main, -similarities[row]))[:6]
        assert listed == [ids[row] for row in nearest]
        names = [f"{rank}_{id_}.jpg" for rank, id_ in enumerate(listed)]
        folder = ROOT / f"{index}_{main}"
        assert sorted(names) == names_in(folder)
        assert all((folder / name).read_bytes() == image_bytes(ids.index(name[2:-4])) for name in names)
    visible = [name for name in names_in(ROOT) if not name.startswith(".")]
    assert visible == sorted(["samples.json", "READ ME.txt", *(f"{i}_{main}" for i, main in enumerate(samples))])


def test_images_are_copies_so_that_a_viewer_may_rotate_them(ids):
    dirrify()
    main = next(iter(read_samples()))
    (copy,) = ROOT.glob(f"0_*/0_{main}.jpg")
    copy.write_bytes(b"rotated")
    assert (CACHE / main[:2] / f"{main}.jpg").read_bytes() == image_bytes(ids.index(main))


def test_same_seed_same_directories(ids, tmp_path):
    dirrify()
    first = tree(ROOT)
    shutil.rmtree(ROOT)
    dirrify()
    assert tree(ROOT) == first
    dirrify("--ann-dirrify-dir-path", "other", "--ann-seed", 1)
    assert list(read_samples(Path("other"))) != list(read_samples())


def test_a_main_image_is_in_no_earlier_directory(ids):
    dirrify(n_dirs=N)
    shown: set[str] = set()
    for main, listed in read_samples().items():
        assert main not in shown
        shown |= set(listed)
    assert shown == set(ids), "it went on until none was left"


def test_annotated_positives_are_no_main_images_but_may_be_neighbors(ids):
    dirrify(n_dirs=N)
    positives = list(read_samples())[:3]
    ANNOTATED.write_text(
        json.dumps([{"pos": [positives[0], positives[1]], "neg": []}, {"pos": positives[2:], "neg": []}])
    )
    shutil.rmtree(ROOT)
    dirrify(n_dirs=N)
    assert not set(positives) & set(read_samples())
    assert set(positives) <= {id_ for listed in read_samples().values() for id_ in listed}


def test_what_the_cache_lacks_is_downloaded_and_named_by_its_content(web_ids, server, capsys):
    server.files["7.jpg"] = image_bytes(7, "PNG")
    assert dirrify(n_dirs=N) == 0
    assert {name[-4:] for name in tree(ROOT) if id_of(f"{server.url}/7.jpg") in Path(name).name} == {".png"}
    assert "(0 from the cache, " in capsys.readouterr().out


def test_an_image_that_cannot_be_loaded_is_left_out_and_its_rank_stays_unused(web_ids, server, capsys):
    dirrify(n_dirs=1)
    main, *others = next(iter(read_samples().values()))
    shutil.rmtree(ROOT)
    server.files.pop(f"{web_ids.index(others[1])}.jpg")
    server.files[f"{web_ids.index(others[3])}.jpg"] = b"<html>not an image"
    dirrify(n_dirs=1)
    kept = [main, others[0], others[2], others[4]]
    assert read_samples() == {main: kept}
    assert sorted(name.split("_")[0] for name in names_in(ROOT / f"0_{main}")) == ["0", "1", "3", "5"]
    assert "could not be loaded: 2 (http_status 1, not_an_image 1)" in capsys.readouterr().out


@pytest.mark.parametrize("n_workers", [1, 16])
def test_another_main_image_is_drawn_for_one_that_cannot_be_loaded(web_ids, server, n_workers):
    for i in range(0, N, 3):
        server.files.pop(f"{i}.jpg")
    dirrify("--download-workers", n_workers, n_dirs=8, n_nearest=2)
    samples = read_samples()
    assert len(samples) == 8
    assert {int(path.name.split("_")[0]) for path in ROOT.glob("[0-9]*")} == set(range(8))
    gone = {web_ids[i] for i in range(0, N, 3)}
    assert not gone & {id_ for listed in samples.values() for id_ in listed}
    shutil.rmtree(ROOT)
    dirrify("--download-workers", 5, n_dirs=8, n_nearest=2)
    assert read_samples() == samples, "whatever the number of connections"


def test_fewer_directories_than_asked_for_are_explained(ids, capsys):
    assert dirrify(n_dirs=1000) == 0
    out = capsys.readouterr().out
    assert "of 1000 directories (ANN_DIRRIFY_NDIRS)" in out
    assert "ANN_DIRRIFY_NNEAREST" in out


def test_named_ids_that_are_not_used_are_counted(ids, capsys):
    dirrify("--ann-sampler-name", "ids", "--ann-sampler-cfg", json.dumps({"ids": [ids[3], "missing"]}))
    out = capsys.readouterr().out
    assert "1 of 2 named ids used" in out
    assert "ANN_DIRRIFY_NDIRS" not in out


def test_no_directory_at_all_is_exit_code_1_and_leaves_no_folder(web_ids, server, capsys):
    server.files.clear()
    assert dirrify("--download-workers", 4) == 1
    assert not ROOT.exists()
    assert "could not be loaded" in capsys.readouterr().out


def test_the_remedies_of_a_shortfall_fit_the_reasons(web_ids, server, capsys):
    dirrify("--download-max-bytes", 10, n_dirs=N)
    assert "What helps: DOWNLOAD_MAX_BYTES, more images" in capsys.readouterr().out


def test_without_network_and_cache_it_stops_with_one_line_and_the_same_command_goes_on(vectors, server, monkeypatch):
    urls = [f"{server.url}/{i}.jpg" for i in range(N)]
    ids = make_collection(vectors, urls)
    dirrify("--ann-dirrify-dir-path", "whole", n_dirs=8)
    first = list(read_samples(Path("whole")).values())[:3]
    fill_cache(ids)
    for id_ in set(ids) - {id_ for listed in first for id_ in listed}:
        (CACHE / id_[:2] / f"{id_}.jpg").unlink()
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"no network: .*refused.*IMAGE_CACHE_DIR_PATH") as error,
    ):
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("no_proxy", "")
        dirrify("--download-attempts", 1, n_dirs=8)
    assert "\n" not in str(error.value)
    assert list(read_samples().values()) == first
    assert dirrify(n_dirs=8) == 0
    assert read_samples() == read_samples(Path("whole"))


def test_a_folder_that_is_not_empty_is_not_touched(ids):
    ROOT.mkdir()
    (ROOT / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        dirrify()
    assert tree(ROOT) == {"mine.txt": b"mine"}


def test_an_empty_folder_is_used(ids):
    ROOT.mkdir()
    assert dirrify() == 0


def test_a_folder_that_only_looks_empty_is_used(ids):
    """A file manager hides some files, and leaves them when all that it shows is deleted."""
    assert dirrify() == 0
    for path in ROOT.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("."):
            path.unlink()
    for name in (".DS_Store", "Thumbs.db"):
        (ROOT / name).write_bytes(b"x")
    assert (ROOT / ".digests.json").exists()
    assert dirrify() == 0
    assert read_digests(ROOT).keys() == read_samples().keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--collection-name", "others"], "no collection others"),
        (["--chromadb-path", "nowhere"], "no Chroma database in nowhere"),
        (["--ann-sampler-name", "best"], "use one of random"),
        (["--ann-sampler-cfg", '{"speed": 1}'], "no option 'speed'"),
        (["--ann-dirrify-ndirs", "0"], "ANN_DIRRIFY_NDIRS is 0; it must be 1 or more"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_leaves_nothing(ids, flags, message):
    with pytest.raises(UserError, match=message) as error:
        dirrify(*flags)
    assert "\n" not in str(error.value)
    assert not ROOT.exists()
    assert not Path("nowhere").exists()


def test_a_collection_of_another_space_is_refused(vectors):
    make_collection(vectors, [f"u{i}" for i in range(N)], hnsw={"space": "l2"})
    with pytest.raises(UserError, match="l2 distance, not cosine"):
        dirrify()


def test_vectors_that_are_not_normalized_are_compared_by_angle(vectors, tmp_path):
    ids = make_collection(vectors * np.arange(1, N + 1)[:, None], [f"u{i}" for i in range(N)])
    fill_cache(ids)
    dirrify(n_dirs=1)
    main, *others = next(iter(read_samples().values()))
    similarities = vectors @ vectors[ids.index(main)]
    assert others == [ids[row] for row in np.argsort(-similarities)[1:6]]


def interrupt_after(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = DirWriter.commit

    def commit_some(self, listed, digests):
        if len(self.samples) == n:
            raise KeyboardInterrupt
        return commit(self, listed, digests)

    monkeypatch.setattr(DirWriter, "commit", commit_some)


def test_an_interrupted_run_leaves_complete_directories_and_is_continued(web_ids, server, monkeypatch):
    for i in range(0, N, 4):
        server.files.pop(f"{i}.jpg")
    dirrify("--ann-dirrify-dir-path", "whole", n_dirs=9, n_nearest=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(5, patch)
        dirrify("--ann-dirrify-dir-path", "broken", n_dirs=9, n_nearest=3)
    samples = read_samples(Path("broken"))
    assert list(samples) == list(read_samples(Path("whole")))[:5]
    names = {name for name in names_in(Path("broken")) if not name.startswith(".")}
    assert names == {"samples.json", "READ ME.txt", *(f"{i}_{main}" for i, main in enumerate(samples))}
    assert dirrify("--ann-dirrify-dir-path", "broken", n_dirs=9, n_nearest=3) == 0
    assert tree(Path("broken")) == tree(Path("whole"))


def test_an_unfinished_folder_is_not_continued_with_other_settings(ids, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        dirrify()
    before = tree(ROOT)
    with pytest.raises(UserError, match="begun with ANN_SEED = 0, not 7"):
        dirrify("--ann-seed", 7)
    assert tree(ROOT) == before


def test_complete_directories_that_are_not_listed_are_made_again_by_the_next_run(ids, monkeypatch):
    dirrify("--ann-dirrify-dir-path", "whole", n_dirs=6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(3, patch)
        dirrify(n_dirs=6)
    (ROOT / "samples.json").write_text(json.dumps(dict(list(read_samples().items())[:1])))
    (ROOT / ".half.part").mkdir()
    dirrify(n_dirs=6)
    assert tree(ROOT) == tree(Path("whole"))


def test_data_that_changed_meanwhile_adds_new_directories_to_those_that_are_there(ids, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        dirrify()
    before = read_samples()
    ANNOTATED.write_text(json.dumps([{"pos": [next(iter(before))], "neg": []}]))
    dirrify()
    samples = read_samples()
    assert list(samples)[:2] == list(before)
    assert len(samples) == 4
    assert not {id_ for listed in before.values() for id_ in listed} & set(list(samples)[2:])


@pytest.mark.parametrize("changed", ["images", "other"])
def test_vectors_that_changed_meanwhile_are_other_data(vectors, ids, changed, monkeypatch):
    make_collection(random_vectors(N, seed=1), [f"http://photos.invalid/{i}.jpg" for i in range(N)], name="other")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(4, patch)
        dirrify("--ann-dirrify-pool", '["other"]', n_dirs=N)
    before = read_samples()
    embedded_again = open_client(CHROMA).get_collection(changed, embedding_function=None)
    embedded_again.update(ids=ids, embeddings=random_vectors(N, seed=2))
    dirrify("--ann-dirrify-pool", '["other"]', n_dirs=N)
    samples = read_samples()
    assert list(samples)[:4] == list(before)
    assert not {id_ for listed in before.values() for id_ in listed} & set(list(samples)[4:])


@pytest.fixture
def ids_with_fields(vectors: np.ndarray) -> list[str]:
    """Row i has the field "third": i % 3."""
    urls = [f"http://photos.invalid/{i}.jpg" for i in range(N)]
    ids = make_collection(vectors, urls, fields=[{"third": i % 3, "kind": "photo"} for i in range(N)])
    fill_cache(ids)
    return ids


INFORMATIVE = ["--ann-dirrify-pick", "informative", "--ann-dirrify-pick-among", 30]


@pytest.fixture
def decided(vectors: np.ndarray, ids: list[str]) -> list[str]:
    """The ids of a collection with one annotated group, by similarity to its main image, which is included."""
    by_similarity = [ids[row] for row in np.argsort(-(vectors @ vectors[0]))]
    ANNOTATED.write_text(json.dumps([{"pos": by_similarity[:10], "neg": by_similarity[10:20]}]))
    return by_similarity


def test_informative_images_lie_among_the_nearest_in_order_of_similarity_and_without_gaps(vectors, ids, decided):
    dirrify("--ann-dirrify-dir-path", "nearest")
    assert dirrify(*INFORMATIVE) == 0
    samples = read_samples()
    assert list(samples) == list(read_samples(Path("nearest")))
    assert samples != read_samples(Path("nearest"))
    for index, (main, listed) in enumerate(samples.items()):
        similarities = vectors @ vectors[ids.index(main)]
        order = sorted(set(range(N)) - {ids.index(main)}, key=lambda row: -similarities[row])
        ranks = [order.index(ids.index(id_)) for id_ in listed[1:]]
        assert ranks == sorted(ranks)
        assert ranks[:3] == [0, 1, 2]
        assert ranks[-1] < 30
        names = [f"{number}_{id_}.jpg" for number, id_ in enumerate(listed)]
        assert sorted(names) == names_in(ROOT / f"{index}_{main}")


def test_informative_without_annotations_spreads_over_three_times_the_nearest(vectors, ids, capsys):
    dirrify(*INFORMATIVE, n_dirs=1)
    ((main, *listed),) = read_samples().values()
    order = [ids[row] for row in np.argsort(-(vectors @ vectors[ids.index(main)]))[1:]]
    assert [order.index(id_) for id_ in listed] == [0, 4, 7, 10, 14]  # of 15
    assert "spread over the 15 nearest" in capsys.readouterr().err


def test_informative_is_recorded_in_the_history(decided):
    dirrify("--ann-dirrify-dir-path", "nearest", n_dirs=1)
    dirrify(*INFORMATIVE, n_dirs=1)
    events = [json.loads(line) for line in Path("data/history.jsonl").read_text().splitlines()]
    assert [event["pick"] for event in events] == ["nearest", "informative"]


def test_an_interrupted_informative_run_is_continued_to_the_same_directories(decided, monkeypatch):
    dirrify(*INFORMATIVE, "--ann-dirrify-dir-path", "whole", n_dirs=6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(3, patch)
        dirrify(*INFORMATIVE, n_dirs=6)
    with pytest.raises(UserError, match="begun with ANN_DIRRIFY_PICK ="):
        dirrify(n_dirs=6)
    dirrify(*INFORMATIVE, n_dirs=6)
    assert tree(ROOT) == tree(Path("whole"))


def test_decisions_that_changed_meanwhile_are_other_data(ids, decided, monkeypatch):
    records = [{"pos": [ids[1], ids[2]], "neg": [ids[3]]}, {"pos": [ids[4], ids[3]], "neg": [ids[2]]}]
    swapped = [{"pos": [ids[1], ids[3]], "neg": [ids[2]]}, {"pos": [ids[4], ids[2]], "neg": [ids[3]]}]
    ANNOTATED.write_text(json.dumps(records))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        dirrify(*INFORMATIVE, n_dirs=5)
    before = list(read_samples())
    ANNOTATED.write_text(json.dumps(swapped))
    dirrify(*INFORMATIVE, n_dirs=5)
    assert list(read_samples())[:2] == before
    shown = {id_ for main in before for id_ in read_samples()[main]}
    assert not shown & set(list(read_samples())[2:])


def test_informative_composes_with_filters_judged_pairs_and_near_duplicates(vectors, tmp_path):
    doubled = np.concatenate([vectors, vectors + 0.001 * random_vectors(N, seed=5)])
    fields = [{"third": i % 3} for i in range(2 * N)]
    ids = make_collection(doubled, [f"http://photos.invalid/{i}.jpg" for i in range(2 * N)], fields=fields)
    fill_cache(ids)
    main, kept, deleted = ids[0], ids[4], ids[5]
    ANNOTATED.write_text(json.dumps([{"pos": [ids[1], main], "neg": [kept]}, {"pos": [kept, deleted], "neg": []}]))
    these = ["--ann-sampler-name", "ids", "--ann-sampler-cfg", json.dumps({"ids": [ids[3], ids[6], ids[9]]})]
    where = ["--ann-dirrify-neighbors-where", '{"third": {"$in": [1, 2]}}', "--ann-dirrify-max-similarity", "0.99"]
    dirrify(*INFORMATIVE, *these, *where, n_dirs=3, n_nearest=8)
    for listed in read_samples().values():
        rows = [ids.index(id_) for id_ in listed]
        assert {row % 3 for row in rows[1:]} <= {1, 2}
        assert len({row % N for row in rows}) == len(rows) == 9


def test_an_unknown_pick_is_one_line(ids):
    with pytest.raises(UserError, match="ANN_DIRRIFY_PICK is 'best'; it must be nearest or informative"):
        dirrify("--ann-dirrify-pick", "best")


def test_a_pool_shows_the_nearest_of_both_collections_in_turns_and_the_history_says_whose(vectors, ids, capsys):
    other = random_vectors(len(ids), dimension=24, seed=9)[:-1]
    make_collection(other, [f"http://photos.invalid/{i}.jpg" for i in range(N - 1)], name="other")  # lacks one image
    dirrify("--ann-dirrify-pool", '["other"]', n_nearest=6)
    assert "1 image left out: not in collection other" in capsys.readouterr().err
    of_id = {id_: row for row, id_ in enumerate(ids)}
    events = {event["main"]: event for event in history.read_events(Path("data/history.jsonl"))}
    for main, listed in read_samples().items():
        assert len(listed) == 7 and ids[-1] not in listed
        brought = events[main]["brought"]
        assert list(brought) == listed[1:] and events[main]["pool"] == ["images", "other"]
        for name, space in (("images", vectors), ("other", other)):
            near = np.argsort(-(space[: len(other)] @ space[of_id[main]]))[1:]
            shown = [of_id[id_] for id_ in listed[1:]]
            assert near[0] in shown[:2]
            own = [of_id[id_] for id_, whose in brought.items() if whose == name]
            assert own == [row for row in near if row in own]  # in the order of their collection


def test_a_pool_of_other_images_or_with_informative_picks_is_one_line(ids, capsys):
    make_collection(random_vectors(3), ["http://other/1", "http://other/2", "http://other/3"], name="foreign")
    with pytest.raises(UserError, match="collection foreign has no image of this one"):
        dirrify("--ann-dirrify-pool", '["foreign"]')
    with pytest.raises(UserError, match="no collection nowhere in"):
        dirrify("--ann-dirrify-pool", '["nowhere"]')
    with pytest.raises(UserError, match="set ANN_DIRRIFY_PICK to nearest"):
        dirrify("--ann-dirrify-pool", '["foreign"]', "--ann-dirrify-pick", "informative")


def test_filters_restrict_main_images_and_neighbors(ids_with_fields):
    where, neighbors_where = '{"third": 0}', '{"third": {"$in": [1, 2]}}'
    dirrify("--ann-dirrify-where", where, "--ann-dirrify-neighbors-where", neighbors_where, n_dirs=N)
    samples = read_samples()
    thirds = {id_: i % 3 for i, id_ in enumerate(ids_with_fields)}
    assert {thirds[main] for main in samples} == {0}
    assert {thirds[id_] for main, listed in samples.items() for id_ in listed[1:]} == {1, 2}
    assert len(samples) == N / 3, "no main image is shown among other's neighbors"


@pytest.mark.parametrize(
    ("flag", "where", "message"),
    [
        ("--ann-dirrify-where", '{"third": 7}', "ANN_DIRRIFY_WHERE .* matches no image"),
        ("--ann-dirrify-neighbors-where", '{"nothing": 7}', "ANN_DIRRIFY_NEIGHBORS_WHERE .* matches no image"),
        ("--ann-dirrify-where", '{"$what": 7}', "ANN_DIRRIFY_WHERE .* is malformed"),
        ("--ann-dirrify-where", '{"third": {"more": 7}}', "ANN_DIRRIFY_WHERE .* malformed.* nested values cannot"),
        ("--ann-dirrify-where", '{"third": 0, "kind": "photo"}', r"ANN_DIRRIFY_WHERE .* malformed.*\$and"),
    ],
)
def test_a_filter_that_matches_nothing_or_is_malformed_is_one_line(ids_with_fields, flag, where, message):
    with pytest.raises(UserError, match=message) as error:
        dirrify(flag, where)
    assert "\n" not in str(error.value)
    assert not ROOT.exists()


def test_near_duplicates_give_their_place_to_the_next_and_are_counted(vectors, capsys):
    doubled = np.concatenate([vectors, vectors + 0.001 * random_vectors(N, seed=5)])
    ids = make_collection(doubled, [f"http://photos.invalid/{i}.jpg" for i in range(2 * N)])
    fill_cache(ids)
    dirrify("--ann-dirrify-max-similarity", 0.99)
    for listed in read_samples().values():
        assert len({ids.index(id_) % N for id_ in listed}) == 6
    assert "near duplicates replaced by the next nearest image" in capsys.readouterr().out


def test_a_pair_that_was_judged_is_not_shown_again_in_either_order(ids):
    main, kept, *deleted = ids[:6]
    ANNOTATED.write_text(json.dumps([{"pos": [main, kept], "neg": deleted}]))
    these = ["--ann-sampler-name", "ids", "--ann-sampler-cfg", json.dumps({"ids": [deleted[0], ids[7]]})]
    dirrify(*these, n_nearest=N)
    assert [main in listed for listed in read_samples().values()] == [False, True]
    assert [len(listed) for listed in read_samples().values()] == [N - 1, N]
    shutil.rmtree(ROOT)
    dirrify("--ann-dirrify-show-judged", *these, n_nearest=N)
    assert [len(listed) for listed in read_samples().values()] == [N, N]


def test_what_is_shown_is_added_to_the_history(vectors, ids):
    dirrify("--ann-seed", 3)
    events = [json.loads(line) for line in Path("data/history.jsonl").read_text().splitlines()]
    assert [event["main"] for event in events] == list(read_samples())
    for event, listed in zip(events, read_samples().values()):
        assert list(event["shown"]) == listed
        cosines = [float(vectors[ids.index(id_)] @ vectors[ids.index(listed[0])]) for id_ in listed]
        assert list(event["shown"].values()) == pytest.approx(cosines, abs=1e-5)
        assert event["root"] == str(ROOT.resolve())
        assert (event["sampler"], event["options"], event["seed"], event["model"]) == ("random", {}, 3, {})
        assert event["time"].endswith("Z")


def test_a_run_that_is_continued_adds_each_directory_to_the_history_once(ids, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(2, patch)
        dirrify()
    dirrify()
    events = [json.loads(line) for line in Path("data/history.jsonl").read_text().splitlines()]
    assert [event["main"] for event in events] == list(read_samples())


def test_without_a_history_everything_else_works(ids):
    assert dirrify("--ann-history-path", "") == 0
    assert not Path("data/history.jsonl").exists()


def test_folders_side_by_side_do_not_repeat_each_other(ids):
    dirrify("--ann-dirrify-dir-path", "a", n_dirs=3)
    dirrify("--ann-dirrify-dir-path", "b", "--ann-dirrify-exclude-dirs", '["a"]', n_dirs=3)
    dirrify("--ann-dirrify-dir-path", "c", "--ann-dirrify-exclude-dirs", '["a", "b"]', n_dirs=N)
    shown: set[str] = set()
    for name in "abc":
        assert not shown & set(read_samples(Path(name)))
        shown |= {id_ for listed in read_samples(Path(name)).values() for id_ in listed}
    with pytest.raises(UserError, match="nowhere does not exist"):
        dirrify("--ann-dirrify-exclude-dirs", '["nowhere"]')


def test_the_ids_sampler_shows_exactly_these(ids):
    dirrify("--ann-sampler-name", "ids", "--ann-sampler-cfg", json.dumps({"ids": ids[:7]}), n_dirs=7)
    assert list(read_samples()) == ids[:7]


def test_named_ids_that_are_used_are_counted(ids, capsys):
    dirrify("--ann-sampler-name", "ids", "--ann-sampler-cfg", json.dumps({"ids": ids[:2]}), n_dirs=7)
    assert capsys.readouterr().out.splitlines()[1] == "2 of 2 named ids used"


def test_a_collection_that_is_torn_is_one_line(vectors, run_script, tmp_path):
    make_collection(vectors, [f"u{i}" for i in range(N)], hnsw={"sync_threshold": 20, "batch_size": 10})
    (index,) = Path("data/chroma").glob("*/data_level0.bin")
    index.write_bytes(index.read_bytes()[:1000])
    done = run_script("ann_dirrify.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "python embed.py repairs it" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_at_a_time_in_one_folder_are_one_too_many(ids):
    with (
        hold(lock_path(ROOT), str(ROOT)),
        pytest.raises(UserError, match=r"in use by pid \d+ on .* since"),
    ):
        dirrify()
    assert not ROOT.exists()


def test_a_full_disk_leaves_complete_directories_and_a_rerun_goes_on(ids, monkeypatch):
    dirrify("--ann-dirrify-dir-path", "whole", n_dirs=8)
    fitting = {ROOT / f".{main}.part" for main in list(read_samples(Path("whole")))[:3]}
    write_copy = dir_images.write_copy

    def fill_disk(file: BinaryIO, stem: Path) -> Path:
        if stem.parent not in fitting:
            raise OSError(errno.ENOSPC, "No space left on device", "x.jpg")
        return write_copy(file, stem)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(dir_images, "write_copy", fill_disk)
        dirrify(n_dirs=8)
    assert len(read_samples()) == 3
    assert dirrify(n_dirs=8) == 0
    assert tree(ROOT) == tree(Path("whole"))
