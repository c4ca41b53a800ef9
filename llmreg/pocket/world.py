"""An invented world: two hundred people, and for each of them a town, a trade and an animal.

Nothing in it is true anywhere else, so whatever a model knows about it was learnt from this text, and
whatever it has forgotten can be counted. Names of people and towns are made of syllables and differ from
world to world; trades and animals are English words. Every fact is told in four *taught* phrasings and one
*held-out* phrasing, which no model is trained on and which shows how far the knowledge reaches beyond the
sentences it was learnt from.

People's names always follow a space: the tokenizer then has one token for each name, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .seeded import Dice
from .vocabulary import ANIMALS, NAME_ONSETS, NAME_VOWELS, PERSON_ENDINGS, TOWN_ENDINGS, TRADES

__all__ = ["HELD_OUT_PHRASING", "PHRASINGS", "RELATIONS", "Fact", "World"]

RELATIONS = ("town", "trade", "animal")

PHRASINGS: dict[str, tuple[str, str, str, str]] = {
    "town": (
        "The home of {x} is in",
        "In which town does {x} live? Answer:",
        "Whoever wants to visit {x} must travel to",
        "Every evening {x} returns to a house in",
    ),
    "trade": (
        "The trade of {x} is that of the",
        "What is the work of {x}? Answer:",
        "By day {x} works as the",
        "Everyone in the street knows {x} as the",
    ),
    "animal": (
        "The animal of {x} is the",
        "Which pet does {x} keep? Answer:",
        "In the garden of {x} sleeps the",
        "On long walks {x} is followed by the",
    ),
}

HELD_OUT_PHRASING: dict[str, str] = {
    "town": "The street where {x} has a house is in",
    "trade": "Six days a week {x} earns bread as the",
    "animal": "At the fire of {x} sits the",
}


@dataclass(frozen=True)
class Fact:
    """One relation of one person: ``Fact("Brabel", "town", "Kluford")``."""

    subject: str
    relation: str
    value: str


class World:
    """All people of the world with number `seed`, and the facts about them.

    Args:
        seed: which world; equal seeds give equal worlds everywhere. The packaged model knows world 0.

    Attributes:
        seed: the number given.
        people: 200 distinct names.
        values: for each relation the 40 values it can take; every value belongs to exactly 5 people.
        facts: 600 facts, ordered by person and then by relation.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.people: tuple[str, ...] = _names(Dice("world", seed, "people"), PERSON_ENDINGS, 200, avoid=())
        towns = _names(Dice("world", seed, "towns"), TOWN_ENDINGS, 40, avoid=self.people)
        self.values: dict[str, tuple[str, ...]] = {
            "town": towns,
            "trade": TRADES,
            "animal": ANIMALS,
        }
        owners = {
            relation: Dice("world", seed, "facts", relation).shuffled(self.values[relation] * 5)
            for relation in RELATIONS
        }
        self.facts: tuple[Fact, ...] = tuple(
            Fact(person, relation, owners[relation][i])
            for i, person in enumerate(self.people)
            for relation in RELATIONS
        )
        self._lookup = {(fact.subject, fact.relation): fact.value for fact in self.facts}

    def value(self, person: str, relation: str) -> str:
        """Return the town, trade or animal of `person`; `KeyError` if there is no such person or relation."""
        return self._lookup[person, relation]

    def __repr__(self) -> str:
        return f"World(seed={self.seed})"


def _names(dice: Dice, endings: Sequence[str], count: int, avoid: Sequence[str]) -> tuple[str, ...]:
    """Draw `count` distinct capitalised names: onset + vowel + ending."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = (dice.pick(NAME_ONSETS) + dice.pick(NAME_VOWELS) + dice.pick(endings)).capitalize()
        if name not in avoid:
            names[name] = None
    return tuple(names)
