"""The tokenizer of the pocket model: byte-level BPE, digits apart, one token for every name.

A text is cut before each word with the space that precedes it, and every digit stands alone (the first
digit of a number takes its space along). All 256 bytes are in the alphabet, so any text can be encoded and
decoded exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .corpus import corpus
from .world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["EOS", "PAD", "build_tokenizer"]

EOS, PAD = "<eos>", "<pad>"
VOCABULARY = 1792
_WORDS = r" ?[0-9]| ?\p{L}+| ?[^\s\p{L}0-9]+|\s+"


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer for world `seed` on its corpus.

    Returns:
        A tokenizer with at most 2048 tokens, ``<eos>`` and ``<pad>`` among them, that adds no token of its
        own.

    Raises:
        RuntimeError: a name or value of the world came out as more than one token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_text(seed), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    split = [w for w in _names(seed) if len(tokenizer(" " + w)["input_ids"]) != 1]
    if split:
        raise RuntimeError(
            f"{len(split)} names are more than one token ({', '.join(split[:5])}): enlarge the vocabulary"
        )
    return tokenizer


def _names(seed: int) -> list[str]:
    world = World(seed)
    return [*world.people, *(value for values in world.values.values() for value in values)]


def _training_text(seed: int) -> Iterator[str]:
    for document in corpus(seed):
        yield document.text
    for name in _names(seed):
        yield from [" " + name] * 100
