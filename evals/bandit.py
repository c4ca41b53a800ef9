"""Whether Lp-Reg keeps a useful unlikely token alive while it is unlucky (arXiv 2510.03222, its premise in a toy).

    python evals/bandit.py            every method, rate and seed (about five minutes on one thread)
    python evals/bandit.py --show     the table of what has been run

One position and a vocabulary of 24: three usual tokens (0.33, 0.30, 0.25), a spark (0.02, above the filter's 0.02 *
0.33) and twenty noise tokens of 0.005 each (below it), so that the proxy's mass is Z = 0.9. Usual tokens are right half
of the time, spark and noise never, so both meet negative advantages whenever they are sampled.

GRPO as in the paper's runs: groups of 8, clip(r, 0, 10) for both signs, gradients clipped at norm 1; SGD on the logits.
A generation batch of 512 tokens is one update (on-policy) or is cut into 8, once or four times over (off-policy). Every
position is a fork here, and in text few are, so the percentile is 15 %. Writes evals/results/bandit.json.

What was found: at the paper's weight of 1 the spark is no better off than under GRPO on-policy, where the push is
`1/Z - 1 = 0.11` against `|A|` of about 1; off-policy, with the old policy's proxy and at high rates, it is two to six
times as likely. At weight 10 with the old proxy it stays near its start through three batches (0.016 to 0.018 at rates
up to 1, where GRPO is at 0.002 to 0.016) while noise is given up; without the filter less of the noise is. Through
thirty batches it fades under every method: as the usual tokens sharpen and noise fades, the filter's cut rises above
the spark and `Z` goes to 1, and with them the protection goes. At a rate of 4, weight 10 is unstable.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from torch import Tensor

from llmreg.files import write_json
from llmreg.regularizers import LowProbabilityRegularizer
from llmreg.regularizers.base import Context, Head
from llmreg.regularizers.low_probability import PROXY, THRESHOLD
from llmreg.trainers.low_probability import generation_threshold, old_proxy

RESULT = Path(__file__).parent / "results" / "bandit.json"
USUAL, SPARK, NOISE = slice(0, 3), 3, slice(4, 24)
START = torch.tensor([0.33, 0.30, 0.25, 0.02] + [0.005] * 20, dtype=torch.float64)
HEAD = Head(torch.eye(24, dtype=torch.float64))
SAMPLES, GROUP = 512, 8
SHOWN = (1, 3, 10, 30)
SEEDS = (0, 1, 2, 3, 4)
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)


def term(**settings: Any) -> LowProbabilityRegularizer:
    return LowProbabilityRegularizer(percentile=0.15, **settings)


#: Into how many parts a batch is cut, how often it is gone through, and the regulariser.
METHODS: dict[str, tuple[int, int, LowProbabilityRegularizer | None]] = {
    "1 update: GRPO": (1, 1, None),
    "1 update: Lp-Reg": (1, 1, term()),
    "1 update: Lp-Reg, exact": (1, 1, term(divergence="exact")),
    "1 update: Lp-Reg, weight 10": (1, 1, term(weight=10.0)),
    "8 updates: GRPO": (8, 1, None),
    "8 updates: Lp-Reg, current proxy": (8, 1, term()),
    "8 updates: Lp-Reg, old proxy": (8, 1, term(policy="old")),
    "8 updates: Lp-Reg, authors' variant": (8, 1, term(policy="old", variant="reference")),
    "8 updates: Lp-Reg, old proxy, weight 10": (8, 1, term(policy="old", weight=10.0)),
    "8 updates: the same, no filter": (8, 1, term(policy="old", weight=10.0, kappa=1e-9)),
    "32 updates: GRPO": (8, 4, None),
    "32 updates: Lp-Reg, old proxy": (8, 4, term(policy="old")),
    "32 updates: Lp-Reg, old proxy, weight 10": (8, 4, term(policy="old", weight=10.0)),
}


def advantages(labels: Tensor, generator: torch.Generator) -> Tensor:
    """GRPO's, (n,): rewards of each group of answers, centred and divided by their deviation."""
    rewards = torch.zeros(len(labels), dtype=torch.float64)
    usual = labels < SPARK
    rewards[usual] = (torch.rand(int(usual.sum()), generator=generator) < 0.5).double()
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def update(logits: Tensor, batch: dict[str, Tensor], regularizer: LowProbabilityRegularizer | None) -> Tensor:
    """The gradient of one update's loss, clipped."""
    logits = logits.detach().requires_grad_()
    hidden = logits.expand(len(batch["labels"]), -1)
    log_probs = torch.log_softmax(hidden, 1).gather(1, batch["labels"][:, None]).squeeze(1)
    ratio = (log_probs - batch["old_log_probs"]).exp().clamp(max=10)
    loss = -(ratio * batch["advantages"]).mean()
    if regularizer is not None:
        context = Context(
            labels=batch["labels"],
            hidden=hidden,
            head=HEAD,
            log_probs=log_probs,
            advantages=batch["advantages"],
            old_log_probs=batch["old_log_probs"],
            extra={THRESHOLD: batch[THRESHOLD], PROXY: batch[PROXY]},
        )
        loss = loss + regularizer.weight * regularizer.loss(context)
    gradient = torch.autograd.grad(loss, logits)[0]
    return gradient / gradient.norm().clamp(min=1)


def generate(
    logits: Tensor, regularizer: LowProbabilityRegularizer | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """One batch, (n,) each, and what the regulariser needs of it."""
    log_policy = torch.log_softmax(logits, 0)
    labels = torch.multinomial(log_policy.exp(), SAMPLES, replacement=True, generator=generator)
    batch = {"labels": labels, "advantages": advantages(labels, generator), "old_log_probs": log_policy[labels]}
    if regularizer is not None:
        log_probs = batch["old_log_probs"]
        threshold = generation_threshold(log_probs, torch.ones_like(log_probs), regularizer.percentile)
        batch[THRESHOLD] = threshold.expand(SAMPLES)
        batch[PROXY] = old_proxy(regularizer, logits.expand(SAMPLES, -1), HEAD, labels, log_probs)
    return batch


def run(method: str, rate: float, seed: int) -> dict[str, list[float]]:
    """After `SHOWN` batches: probability of the spark and of all noise, entropy, and how often the spark was hit."""
    parts, passes, regularizer = METHODS[method]
    generator = torch.Generator().manual_seed(seed)
    logits, hits = START.log(), 0
    found: dict[str, list[float]] = {"spark": [], "noise": [], "entropy": [], "hits": []}
    for number in range(1, SHOWN[-1] + 1):
        batch = generate(logits, regularizer, generator)
        hits += int(((batch["labels"] == SPARK) & (batch["advantages"] < 0)).sum())
        for _ in range(passes):
            for rows in torch.randperm(SAMPLES, generator=generator).chunk(parts):
                part = {key: values[rows] for key, values in batch.items()}
                logits = logits - rate * update(logits, part, regularizer)
        if number in SHOWN:
            policy = logits.softmax(0)
            found["spark"].append(float(policy[SPARK]))
            found["noise"].append(float(policy[NOISE].sum()))
            found["entropy"].append(float(-(policy * policy.log()).nansum()))
            found["hits"].append(hits)
    return found


#: What is shown, after how many batches.
COLUMNS = (("hits", 3), ("spark", 3), ("noise", 3), ("spark", 10), ("noise", 10), ("spark", 30), ("entropy", 30))


def rows_of(runs: dict[str, Any]) -> list[list[str]]:
    """One row a method and rate: medians over seeds."""
    rows = []
    for method in METHODS:
        for rate in RATES:
            of_seeds = [runs[key] for seed in SEEDS if (key := f"{method} {rate:g} {seed}") in runs]
            if of_seeds:
                medians = [
                    statistics.median(run[what][SHOWN.index(after)] for run in of_seeds) for what, after in COLUMNS
                ]
                rows.append([method, f"{rate:g}", *(f"{median:.2g}" for median in medians)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {"runs": {}}
    for method in () if arguments.show else METHODS:
        for rate in RATES:
            for seed in SEEDS:
                results["runs"][f"{method} {rate:g} {seed}"] = run(method, rate, seed)
        write_json(RESULT, {**results, **machine()})
    columns = ["method", "rate", *(f"{what}, {after}" for what, after in COLUMNS)]
    print_table(
        "A spark of 0.02 and noise of 0.1 after so many unlucky batches, medians of five seeds",
        columns,
        rows_of(results["runs"]),
    )


if __name__ == "__main__":
    main()
