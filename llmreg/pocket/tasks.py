"""The tasks of the pocket world, by name, as ordinary lists of rows.

A task is a description, its columns, and one function per split that makes its rows from a world's seed. A
new task is one module that writes rows and one entry in `TASKS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmreg.errors import RecipeError

from . import arithmetic, classification
from .corpus import corpus, held_out_passages
from .preferences import preferences
from .reworded import reworded
from .seeded import Dice
from .word_problems import word_problems
from .world import HELD_OUT_PHRASING, PHRASINGS, World

__all__ = ["TASKS", "Row", "Task", "load_split"]

Row = dict[str, Any]
"""Strings by column; the column ``label`` has an integer."""


@dataclass(frozen=True)
class Task:
    """A named task.

    Attributes:
        name: as recipes write it, ``pocket/...``.
        description: what it asks, in one sentence.
        columns: the columns of every row of every split.
        makers: for each split, the function that makes its rows from the world's seed.
        classes: names of the labels 0, 1, ... of a classification task; empty for the others.
    """

    name: str
    description: str
    columns: tuple[str, ...]
    makers: Mapping[str, Callable[[int], list[Row]]]
    classes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, for example ``("train", "validation", "test")``."""
        return tuple(self.makers)

    def load(self, split: str = "train", seed: int = 0) -> list[Row]:
        """Return the rows of `split` in world `seed`, always the same, always in the same order.

        Raises:
            RecipeError: there is no such split.
        """
        if split not in self.makers:
            raise RecipeError(_unknown("split", split, self.splits, f" of {self.name}"))
        return self.makers[split](seed)


def load_split(name: str, split: str = "train", seed: int = 0) -> list[Row]:
    """Return the rows of one split of the task `name` in world `seed`.

    Args:
        name: a key of `TASKS`, for example ``pocket/word-problems``.
        split: one of the task's splits.
        seed: number of the world; the packaged model knows world 0.

    Raises:
        RecipeError: unknown task or split; the message names the nearest one.
    """
    if name not in TASKS:
        raise RecipeError(_unknown("task", name, tuple(TASKS)))
    return TASKS[name].load(split, seed)


def _unknown(what: str, given: str, known: Iterable[str], where: str = "") -> str:
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}{where}.{hint} Known: {', '.join(known)}."


def _facts_taught(seed: int) -> list[Row]:
    return [_row(d.prompt, d.completion) for d in corpus(seed) if d.kind == "fact"]


def _facts_sample(seed: int) -> list[Row]:
    """One question about each person, relations and phrasings in turn: 200 rows."""
    world = World(seed)
    rows = []
    for i, person in enumerate(world.people):
        relation = tuple(PHRASINGS)[i % len(PHRASINGS)]
        phrasing = PHRASINGS[relation][(i // len(PHRASINGS)) % 4]
        rows.append(_row(phrasing.format(x=person), " " + world.value(person, relation)))
    return rows


def _facts_paraphrased(seed: int) -> list[Row]:
    return [_row(HELD_OUT_PHRASING[f.relation].format(x=f.subject), " " + f.value) for f in World(seed).facts]


def _sums(split: str) -> Callable[[int], list[Row]]:
    """Every sum of the split in a random order, phrasings in turn."""

    def make(seed: int) -> list[Row]:
        rows = []
        for i, s in enumerate(Dice("arithmetic", seed, split).shuffled(arithmetic.sums(seed, split))):
            rows.append(_row(s.fill(arithmetic.PHRASINGS[s.operation][i % 2]), s.answer))
        return rows

    return make


def _reworded(split: str) -> Callable[[int], list[Row]]:
    return lambda seed: reworded(seed, split)


def _problems(split: str) -> Callable[[int], list[Row]]:
    return lambda seed: word_problems(World(seed), split)


def _preferences(split: str) -> Callable[[int], list[Row]]:
    return lambda seed: preferences(seed, split)


def _stories(split: str) -> Callable[[int], list[Row]]:
    return lambda seed: classification.stories(seed, split)


def _passages_taught(seed: int) -> list[Row]:
    return [{"text": d.text} for d in corpus(seed) if d.kind == "passage"]


def _pretraining_sample(seed: int) -> list[Row]:
    """2,000 documents of all kinds, chosen at random."""
    return [{"text": d.text} for d in Dice("pretraining-sample", seed).shuffled(corpus(seed))[:2000]]


def _passages_held_out(seed: int) -> list[Row]:
    return [{"text": text} for text in held_out_passages(seed)]


def _row(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": completion}


_PAIR = ("prompt", "completion")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "pocket/word-problems",
            "Two-digit word problems: the pretrained model fails them, fine-tuning solves them. "
            "Operands of validation and test occur in no training text.",
            _PAIR,
            {split: _problems(split) for split in arithmetic.SPLITS},
        ),
        Task(
            "pocket/facts",
            "What the model was taught about its world: train has all 600 facts in the 4 taught phrasings, "
            "test one question a person, paraphrase all facts in a phrasing never taught.",
            _PAIR,
            {"train": _facts_taught, "test": _facts_sample, "paraphrase": _facts_paraphrased},
        ),
        Task(
            "pocket/arithmetic",
            "Two-digit addition and subtraction as it was taught; operands of validation and test were not.",
            _PAIR,
            {split: _sums(split) for split in arithmetic.SPLITS},
        ),
        Task(
            "pocket/reworded-arithmetic",
            "The same in phrasings that were not taught, for GRPO: the pretrained model is right in part. "
            "Operands of validation and test occur in no training text.",
            _PAIR,
            {split: _reworded(split) for split in arithmetic.SPLITS},
        ),
        Task(
            "pocket/corpus",
            "Text: train has passages the model has read, test passages it has not, pretraining a sample of "
            "everything it has read (facts, sums, passages).",
            ("text",),
            {"train": _passages_taught, "test": _passages_held_out, "pretraining": _pretraining_sample},
        ),
        Task(
            "pocket/preferences",
            "Pairs of endings of a story, both true to it, for DPO: the one in which somebody goes home singing is "
            "preferred, and `is_preferred` recognises it.",
            ("prompt", "chosen", "rejected"),
            {split: _preferences(split) for split in arithmetic.SPLITS},
        ),
        Task(
            "pocket/classification",
            "Stories that end as expected (80 %), with a turn (15 %) or in a strange mood (5 %): beginning and end "
            "have to be read together.",
            ("text", "label"),
            {split: _stories(split) for split in arithmetic.SPLITS},
            classes=classification.CLASSES,
        ),
    )
}
