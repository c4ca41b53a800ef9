"""The yardstick of the held-out perplexity: a model that knows token frequencies and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["unigram_perplexity"]


def unigram_perplexity(tokenizer: PreTrainedTokenizerBase, train: Sequence[str], test: Sequence[str]) -> float:
    """Return the perplexity on `test` of token frequencies counted on `train` (add-one smoothing).

    Counts the same tokens as `llmreg.evaluation.scoring.perplexity`: all but the first of each text, and
    the end.
    """
    counts = Counter(_predicted(tokenizer, train))
    total = sum(counts.values()) + len(tokenizer)
    loss, n = 0.0, 0
    for token in _predicted(tokenizer, test):
        loss -= math.log((counts[token] + 1) / total)
        n += 1
    return math.exp(loss / n)


def _predicted(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterable[int]:
    for ids in tokenizer(list(texts))["input_ids"]:
        yield from ids[1:]
        yield tokenizer.eos_token_id
