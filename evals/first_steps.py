"""How a start moves the first steps: gradient norm at step 0 and the loss of the first 50 and 100 steps.

    python evals/first_steps.py                      every method below, its rates, three seeds
    python evals/first_steps.py --show               the table of what has been run

The pocket recipes with a constant learning rate, no warm-up and no evaluation, each rate and seed for itself; a method
is compared at the rate that is best for it. EVA's claim (arXiv 2410.07170) is a larger first gradient than LoRA's and
quicker progress; CorDA's (arXiv 2406.05223) is quicker progress than PiSSA's in its instruction-previewed mode.
Writes evals/results/first_steps.json after every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import machine, print_table

from llmreg.files import write_json
from llmreg.quiet import quiet
from llmreg.recipes import load_recipe, plan
from llmreg.recipes.base_model import load_base
from llmreg.recipes.building import build_trainer
from llmreg.recipes.calibrating import start_on_data
from llmreg.recipes.data import load_training_data

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "first_steps.json"
STEPS, BATCH = 100, 16
SEEDS = (0, 1, 2)
#: Recipe, overrides, rates.
METHODS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "LoRA": ("pocket-lora", (), (2e-3, 4e-3, 8e-3)),
    "EVA": ("pocket-eva", (), (2e-3, 4e-3, 8e-3)),
    "PiSSA": ("quickstart", (), (1e-3, 2e-3, 4e-3)),
    "CorDA ipm, balanced": ("pocket-corda", (), (1e-3, 2e-3, 4e-3)),
    "CorDA ipm, the paper's factors": ("pocket-corda", ("adapter.balance=false",), (1e-4, 3e-4, 1e-3)),
}
FIXED = (
    f"training.max_steps={STEPS}",
    "training.lr_scheduler_type=constant",
    "training.warmup_steps=0",
    "training.logging_steps=1",
    "evaluation={}",
)


def run(method: str, rate: float, seed: int) -> dict[str, Any]:
    """Gradient norm of the first step before clipping, mean losses, and every step's loss."""
    name, overrides, _ = METHODS[method]
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = (f"training.learning_rate={rate}", f"seed={seed}", f"output.dir={folder}/run")
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*FIXED, *overrides, *settings])
        settled = plan(recipe)
        model, tokenizer = load_base(recipe, gpu=False)
        data = load_training_data(recipe)
        data = dataclasses.replace(data, train=data.train.select(range(STEPS * BATCH)))
        trainer = build_trainer(settled, model, tokenizer, data)
        start_on_data(settled, trainer, tokenizer)
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    losses = [line["loss"] for line in lines]
    return {
        "gradient_norm": lines[0]["grad_norm"],
        "first_loss": losses[0],
        "loss_50": statistics.mean(losses[40:50]),
        "loss_100": statistics.mean(losses[90:100]),
        "losses": losses,
    }


def summary(results: dict[str, Any]) -> list[list[str]]:
    """One row a method: at the rate with the least loss at the end (mean over seeds), with the seeds' extremes."""
    rows = []
    for method, (_, _, rates) in METHODS.items():
        of_rate = {rate: [results["runs"].get(f"{method} {rate:g} {seed}") for seed in SEEDS] for rate in rates}
        whole = {rate: runs for rate, runs in of_rate.items() if all(runs)}
        if not whole:
            continue
        best = min(whole, key=lambda rate: statistics.mean(run["loss_100"] for run in whole[rate]))
        columns = {key: [run[key] for run in whole[best]] for key in ("gradient_norm", "loss_50", "loss_100")}
        cells = [
            f"{statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})" for values in columns.values()
        ]
        rows.append([method, f"{best:g}", f"{len(whole)} of {len(rates)}", *cells])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {"runs": {}}
    for method in () if arguments.show else arguments.methods:
        for seed in SEEDS:
            for rate in METHODS[method][2]:
                label = f"{method} {rate:g} {seed}"
                if label not in results["runs"]:
                    results["runs"][label] = run(method, rate, seed)
                    write_json(RESULT, {**machine(), **results, "steps": STEPS})
                    print(label, {k: v for k, v in results["runs"][label].items() if k != "losses"}, flush=True)
    columns = ["method", "rate", "rates run", "first gradient norm", "loss, steps 41 to 50", "loss, steps 91 to 100"]
    print_table("The first 100 steps of word problems, three seeds", columns, summary(results))


if __name__ == "__main__":
    main()
