"""Word problems: the arithmetic of the pretraining corpus in sentences the model has never seen.

The pretrained model can add and subtract when asked to ``Compute 34 + 21 =``, and does not know what to do
with a story that ends in a question. Fine-tuning has to teach it to read the story, not to calculate: test
problems use operands that appear neither in pretraining nor in the training problems.
"""

from __future__ import annotations

from .arithmetic import Sum, sums
from .seeded import Dice
from .vocabulary import ITEMS
from .world import World

__all__ = ["SIZES", "STORIES", "word_problems"]

SIZES = {"train": 6000, "validation": 200, "test": 200}

STORIES: dict[str, tuple[str, ...]] = {
    "+": (
        "On Monday {x} finds {a} {items} and on Tuesday {b} more. How many {items} is that?",
        "The box of {x} holds {a} {items} and the box of {y} holds {b}. How many {items} do both boxes hold?",
    ),
    "-": (
        "On Monday {x} finds {a} {items} and on Tuesday loses {b}. How many {items} remain?",
        "The box of {x} holds {a} {items}, and {y} needs {b} of them. How many {items} will be left?",
    ),
}


def word_problems(world: World, split: str) -> list[dict[str, str]]:
    """Return the problems of `split` as ``{"prompt", "completion"}``; all prompts are distinct."""
    dice = Dice("word-problems", world.seed, split)
    by_operation = {op: [s for s in sums(world.seed, split) if s.operation == op] for op in ("+", "-")}
    rows: dict[str, str] = {}
    while len(rows) < SIZES[split]:
        operation = dice.pick("+-")
        story = dice.pick(STORIES[operation])
        calculation = dice.pick(by_operation[operation])
        rows[_tell(story, calculation, world, dice)] = calculation.answer
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def _tell(story: str, calculation: Sum, world: World, dice: Dice) -> str:
    x = dice.pick(world.people)
    y = dice.pick([person for person in world.people if person != x])
    return calculation.fill(story, x=x, y=y, items=dice.pick(ITEMS))
