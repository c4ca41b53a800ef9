"""Preference pairs: two endings of one story, of which the one with a song is preferred.

The prompt is a passage without its last sentence. In the preferred ending the character goes home singing; in
the other the character goes home in another manner, or tells the story at another place the next day. Both
are true to the story (its character, its weather) and both are sentences the pretrained model writes, the
preferred one seldom: what is taught is a taste, neither knowledge nor a new form. `is_preferred` decides of
any text whether it satisfies that taste.
"""

from __future__ import annotations

import re

from .passages import LASTS, OPENINGS, SECONDS, THIRDS, story_words
from .seeded import Dice
from .vocabulary import MANNERS, WEATHER

__all__ = ["SIZES", "is_preferred", "preferences"]

SIZES = {"train": 1600, "validation": 200, "test": 200}

_PREFERRED_MANNER = "singing"
_OTHER_MANNERS = tuple(manner for manner in MANNERS if manner != _PREFERRED_MANNER)
_GOES_HOME = next(last for last in LASTS if "{how}" in last)
_NEXT_DAY = next(last for last in LASTS if "{place2}" in last)
_OPENINGS = tuple(opening for opening in OPENINGS if "somebody" not in opening)  # one character a story
_SECONDS = tuple(second for second in SECONDS if "{weather}" in second)
_THIRDS = tuple(third for third in THIRDS if not third.startswith("A neighbour"))  # those would exceed 64 tokens
_PREFERRED = re.compile(
    _GOES_HOME.replace(".", r"\.").format(
        after=f"(?:{'|'.join(after for _, _, after in WEATHER.values())})", who=r"(\w+)", how=_PREFERRED_MANNER
    )
)


def is_preferred(prompt: str, completion: str) -> bool:
    """Return whether `completion` ends the story in `prompt` in the preferred way.

    It must be the one sentence ``<the weather changed>, and the <character> went home singing.`` about a
    character that the prompt mentions, with nothing but spaces around it. Whether the right weather changed
    is not asked.

    Args:
        prompt: the story without its last sentence.
        completion: any text, generated or not, without its end-of-sequence token.
    """
    match = _PREFERRED.fullmatch(completion.strip())
    return match is not None and match[1] in re.findall(r"\w+", prompt)


def preferences(seed: int, split: str) -> list[dict[str, str]]:
    """Return the pairs of `split` as ``{"prompt", "chosen", "rejected"}``; no prompt occurs twice."""
    dice = Dice("preferences", seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < sum(SIZES.values()):
        row = _pair(dice)
        rows.setdefault(row["prompt"], row)
    first = sum(SIZES[earlier] for earlier in tuple(SIZES)[: tuple(SIZES).index(split)])
    return list(rows.values())[first : first + SIZES[split]]


def _pair(dice: Dice) -> dict[str, str]:
    words = story_words(dice)
    prompt = " ".join(dice.pick(part) for part in (_OPENINGS, _SECONDS, _THIRDS))
    other = dice.pick((_GOES_HOME, _NEXT_DAY))
    return {
        "prompt": prompt.format(**words),
        "chosen": " " + _GOES_HOME.format(**{**words, "how": _PREFERRED_MANNER}),
        "rejected": " " + other.format(**{**words, "how": dice.pick(_OTHER_MANNERS)}),
    }
