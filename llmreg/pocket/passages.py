"""Short passages of plain English: four sentences about one character, one thing and one place.

The sentences of a passage share their character, thing, place and weather, so there is something to predict
beyond the next word's frequency: who "she" is, which thing comes back, what the weather allows.
"""

from __future__ import annotations

from .seeded import Dice
from .vocabulary import CHARACTERS, DAYS, ITEMS, LOOKS, MANNERS, PLACES, QUALITIES, THINGS, TIMES, WEATHER

__all__ = ["LASTS", "OPENINGS", "SECONDS", "THIRDS", "passage", "passages", "story_words"]

OPENINGS = (
    "{time} the {kind} {who} walked to the {place} with a {look} {thing}.",
    "{time} a {kind} {who} found a {look} {thing} near the {place}.",
    "There was once a {kind} {who} who kept a {look} {thing} by the {place}.",
    "{time} the {kind} {who} lost a {look} {thing} on the way to the {place}.",
    "{time} somebody left a {look} {thing} at the {place}, and a {kind} {who} saw it.",
)
SECONDS = (
    "{weather}, and {he} was {kind2}.",
    "{weather}, so the {place} was {feel} and empty.",
    "{weather}, but the {who} did not mind.",
    "{weather}, and nobody else came to the {place}.",
    "{He} had {items} in a box and sold them at the market on {day}.",
    "There were {items} and {items2} in the kitchen, but {he} was {kind2}.",
    "{He} looked at the {thing} for a long time, because {he} was {kind2}.",
)
THIRDS = (
    'A neighbour asked, "Is this your {thing}?" and the {who} said {yes}.',
    "{He} put the {thing} under a tree and slept until noon.",
    "{He} wanted to sell the {thing}, but it was too {look} for the people there.",
    "{He} carried the {thing} home and showed it to {his} family.",
    "A child came from the {place2} and asked for the {thing}.",
    'A neighbour asked, "How many {items} are in the cart?" but {he} did not know.',
    "On {day} {he} brought {items} for the feast and took the {thing} away.",
    "{He} gave the {thing} to a friend who lived near the {place2}.",
)
LASTS = (
    "{after}, and the {who} went home {how}.",
    "{after}, and the {thing} was never seen again.",
    "From that day the {who} came to the {place} every week.",
    "In the end {he} kept the {thing}, and everyone was content.",
    "The next day {he} went to the {place2} and told the story again.",
)


def story_words(dice: Dice) -> dict[str, str]:
    """Draw the words of one story: a value for every name in braces of the four groups of sentences."""
    who, he = dice.pick(CHARACTERS)
    place, place2 = dice.shuffled(PLACES)[:2]
    weather, feel, after = WEATHER[dice.pick(tuple(WEATHER))]
    kind, kind2 = dice.shuffled(QUALITIES)[:2]
    items, items2 = dice.shuffled(ITEMS)[:2]
    return {
        "items": items,
        "items2": items2,
        "day": dice.pick(DAYS),
        "who": who,
        "he": he,
        "He": he.capitalize(),
        "his": "his" if he == "he" else "her",
        "place": place,
        "place2": place2,
        "weather": weather,
        "feel": feel,
        "after": after,
        "kind": kind,
        "kind2": kind2,
        "thing": dice.pick(THINGS),
        "look": dice.pick(LOOKS),
        "time": dice.pick(TIMES),
        "yes": dice.pick(("yes", "no", "nothing")),
        "how": dice.pick(MANNERS),
    }


def passage(dice: Dice) -> str:
    """Write one passage of four sentences, about 45 words."""
    words = story_words(dice)
    return " ".join(dice.pick(part) for part in (OPENINGS, SECONDS, THIRDS, LASTS)).format(**words)


def passages(seed: int, split: str, count: int, avoid: frozenset[str] = frozenset()) -> list[str]:
    """Return `count` distinct passages of `split`, none of them in `avoid`."""
    dice = Dice("passages", seed, split)
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = passage(dice)
        if text not in avoid:
            texts[text] = None
    return list(texts)
