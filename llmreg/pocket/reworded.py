"""The arithmetic of pretraining in words that pretraining did not use: a task with a signal for reinforcement learning.

The pretrained model reads these phrasings right in part, each differently often (greedy, on training operands: 73, 71,
42 and 33 %), so that some of several sampled answers are right and some are wrong. Word problems give no such signal:
it solves none. Operands of validation and test occur in no training text.
"""

from __future__ import annotations

from .arithmetic import sums
from .seeded import Dice

__all__ = ["PHRASINGS", "SIZES", "reworded"]

SIZES = {"train": 4000, "validation": 200, "test": 200}

PHRASINGS: dict[str, tuple[str, str]] = {
    "+": ("Answer: {a} plus {b} is", "The sum {a} plus {b} is"),
    "-": ("The difference of {a} and {b} is", "What is {a} less {b}? Answer:"),
}


def reworded(seed: int, split: str) -> list[dict[str, str]]:
    """Return the rows of `split` in world `seed` as ``{"prompt", "completion"}``; all prompts are distinct."""
    dice = Dice("reworded-arithmetic", seed, split)
    asked = [
        (calculation, phrasing) for calculation in sums(seed, split) for phrasing in PHRASINGS[calculation.operation]
    ]
    return [
        {"prompt": calculation.fill(phrasing), "completion": calculation.answer}
        for calculation, phrasing in dice.shuffled(asked)[: SIZES[split]]
    ]
