"""Effect of hybrid matching: the same model, data, steps and seeds with and without one-to-many queries.

    python benchmarks/quality/hybrid_ablation.py RECIPE data.val.annotations=FILE [key=value ...] [--seeds 0 1 2]
        [--variants one-to-one hybrid] [--every 200] [--output outputs/ablation] [--figure ablation.svg]

Every run is `hpetr train` in its own process, evaluated at a fixed interval of steps. Interrupted runs are resumed,
finished ones are not repeated. Variants are `one-to-one`, `hybrid`, and `k5` or `q300` for hybrid with another number
of copies of each person or of one-to-many queries. The table has mean and standard deviation of the last AP over seeds,
and seconds per step. The figure has AP over steps with the range over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from hpetr.training.recipe import load_recipe

K, QUERIES = 4, 100  # of `hybrid`


def options_of(variant: str) -> dict[str, int]:
    """Return the model options of a variant."""
    if variant == "one-to-one":
        return {"num_one_to_many_queries": 0}
    options = {"num_one_to_many_queries": QUERIES, "one_to_many_k": K}
    if variant == "hybrid":
        return options
    key = {"k": "one_to_many_k", "q": "num_one_to_many_queries"}.get(variant[:1])
    if key is None or not variant[1:].isdecimal():
        sys.exit(f"error: variant {variant!r}, expected one-to-one, hybrid, or k or q with a number")
    return {**options, key: int(variant[1:])}


def train(recipe: Path, overrides: list[str], variant: str, seed: int, every: int, folder: Path) -> list[dict]:
    """Return the log of a run, training it first if it is not finished."""
    done = folder / "done"
    if not done.exists():
        options = {**load_recipe(recipe, overrides).model.options, **options_of(variant)}
        settings = [f"output={folder}", f"train.seed={seed}", f"train.eval_every={every}", f"train.save_every={every}"]
        settings.append(f"model.options={json.dumps(options)}")
        command = [sys.executable, "-m", "hpetr", "train", str(recipe), "--resume", *overrides, *settings]
        subprocess.run(command, check=True)
        done.touch()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(log: list[dict]) -> dict[int, float]:
    """Return AP by step."""
    return {entry["step"]: entry["AP"] for entry in log if "AP" in entry}


def draw(curves: dict[str, list[dict[int, float]]], path: Path) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "hpetr", "svg.fonttype": "none"})
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="AP")
    for variant, runs in curves.items():
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        values = [[run[step] for run in runs] for step in steps]
        (line,) = axes.plot(steps, [statistics.mean(v) for v in values], label=variant)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, as for hpetr train; data.val is needed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["one-to-one", "hybrid"])
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--figure", type=Path, help="SVG of AP over steps")
    args = parser.parse_args()
    if load_recipe(args.recipe, args.overrides).data.val is None:
        sys.exit("error: no data.val, expected data to evaluate on")
    curves: dict[str, list[dict[int, float]]] = {}
    rows = []
    for variant in args.variants:
        logs = [
            train(args.recipe, args.overrides, variant, seed, args.every, args.output / f"{variant}-{seed}")
            for seed in args.seeds
        ]
        curves[variant] = [curve(log) for log in logs]
        last = [run[max(run)] for run in curves[variant]]
        spread = statistics.stdev(last) if len(last) > 1 else float("nan")
        seconds = statistics.median(entry["step_seconds"] for log in logs for entry in log if "step_seconds" in entry)
        rows.append((variant, statistics.mean(last), spread, max(curves[variant][0]), seconds))
    print(f"| variant | AP, mean of {len(args.seeds)} seeds | standard deviation | steps | s a step |")
    print("|---|---|---|---|---|")
    for variant, mean, spread, steps, seconds in rows:
        print(f"| {variant} | {mean:.4f} | {spread:.4f} | {steps:,} | {seconds:.3f} |")
    if args.figure is not None:
        draw(curves, args.figure)


if __name__ == "__main__":
    main()
