"""The pretraining corpus: facts, calculations and passages, and the order in which a model reads them.

`corpus` lists the distinct documents; `reading_order` repeats and shuffles them. A document is a prompt and a
completion. Only the completion counts for the loss: who is asked about and which numbers come up is chance,
and a model of a million parameters should not spend itself on predicting chance. Passages are all
completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from . import arithmetic
from .passages import passages
from .seeded import Dice
from .world import PHRASINGS, World

__all__ = ["REPEATS", "Document", "corpus", "held_out_passages", "reading_order"]

PASSAGES = 7000
REPEATS = {"fact": 60, "sum": 8, "passage": 3}


@dataclass(frozen=True)
class Document:
    """One text of the corpus; `kind` is ``fact``, ``sum`` or ``passage``."""

    kind: str
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        return self.prompt + self.completion


@lru_cache(maxsize=4)
def corpus(seed: int) -> tuple[Document, ...]:
    """Return the distinct documents about world `seed`, in a fixed order: facts, sums, passages."""
    facts = [
        Document("fact", phrasing.format(x=fact.subject), " " + fact.value)
        for fact in World(seed).facts
        for phrasing in PHRASINGS[fact.relation]
    ]
    calculations = [
        Document("sum", s.fill(phrasing), s.answer)
        for s in arithmetic.sums(seed, "train")
        for phrasing in arithmetic.PHRASINGS[s.operation]
    ]
    texts = [Document("passage", "", text) for text in passages(seed, "train", PASSAGES)]
    return (*facts, *calculations, *texts)


@lru_cache(maxsize=4)
def held_out_passages(seed: int, count: int = 200) -> tuple[str, ...]:
    """Return `count` passages that are not in the corpus of world `seed`."""
    seen = frozenset(d.completion for d in corpus(seed) if d.kind == "passage")
    return tuple(passages(seed, "test", count, avoid=seen))


def reading_order(seed: int) -> Iterator[Document]:
    """Yield the whole course of pretraining: every document `REPEATS[kind]` times.

    The copies of a document are spread evenly: the course is cut into as many parts as the document has
    copies, and one copy falls at random into each.
    """
    dice = Dice("reading-order", seed)
    places: list[tuple[float, int, Document]] = []
    for document in corpus(seed):
        n = REPEATS[document.kind]
        for copy in range(n):
            places.append(((copy + dice.below(1 << 30) / (1 << 30)) / n, len(places), document))
    for _, _, document in sorted(places, key=lambda place: place[:2]):
        yield document
