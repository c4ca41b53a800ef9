"""Two scores for any causal language model: exact match of greedy completions, and perplexity.

Both take a plain or a PEFT model wherever it lies (CPU, GPU) and leave it as it was: training flags,
padding side and random state are the same before and after. Batching pads by hand and masks the padding, so
the batch size does not change what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmreg.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = ["Perplexity", "Progress", "Score", "exact_match", "perplexity"]

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all) after every batch."""


@dataclass(frozen=True)
class Score:
    """A ratio with both of its parts, so that scores of several parts can be added up.

    Attributes:
        numerator: what was counted, for example the right answers.
        denominator: out of how many.
    """

    numerator: float
    denominator: int

    @property
    def value(self) -> float:
        """`numerator / denominator`, between 0 and 1 for `exact_match`."""
        return self.numerator / self.denominator


@dataclass(frozen=True)
class Perplexity(Score):
    """Perplexity from the summed negative log-likelihood in nats (`numerator`) of `denominator` tokens."""

    @property
    def value(self) -> float:
        """`exp(numerator / denominator)`; infinite where that overflows."""
        mean = self.numerator / self.denominator
        return math.exp(mean) if mean < 700 else math.inf


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Score:
    """Count the examples whose greedy completion is the expected one.

    The completion runs to the end-of-sequence token or to `max_new_tokens`; it is right if its text equals
    the expected completion, spaces at both ends apart. A right answer followed by anything else is wrong.

    Args:
        model: a causal LM, plain or PEFT.
        tokenizer: its tokenizer, with an end-of-sequence token.
        examples: rows with ``prompt`` and ``completion``.
        max_new_tokens: longest completion to generate; default: the longest expected one and its end token.
        batch_size: examples a batch.
        progress: called after every batch.

    Returns:
        Right answers out of ``len(examples)``.

    Raises:
        RecipeError: no examples, a row without the two columns, or an empty prompt.
    """
    rows = check_rows(examples, ("prompt", "completion"))
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    if not all(prompts):
        raise RecipeError("exact_match: an example has an empty prompt; give every example a prompt to complete")
    if max_new_tokens is None:
        max_new_tokens = 1 + max(map(len, encode(tokenizer, [row["completion"] for row in rows])))
    right = 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            answers = _complete(model, tokenizer, prompts[start : start + batch_size], max_new_tokens)
            expected = [row["completion"].strip() for row in rows[start : start + batch_size]]
            right += sum(answer == target for answer, target in zip(answers, expected, strict=True))
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
    return Score(right, len(rows))


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 256,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure how well `model` predicts `texts`: the exponential of the mean loss over all predicted tokens.

    Every text stands alone, followed by the end-of-sequence token if the tokenizer has one; each token
    after the first counts once, so long texts weigh more than short ones and padding does not count at all.

    Args:
        model: a causal LM, plain or PEFT.
        tokenizer: its tokenizer.
        texts: what to predict.
        max_length: tokens of a text that are read; what lies beyond is cut off.
        batch_size: texts a batch.
        progress: called after every batch.

    Raises:
        RecipeError: there is nothing to predict (no text of at least two tokens).
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [(ids + end)[:max_length] for ids in encode(tokenizer, list(texts))] if texts else []
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise RecipeError("perplexity: nothing to predict; give at least one text of two tokens or more")
    loss, tokens = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            loss += _loss(model, tokenizer, batch)
            tokens += sum(len(row) - 1 for row in batch)
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
    return Perplexity(loss, tokens)


def check_rows(examples: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Sequence[Mapping[str, str]]:
    if not len(examples):
        raise RecipeError("there are no examples to score; give at least one")
    for i, row in enumerate(examples):
        missing = [column for column in columns if column not in row]
        if missing:
            raise RecipeError(f"example {i} has no column {missing[0]!r}; it has {', '.join(sorted(row)) or 'none'}")
    return examples


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts)["input_ids"]
    return encoded


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put `model` into evaluation mode without gradients; give every module its own flag back afterwards."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: Any) -> torch.device:
    """The device of the input embeddings: where a model spread over several devices expects its tokens."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def padded(
    rows: Sequence[Sequence[int]], pad: int, side: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, both (rows, longest row), padded on `side`."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0  # masked everywhere, so any token will do


def _complete(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Return the greedy completions of `prompts` as text, without spaces at the ends."""
    from transformers import GenerationConfig

    pad = pad_token(tokenizer)
    ids, mask = padded(prompts, pad, "left", device_of(model))
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    with _generation_config(model, config):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    completions = output[:, ids.shape[1] :].tolist()
    return [tokenizer.decode(_before_end(tokens, tokenizer)).strip() for tokens in completions]


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `config` stand in for the model's own: `generate` mixes the two and warns of sampling fields in it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own


def _before_end(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _loss(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> float:
    """Return the summed negative log-likelihood, in nats, of all tokens of `rows` but the first of each."""
    import torch

    ids, mask = padded(rows, pad_token(tokenizer), "right", device_of(model))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    total = 0.0
    for i, row in enumerate(rows):  # row by row: a float copy of one text's logits, not of the batch's
        scores = logits[i, : len(row) - 1].float()
        targets = ids[i, 1 : len(row)].to(scores.device)
        total += torch.nn.functional.cross_entropy(scores, targets, reduction="sum").item()
    return total
