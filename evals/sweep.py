"""Learning rates of the pocket recipes, over seeds: each method's best setting, before any two methods are compared.

    python evals/sweep.py                                  everything below; goes on where it stopped
    python evals/sweep.py --recipes quickstart --seeds 0 1 2 --rates 1e-3
    python evals/sweep.py --world 1 --rates best           each at its best rate, on the world of another seed
    python evals/sweep.py --show                           the tables of what has been run

Each run is `llmreg train RECIPE training.learning_rate=... seed=...` in a process of its own; only the rate and the
seed differ from the recipe (and what `SWEEPS` says). Writes evals/results/sweep.json after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
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
    """A recipe, what is overridden in it, and the rates that are tried."""

    recipe: str
    rates: tuple[float, ...]
    overrides: tuple[str, ...] = ()


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
    "pocket-classification": Sweep("pocket-classification", (5e-4, 1e-3, 2e-3)),
    "pocket-classification-lora": Sweep("pocket-classification-lora", (1e-3, 2e-3, 4e-3)),
    "pocket-classification-svfit": Sweep("pocket-classification-svfit", (1e-2, 3e-2, 5e-2, 1e-1)),
    # Little but the head: one trained number in one layer.
    "pocket-classification, head": Sweep(
        "pocket-classification-svfit",
        (1e-2, 3e-2, 5e-2, 1e-1),
        ("adapter.r=1", "adapter.target_modules=[layers.0.self_attn.q_proj]"),
    ),
}
SEEDS = (0, 1, 2)
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
    rows = report["measurements"]
    names = [row["name"] for row in rows]
    scores = {}
    for row in rows:
        name = row["name"] if names.count(row["name"]) == 1 else f"{row['name']} ({row['metric']})"
        scores[name.replace(f"{folder}/", "pocket/").replace(".jsonl", "")] = {
            "before": row["before"],
            "after": row["after"],
        }
    return {
        "scores": scores,
        "train_seconds": report["seconds"]["train"],
        "train_loss": statistics.mean(point["loss"] for point in report["losses"][-10:]),
        "trained": report["trainable_parameters"],
        "condition": conditions,
        "threads": threads,
    }


def condition_numbers(adapter: Path) -> dict[str, float] | None:
    """Of the trained factors A and B of all layers: median and largest; None for adapters without both."""
    path = adapter / "llmreg_factors.safetensors"
    factors = load_file(path) if path.is_file() else {}
    trained = [value for key, value in factors.items() if ".lora_A." in key or ".lora_B." in key]
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
    return [
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
    return {"adapter": {"method": loaded.adapter.method, **loaded.adapter.settings}, "training": training}


def summaries(entry: dict[str, Any], world: int = 0) -> dict[float, dict[str, Any]]:
    """By learning rate: the number of runs, and of both scores the mean and every seed's."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for name, done in sorted(entry["runs"].items()):
        if (" world=1" in name) == bool(world):
            by_rate.setdefault(float(name.split(" lr=")[1].split()[0]), []).append(done["scores"])
    rows = {}
    for rate, runs in sorted(by_rate.items()):
        wanted = next(names for names in SCORES.values() if names[0] in runs[0])
        values = [[scores[name]["after"] for scores in runs] for name in wanted]
        rows[rate] = {"runs": len(runs), "means": [statistics.mean(column) for column in values], "each": values}
    return rows


def best_rate(entry: dict[str, Any]) -> float:
    """The rate with the highest mean of the first score; of equals the lowest."""
    rows = summaries(entry)
    return max(sorted(rows), key=lambda rate: rows[rate]["means"][0])


def show(results: dict[str, Any]) -> None:
    for name, entry in results["recipes"].items():
        for world in (0, 1):
            rows = []
            for rate, row in summaries(entry, world).items():
                cells = [f"{rate:.1e}", str(row["runs"])]
                for mean, each in zip(row["means"], row["each"], strict=True):
                    cells += [f"{mean:.1%}", " ".join(f"{score:.1%}" for score in each)]
                rows.append(cells)
            if rows:
                columns = ["learning rate", "runs", "task", "each seed", "kept (or accuracy)", "each seed"]
                steps = entry["settings"]["training"]["max_steps"]
                print_table(f"{name}: after {steps} steps{', second world' if world else ''}", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="+", help="some of the rates only, or: best")
    parser.add_argument("--world", type=int, choices=(0, 1), default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    if arguments.show:
        show(_results())
        return
    for name in arguments.recipes:
        sweep, shared = SWEEPS[name], settings(SWEEPS[name])
        entry = _results()["recipes"].get(name)
        if entry is None or entry["settings"] != shared:
            entry = {"settings": shared, "runs": {}}
        rates = [float(rate) for rate in arguments.rates or sweep.rates if rate != "best"] or [best_rate(entry)]
        for seed in arguments.seeds:
            for rate in rates:
                label = key(name, rate, seed, arguments.world)
                if label not in entry["runs"]:
                    entry["runs"][label] = run(sweep, rate, seed, arguments.world, arguments.threads)
                    results = _results()  # read anew: another process may have written meanwhile
                    results["recipes"][name] = entry
                    write_json(RESULT, {**results, **machine()})
                    print(
                        label,
                        {task: score["after"] for task, score in entry["runs"][label]["scores"].items()},
                        flush=True,
                    )
    show(_results())


def _results() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.is_file() else {"recipes": {}}


if __name__ == "__main__":
    main()
