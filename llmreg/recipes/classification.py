"""Text classification: transformers' `Trainer` over rows of `text` (and `text_pair`) and `label`.

The head is new, so it is trained in full and saved with the adapter (PEFT's `modules_to_save`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

__all__ = ["ClassificationConfig", "classification_trainer"]


@dataclass
class ClassificationConfig(TrainingArguments):
    """transformers' `TrainingArguments`, and `max_length`: tokens of a row that are read; the rest is cut off."""

    max_length: int | None = field(default=512, metadata={"help": "Tokens of a row that are read; None = the model's."})


def classification_trainer(
    model: Any, arguments: ClassificationConfig, tokenizer: Any, train: Any, heldout: Any
) -> Trainer:
    """A `Trainer` for a PEFT model with a classification head.

    Args:
        train, heldout: `datasets.Dataset`s with `text`, perhaps `text_pair`, and `label`, a number; `heldout` may be
            None.
    """

    def encoded(rows: Any) -> Any:
        columns = [column for column in ("text", "text_pair") if column in rows.column_names]

        def encode(batch: dict[str, list]) -> dict[str, list]:
            texts = [list(batch[column]) for column in columns]
            encoding = tokenizer(*texts, truncation=True, max_length=_longest(arguments, tokenizer, model))
            return {**encoding, "labels": batch["label"]}

        return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")

    return Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded(train),
        eval_dataset=None if heldout is None else encoded(heldout),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def _longest(arguments: ClassificationConfig, tokenizer: Any, model: Any) -> int:
    """The shortest of what the recipe, the tokenizer and the model's positions allow."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(limit for limit in (arguments.max_length, tokenizer.model_max_length, positions) if limit is not None)
