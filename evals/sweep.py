"""Learning rates of the pocket recipes, over seeds: each method's best setting, before any two methods are compared.

    python evals/sweep.py                                  every recipe below; goes on where it stopped
    python evals/sweep.py --recipes quickstart --seeds 0 1 2
    python evals/sweep.py --show                           the table of what has been run

Each run is `llmreg train RECIPE training.learning_rate=... seed=...` in a process of its own; only the rate and the
seed differ from the recipe. Writes evals/results/sweep.json after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, print_table

from llmreg.errors import LlmregError
from llmreg.files import write_json
from llmreg.recipes import load_recipe

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "sweep.json"
RATES = {
    "quickstart": (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
    "pocket-lora": (1e-3, 2e-3, 3e-3, 5e-3),
    "pocket-nf4": (1e-3, 1.5e-3, 2e-3),
    "pocket-sorsa": (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
}
SEEDS = (0, 1, 2)


def run(recipe: str, rate: float, seed: int, threads: int) -> dict[str, Any]:
    """Scores after one run, seconds of training and the final training loss."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"training.learning_rate={rate:.1e}", f"seed={seed}", f"output.dir={folder}/run"]
        command = [sys.executable, "-m", "llmreg", "train", str(ROOT / "recipes" / f"{recipe}.yaml"), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise LlmregError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        report = json.loads((Path(folder) / "run" / "report.json").read_text())
    scores = {row["name"]: {"before": row["before"], "after": row["after"]} for row in report["measurements"]}
    return {"scores": scores, "train_seconds": report["seconds"]["train"], "threads": threads}


def key(recipe: str, rate: float, seed: int) -> str:
    return f"{recipe} lr={rate:.1e} seed={seed}"


def settings(recipe: str) -> dict[str, Any]:
    """What every run of this recipe shares; runs of another state of the recipe do not count."""
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml")
    training = {name: value for name, value in loaded.training.items() if name != "learning_rate"}
    return {"adapter": {"method": loaded.adapter.method, **loaded.adapter.settings}, "training": training}


def show(results: dict[str, Any]) -> None:
    for recipe, entry in results["recipes"].items():
        rows = []
        for rate in RATES[recipe]:
            runs = [
                entry["runs"][key(recipe, rate, seed)] for seed in SEEDS if key(recipe, rate, seed) in entry["runs"]
            ]
            if runs:
                cells = [f"{rate:.1e}", str(len(runs))]
                for task in ("pocket/word-problems", "pocket/facts"):
                    after = [run["scores"][task]["after"] for run in runs]
                    cells += [f"{statistics.mean(after):.1%}", " ".join(f"{score:.1%}" for score in after)]
                rows.append(cells)
        columns = ["learning rate", "runs", "word problems", "each seed", "facts kept", "each seed"]
        print_table(f"{recipe}: after {entry['settings']['training']['max_steps']} steps", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {"recipes": {}}
    if arguments.show:
        show(results)
        return
    for recipe in arguments.recipes:
        shared = settings(recipe)
        entry = results["recipes"].get(recipe)
        if entry is None or entry["settings"] != shared:
            entry = results["recipes"][recipe] = {"settings": shared, "runs": {}}
        for seed in arguments.seeds:
            for rate in RATES[recipe]:
                name = key(recipe, rate, seed)
                if name not in entry["runs"]:
                    entry["runs"][name] = run(recipe, rate, seed, arguments.threads)
                    write_json(RESULT, {**results, **machine()})
                    print(name, entry["runs"][name]["scores"]["pocket/word-problems"]["after"], flush=True)
    show(results)


if __name__ == "__main__":
    main()
