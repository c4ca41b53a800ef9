"""Batches for calibration from what a trainer trains on, or from rows in TRL's formats.

| trainer | what is calibrated on |
|---|---|
| SFT, transformers' own | the rows as they are trained on, by the trainer's collator: packed, padded, labelled |
| DPO and its kin | prompt and chosen completion |
| GRPO, RLOO | prompts as the model is given them |

Rows of a `calibration_dataset` (and of a recipe's `calibration.data`) are text, prompt and completion, prompt and
chosen, a prompt alone, or messages, each as text or as a conversation; prompts carry no label.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RecipeError

__all__ = ["batches_of_rows", "batches_of_trainer", "choose_rows"]

_IGNORED = -100


def batches_of_trainer(
    trainer: Any, rows: Any = None, *, samples: int | None = 256, batch_size: int | None = None, seed: int = 0
) -> list[Any]:
    """Batches of at most `samples` rows, this process's share of them.

    Args:
        trainer: of TRL or transformers. rows: a data set in place of its training set.
        samples: chosen at random by `seed`, from a stream the first; None: all.
        batch_size: rows at a time; None: the trainer's training batch size.

    Raises:
        RecipeError: no data, or rows in no known format.
    """
    size = batch_size or trainer.args.per_device_train_batch_size
    if rows is not None:
        chosen = _share(choose_rows(rows, samples, seed))
        max_length = getattr(trainer.args, "max_length", None)
        return batches_of_rows(chosen, _tokenizer(trainer), batch_size=size, max_length=max_length)
    if trainer.train_dataset is None:
        raise RecipeError(
            "the trainer has no train_dataset to calibrate on; pass calibration_dataset=, or a dataloader to "
            "llmreg.initialize(model, dataloader)."
        )
    chosen = _share(choose_rows(trainer.train_dataset, samples, seed))
    collate = _collator(trainer, chosen[0] if chosen else {})
    return [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]


def choose_rows(rows: Any, samples: int | None, seed: int = 0) -> list[dict[str, Any]]:
    """At most `samples` rows of a data set, a list or a stream."""
    if not hasattr(rows, "__len__"):
        return list(itertools.islice(rows, samples))
    if samples is None or len(rows) <= samples:
        return [rows[index] for index in range(len(rows))]
    generator = torch.Generator().manual_seed(seed)
    return [rows[index] for index in sorted(torch.randperm(len(rows), generator=generator)[:samples].tolist())]


def batches_of_rows(
    rows: Sequence[dict[str, Any]], tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """`input_ids`, `attention_mask` and `labels`, `(rows, columns)` each, padded to the longest of a batch.

    Raises:
        RecipeError: a row in no known format, or a tokenizer without a token to pad with.
    """
    examples = [_tokenized(row, tokenizer, number) for number, row in enumerate(rows, 1)]
    examples = [(ids[:max_length], labels[:max_length]) for ids, labels in examples if ids]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return [
        _padded(examples[start : start + batch_size], 0 if padding is None else padding)
        for start in range(0, len(examples), batch_size)
    ]


def _share(rows: list[Any]) -> list[Any]:
    """Every so-manieth row, equally many for each process, so that all run as many batches."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    rank, world = dist.get_rank(), dist.get_world_size()
    return rows[rank : len(rows) - len(rows) % world : world] if len(rows) >= world else rows


# -- a trainer's own rows ---------------------------------------------------------------------------------------


def _tokenizer(trainer: Any) -> Any:
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def _collator(trainer: Any, row: dict[str, Any]) -> Callable[[list[Any]], Any]:
    tokenizer = _tokenizer(trainer)
    if "chosen_ids" in row:
        padding = tokenizer.pad_token_id

        def preferred(rows: list[Any]) -> dict[str, torch.Tensor]:
            limit = getattr(trainer.args, "max_length", None)
            pairs = [_joined(row["prompt_ids"], row["chosen_ids"]) for row in rows]
            return _padded([(ids[:limit], labels[:limit]) for ids, labels in pairs], padding)

        return preferred
    if "input_ids" not in row and "prompt" in row:
        return lambda rows: batches_of_rows(
            [{"prompt": row["prompt"]} for row in rows], tokenizer, batch_size=len(rows)
        )[0]
    return trainer._get_collator_with_removed_columns(trainer.data_collator, description="calibration")


# -- rows in TRL's formats ----------------------------------------------------------------------------------------


def _tokenized(row: dict[str, Any], tokenizer: Any, number: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row."""
    if "input_ids" in row:
        ids = list(row["input_ids"])
        return ids, list(row.get("labels") or ids)
    if "prompt" in row:
        prompt = row["prompt"]
        answer = row.get("completion", row.get("chosen"))
        before = _encode(prompt, tokenizer, generate=True)
        if answer is None:
            return before, list(before)
        whole = _ended(_encode(_concatenated(prompt, answer), tokenizer), tokenizer)
        return _joined(whole[: len(before)], whole[len(before) :])
    for column in ("text", "messages", "conversations", "chosen"):
        if column in row:
            ids = _ended(_encode(row[column], tokenizer), tokenizer)
            return ids, list(ids)
    raise RecipeError(
        f"row {number} of the calibration data has the columns {', '.join(row) or '(none)'}; give text, prompt (and "
        "completion or chosen), messages, or input_ids."
    )


def _concatenated(prompt: Any, answer: Any) -> Any:
    if isinstance(prompt, str) != isinstance(answer, str):
        raise RecipeError(
            "a row of the calibration data has a prompt and an answer of different kinds: text and messages."
        )
    return prompt + answer


def _encode(value: Any, tokenizer: Any, *, generate: bool = False) -> list[int]:
    if isinstance(value, str):
        return list(tokenizer(value)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise RecipeError("the calibration data holds conversations, and the tokenizer has no chat template for them.")
    return list(
        tokenizer.apply_chat_template(value, add_generation_prompt=generate, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    )


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With the end-of-sequence token, which TRL appends to what is learned."""
    end = getattr(tokenizer, "eos_token_id", None)
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _joined(prompt: Iterable[int], answer: Iterable[int]) -> tuple[list[int], list[int]]:
    prompt, answer = list(prompt), list(answer)
    return prompt + answer, [_IGNORED] * len(prompt) + answer


def _padded(examples: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in examples)
    fields: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in examples:
        missing = width - len(ids)
        fields["input_ids"].append(ids + [padding] * missing)
        fields["attention_mask"].append([1] * len(ids) + [0] * missing)
        fields["labels"].append(labels + [_IGNORED] * missing)
    return {name: torch.tensor(values) for name, values in fields.items()}
