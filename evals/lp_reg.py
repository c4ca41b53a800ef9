"""Whether Lp-Reg (arXiv 2510.03222) keeps entropy and unlikely tokens where GRPO loses them, at small scale.

    python evals/lp_reg.py                      each method at its rates with one seed, then two more at its best rate
    python evals/lp_reg.py --stop-after 2400    begins no run later than this; goes on where it stopped
    python evals/lp_reg.py --show               the tables and docs/lp_reg.png of what has been run

Plain LoRA on the pocket model, reworded arithmetic, answers of at most three tokens. A generation batch of 16 prompts
with 8 answers each is cut into 4 updates (off-policy) under the paper's clip, clip(r, 0, 10) for both signs. The pocket
model is sure of itself, and most groups of answers are all right or all wrong, so policies are those at temperature 1.5
(0.55 nats a token), in sampling and in training; scores are greedy.

A batch has about 384 tokens, so that the paper's percentile of 1 % is 4 tokens, of which those of negative advantage
count; hence a wide variant beside it. Both take the proxy of the policy that sampled. Weights of the other methods are
common ones; only the learning rate is swept: the best by the greedy score on 200 validation rows at seed 0, for all
methods alike. A spark is a sampled token with 0.02 max pi < pi < 0.1, noise one below that, whatever the method; both
are measured from the pass in which TRL takes the log-probabilities of what it has sampled.

Writes evals/results/lp_reg.json after every run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import machine, print_table
from torch import Tensor

from llmreg.evaluation.measure import Suite, measure
from llmreg.files import write_json
from llmreg.pocket import load_split
from llmreg.quiet import quiet
from llmreg.recipes import load_recipe, plan
from llmreg.recipes.base_model import load_base
from llmreg.recipes.data import load_training_data
from llmreg.recipes.progress_callback import use_training_bar
from llmreg.recipes.rewards import reward_functions
from llmreg.trainers import GRPOTrainer
from llmreg.trainers.model_parts import backbone_of, head_of

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "lp_reg.json"
PICTURE = ROOT / "docs" / "lp_reg.png"
RATES, SEEDS = (5e-4, 1e-3, 2e-3), (0, 1, 2)
STEPS = 240
KAPPA, UNLIKELY = 0.02, 0.1
TASK = "pocket/reworded-arithmetic"
#: What all runs share, over the recipe pocket-grpo.
FIXED = (
    "adapter={method: lora, r: 16, lora_alpha: 16, target_modules: all-linear}",
    "training.per_device_train_batch_size=32",
    "training.steps_per_generation=4",
    "training.max_completion_length=3",
    "training.temperature=1.5",
    "training.epsilon=1",
    "training.epsilon_high=9",
    "training.delta=10",
    "training.logging_steps=1",
)
METHODS: dict[str, tuple[str, ...]] = {
    "GRPO": (),
    "GRPO + entropy bonus": ("training.entropy_coef=0.1",),
    "GRPO + KL to the base": ("training.beta=0.04",),
    "GRPO + Lp-Reg": ("regularizers=[{name: low_probability, policy: old}]",),
    "GRPO + Lp-Reg, 10 %": ("regularizers=[{name: low_probability, policy: old, percentile: 0.1}]",),
    "GRPO + Lp-Reg, 10 %, weight 10": (
        "regularizers=[{name: low_probability, policy: old, percentile: 0.1, weight: 10}]",
    ),
}
#: What a run keeps of every generation batch.
CURVES = ("entropy", "spark", "noise", "mixed", "reward")


class MeasuredTrainer(GRPOTrainer):
    """Keeps statistics of every batch it generates, under the policy that sampled it.

    Attributes:
        curves: by name a value for each generation batch: the mean entropy of the policy at sampled tokens, the shares
            of tokens that are sparks and noise, of groups that are neither all right nor all wrong, and the reward.
    """

    curves: dict[str, list[float]]
    _states: Tensor | None = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or self._states is not None:  # training, or the reference after the policy
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        states: list[Tensor] = []
        hook = backbone_of(self.model).register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
        try:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        finally:
            hook.remove()
            self._states = torch.cat(states)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._states = None
        output = super()._generate_and_score_completions(inputs)
        scored, labels = output["completion_mask"].bool(), output["completion_ids"]
        hidden = self._states[:, -labels.shape[1] - 1 : -1][scored]
        found = token_shares(hidden, head_of(self.model, self.temperature), labels[scored])
        found["mixed"] = float(output["advantages"].view(-1, self.num_generations).ne(0).any(1).float().mean())
        found["reward"] = self._metrics["train"]["reward"][-1]
        for name in CURVES:
            self.curves[name].append(round(found[name], 5))
        return output


@torch.no_grad()
def token_shares(hidden: Tensor, head: Any, labels: Tensor) -> dict[str, float]:
    """Mean entropy at `hidden` (n, hidden), and the shares of sampled `labels` (n,) that are sparks and noise."""
    log_probs = torch.log_softmax(hidden @ head.weight.T / head.temperature, 1)
    probs = log_probs.exp()
    sampled, cut = probs.gather(1, labels[:, None]).squeeze(1), KAPPA * probs.max(1).values
    return {
        "entropy": float(-(probs * log_probs).sum(1).mean()),
        "spark": float(((sampled > cut) & (sampled < UNLIKELY)).float().mean()),
        "noise": float((sampled <= cut).float().mean()),
    }


def run(method: str, rate: float, seed: int) -> dict[str, Any]:
    """Curves over generation batches, greedy scores at the end, and what the regulariser logged, mean over updates."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = (f"training.learning_rate={rate}", f"training.max_steps={STEPS}", f"seed={seed}")
        settings += (f"output.dir={folder}/run",)
        recipe = load_recipe(ROOT / "recipes" / "pocket-grpo.yaml", [*FIXED, *METHODS[method], *settings])
        settled = plan(recipe)
        model, tokenizer = load_base(recipe, gpu=False)
        trainer = MeasuredTrainer(
            model=model,
            args=settled.training,
            reward_funcs=reward_functions(recipe),
            train_dataset=load_training_data(recipe).train,
            processing_class=tokenizer,
            peft_config=settled.adapter,
            regularizers=list(settled.regularizers) or None,
        )
        use_training_bar(trainer)
        trainer.curves = {name: [] for name in CURVES}
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        suites = [Suite(split, load_split(TASK, split)) for split in ("validation", "test")]
        suites.append(Suite("facts", load_split("pocket/facts", "test")))
        scores = measure(trainer.accelerator.unwrap_model(trainer.model), tokenizer, suites)
    logged = [line for line in trainer.state.log_history if "regularizer/spark_share" in line]
    keys = ("regularizer/spark_share", "regularizer/low_probability_share")
    return {
        **{name: score for (name, _), score in scores.items()},
        "curves": trainer.curves,
        "regularizer": {key: statistics.mean(float(line[key]) for line in logged) for key in keys} if logged else None,
        "seconds": seconds,
    }


# -- what was found -----------------------------------------------------------------------------------------------


def runs_of(results: dict[str, Any], method: str, rate: float) -> list[dict[str, Any]]:
    return [results["runs"][key] for seed in SEEDS if (key := f"{method} {rate:g} {seed}") in results["runs"]]


def best_rate(results: dict[str, Any], method: str) -> float | None:
    """The rate with the best validation score at the first seed; of equals the lowest. None before all rates ran."""
    scores = {rate: results["runs"].get(f"{method} {rate:g} {SEEDS[0]}") for rate in RATES}
    return max(RATES, key=lambda rate: scores[rate]["validation"]) if all(scores.values()) else None


def at_end(run: dict[str, Any], name: str) -> float:
    """Mean of a curve over the last fifth of the generation batches."""
    curve = run["curves"][name]
    return statistics.mean(curve[-max(1, len(curve) // 5) :])


def summary_row(runs: list[dict[str, Any]]) -> list[str]:
    """Cells of one method and rate: means, and the least and most of the seeds for what is compared."""

    def cell(values: list[float], form: str) -> str:
        spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    test, facts = ([run[name] for run in runs] for name in ("test", "facts"))
    reward, entropy, spark, noise = (
        [at_end(run, name) for run in runs] for name in ("reward", "entropy", "spark", "noise")
    )
    return [
        cell(test, ".1%"),
        cell(reward, ".2f"),
        cell(entropy, ".2f"),
        cell(spark, ".1%"),
        f"{statistics.mean(noise):.1%}",
        f"{statistics.mean(facts):.1%}",
    ]


COLUMNS = ["greedy score", "reward", "entropy", "sparks", "noise", "facts kept"]


def start_row(results: dict[str, Any]) -> list[str]:
    """The same of the base: the first generation batch of every run, before any update."""
    first = {name: statistics.mean(run["curves"][name][0] for run in results["runs"].values()) for name in CURVES}
    base = results["base"]
    return [
        f"{base['test']:.1%}",
        f"{first['reward']:.2f}",
        f"{first['entropy']:.2f}",
        f"{first['spark']:.1%}",
        f"{first['noise']:.1%}",
        f"{base['facts']:.1%}",
    ]


def best_rows(results: dict[str, Any]) -> list[list[str]]:
    """The base, and each method at its best rate."""
    rows = [["the base", "", "", *start_row(results)]]
    for method in METHODS:
        chosen = best_rate(results, method)
        if chosen is not None:
            runs = runs_of(results, method, chosen)
            rows.append([method, f"{chosen:g}", str(len(runs)), *summary_row(runs)])
    return rows


def show(results: dict[str, Any]) -> None:
    every = []
    for method in METHODS:
        for rate in RATES:
            runs = runs_of(results, method, rate)
            if runs:
                validation = f"{statistics.mean(run['validation'] for run in runs):.1%}"
                every.append([method, f"{rate:g}", str(len(runs)), validation, *summary_row(runs)])
    print_table(
        "Every rate; curves over the last fifth of batches", ["", "rate", "seeds", "validation", *COLUMNS], every
    )
    title = "Each method at its best rate by validation at seed 0; curves over the last fifth"
    print_table(title, ["", "rate", "seeds", *COLUMNS], best_rows(results))
    rows = []
    for key, done in results["runs"].items():
        if done["regularizer"]:
            shares = (done["regularizer"][f"regularizer/{name}_share"] for name in ("low_probability", "spark"))
            rows.append([key, *(f"{share:.2%}" for share in shares)])
    columns = ["method, rate, seed", "tokens selected", "of unlikely ones kept by the filter"]
    print_table("What Lp-Reg acted on, mean over updates", columns, rows)


def picture(results: dict[str, Any]) -> None:
    """Entropy, reward and sparks over updates, each method at its best rate, means over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    per_batch = int(next(one for one in FIXED if "steps_per_generation" in one).split("=")[1])
    for method in METHODS:
        chosen = best_rate(results, method)
        if chosen is None:
            continue
        for axis, name in zip(axes, ("entropy", "reward", "spark"), strict=True):
            values = smooth([run["curves"][name] for run in runs_of(results, method, chosen)], window=5)
            axis.plot([per_batch * index for index in range(len(values))], values, label=f"{method}, {chosen:g}")
    for axis, title in zip(axes, ("entropy, nats a token", "reward", "share of sparks"), strict=True):
        axis.set(title=title, xlabel="update")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)


def smooth(curves: list[list[float]], window: int) -> list[float]:
    """Mean of the curves at each batch, then over so many batches up to it."""
    means = [statistics.mean(values) for values in zip(*curves, strict=True)]
    return [statistics.mean(means[max(0, index - window + 1) : index + 1]) for index in range(len(means))]


# -- many runs ----------------------------------------------------------------------------------------------------


def base_scores() -> dict[str, float]:
    recipe = load_recipe(ROOT / "recipes" / "pocket-grpo.yaml")
    with quiet():
        model, tokenizer = load_base(recipe, gpu=False)
        suites = [Suite("test", load_split(TASK, "test")), Suite("facts", load_split("pocket/facts", "test"))]
        return {name: score for (name, _), score in measure(model.eval(), tokenizer, suites).items()}


def read() -> dict[str, Any]:
    """What has been run with the settings of this file; other settings or rows begin anew, of all methods or of one."""
    rows = json.dumps([load_split(TASK, split) for split in ("train", "validation", "test")]).encode()
    settings = {
        "fixed": [*FIXED, f"training.max_steps={STEPS}", f"rows: {hashlib.sha256(rows).hexdigest()}"],
        "methods": {name: list(value) for name, value in METHODS.items()},
    }
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {"settings": {"fixed": None}}
    if found["settings"]["fixed"] != settings["fixed"]:
        return {"settings": settings, "runs": {}}
    then = found["settings"]["methods"]
    same = {name for name, overrides in settings["methods"].items() if then.get(name) == overrides}
    kept = {key: done for key, done in found["runs"].items() if key.rsplit(" ", 2)[0] in same}
    return {**found, "settings": settings, "runs": kept}


def run_all(methods: list[str], stop_after: float) -> None:
    """All rates with the first seed, then the other seeds at each method's best rate."""
    results, deadline = read(), time.monotonic() + stop_after
    results.setdefault("base", base_scores())
    for seed in SEEDS:
        for method in methods:
            for rate in RATES if seed == SEEDS[0] else (best_rate(results, method),):
                key = f"{method} {rate:g} {seed}" if rate else None
                if key is None or key in results["runs"] or time.monotonic() > deadline:
                    continue
                done = run(method, rate, seed)
                results["runs"] = {**read()["runs"], key: done}  # another process may have written
                write_json(RESULT, {**machine(), **results})
                ends = {name: round(at_end(done, name), 4) for name in CURVES}
                scores = {name: done[name] for name in ("validation", "test", "facts")}
                print(key, scores, ends, f"{done['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.show:
        run_all(arguments.methods, arguments.stop_after)
    results = read()
    show(results)
    picture(results)


if __name__ == "__main__":
    main()
