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
        "At dawn {x} has {a} {items}. Then {y} brings {b} more. How many {items} does {x} have now?",
        "On Monday {x} finds {a} {items} and on Tuesday {b} more. How many {items} is that?",
        "In the kitchen of {x} are {a} {items} and in the cellar {b}. How many {items} are there in all?",
        "With {a} {items} in the cart, {x} buys {b} more at the market. How many {items} are in the cart?",
        "The box of {x} holds {a} {items} and the box of {y} holds {b}. How many {items} do both boxes hold?",
        "Last week {x} sold {a} {items} and this week {b}. How many {items} were sold?",
    ),
    "-": (
        "At dawn {x} has {a} {items}. Then {y} takes {b} away. How many {items} does {x} have now?",
        "On Monday {x} finds {a} {items} and on Tuesday loses {b}. How many {items} remain?",
        "In the kitchen of {x} are {a} {items}, but {b} are broken. How many {items} are whole?",
        "With {a} {items} in the cart, {x} sells {b} at the market. How many {items} are in the cart?",
        "The box of {x} holds {a} {items}, and {y} needs {b} of them. How many {items} will be left?",
        "For the feast {x} wants {a} {items} and has {b}. How many {items} are missing?",
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
