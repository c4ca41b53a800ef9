"""What a recipe can train: one row a task, with the library's classes for it and the rows it reads.

Nothing heavy is imported here; `config_class` imports what it returns.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SCORED_FORMATS", "TASKS", "TASKS_TO_COME", "TaskKind", "config_class"]

Formats = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class TaskKind:
    """A kind of training.

    Attributes:
        name: as `task:` writes it. config: import path of the class whose fields `training:` takes, "module:Class".
        peft_task_type: PEFT's `TaskType`. auto_class: transformers' class that loads the model.
        formats: the columns that rows may have, the first that fits is taken.
        refused: fields of `config` that a recipe does not set -> what to write instead.
    """

    name: str
    config: str
    peft_task_type: str
    auto_class: str
    formats: Formats
    refused: Mapping[str, str] = field(default_factory=dict)


TASKS = {
    kind.name: kind
    for kind in (
        TaskKind(
            "sft",
            "trl:SFTConfig",
            "CAUSAL_LM",
            "AutoModelForCausalLM",
            (("prompt", "completion"), ("messages",), ("conversations",), ("text",)),
        ),
        TaskKind(
            "dpo",
            "trl:DPOConfig",
            "CAUSAL_LM",
            "AutoModelForCausalLM",
            (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
            {
                "sync_ref_model": "the reference is the untouched base, which a PEFT adapter cannot move",
                "ref_model_mixup_alpha": "the reference is the untouched base",
                "ref_model_sync_steps": "the reference is the untouched base",
            },
        ),
        TaskKind(
            "grpo",
            "trl:GRPOConfig",
            "CAUSAL_LM",
            "AutoModelForCausalLM",
            (("prompt", "answer"), ("prompt", "completion"), ("prompt",)),
            {
                "reward_weights": "write each reward's weight beside its name under rewards",
                "sync_ref_model": "the reference is the untouched base, which a PEFT adapter cannot move",
                "ref_model_mixup_alpha": "the reference is the untouched base",
                "ref_model_sync_steps": "the reference is the untouched base",
                "eval_strategy": "grpo has no held-out loss; write evaluation.tasks, which are scored before and after",
                "log_completions_hub_repo": "nothing is published while training",
            },
        ),
        TaskKind(
            "classification",
            "llmreg.recipes.classification:ClassificationConfig",
            "SEQ_CLS",
            "AutoModelForSequenceClassification",
            (("text", "text_pair", "label"), ("text", "label")),
        ),
    )
}
#: Tasks that later versions train.
TASKS_TO_COME = ("edit",)
#: Rows that `evaluation` scores, by PEFT's task type; the first that fits is taken.
SCORED_FORMATS: dict[str, Formats] = {
    "CAUSAL_LM": (("prompt", "completion"), ("prompt", "chosen", "rejected"), ("text",)),
    "SEQ_CLS": TASKS["classification"].formats,
}


def config_class(kind: TaskKind) -> Any:
    """Import and return the class whose fields `training:` takes."""
    module, _, name = kind.config.partition(":")
    return getattr(importlib.import_module(module), name)
