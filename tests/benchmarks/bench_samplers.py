"""Compare samplers: replay labeled sets with a reviewer who keeps the images with the main image's label.

    python tests/benchmarks/bench_samplers.py              # both sets, ten seeds: about 15 minutes on two cores
    python tests/benchmarks/bench_samplers.py --quick      # two seeds, budgets to 20
    python tests/benchmarks/bench_samplers.py --compare "herding informative" "ambiguous nearest"
    python tests/benchmarks/bench_samplers.py --speed      # instead: 1,000 picks out of 100,000 x 512

Compares combinations of a sampler, ANN_DIRRIFY_PICK, and a recipe: that of ann_train.py, or the one before it ("old").
Rounds of 10 folders, a main image with 20 others each: choose, look up neighbors, review, record, again. Prints tables
and, as the last line, all figures as JSON; writes a chart per set to --out, and each seed's figures, from which an
interrupted run goes on. After 50 folders ann_train.py's own test is made, on real and on shuffled verdicts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script

import samplers
from tests.benchmarks import labeled_sets, metric_learning
from tests.benchmarks.chart import draw_lines
from utils.annotation import neighbors
from utils.training import evaluation, projection
from utils.training.projection import Group

SETS = ("digits", "photos")
BAR = "random nearest old"
COMPARED = (BAR, "random nearest", "random informative")
REPORTED = (10, 20, 50, 100)  # folders
BUDGETS = (10, 15, 20, 30, 50, 70, 100)  # the others serve to find the folders at which a curve reaches the bar
MATCH_BUDGET = 50  # the bar is what BAR has then
ROUND, N_NEAREST, N_AMONG = 10, 20, 160
DELETIONS = (50, 100, 200, 400)
HELD_OUT = 4  # one image in so many
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}  # Student's t, by number of seeds
METRICS = ("map_at_r", "recall_at_1", "classes", "positives", "hard_negatives", "deletions")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.speed:
        print(json.dumps(measure_speed()))
        return 0
    budgets = [budget for budget in BUDGETS if budget <= (20 if args.quick else 100)]
    seeds = range(args.first_seed, args.first_seed + (2 if args.quick else args.seeds))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        labeled_sets.load(name)  # the photos are embedded once, before processes share them
    figures = {name: compare(name, args.compare, budgets, seeds, args) for name in args.sets}
    for name, found in figures.items():
        print_table(name, found, budgets)
        write_chart(args.out / f"{name}.png", name, found, budgets)
    print(json.dumps({"seeds": len(seeds), "budgets": budgets, "sets": figures}))
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--seeds", type=int, default=10, choices=T_95)
    parser.add_argument("--first-seed", type=int, default=0, help="tuning is done on seeds from 100 on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--compare", nargs="+", default=COMPARED, metavar="'SAMPLER PICK [old]'")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bench_samplers")
    return parser.parse_args(argv)


def compare(name: str, names: list[str], budgets: list[int], seeds: range, args: argparse.Namespace) -> dict[str, Any]:
    """Per combination: each metric at each budget as (mean, half of its 95% interval), and the folders to the bar."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers: their threads would wait for each other
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        runs = list(pool.map(functools.partial(run_seed, name, list(names), budgets, args.out), seeds))
    result: dict[str, Any] = {"untrained": interval([run["untrained"] for run in runs])}
    curves = {key: np.array([[at[0] for at in run[key]] for run in runs]) for key in names}
    for key in names:
        values = np.array([run[key] for run in runs])  # (seeds, budgets, metrics)
        row: dict[str, Any] = {
            metric: [interval(values[:, b, m]) for b in range(len(budgets))] for m, metric in enumerate(METRICS)
        }
        untrained = [run["untrained"] for run in runs]
        row["map_at_r_by_deletions"] = [by_deletions(values, untrained, budgets, n) for n in DELETIONS]
        if BAR in curves:
            gains = curves[key] - curves[BAR]  # of the same split and seed
            row["map_at_r_above_bar"] = [interval(gains[:, b]) for b in range(len(budgets))]
            row["folders_to_bar"] = folders_to_match(curves[key], curves[BAR], budgets)
        result[key] = row
    for verdicts in ("real", "shuffled"):
        tests = [run[verdicts] for run in runs if run[verdicts]]
        if tests:
            result[f"stage_{verdicts}"] = {
                "passed": sum(test["passed"] for test in tests),
                "of": len(tests),
                "gain": interval([test["gain"] for test in tests]),
                "map_at_r_gain": interval([test["map_at_r_gain"] for test in tests]),
                "lowest_map_at_r_gain": min(test["map_at_r_gain"] for test in tests),
            }
    return result


def by_deletions(values: np.ndarray, untrained: list[float], budgets: list[int], n: int) -> list[float] | None:
    """MAP@R when n images were deleted, interpolated from none and between budgets; None if a seed ends before."""
    deleted = values[:, :, METRICS.index("deletions")] * budgets
    if (deleted[:, -1] < n).any():
        return None
    curves = zip(untrained, deleted, values[:, :, 0])
    return interval([np.interp(n, [0, *counts], [start, *curve]) for start, counts, curve in curves])


def run_seed(name: str, names: list[str], budgets: list[int], out: Path, seed: int) -> dict[str, Any]:
    """One split of the set and one run of each combination on it: METRICS at each budget. Kept in `out`."""
    import torch

    torch.set_num_threads(1)
    path = out / f"{name}-{seed}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    vectors, labels = labeled_sets.load(name)
    order = np.random.default_rng([seed, 7]).permutation(len(labels))
    held_out, rows = np.sort(order[: len(order) // HELD_OUT]), np.sort(order[len(order) // HELD_OUT :])
    known, test, test_labels = vectors[rows], vectors[held_out], labels[held_out]
    result["untrained"] = metric_learning.map_at_r(test, test_labels)[0]
    basis = projection.leading(known)
    for key in (key for key in names if len(result.get(key, ())) != len(budgets)):
        sampler, pick, *recipe = key.split()
        groups = replay(sampler, pick, known, labels[rows], max(budgets), seed)
        result[key] = []
        for budget in budgets:
            if recipe == ["old"]:
                matrix = metric_learning.learn_old(known, groups[:budget], known, seed)
            else:
                matrix = projection.learn(known, groups[:budget], basis, projection.RECIPES[0], seed)
            scores = metric_learning.map_at_r(projection.project(test, matrix), test_labels)
            result[key].append([*scores, *describe(groups[:budget], known, labels[rows])])
        path.write_text(json.dumps(result))
    groups = replay("random", "informative", known, labels[rows], MATCH_BUDGET, seed)
    for verdicts, judged in (("real", groups), ("shuffled", shuffle(groups, seed))):
        if MATCH_BUDGET in budgets and verdicts not in result:
            gain, recipe_found = evaluation.cross_validate(known, judged, basis, seed)
            matrix = projection.learn(known, judged, basis, recipe_found, seed)
            after = metric_learning.map_at_r(projection.project(test, matrix), test_labels)[0]
            figures = {"passed": gain.is_enough, "gain": gain.value, "map_at_r_gain": after - result["untrained"]}
            result[verdicts] = figures
        path.write_text(json.dumps(result))
    return {"real": None, "shuffled": None, **result}


def shuffle(groups: list[Group], seed: int) -> list[Group]:
    """The same images in each group, as many of them kept; which ones is drawn."""
    rng, result = np.random.default_rng([seed, 8]), []
    for kept, deleted in groups:
        shown = rng.permutation(kept[1:] + deleted).astype(int).tolist()
        result.append(([kept[0], *shown[: len(kept) - 1]], shown[len(kept) - 1 :]))
    return result


def replay(sampler: str, pick: str, vectors: np.ndarray, labels: np.ndarray, budget: int, seed: int) -> list[Group]:
    """The groups that a reviewer records of `budget` folders, in rounds of an ann_dirrify and an ann_dirload each."""
    judged: list[set[int]] = [set() for _ in labels]  # what is not shown again beside each
    annotated = np.zeros(len(labels), bool)
    groups: list[Group] = []
    while len(groups) < budget:
        pool = as_pool(vectors, ~annotated, groups)
        choose = samplers.informative(pool, N_NEAREST) if pick == "informative" else None
        folders: list[list[int]] = []
        for row in samplers.draw(sampler, {}, pool, seed * 1_000 + len(groups), N_NEAREST):
            n_found = N_AMONG if choose else N_NEAREST
            (found,) = neighbors.nearest(vectors, [row], n_found, judged=[sorted(judged[row])])
            if choose:
                found = found.only(choose(found.rows, found.similarities))
            folders.append([row, *found.rows])
            pool.allowed[folders[-1]] = False
            if len(folders) == ROUND:
                break
        if not folders:
            break
        for shown in folders:
            is_kept = labels[shown] == labels[shown[0]]
            groups.append((np.array(shown)[is_kept].tolist(), np.array(shown)[~is_kept].tolist()))
            annotated[groups[-1][0]] = True
            for other in shown[1:]:
                judged[shown[0]].add(other)
                judged[other].add(shown[0])
    return groups[:budget]


def as_pool(vectors: np.ndarray, allowed: np.ndarray, groups: list[Group]) -> samplers.Pool:
    ids = [f"{row:06}" for row in range(len(vectors))]
    return samplers.Pool(
        ids,
        vectors,
        lambda: [{"a": i % 100} for i in range(len(ids))],
        lambda prompt: vectors[0],
        allowed,
        list(groups),
    )


def describe(groups: list[Group], vectors: np.ndarray, labels: np.ndarray) -> list[float]:
    """Classes of main images; per folder, near duplicates collapsed, positives and negatives; deletions per folder."""
    n_pos = [count_distinct(vectors[pos]) - 1 for pos, _ in groups]  # beside the main image
    n_neg = [count_distinct(vectors[neg]) if neg else 0 for _, neg in groups]
    n_deleted = np.mean([len(neg) for _, neg in groups])
    return [len({int(labels[pos[0]]) for pos, _ in groups}), *map(float, (np.mean(n_pos), np.mean(n_neg), n_deleted))]


def count_distinct(vectors: np.ndarray) -> int:
    """Images that are not near duplicates of an earlier image."""
    return int((~(np.tril(vectors @ vectors.T, -1) > samplers.NEAR_DUPLICATE).any(1)).sum())


def interval(values: Any) -> list[float]:
    """Mean, and half of its 95% interval."""
    values = np.asarray(values, float)
    return [
        round(float(values.mean()), 4),
        round(float(T_95[len(values)] * values.std(ddof=1) / len(values) ** 0.5), 4),
    ]


def folders_to_match(curves: np.ndarray, bar_curves: np.ndarray, budgets: list[int]) -> list[float | None] | None:
    """Folders at which the mean curve reaches the bar's at MATCH_BUDGET, and its 95% interval, bootstrapped over seeds.

    Interpolated between budgets; None for never, or where the budgets do not go so far.
    """
    if MATCH_BUDGET not in budgets:
        return None
    at = budgets.index(MATCH_BUDGET)

    def cross(sample: np.ndarray) -> float:
        goal, curve = bar_curves[sample, at].mean(), curves[sample].mean(0)
        for b, value in enumerate(curve):
            if value >= goal:
                if b == 0:
                    return budgets[0]
                return float(np.interp(goal, [curve[b - 1], value], budgets[b - 1 : b + 1]))
        return np.inf

    rng = np.random.default_rng(0)
    crossings = [cross(rng.integers(len(curves), size=len(curves))) for _ in range(1_000)]
    found = [cross(np.arange(len(curves))), *np.quantile(crossings, [0.025, 0.975], method="nearest")]
    return [round(value, 1) if np.isfinite(value) else None for value in found]


def print_table(name: str, found: dict[str, Any], budgets: list[int]) -> None:
    print(f"\n{name}: held-out MAP@R untrained {found['untrained'][0]:.3f} ± {found['untrained'][1]:.3f}")
    heads = ("MAP@R", "above the bar", "recall@1", "classes", "positives", "negatives", "deletions")
    print(f"{'sampler, pick, recipe':22} {'folders':>7} " + " ".join(f"{head:>15}" for head in heads))
    rows = {key: row for key, row in found.items() if isinstance(row, dict) and "map_at_r" in row}
    for key, row in rows.items():
        above = row.get("map_at_r_above_bar", [[float("nan")] * 2] * len(budgets))
        columns = [row["map_at_r"], above, *(row[metric] for metric in METRICS[1:])]
        for b, budget in enumerate(budgets):
            if budget in REPORTED:
                cells = " ".join("{:7.3f} ± {:.3f}".format(*column[b]) for column in columns)
                print(f"{key:22} {budget:7} {cells}")
        if row.get("folders_to_bar"):
            middle, low, high = (value or "never" for value in row["folders_to_bar"])
            print(f"{'':22} folders to what '{BAR}' has at {MATCH_BUDGET}: {middle} (95%: {low} to {high})")
        at = ", ".join(f"{n}: {v[0]:.3f} ± {v[1]:.3f}" for n, v in zip(DELETIONS, row["map_at_r_by_deletions"]) if v)
        print(f"{'':22} MAP@R by deletions in all: {at}")
    for verdicts in ("real", "shuffled"):
        if test := found.get(f"stage_{verdicts}"):
            print(
                f"ann_train.py after {MATCH_BUDGET} informative folders, {verdicts} verdicts: passes {test['passed']} "
                "of {of}, gain {gain}, MAP@R gain {map_at_r_gain}, lowest {lowest_map_at_r_gain:.3f}".format(**test)
            )


def write_chart(path: Path, name: str, found: dict[str, Any], budgets: list[int]) -> None:
    curves = {
        key: ([mean for mean, _ in row["map_at_r"]], [half for _, half in row["map_at_r"]])
        for key, row in found.items()
        if isinstance(row, dict) and "map_at_r" in row
    }
    draw_lines(path, f"{name}: held-out MAP@R by folders reviewed, mean and 95% interval", budgets, curves)
    print(f"chart: {path}")


def measure_speed(n: int = 100_000, dim: int = 512, n_picks: int = 1_000) -> dict[str, list[float]]:
    """Seconds for n_picks, with 500 groups annotated, and peak memory of the process so far in GB, by sampler."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((n, 128), np.float32) @ rng.standard_normal((128, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = [(rng.choice(n, 11).tolist(), rng.choice(n, 10).tolist()) for _ in range(500)]
    cfgs = {"metadata": {"fields": ["a"]}, "text": {"prompt": "x"}, "ids": {"ids": [f"{i:06}" for i in range(n_picks)]}}
    result = {}
    for name in samplers.SAMPLERS:
        allowed = np.ones(n, bool)
        allowed[[row for pos, _ in groups for row in pos]] = False
        pool = as_pool(vectors, allowed, groups)
        began = time.perf_counter()
        for row in itertools.islice(samplers.draw(name, cfgs.get(name, {}), pool, 0, N_NEAREST), n_picks):
            allowed[row] = False
        result[name] = [round(time.perf_counter() - began, 2), peak_gb()]
        print(f"{name:10} {result[name][0]:7.2f} s, peak {result[name][1]:.2f} GB", flush=True)
    return result


def peak_gb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


if __name__ == "__main__":
    sys.exit(main())
