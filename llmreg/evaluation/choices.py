"""Scores of choosing: the more probable of two completions for a language model, the class for a classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from .scoring import Progress, Score, check_rows, device_of, encode, evaluating, pad_token, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["classification", "preference_accuracy"]


def preference_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, str]],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Score:
    """Count the pairs whose chosen completion is more probable than the rejected one.

    Probable by the sum of the log-probabilities of the completion's tokens and the end-of-sequence token after the
    prompt (no reference, no length normalisation); equal is not more.

    Args:
        model: a causal LM, plain or PEFT. tokenizer: its tokenizer.
        pairs: rows with ``prompt``, ``chosen`` and ``rejected``.
        batch_size: pairs a batch. progress: called after every batch.

    Raises:
        RecipeError: no pairs, a row without the columns, or an empty prompt.
    """
    rows = check_rows(pairs, ("prompt", "chosen", "rejected"))
    right = 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = encode(tokenizer, [row["prompt"] for row in batch])
            if not all(prompts):
                raise RecipeError("preference accuracy: a pair has an empty prompt; give every pair a prompt")
            sums = [
                _log_probs(model, tokenizer, prompts, [row["prompt"] + row[kind] for row in batch])
                for kind in ("chosen", "rejected")
            ]
            right += sum(chosen > rejected for chosen, rejected in zip(*sums, strict=True))
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
    return Score(right, len(rows))


def _log_probs(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], texts: list[str]
) -> list[float]:
    """Summed log-probability of what follows each prompt in its text, in nats."""
    import torch

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [[*ids, *end] for ids in encode(tokenizer, texts)]
    ids, mask = padded(rows, pad_token(tokenizer), "right", device_of(model))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    sums = []
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        first = min(len(prompt), len(row) - 1)
        scores = logits[i, first - 1 : len(row) - 1].float()
        targets = ids[i, first : len(row)].to(scores.device)
        sums.append(-torch.nn.functional.cross_entropy(scores, targets, reduction="sum").item())
    return sums


def classification(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    max_length: int = 512,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Accuracy, and the mean of the classes' F1 scores (a class that nobody predicts and nobody has is left out).

    Args:
        model: a sequence classifier, plain or PEFT, whose config names the classes. tokenizer: its tokenizer.
        examples: rows with ``text`` (and ``text_pair``) and ``label``, a number or a class name.
        batch_size: rows a batch. max_length: tokens of a row that are read. progress: called after every batch.

    Returns:
        ``{"accuracy", "macro F1"}``, both between 0 and 1.

    Raises:
        RecipeError: no examples, a row without the columns, or a label that the model does not know.
    """
    rows = check_rows(examples, ("text", "label"))
    known = model.config.label2id
    expected = [_number(row["label"], known, i) for i, row in enumerate(rows)]
    predicted: list[int] = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            texts = [[row[column] for row in batch] for column in ("text", "text_pair") if column in batch[0]]
            positions = getattr(model.config, "max_position_embeddings", max_length)
            longest = min(tokenizer.model_max_length, positions, max_length)
            encoding = tokenizer(*texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
            logits = model(**encoding.to(device_of(model))).logits
            predicted += logits.argmax(-1).tolist()
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
    hits = sum(a == b for a, b in zip(expected, predicted, strict=True))
    return {"accuracy": hits / len(rows), "macro F1": _macro_f1(expected, predicted)}


def _number(label: int | str, known: Mapping[str, int], row: int) -> int:
    number = known.get(label) if isinstance(label, str) else label if label in known.values() else None
    if number is None:
        raise RecipeError(f"example {row} has the label {label!r}, but the model knows {', '.join(known)}")
    return number


def _macro_f1(expected: Sequence[int], predicted: Sequence[int]) -> float:
    hits = Counter(a for a, b in zip(expected, predicted, strict=True) if a == b)
    sizes = Counter(expected) + Counter(predicted)
    return sum(2 * hits[label] / size for label, size in sizes.items()) / len(sizes)
