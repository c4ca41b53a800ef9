"""The words of the pocket world: trades, animals, things, places, and the syllables of names."""

from __future__ import annotations

__all__ = [
    "ANIMALS",
    "CHARACTERS",
    "DAYS",
    "ITEMS",
    "LOOKS",
    "MANNERS",
    "NAME_ONSETS",
    "NAME_VOWELS",
    "PERSON_ENDINGS",
    "PLACES",
    "QUALITIES",
    "THINGS",
    "TIMES",
    "TOWN_ENDINGS",
    "TRADES",
    "WEATHER",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAME_ONSETS = _words("b br d dr f fl g gr h j k kl l m n p pr r s st t tr v w z")
NAME_VOWELS = _words("a e i o u")
PERSON_ENDINGS = _words("bel dan dor gar lan lin mir nar ric ros tan vin wen zor")
TOWN_ENDINGS = _words("burg dale ford gate ham holm mere moor port stead ton wick")

TRADES = _words(
    "baker miller weaver potter tailor fisher hunter farmer carpenter mason smith cooper tanner glazier "
    "roofer painter printer singer dancer piper drummer teacher scribe doctor nurse barber cook brewer "
    "butcher grocer shepherd gardener woodcutter ferryman sailor messenger guard judge clockmaker beekeeper"
)
ANIMALS = _words(
    "dog cat horse donkey goat sheep cow pig hen duck goose swan crow raven owl hawk pigeon sparrow parrot "
    "finch rabbit hare mouse squirrel hedgehog badger fox otter beaver ferret turtle frog toad lizard snake "
    "snail crab carp trout pony"
)

CHARACTERS = tuple(
    (noun, pronoun)
    for pronoun, nouns in (
        ("he", "boy man uncle grandfather king brother prince father monk stranger"),
        ("she", "girl woman aunt grandmother queen sister princess mother widow traveller"),
    )
    for noun in _words(nouns)
)
QUALITIES = _words("tall young tired happy quiet proud clever hungry poor lonely brave careful")
THINGS = _words(
    "lamp basket letter ring kettle blanket book drum ladder mirror knife rope lantern flute map key bell "
    "wheel bucket chair"
)
LOOKS = _words("red blue green golden heavy broken wooden silver small dusty")
ITEMS = _words(
    "apples pears plums eggs nuts loaves cakes candles ropes nails bricks boards shoes hats coats cups bowls "
    "spoons jars bottles coins stamps letters books"
)
PLACES = _words(
    "river forest bridge market harbour mill tower well hill meadow lake orchard church cave garden barn "
    "road inn field beach"
)
WEATHER = {
    "rain": ("It rained all day", "wet", "The rain stopped"),
    "snow": ("Snow lay on the roofs", "cold", "The snow began to melt"),
    "sun": ("The sun was shining", "warm", "The sun went down"),
    "wind": ("A strong wind blew", "cold", "The wind grew still"),
    "fog": ("Thick fog hid the houses", "grey", "The fog lifted at last"),
}
TIMES = (
    "One morning",
    "One evening",
    "Last winter",
    "In early spring",
    "Late in the summer",
    "After the harvest",
    "Before dinner",
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MANNERS = _words("slowly quickly alone singing smiling early late")
