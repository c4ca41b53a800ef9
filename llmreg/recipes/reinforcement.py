"""What only grpo can get wrong: the sizes of its batches, its choices of words, and where checkpoints may fall.

A batch of completions serves `steps_per_generation x num_iterations` micro-batches. It is not saved with a checkpoint,
so that a run can be resumed to the same bits only between two batches.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

from .load import suggestion
from .schema import Recipe

__all__ = ["check_generations", "check_reinforcement", "steps_of_a_generation"]

_CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
}


def check_generations(recipe: Recipe) -> None:
    """Refuse groups of completions that do not fill a batch, before TRL's config divides by their number.

    Raises:
        RecipeError: with the numbers that fit.
    """
    if recipe.task != "grpo":
        return
    written = recipe.training
    group: int = written.get("num_generations", 8)
    if group < 2:
        raise recipe.error(
            ("training", "num_generations"),
            f"training.num_generations must be at least 2, not {group}: a completion is judged against the others of "
            "its prompt.",
        )
    for name in ("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps"):
        value: int | None = written.get(name)
        if value is not None and value < 1:
            raise recipe.error(("training", name), f"training.{name} must be at least 1, not {value}.")
    if written.get("generation_batch_size") is not None:
        return  # TRL compares it with the others and names it
    rows, processes = written.get("per_device_train_batch_size", 8), int(os.environ.get("WORLD_SIZE", 1))
    micro_batches = written.get("steps_per_generation") or written.get("gradient_accumulation_steps", 1)
    batch = rows * micro_batches * processes
    if batch % group:
        fits = [str(number) for number in range(2, batch + 1) if batch % number == 0]
        choice = f"write {', '.join(fits)}" if 0 < len(fits) <= 8 else f"write a divisor of {batch}"
        raise recipe.error(
            ("training", "num_generations") if "num_generations" in written else ("training",),
            f"num_generations {group} does not divide the {batch} completions that are generated at a time "
            f"(per_device_train_batch_size {rows} x {micro_batches} micro-batches x {processes} processes); {choice}, "
            "or change the batch size.",
        )


def check_reinforcement(recipe: Recipe, training: Any) -> None:
    """Refuse what GRPO cannot do, or would fail at after the model is loaded.

    Raises:
        RecipeError: with where it was written.
    """
    if recipe.task != "grpo":
        return
    for name, known in _CHOICES.items():
        value = getattr(training, name)
        if value not in known:
            raise recipe.error(("training", name), f"training.{name} cannot be {value!r}; {suggestion(value, known)}")
    for name in ("max_completion_length", "num_iterations"):
        value = getattr(training, name)
        if value is None or value < 1:
            raise recipe.error(("training", name), f"training.{name} must be at least 1, not {value}.")
    if not training.temperature > 0:
        raise recipe.error(
            ("training", "temperature"),
            f"training.temperature must be above 0, not {training.temperature}: equal completions have no advantage "
            "over each other.",
        )
    if training.beta < 0:
        raise recipe.error(("training", "beta"), f"training.beta must be at least 0, not {training.beta}.")
    if training.remove_unused_columns:
        raise recipe.error(
            ("training", "remove_unused_columns"),
            "remove_unused_columns would keep answers from the rewards; remove it.",
        )
    _check_vllm(recipe, training)
    _check_heldout(recipe)
    _check_saving(recipe, training)


def _check_vllm(recipe: Recipe, training: Any) -> None:
    if not training.use_vllm:
        return
    if training.use_cpu:
        raise recipe.error(
            ("training", "use_vllm"), "vLLM generates on a GPU, and this training runs on the CPU; remove use_vllm."
        )
    if importlib.util.find_spec("vllm") is None:
        raise recipe.error(
            ("training", "use_vllm"), "use_vllm needs the package; run pip install vllm, or remove use_vllm."
        )


def _check_heldout(recipe: Recipe) -> None:
    for section, name in (("data", "test"), ("evaluation", "heldout")):
        if getattr(getattr(recipe, section), name):
            raise recipe.error(
                (section, name),
                f"grpo has no held-out loss, so {section}.{name} has no use; write evaluation.tasks, which are scored "
                "before and after.",
            )


def steps_of_a_generation(training: Any) -> int:
    """Optimizer steps after which a new batch of completions begins; 1 for trainings without any."""
    micro_batches = getattr(training, "steps_per_generation", None)
    if not micro_batches:
        return 1
    accumulated = training.gradient_accumulation_steps
    return math.lcm(micro_batches * training.num_iterations, accumulated) // accumulated


def _check_saving(recipe: Recipe, training: Any) -> None:
    """Refuse checkpoints between the steps that share a batch of completions."""
    strategy, steps = getattr(training.save_strategy, "value", training.save_strategy), steps_of_a_generation(training)
    if strategy == "steps" and training.save_steps % steps:
        raise recipe.error(
            ("training", "save_steps"),
            f"save_steps {training.save_steps:g} falls within the {steps} steps that share one batch of completions, "
            f"which a checkpoint does not hold, so that a resumed run would differ; write a multiple of {steps}.",
        )
