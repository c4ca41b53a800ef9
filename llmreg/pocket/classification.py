"""Stories in three classes of very unequal size: as expected, with a turn of fate, in a strange mood.

In a story somebody loses a thing or finds one, and goes home; the end tells either what became of the thing or
the mood. What was lost is expected to stay lost and what was found to be taken home; who lost something goes
home alone and who found something singing. Most stories (80 %) go that way; in 15 % fate turns, in 5 % the
mood does not fit. Every beginning and every end also occurs in class 0, and both other classes have either
beginning (one of them in four rows of five, a first hold for training): beginning and end have to be read
together. All words are ordinary English, so an encoder that has never seen the pocket world can be trained too.
"""

from __future__ import annotations

from .passages import SECONDS, story_words
from .seeded import Dice

__all__ = ["CLASSES", "SIZES", "stories"]

CLASSES = ("expected", "turn", "mood")
"""Names of the labels 0, 1 and 2."""

SIZES = {"train": (1600, 300, 100), "validation": (320, 60, 20), "test": (320, 60, 20)}
"""Rows of each class in each split."""

_BEGINNINGS = {
    "lost": "{time} the {kind} {who} lost a {look} {thing} on the way to the {place}.",
    "found": "{time} a {kind} {who} found a {look} {thing} near the {place}.",
}
_ENDS = {
    "gone": "{after}, and the {who} went home and never saw the {thing} again.",
    "kept": "{after}, and the {who} went home with the {thing}.",
    "alone": "{after}, and the {who} went home alone.",
    "singing": "{after}, and the {who} went home singing.",
}
_PLOTS = {
    "expected": (("lost", "gone"), ("found", "kept"), ("lost", "alone"), ("found", "singing")),
    "turn": 4 * (("lost", "kept"),) + (("found", "gone"),),
    "mood": 4 * (("found", "alone"),) + (("lost", "singing"),),
}
_SECONDS = tuple(second for second in SECONDS if "{weather}" in second)


def stories(seed: int, split: str) -> list[dict[str, str | int]]:
    """Return the rows of `split` as ``{"text", "label"}`` in random order; no text occurs twice in a world."""
    dice = Dice("classification", seed)
    rows: dict[str, list[dict[str, str | int]]] = {}
    seen: set[str] = set()
    for name, sizes in SIZES.items():
        rows[name] = []
        for label, size in enumerate(sizes):
            for _ in range(size):
                while (text := _story(dice, CLASSES[label])) in seen:
                    pass
                seen.add(text)
                rows[name].append({"text": text, "label": label})
        rows[name] = dice.shuffled(rows[name])
    return rows[split]


def _story(dice: Dice, label: str) -> str:
    beginning, end = dice.pick(_PLOTS[label])
    parts = (_BEGINNINGS[beginning], dice.pick(_SECONDS), _ENDS[end])
    return " ".join(parts).format(**story_words(dice))
