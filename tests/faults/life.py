"""A state machine that lives through months of the project in minutes, in any order, with kills, and checks each step.

    python -m tests.faults.life [--steps 2000] [--seed 0] [--shrink] [--short]

Its rules are the commands of all stages, edits of the list, what reviewers and other people do, and faults. Images are
data: URLs, the encoder is a light one, each command is a real process, forked from this one, which has imported all
that it needs. A plain model of its own says what must hold. A failure is printed as shell
commands; the same seed, with --shrink, finds a short one.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import functools
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, core, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from PIL import Image

from tests.faults import light_encoder
from tests.faults.embed_kills import read_journal
from tests.faults.killed import die_at
from utils import cli, processes
from utils.ids import from_ids
from utils.store import collection as collections

N_ITEMS, N_BROKEN = 40, 4  # images that lists are made of; items that are none
STEPS = 40  # of one life
ROOTS = ["r0", "r1"]
FORMATS = ["triplets", "flagembedding", "reranking", "qrels", "pairs"]
Records = list[dict[str, list[str]]]
# Drawn without a look at the state, which depends on moments of kills: a replay must draw the same.
one, several, kill_share = st.integers(0, 10_000), st.lists(st.integers(0, 10_000), max_size=4), st.floats(0, 1)
counts: Counter[str] = Counter()
last_failure: list[str] = []


# --- images -----------------------------------------------------------------------------------------------------------
@functools.cache
def colors(number: int) -> np.ndarray:
    """(8, 8, 3) uint8, in ten families of similar images."""
    family, own = np.random.default_rng(number % 10), np.random.default_rng(number)
    return (family.integers(0, 200, (8, 8, 3)) + own.integers(0, 56, (8, 8, 3))).astype(np.uint8)


@functools.cache
def url_of(number: int) -> str:
    if number >= N_ITEMS:
        return f"data:text/html,no image {number}"
    file = io.BytesIO()
    Image.fromarray(colors(number).repeat(4, 0).repeat(4, 1)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@functools.cache
def id_of(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, url_of(number)))


NUMBERS = {id_of(number): number for number in range(N_ITEMS)}


def vector_of(number: int) -> np.ndarray:
    vector = colors(number).reshape(-1).astype(np.float32) + 1
    return vector / np.linalg.norm(vector)


def pick(values: list[Any], choices: list[int]) -> list[Any]:
    """Different elements of `values`, chosen by the numbers."""
    return list(dict.fromkeys(values[choice % len(values)] for choice in choices)) if values else []


# --- processes --------------------------------------------------------------------------------------------------------
def fork(task: Callable[[], Any], folder: Path, name: str) -> int:
    """`task()` in a process of its own in `folder`; its output goes to files. Returns the pid."""
    forkserver.ensure_running()  # it ends if a command is killed in the middle of a request to it
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined] # it is our parent's child
        code = task() or 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, limit_s: float = 120) -> int:
    """The exit code; negative if a signal ended it."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a command hung for {limit_s} s")


def run_script(script: str, flags: list[str], kill_at: int = 0, limit: int = 0) -> Callable[[], None]:
    def task() -> None:
        light_encoder.install()
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if kill_at:
            die_at(kill_at, Path.cwd())
        module = importlib.import_module(script.removesuffix(".py"))
        cli.run(lambda: module.main(flags))

    return task


def logged(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def step(self: Life, *args: Any, **kwargs: Any) -> None:
        counts["steps"] += 1
        counts[method.__name__] += 1
        try:
            method(self, *args, **kwargs)
            self.check()
        except BaseException:
            last_failure[:] = [*self.shell, traceback.format_exc()]  # hypothesis replays it, and may not meet it again
            raise

    return step


class AllRules:
    def is_enabled(self, _name: str) -> bool:
        return True


# --- the machine ------------------------------------------------------------------------------------------------------
class Life(RuleBasedStateMachine):
    """`folder` is where the scripts run. The model: what the list holds, what is stored, deleted, shown and decided."""

    def __init__(self) -> None:
        super().__init__()
        # Hypothesis would leave out a random half of the rules in each life, and most lives would never load a folder.
        self._rules_strategy.enabled_rules_strategy = st.just(AllRules())
        self.folder = Path(tempfile.mkdtemp(prefix="life"))
        (self.folder / "data").mkdir()
        model = self.folder / "model"
        model.mkdir()
        (model / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 192}}')
        (model / "open_clip_model.safetensors").write_bytes(b"weights")
        self.shell: list[str] = []
        self.listed: dict[int, int] = {}  # number -> version of its metadata
        self.stored: set[str] = set()
        self.gone: set[str] = set()
        self.doomed: set[str] = set()  # a --prune that was killed may have begun to remove these
        self.is_clean = False  # the last embed.py ended well, and the list and the store are as it left them
        self.are_noted = True  # deletions in the collection
        self.samples: dict[str, dict[str, list[str]]] = {}  # root -> main -> ids shown, the main one first
        self.deleted: dict[tuple[str, str], set[str]] = {}  # (root, main) -> ids deleted by the reviewer
        self.discarded: set[tuple[str, str]] = set()
        self.records: Records = []
        self.before: list[Records] = []  # the records before each load that can be taken back
        self.saved: list[Records] = []  # versions of annotated.json that somebody has kept

    @initialize(numbers=st.lists(st.integers(0, N_ITEMS + N_BROKEN - 1), min_size=15, max_size=30, unique=True))
    def begin(self, numbers: list[int]) -> None:
        self.listed = dict.fromkeys(numbers, 0)
        self.write_list()
        self.do_embed(prune=False, refresh=False, retry=False)
        if len(self.stored) > 8:  # so that there is something to review from the beginning
            self.dirrify(ROOTS[0], n=3, nearest=5, seed=0, sampler="random", pick="nearest", kill_at=0)

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- means --------------------------------------------------------------------------------------------------------

    def run(self, script: str, *flags: str, kill_at: int = 0, limit: int = 0, kill_after_s: float = 0) -> int:
        """The exit code of a script; negative if it was killed."""
        command = shlex.join(["python", script, *flags])
        fault = f"ulimit -f {limit // 1024}; " * bool(limit)
        fault += f"python -m tests.faults.killed {kill_at} . " * bool(
            kill_at
        ) + f"timeout -s KILL {kill_after_s:.2f} " * bool(kill_after_s)
        self.shell.append(fault + (command.removeprefix("python ") if kill_at else command))
        pid = fork(run_script(script, list(flags), kill_at, limit), self.folder, script)
        if kill_after_s:
            time.sleep(kill_after_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        counts["kills"] += code < 0
        self.out = (self.folder / f"{script}.out").read_text(errors="replace")
        self.err = (self.folder / f"{script}.err").read_text(errors="replace")
        assert "Traceback" not in self.err, self.err
        assert code in (0, 1, 2) or ((kill_at or kill_after_s) and code == -signal.SIGKILL), (code, self.err)
        return code

    def embed(self, *flags: str, **faults: Any) -> int:
        return self.run("embed.py", *self.embed_flags(), *flags, **faults)

    def embed_flags(self) -> list[str]:
        return ["--clip-model-name", "local-dir:model", "--download-workers", "2", "--batch-size", "4"]

    def write_list(self) -> None:
        items = [{"url": url_of(number), "version": version} for number, version in self.listed.items()]
        (self.folder / "data/formatted.json").write_text(json.dumps(items))
        self.shell.append(f"python -m tests.faults.life --write-list '{json.dumps(self.listed)}'")
        self.is_clean = False

    def listed_ids(self) -> set[str]:
        return {id_of(number) for number in self.listed if number < N_ITEMS}

    def read_records(self) -> Records:
        path = self.folder / "data/annotated.json"
        return json.loads(path.read_text()) if path.exists() else []

    def in_collection(self, task: Callable[[Any], None]) -> None:
        """A change that a person makes to the collection with another program."""

        def open_and_do() -> None:
            task(collections.open_client(Path("data/chroma")).get_collection("images", embedding_function=None))

        code = wait(fork(open_and_do, self.folder, "person"))
        assert code == 0, (self.folder / "person.err").read_text()

    # --- what must hold after every step ------------------------------------------------------------------------------

    def check(self) -> None:
        journal = read_journal(self.folder / "data/chroma/journal")
        found = from_ids(np.frombuffer(b"".join(id_ for id_, _ in journal), "V16"))
        assert len(set(found)) == len(found), "an id is stored twice"
        for id_, (_, vector) in zip(found, journal):
            assert vector == vector_of(NUMBERS[id_]).tobytes(), f"{id_} has the vector of another image"
        missing = self.stored - set(found) - self.doomed
        assert not missing, f"lost: {missing}"
        self.stored = set(found)
        assert self.read_records() == self.records, "records changed without a load"
        for record in self.records:
            main = record["pos"][0]
            shown = [listed for samples in self.shown for m, listed in samples.items() if m == main]
            assert any({*record["pos"], *record["neg"]} <= set(listed) for listed in shown), (
                "decided on what was never shown"
            )

    @property
    def shown(self) -> list[dict[str, list[str]]]:
        return self.__dict__.setdefault("_shown", [])

    def check_summary(self) -> dict[str, int]:
        line = next(line for line in self.out.splitlines() if " items = " in line)
        total, rest = line.split(" items = ")
        parts = {name: int(n) for n, name in re.findall(r"(\d+) ([a-z ]+?)(?= \+|$)", rest)}
        assert int(total) == sum(parts.values()) == len(self.listed), line
        return parts

    def check_collection(self, versions: dict[str, int]) -> None:
        """The collection has every stored record that was not deleted, with its vector, url and version."""
        expected = {id_: NUMBERS[id_] for id_ in self.stored - self.gone}

        def look(collection: Any) -> None:
            got = collection.get(include=["embeddings", "metadatas"])
            assert set(got["ids"]) == set(expected), (len(got["ids"]), len(expected))
            for id_, vector, metadata in zip(got["ids"], got["embeddings"], got["metadatas"]):
                assert np.dot(vector, vector_of(expected[id_])) > 0.99999
                assert metadata["url"] == url_of(expected[id_])
                assert metadata["version"] == versions.get(id_, metadata["version"])
            if expected:
                found = collection.query(query_embeddings=[vector_of(n) for n in expected.values()], n_results=1)
                assert [ids[0] for ids in found["ids"]] == list(expected)

        self.in_collection(look)

    # --- the list and embed.py ----------------------------------------------------------------------------------------

    @rule(numbers=st.lists(st.integers(0, N_ITEMS + N_BROKEN - 1), min_size=1, max_size=20), shuffled=st.randoms())
    @logged
    def add_items(self, numbers: list[int], shuffled: Any) -> None:
        for number in numbers:
            self.listed.setdefault(number, 0)
        items = list(self.listed.items())
        shuffled.shuffle(items)
        self.listed = dict(items)
        self.write_list()

    @rule(choices=several, removes=st.booleans())
    @logged
    def edit_items(self, choices: list[int], removes: bool) -> None:
        for number in pick(sorted(self.listed), choices):
            if removes:
                del self.listed[number]
            else:
                self.listed[number] += 1
        self.write_list()

    @rule(prune=st.booleans(), refresh=st.booleans(), retry=st.booleans())
    @logged
    def embed_all(self, prune: bool, refresh: bool, retry: bool) -> None:
        self.do_embed(prune, refresh, retry)

    def do_embed(self, prune: bool, refresh: bool, retry: bool) -> None:
        flags = ["--prune"] * prune + ["--refresh-metadata"] * refresh + ["--retry-failed"] * retry
        before = set(self.stored)
        if prune:
            self.stored &= self.listed_ids()
        code = self.embed(*flags)
        assert code == 0 or not self.listed_ids(), self.err
        parts = self.check_summary()
        counts["embedded"] += parts["stored"]
        assert parts["already there"] == len(before & self.listed_ids()) or self.doomed
        journal = read_journal(self.folder / "data/chroma/journal")
        self.stored = set(from_ids(np.frombuffer(b"".join(id_ for id_, _ in journal), "V16")))
        assert self.listed_ids() <= self.stored <= self.listed_ids() | (set() if prune else before)
        assert prune or before - self.doomed <= self.stored
        self.gone &= self.stored
        self.doomed = set()
        if self.stored:
            self.check_collection({id_of(number): v for number, v in self.listed.items()} if refresh else {})
        self.is_clean = self.are_noted = True

    @precondition(lambda self: self.is_clean and self.stored)
    @rule(verify=st.booleans())
    @logged
    def embed_again(self, verify: bool) -> None:
        path = self.folder / "data/chroma/journal/images.sqlite3"
        content = path.read_bytes()
        if verify:
            assert self.embed("--verify") == (0 if "differences        0" in self.out else 1)
            assert "differences        0" in self.out, self.out
        else:
            assert self.embed() == 0 or not self.listed_ids()
            assert self.check_summary()["stored"] == 0
        assert path.read_bytes() == content or not self.are_noted, "a run with nothing to do wrote"
        self.are_noted = True

    @rule(share=kill_share, prune=st.booleans())
    @logged
    def embed_killed(self, share: float, prune: bool) -> None:
        extra = self.stored - self.listed_ids()
        prune = prune and not extra & self.gone  # whether such an id came back would depend on the moment
        if prune:
            self.doomed |= extra
        self.is_clean = False
        self.embed(*["--prune"] * prune, kill_after_s=0.05 + 2 * share**2)

    @rule(limit=st.integers(100, 6_000))
    @logged
    def embed_full_disk(self, limit: int) -> None:
        self.is_clean = False
        self.embed(limit=1024 * limit)

    @precondition(lambda self: len(self.shell) % 4 == 0)  # else a fifth of all steps
    @rule()
    @logged
    def embed_twice_at_once(self) -> None:
        """A second writer does not wait: it names the current writer, or runs after it."""
        flags = self.embed_flags()
        command = shlex.join(["python", "embed.py", *flags])
        self.shell.append(f"{command} & {command}")
        pids = [fork(run_script("embed.py", flags), self.folder, f"writer{i}") for i in range(2)]
        codes = [wait(pid) for pid in pids]
        for i, code in enumerate(codes):
            err = (self.folder / f"writer{i}.err").read_text()
            assert code in (0, 1) or (code == 2 and "in use by" in err), err
        assert set(codes) != {2}, "neither could write"
        self.check()
        assert self.listed_ids() <= self.stored
        self.doomed = set()
        self.is_clean = self.are_noted = True

    @precondition(lambda self: self.is_clean and len(self.stored - self.gone) > 12)
    @rule(choices=several)
    @logged
    def person_deletes_from_collection(self, choices: list[int]) -> None:
        ids = pick(sorted(self.stored - self.gone), choices)[:3]
        if not ids:
            return
        client = "chromadb.PersistentClient('data/chroma').get_collection('images', embedding_function=None)"
        self.shell.append(f'python -c "import chromadb; {client}.delete({ids})"')
        self.in_collection(lambda collection: collection.delete(ids=ids))
        self.gone |= set(ids)
        self.are_noted = False

    # --- directories --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_clean and len(self.stored - self.gone) > 8)
    @rule(root=st.sampled_from(ROOTS), n=st.integers(1, 5), nearest=st.integers(1, 6), seed=st.integers(0, 3),
          sampler=st.sampled_from(["random", "kmeans"]), pick=st.sampled_from(["nearest", "informative"]),
          kill_at=st.sampled_from([0, 0, 3, 10, 25, 60]))  # fmt: skip
    @logged
    def dirrify(self, root: str, n: int, nearest: int, seed: int, sampler: str, pick: str, kill_at: int) -> None:
        is_new = not (self.folder / root).exists()
        flags = ["--ann-dirrify-dir-path", root, "--ann-dirrify-ndirs", str(n), "--ann-dirrify-nnearest", str(nearest)]
        flags += ["--ann-seed", str(seed), "--ann-dirrify-pick", pick, "--ann-sampler-name", sampler]
        others = [other for other in ROOTS if other != root and (self.folder / other / "samples.json").exists()]
        flags += ["--ann-dirrify-exclude-dirs", json.dumps(others)]
        code = self.run("ann_dirrify.py", *flags, kill_at=kill_at)
        path = self.folder / root / "samples.json"
        made = json.loads(path.read_text()) if path.exists() else {}
        if is_new:
            self.check_undecided(made)
        assert self.samples.get(root, {}).items() <= made.items(), "a directory that was shown is gone from the list"
        self.samples[root] = made
        self.shown.append(made)
        if code == 0 and is_new:
            tree = tree_of(self.folder / root)
            assert self.run("ann_dirrify.py", *flags) == 2 and "is not empty; load it" in self.err
            assert tree_of(self.folder / root) == tree, "a second run changed the directories"

    def check_undecided(self, made: dict[str, list[str]]) -> None:
        positives = {id_ for record in self.records for id_ in record["pos"]}
        judged = {(r["pos"][0], id_) for r in self.records for id_ in (*r["pos"][1:], *r["neg"])}
        for main, listed in made.items():
            assert listed[0] == main and len(set(listed)) == len(listed)
            assert not set(listed) & self.gone and set(listed) <= self.stored
            assert main not in positives, "a positive came back as a main image"
            for id_ in listed[1:]:
                assert not {(main, id_), (id_, main)} & judged, "a judged pair came back as undecided"

    def folder_of(self, root: str, main: str) -> Path | None:
        return next((self.folder / root).glob(f"*{main}*"), None) if (self.folder / root).exists() else None

    def a_dir(self, choice: int) -> tuple[str, str]:
        """(root, main) of a directory that was made; ("", "") if there is none."""
        return (pick([(root, main) for root in self.samples for main in self.samples[root]], [choice]) or [("", "")])[0]

    @precondition(lambda self: any(self.samples.values()))
    @rule(choice=one, choices=several)
    @logged
    def review(self, choice: int, choices: list[int]) -> None:
        """A reviewer deletes images of one directory, or restores some from the trash."""
        root, main = self.a_dir(choice)
        if not root:
            return
        folder, listed = self.folder_of(root, main), self.samples[root][main]
        if folder is None or len(listed) < 2:
            return
        trash = self.folder / "trash" / root / main
        trash.mkdir(parents=True, exist_ok=True)
        deleted = self.deleted.setdefault((root, main), set())
        for id_ in pick(listed[1:], choices):
            source, target = (trash, folder) if id_ in deleted else (folder, trash)
            for file in source.glob(f"*{id_}*"):
                self.shell.append(f"mv {file.relative_to(self.folder)} {target.relative_to(self.folder)}/")
                file.rename(target / file.name)
            deleted ^= {id_}

    @precondition(lambda self: any(self.samples.values()) and len(self.shell) % 3 == 0)
    @rule(choice=one)
    @logged
    def discard(self, choice: int) -> None:
        root, main = self.a_dir(choice)
        if root and (folder := self.folder_of(root, main)):
            self.shell.append(f"rm -r {folder.relative_to(self.folder)}")
            shutil.rmtree(folder)
            self.discarded.add((root, main))

    @precondition(lambda self: any(self.samples.values()) and len(self.shell) % 6 == 0)
    @rule(root=st.sampled_from(ROOTS))
    @logged
    def remove_root(self, root: str) -> None:
        self.shell.append(f"rm -r {root} trash/{root}")
        shutil.rmtree(self.folder / root, ignore_errors=True)
        shutil.rmtree(self.folder / "trash" / root, ignore_errors=True)
        self.samples.pop(root, None)
        self.deleted = {key: ids for key, ids in self.deleted.items() if key[0] != root}
        self.discarded = {key for key in self.discarded if key[0] != root}

    # --- records ------------------------------------------------------------------------------------------------------

    def expected(self, roots: list[str], replace: bool) -> Records:
        records: Records = json.loads(json.dumps(self.records))
        done: set[str] = set()
        for root in roots:
            for main, listed in self.samples[root].items():
                if (root, main) in self.discarded or not self.folder_of(root, main):
                    continue
                gone = self.deleted.get((root, main), set())
                new = {"pos": [i for i in listed if i not in gone], "neg": [i for i in listed if i in gone]}
                own = [i for i, r in enumerate(records) if main in r["pos"]
                       and (r["pos"][0] == main or {*r["pos"], *r["neg"]} == set(listed))]  # fmt: skip
                if not own:
                    records.append(new)
                elif replace and main not in done:
                    records[own[0]] = new
                done.add(main)
        return records

    @precondition(lambda self: any(self.samples.values()))
    @rule(
        roots=st.sampled_from([["r0"], ["r1"], ["r0", "r1"], ["r1", "r0"]]),
        mode=st.sampled_from(["", "", "--replace", "--dry-run"]),
        kill_at=st.sampled_from([0, 0, 0, 2, 4, 6, 9]),
    )
    @logged
    def dirload(self, roots: list[str], mode: str, kill_at: int) -> None:
        roots = [root for root in roots if self.samples.get(root)]
        if not roots:
            return
        new = self.records if mode == "--dry-run" else self.expected(roots, mode == "--replace")
        code = self.run("ann_dirload.py", *roots, *[mode] * bool(mode), kill_at=kill_at)
        now = self.read_records()
        assert now == new or (code < 0 and now == self.records), (self.records, now, new)
        if now != self.records:
            self.before.append(self.records)
            counts["records"] += len(now) - len(self.records)
        self.records = now
        if code == 0 and mode != "--dry-run":
            content = (self.folder / "data/annotated.json").read_bytes() if now else b""
            assert self.run("ann_dirload.py", *roots) == 0
            assert not now or (self.folder / "data/annotated.json").read_bytes() == content, (
                "a second load changed records"
            )
        if code < 0 and self.before and self.before[-1] != self.records:
            self.before.append(self.records)  # killed between backup and file: the backup may be this version

    @precondition(lambda self: self.before)
    @rule()
    @logged
    def undo(self) -> None:
        code = self.run("ann_dirload.py", "--undo")
        now = self.read_records()
        if code == 0:
            assert now == self.records or now in self.before, "undo made something else than what was there before"
            if self.before and now != self.records:
                self.before = self.before[: self.before.index(now)]
            self.records = now

    @precondition(lambda self: self.records and len(self.shell) % 3 == 0)
    @rule()
    @logged
    def save_copy(self) -> None:
        if not self.records:
            return
        self.shell.append(f"cp data/annotated.json copy{len(self.saved)}.json")
        self.saved.append(self.records)

    @rule(choice=one)
    @logged
    def restore_copy(self, choice: int) -> None:
        if not self.saved:
            return
        number = choice % len(self.saved)
        self.shell.append(f"cp copy{number}.json data/annotated.json")
        (self.folder / "data/annotated.json").write_text(json.dumps(self.saved[number]))
        self.before.append(self.records)
        self.records = self.saved[number]

    # --- training and judging -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_clean)
    @rule(kind=st.sampled_from(FORMATS), seed=st.integers(0, 2), kill_at=st.sampled_from([0, 0, 0, 2, 5, 8]))
    @logged
    def export(self, kind: str, seed: int, kill_at: int) -> None:
        if not self.records:
            return
        flags = ["--ann-export-format", kind, "--ann-export-value", "id", "--ann-export-seed", str(seed)]
        code = self.run("ann_export.py", *flags, kill_at=kill_at)
        if code != 0:
            return
        rows = read_export(self.folder / "data/export", kind)
        judged = {(r["pos"][0], id_, 1) for r in self.records for id_ in r["pos"][1:]}
        judged |= {(r["pos"][0], id_, 0) for r in self.records for id_ in r["neg"]}
        assert rows <= judged, f"exported, and never decided: {rows - judged}"
        if kind == "pairs":
            assert rows == judged
        tree = tree_of(self.folder / "data/export")
        assert self.run("ann_export.py", *flags) == 0
        assert tree_of(self.folder / "data/export") == tree, "a second export differs"

    @precondition(lambda self: self.is_clean and self.records)
    @rule()
    @logged
    def report(self) -> None:
        code = self.run("ann_report.py")
        assert code == 0, self.err


def read_export(folder: Path, kind: str) -> set[tuple[str, str, int]]:
    """(main, id, label) of each judgment in an export."""
    found = set()
    for path in folder.glob(f"{kind}.*"):
        text = path.read_text()
        if kind == "triplets":
            for row in csv.DictReader(io.StringIO(text)):
                found |= {(row["anchor"], row["positive"], 1), (row["anchor"], row["negative"], 0)}
        elif kind == "pairs":
            found |= {(row["id_a"], row["id_b"], int(row["label"])) for row in csv.DictReader(io.StringIO(text))}
        elif kind == "qrels" and path.suffix == ".txt":
            found |= {(q, id_, int(label)) for q, _, id_, label in map(str.split, text.splitlines())}
        elif kind in ("flagembedding", "reranking"):
            rows = json.loads(text) if kind == "reranking" else map(json.loads, text.splitlines())
            for row in rows:
                for name, label in (("pos", 1), ("positive", 1), ("neg", 0), ("negative", 0)):
                    found |= {(row["query"], id_, label) for id_ in row.get(name, [])}
    return found


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prepare() -> None:
    """Import all that commands need, and start the process that their children are forked from."""
    processes.CONTEXT = multiprocessing.get_context("forkserver")
    processes.CONTEXT.set_forkserver_preload(["chromadb", "utils.store.index", "utils.embedding.fetch_worker"])
    forkserver.ensure_running()
    for name in ("chromadb", "embed", "ann_dirrify", "ann_dirload", "ann_export", "ann_report"):
        importlib.import_module(name)


def play_once() -> None:
    """Every rule in an order that makes sense, without hypothesis: for the suite."""
    life = Life()
    try:
        life.begin(numbers=[*range(0, 24), N_ITEMS])
        life.remove_root(root="r0")
        life.person_deletes_from_collection(choices=[3, 8])
        life.edit_items(choices=[0, 5], removes=False)
        life.embed_killed(share=0.5, prune=False)
        life.add_items(numbers=[30, 31], shuffled=random.Random(0))
        life.embed_full_disk(limit=1_000)
        life.embed_all(prune=False, refresh=True, retry=True)
        life.dirrify(root="r0", n=3, nearest=4, seed=0, sampler="random", pick="nearest", kill_at=10)
        life.dirrify(root="r0", n=3, nearest=4, seed=0, sampler="random", pick="nearest", kill_at=0)
        life.review(choice=0, choices=[0, 2])
        life.discard(choice=2)
        life.dirload(roots=["r0"], mode="", kill_at=4)
        life.dirload(roots=["r0"], mode="", kill_at=0)
        life.save_copy()
        life.review(choice=1, choices=[1])
        life.dirload(roots=["r0"], mode="--replace", kill_at=0)
        life.undo()
        life.restore_copy(choice=0)
        life.export(kind="pairs", seed=0, kill_at=0)
        life.report()
        life.embed_twice_at_once()
        life.edit_items(choices=[0, 7], removes=True)
        life.embed_all(prune=True, refresh=False, retry=False)
        life.embed_again(verify=True)
    finally:
        life.teardown()


def live(steps: int, seed: int, shrinks: bool) -> None:
    """Run this many steps, in lives of STEPS each. Raises AssertionError."""
    core.global_force_seed = seed  # type: ignore[attr-defined]
    chosen = settings(
        max_examples=max(1, steps // STEPS), stateful_step_count=min(STEPS, steps), deadline=None, database=None,
        phases=(Phase.generate, *[Phase.shrink] * shrinks), suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    run_state_machine_as_test(Life, settings=chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="each rule about once, the same each time")
    parser.add_argument("--shrink", action="store_true", help="shrink a failure, five minutes at most")
    parser.add_argument("--write-list", help="write data/formatted.json of these {number: version}, and end")
    args = parser.parse_args()
    if args.write_list:
        items = [{"url": url_of(int(number)), "version": v} for number, v in json.loads(args.write_list).items()]
        Path("data/formatted.json").write_text(json.dumps(items))
        return 0
    start = time.monotonic()
    try:
        prepare()
        if args.short:
            play_once()
        else:
            live(args.steps, args.seed, args.shrink)
    except BaseException:
        print("\n".join(last_failure))
        raise
    finally:
        print(f"seed {args.seed}: {json.dumps(counts)} in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
