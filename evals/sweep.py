"""Learning rates of the pocket recipes, over seeds: each method's best setting, before any two methods are compared.

    python evals/sweep.py                                  everything below; goes on where it stopped
    python evals/sweep.py --recipes quickstart --seeds 0 1 2 --rates 1e-3
    python evals/sweep.py --world 1 --rates best           each at its best rate, on the world of another seed
    python evals/sweep.py --jobs 14 --cpu --stop-after 540 --results FILE      several at once, on a borrowed machine
    python evals/sweep.py --merge FILE                     takes over what was run there
    python evals/sweep.py --show                           the tables of what has been run

Each run is `llmreg train RECIPE training.learning_rate=... seed=...` in a process of its own; only the rate and the
seed differ from the recipe (and what `SWEEPS` says). Writes evals/results/sweep.json after every run, which names the
machine it ran on; runs that name none are of the machine at the end of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from divergence import measure
from safetensors.torch import load_file

from llmreg.errors import LlmregError
from llmreg.files import write_json
from llmreg.pocket import load_split
from llmreg.recipes import load_recipe

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "sweep.json"
SECOND_WORLD = Path(__file__).parent / "second_world"


@dataclass(frozen=True)
class Sweep:
    """A recipe, what is overridden in it, the rates that are tried, and whether it is compared with its base."""

    recipe: str
    rates: tuple[float, ...]
    overrides: tuple[str, ...] = ()
    divergence: bool = False


#: Half the steps of the recipes, for PiSSA as for BA-LoRA.
_HALF = "training.max_steps=500"

SWEEPS = {
    "quickstart": Sweep("quickstart", (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3)),
    "pocket-lora": Sweep("pocket-lora", (1e-3, 2e-3, 3e-3, 5e-3)),
    "pocket-nf4": Sweep("pocket-nf4", (1e-3, 1.5e-3, 2e-3)),
    "pocket-sorsa": Sweep("pocket-sorsa", (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3)),
    "pocket-sorsa, sum": Sweep("pocket-sorsa", (1e-3,), ("adapter.reduction=sum",)),
    "pocket-sorsa, start only": Sweep("pocket-sorsa", (1e-3,), ("adapter.weights=null",)),
    "pocket-bone": Sweep("pocket-bone", (5e-4, 1e-3, 2e-3, 4e-3)),
    "pocket-bone, row sharing": Sweep("pocket-bone", (5e-4, 1e-3, 2e-3, 4e-3), ("adapter.variant=bone",)),
    # As many trained numbers as LoRA at rank 16.
    "pocket-bone, row sharing, r 32": Sweep(
        "pocket-bone", (5e-4, 1e-3, 2e-3), ("adapter.variant=bone", "adapter.r=32")
    ),
    "pocket-svfit": Sweep("quickstart", (1e-2, 3e-2, 1e-1), ("adapter.method=svfit", "adapter.r=64")),
    "pocket-corda": Sweep("pocket-corda", (5e-4, 1e-3, 1.5e-3, 2e-3)),
    "pocket-corda, the paper's factors": Sweep(
        "pocket-corda", (5e-5, 1e-4, 2e-4, 5e-4, 1e-3), ("adapter.balance=false",)
    ),
    "pocket-corda-kpm": Sweep("pocket-corda-kpm", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    # A holds the inverse of C there, so a small change of B is a large one where calibration saw little.
    "pocket-corda-kpm, the paper's factors": Sweep(
        "pocket-corda-kpm", (5e-5, 2e-4, 5e-4, 1e-3), ("adapter.balance=false",)
    ),
    # What the base was pretrained on: stories and arithmetic beside the facts.
    "pocket-corda-kpm, of the corpus": Sweep(
        "pocket-corda-kpm",
        (5e-4, 1e-3, 2e-3, 4e-3),
        ("calibration.data=pocket/corpus", "calibration.split=pretraining", "calibration.samples=1024"),
    ),
    "pocket-eva": Sweep("pocket-eva", (1e-3, 2e-3, 3e-3, 5e-3)),
    "pocket-eva, equal ranks": Sweep("pocket-eva", (1e-3, 2e-3, 3e-3, 5e-3), ("adapter.rho=1",)),
    "pocket-eora": Sweep("pocket-eora", (1e-3, 2e-3, 3e-3)),
    # LoRA on the same base, from zero.
    "pocket-eora, lora": Sweep(
        "pocket-nf4", (1e-3, 2e-3, 3e-3), ("adapter={method: lora, r: 16, lora_alpha: 16, target_modules: all-linear}",)
    ),
    "pocket-classification": Sweep("pocket-classification", (5e-4, 1e-3, 2e-3)),
    "pocket-classification-lora": Sweep("pocket-classification-lora", (1e-3, 2e-3, 4e-3)),
    "pocket-classification-svfit": Sweep("pocket-classification-svfit", (1e-2, 3e-2, 5e-2, 1e-1)),
    # Little but the head: one trained number in one layer.
    "pocket-classification, head": Sweep(
        "pocket-classification-svfit",
        (1e-2, 3e-2, 5e-2, 1e-1),
        ("adapter.r=1", "adapter.target_modules=[layers.0.self_attn.q_proj]"),
    ),
    "pissa, 500 steps": Sweep("quickstart", (7e-4, 1e-3, 1.5e-3), (_HALF,), divergence=True),
    "balora, 500 steps": Sweep("pocket-balora", (7e-4, 1e-3, 1.5e-3), (_HALF,), divergence=True),
    # The paper's weight moves little here.
    "balora, 500 steps, consistency x 40": Sweep(
        "pocket-balora", (7e-4, 1e-3, 1.5e-3), (_HALF, "adapter.consistency=1.0"), divergence=True
    ),
}
SEEDS = (0, 1, 2)
#: The mean training loss up to these steps is kept: how early a method learns.
FIRST_STEPS = (50, 100, 200, 500)
#: Two scores of a run: what should rise, and what should stay.
SCORES = {
    "sft": ("pocket/word-problems", "pocket/facts"),
    "classification": ("pocket/classification (macro F1)", "pocket/classification (accuracy)"),
}


def run(sweep: Sweep, rate: float, seed: int, world: int, threads: int) -> dict[str, Any]:
    """Scores after one run, seconds of training, and how many numbers were trained."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"training.learning_rate={rate:.1e}", f"seed={seed}", f"output.dir={folder}/run"]
        overrides += [*sweep.overrides, *(_second_world(sweep, Path(folder)) if world else ())]
        recipe = ROOT / "recipes" / f"{sweep.recipe}.yaml"
        command = [sys.executable, "-m", "llmreg", "train", str(recipe), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise LlmregError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        report = json.loads((Path(folder) / "run" / "report.json").read_text())
        conditions = condition_numbers(Path(folder) / "run" / "adapter")
        compared = measure(Path(folder) / "run" / "adapter") if sweep.divergence else {}
    rows = report["measurements"]
    names = [row["name"] for row in rows]
    scores = {}
    for row in rows:
        name = row["name"] if names.count(row["name"]) == 1 else f"{row['name']} ({row['metric']})"
        scores[_pocket_name(name, folder)] = {"before": row["before"], "after": row["after"]}
    return {
        "scores": scores,
        "train_seconds": report["seconds"]["train"],
        "train_loss": statistics.mean(point["loss"] for point in report["losses"][-10:]),
        "first_losses": first_losses(report["losses"]),
        "init_seconds": report["seconds"]["init"],
        "trained": report["trainable_parameters"],
        "condition": conditions,
        "threads": threads,
        "machine": machine(),
        **compared,
        **({"calibration": _of_pocket(report["calibration"], folder)} if report.get("calibration") else {}),
    }


def _pocket_name(name: str, folder: str) -> str:
    """The task whose rows of the second world were written into `folder`."""
    return name.replace(f"{folder}/", "pocket/").replace("-train.jsonl", "").replace(".jsonl", "")


def _of_pocket(calibration: dict[str, Any], folder: str) -> dict[str, Any]:
    return {**calibration, "data": _pocket_name(calibration["data"], folder)}


def first_losses(losses: list[dict[str, float]]) -> dict[str, float]:
    """The mean training loss of the first 50, 100, ... steps; a logged loss is the mean since the one before."""
    steps = [0.0, *(point["step"] for point in losses)]
    spans = [
        (point["loss"], after - before, after) for point, (before, after) in zip(losses, pairwise(steps), strict=True)
    ]
    means = {}
    for limit in FIRST_STEPS:
        within = [(loss, weight) for loss, weight, step in spans if step <= limit]
        if any(step == limit for _, _, step in spans):
            means[str(limit)] = sum(loss * weight for loss, weight in within) / limit
    return means


def condition_numbers(adapter: Path) -> dict[str, float] | None:
    """Of the trained factors A and B of all layers: median and largest; None for adapters without both."""
    path = adapter / "llmreg_factors.safetensors"
    factors = load_file(path) if path.is_file() else {}
    trained = [value.float() for key, value in factors.items() if ".lora_A." in key or ".lora_B." in key]
    numbers = [float(values[0] / values[-1]) for values in map(torch.linalg.svdvals, trained)]
    return {"median": statistics.median(numbers), "largest": max(numbers)} if numbers else None


def _second_world(sweep: Sweep, folder: Path) -> list[str]:
    """Overrides onto the model and the tasks of world 1, whose rows are written into `folder`."""
    recipe = load_recipe(ROOT / "recipes" / f"{sweep.recipe}.yaml")

    def rows(name: str, split: str) -> str:
        path = folder / f"{name.removeprefix('pocket/')}{'-train' if split == 'train' else ''}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in load_split(name, split, seed=1)))
        return str(path)

    tasks, kept = (
        [rows(name, "test") for name in names] for names in (recipe.evaluation.tasks, recipe.evaluation.forgetting)
    )
    calibration = recipe.calibration and recipe.calibration.data
    return [
        *([f"calibration.data={rows(calibration, 'train')}"] if calibration else []),
        f"model.name={SECOND_WORLD}",
        f"data.train={rows(recipe.data.train, 'train')}",
        f"evaluation.tasks={json.dumps(tasks)}",
        f"evaluation.forgetting={json.dumps(kept)}",
    ]


def key(name: str, rate: float, seed: int, world: int = 0) -> str:
    return f"{name} lr={rate:.1e} seed={seed}" + (f" world={world}" if world else "")


def settings(sweep: Sweep) -> dict[str, Any]:
    """What every run of this recipe shares; runs of another state of the recipe do not count."""
    loaded = load_recipe(ROOT / "recipes" / f"{sweep.recipe}.yaml", sweep.overrides)
    training = {name: value for name, value in loaded.training.items() if name != "learning_rate"}
    shared = {"adapter": {"method": loaded.adapter.method, **loaded.adapter.settings}, "training": training}
    if loaded.calibration:
        shared["calibration"] = loaded.calibration.model_dump(exclude_none=True)
    if loaded.model.quantization:
        shared["quantization"] = loaded.model.quantization
    return shared


def summaries(entry: dict[str, Any], world: int = 0) -> dict[float, dict[str, Any]]:
    """By learning rate: the number of runs, of both scores the mean and every seed's, and the mean early losses."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for name, done in sorted(entry["runs"].items()):
        if (" world=1" in name) == bool(world):
            by_rate.setdefault(float(name.split(" lr=")[1].split()[0]), []).append(done)
    rows = {}
    for rate, runs in sorted(by_rate.items()):
        wanted = next(names for names in SCORES.values() if names[0] in runs[0]["scores"])
        values = [[done["scores"][name]["after"] for done in runs] for name in wanted]
        early = [done["first_losses"] for done in runs if done.get("first_losses")]  # runs before 2026-11-27 have none
        first = {step: statistics.mean(one[step] for one in early) for step in early[0]} if early else {}
        means = [statistics.mean(column) for column in values]
        rows[rate] = {"runs": len(runs), "means": means, "each": values, "first_losses": first}
    return rows


def best_rate(entry: dict[str, Any]) -> float:
    """The rate with the highest mean of the first score; of equals the lowest."""
    rows = summaries(entry)
    return max(sorted(rows), key=lambda rate: rows[rate]["means"][0])


def kept_at(entry: dict[str, Any], wanted: float) -> list[float]:
    """Of each seed that reaches `wanted` of the first score at some rate: the most of the second score it then has.

    A rate is chosen for each seed, as one who looks at both scores would; a seed that never gets there is not in it.
    """
    by_seed: dict[str, list[float]] = {}
    task, other = SCORES["sft"]
    for name, done in entry["runs"].items():
        scores = done["scores"]
        if " world=1" not in name and scores[task]["after"] >= wanted:
            by_seed.setdefault(name.split(" seed=")[1], []).append(scores[other]["after"])
    return [max(scores) for scores in by_seed.values()]


def show(results: dict[str, Any]) -> None:
    for name, entry in results["recipes"].items():
        for world in (0, 1):
            rows = []
            for rate, row in summaries(entry, world).items():
                cells = [f"{rate:.1e}", str(row["runs"])]
                for mean, each in zip(row["means"], row["each"], strict=True):
                    cells += [f"{mean:.1%}", " ".join(f"{score:.1%}" for score in each)]
                early = (row["first_losses"].get(step) for step in ("50", "100", "200"))
                rows.append([*cells, " ".join("-" if loss is None else f"{loss:.2f}" for loss in early)])
            if rows:
                columns = ["learning rate", "runs", "task", "each seed", "kept (or accuracy)", "each seed"]
                columns.append("loss of first 50, 100, 200")
                steps = entry["settings"]["training"]["max_steps"]
                print_table(f"{name}: after {steps} steps{', second world' if world else ''}", columns, rows)


# -- many runs --------------------------------------------------------------------------------------------------


def planned(names: list[str], seeds: list[int], rates: list[str] | None, world: int, file: Path) -> Iterator[tuple]:
    """(name, rate, seed) of what has not been run, seed by seed, so that an early end leaves whole seeds."""
    entries = _results(file)["recipes"]
    for seed in seeds:
        for name in names:
            entry = entries.get(name, {})
            done = entry.get("runs", {}) if entry.get("settings") == settings(SWEEPS[name]) else {}
            chosen = rates or SWEEPS[name].rates
            for rate in [float(rate) for rate in chosen if rate != "best"] or [best_rate(entries[name])]:
                if key(name, rate, seed, world) not in done:
                    yield name, rate, seed


def keep(file: Path, name: str, shared: dict[str, Any], runs: dict[str, Any]) -> None:
    """Add runs of one recipe; the file is read anew, since another process may have written meanwhile."""
    results = _results(file)
    entry = results["recipes"].get(name)
    if entry is None or entry["settings"] != shared:
        entry = results["recipes"][name] = {"settings": shared, "runs": {}}
    entry["runs"].update(runs)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**machine(), **results})  # runs without a machine of their own are of the first one


def run_all(arguments: argparse.Namespace) -> int:
    """Run what is missing, several at once; returns how many failed. Only this process writes the results."""
    file, deadline = arguments.results, time.monotonic() + (arguments.stop_after or float("inf"))
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs)

    def one(name: str, rate: float, seed: int) -> dict[str, Any] | None:
        return None if time.monotonic() > deadline else run(SWEEPS[name], rate, seed, arguments.world, threads)

    failed = 0
    todo = planned(arguments.recipes, arguments.seeds, arguments.rates, arguments.world, file)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        started = {pool.submit(one, *task): task for task in todo}
        for future in as_completed(started):
            name, rate, seed = started[future]
            label = key(name, rate, seed, arguments.world)
            try:
                done = future.result()
            except Exception as error:  # whatever one run does, the others are kept
                failed += 1
                print(f"{label} failed: {error!r}", file=sys.stderr, flush=True)
                continue
            if done is not None:
                keep(file, name, settings(SWEEPS[name]), {label: done})
                print(label, {task: score["after"] for task, score in done["scores"].items()}, flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="+", help="some of the rates only, or: best")
    parser.add_argument("--world", type=int, choices=(0, 1), default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each a process of its own")
    parser.add_argument("--threads", type=int, help="of each run; by default the cores shared by the jobs")
    parser.add_argument("--cpu", action="store_true", help="hide the GPU from the runs")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no run later than this")
    parser.add_argument("--results", type=Path, default=RESULT, help="read and written")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="add the runs of another results file, and end")
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    failed = 0
    if arguments.merge:
        for name, entry in _results(arguments.merge)["recipes"].items():
            if name in SWEEPS and entry["settings"] == settings(SWEEPS[name]):
                keep(arguments.results, name, entry["settings"], entry["runs"])
            else:
                print(f"{name}: left out, run under another state of the recipe", file=sys.stderr)
    elif not arguments.show:
        failed = run_all(arguments)
    show(_results(arguments.results))
    sys.exit(1 if failed else 0)


def _results(file: Path = RESULT) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {"recipes": {}}


if __name__ == "__main__":
    main()
