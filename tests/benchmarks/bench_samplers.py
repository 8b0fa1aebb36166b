"""Which sampler makes folders worth most? Replays labeled sets with a reviewer who keeps what has the main's label.

    python tests/benchmarks/bench_samplers.py            # both sets, ten seeds: about 15 minutes on two cores
    python tests/benchmarks/bench_samplers.py --quick    # two seeds, budgets to 20
    python tests/benchmarks/bench_samplers.py --speed    # instead: 1,000 picks out of 100,000 x 512

Rounds of 10 folders, a main image with its 20 nearest each: choose, look up neighbors, review, record, again. Prints a
table and, as the last line, all figures as JSON; writes a chart per set to --out.
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
from tests.benchmarks.metric_learning import Group
from utils.annotation import neighbors

SETS = ("digits", "photos")
COMPARED = ("random", "cluster", "k_center", "typical", "herding", "ambiguous")
REPORTED = (10, 20, 50, 100)  # folders
BUDGETS = (10, 20, 30, 40, 50, 70, 100)  # those between serve to tell when a sampler reaches what random has at 50
MATCH_BUDGET = 50
ROUND, N_NEAREST = 10, 20
HELD_OUT = 4  # one image in so many
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}  # Student's t, by number of seeds
METRICS = ("map_at_r", "recall_at_1", "classes", "positives", "hard_negatives", "deletions_per_pair")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.speed:
        print(json.dumps(measure_speed()))
        return 0
    budgets = [budget for budget in BUDGETS if budget <= (20 if args.quick else 100)]
    seeds = range(2 if args.quick else args.seeds)
    for name in args.sets:
        labeled_sets.load(name)  # the photos are embedded once, before processes share them
    figures = {name: compare(name, args.samplers, budgets, seeds, args.workers) for name in args.sets}
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
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--samplers", nargs="+", default=COMPARED, choices=COMPARED)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bench_samplers")
    return parser.parse_args(argv)


def compare(name: str, names: list[str], budgets: list[int], seeds: range, n_workers: int) -> dict[str, Any]:
    """Per sampler: each metric at each budget as (mean, half of its 95% interval), and the folders to match random."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers: their threads would wait for each other
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(n_workers, mp_context=spawn) as pool:
        runs = list(pool.map(functools.partial(run_seed, name, list(names), budgets), seeds))
    result: dict[str, Any] = {"untrained": interval([run["untrained"] for run in runs])}
    curves = {sampler: np.array([[at[0] for at in run[sampler]] for run in runs]) for sampler in names}
    for sampler in names:
        values = np.array([run[sampler] for run in runs])  # (seeds, budgets, metrics)
        result[sampler] = {
            metric: [interval(values[:, b, m]) for b in range(len(budgets))] for m, metric in enumerate(METRICS)
        }
        if "random" in curves:
            gains = curves[sampler] - curves["random"]  # of the same split and seed
            result[sampler]["map_at_r_above_random"] = [interval(gains[:, b]) for b in range(len(budgets))]
            result[sampler]["folders_to_match_random"] = folders_to_match(curves[sampler], curves["random"], budgets)
    return result


def run_seed(name: str, names: list[str], budgets: list[int], seed: int) -> dict[str, Any]:
    """One split of the set and one run of each sampler on it: METRICS at each budget."""
    import torch

    torch.set_num_threads(1)
    vectors, labels = labeled_sets.load(name)
    order = np.random.default_rng([seed, 7]).permutation(len(labels))
    held_out, rows = np.sort(order[: len(order) // HELD_OUT]), np.sort(order[len(order) // HELD_OUT :])
    reduced = metric_learning.reduce_dims(vectors, vectors[rows])
    result: dict[str, Any] = {"untrained": metric_learning.map_at_r(vectors[held_out], labels[held_out])[0]}
    for sampler in names:
        groups = replay(sampler, vectors[rows], labels[rows], max(budgets), seed)
        result[sampler] = []
        for budget in budgets:
            projection = metric_learning.train(reduced[rows], groups[:budget], seed)
            projected = metric_learning.project(reduced[held_out], projection)
            scores = metric_learning.map_at_r(projected, labels[held_out])
            result[sampler].append([*scores, *describe(groups[:budget], vectors[rows], labels[rows])])
    return result


def replay(sampler: str, vectors: np.ndarray, labels: np.ndarray, budget: int, seed: int) -> list[Group]:
    """The groups that a reviewer records of `budget` folders, in rounds of an ann_dirrify and an ann_dirload each."""
    judged: list[set[int]] = [set() for _ in labels]  # what is not shown again beside each
    annotated = np.zeros(len(labels), bool)
    groups: list[Group] = []
    while len(groups) < budget:
        pool = as_pool(vectors, ~annotated, groups)
        folders: list[list[int]] = []
        for row in samplers.draw(sampler, {}, pool, seed * 1_000 + len(groups), N_NEAREST):
            (found,) = neighbors.nearest(vectors, [row], N_NEAREST, judged=[sorted(judged[row])])
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
    return samplers.Pool(ids, lambda: vectors, lambda: [{"a": i % 100} for i in range(len(ids))], allowed, list(groups))


def describe(groups: list[Group], vectors: np.ndarray, labels: np.ndarray) -> list[float]:
    """Classes of main images; per folder, near duplicates collapsed, positives and negatives; deletions per pair."""
    n_pos = [count_distinct(vectors[pos]) - 1 for pos, _ in groups]  # beside the main image
    n_neg = [count_distinct(vectors[neg]) if neg else 0 for _, neg in groups]
    n_pairs = max(1, sum(n_pos) + sum(n_neg))
    n_deleted = sum(len(neg) for _, neg in groups)
    return [len({labels[pos[0]] for pos, _ in groups}), np.mean(n_pos), np.mean(n_neg), n_deleted / n_pairs]


def count_distinct(vectors: np.ndarray) -> int:
    """Images that are no near duplicate of an earlier one."""
    return int((~(np.tril(vectors @ vectors.T, -1) > samplers.NEAR_DUPLICATE).any(1)).sum())


def interval(values: Any) -> list[float]:
    """Mean, and half of its 95% interval."""
    values = np.asarray(values, float)
    return [
        round(float(values.mean()), 4),
        round(float(T_95[len(values)] * values.std(ddof=1) / len(values) ** 0.5), 4),
    ]


def folders_to_match(curves: np.ndarray, random_curves: np.ndarray, budgets: list[int]) -> list[float | None] | None:
    """Folders at which the mean curve reaches random's at MATCH_BUDGET, and its 95% interval, bootstrapped over seeds.

    Interpolated between budgets; None for never, or where the budgets do not go so far.
    """
    if MATCH_BUDGET not in budgets:
        return None
    at = budgets.index(MATCH_BUDGET)

    def cross(sample: np.ndarray) -> float:
        goal, curve = random_curves[sample, at].mean(), curves[sample].mean(0)
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
    print(
        f"{'sampler':10} {'folders':>7} {'MAP@R':>15} {'above random':>15} {'recall@1':>15} {'classes':>12} "
        f"{'positives':>12} {'negatives':>12} {'del./pair':>13}"
    )
    for sampler in (key for key in found if key != "untrained"):
        row = found[sampler]
        for b, budget in enumerate(budgets):
            if budget in REPORTED:
                cells = [f"{mean:7.3f} ± {half:.3f}" for mean, half in (row["map_at_r"][b], _above(row, b))]
                cells.append("{:7.3f} ± {:.3f}".format(*row["recall_at_1"][b]))
                cells += ["{:6.1f} ± {:.1f}".format(*row[m][b]) for m in ("classes", "positives", "hard_negatives")]
                cells.append("{:6.3f} ± {:.3f}".format(*row["deletions_per_pair"][b]))
                print(
                    f"{sampler:10} {budget:7} "
                    + " ".join(f"{c:>{w}}" for c, w in zip(cells, (15, 15, 15, 12, 12, 12, 13)))
                )
        if row.get("folders_to_match_random"):
            middle, low, high = (value or "never" for value in row["folders_to_match_random"])
            print(f"{'':10} folders to match random at {MATCH_BUDGET}: {middle} (95%: {low} to {high})")


def _above(row: dict[str, Any], b: int) -> list[float]:
    return row.get("map_at_r_above_random", [[float("nan")] * 2] * (b + 1))[b]


def write_chart(path: Path, name: str, found: dict[str, Any], budgets: list[int]) -> None:
    curves = {
        sampler: ([mean for mean, _ in row["map_at_r"]], [half for _, half in row["map_at_r"]])
        for sampler, row in found.items()
        if sampler != "untrained"
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
        pool.text_vector = lambda prompt: vectors[0]
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
