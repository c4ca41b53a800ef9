"""From a settled recipe, a model and rows to the trainer of the task; the libraries' refusals in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import LlmregError
from .data import TrainingData
from .planning import Plan
from .progress_callback import use_training_bar
from .regularizing import load_teacher
from .rewards import reward_functions
from .schema import Recipe

__all__ = ["build_trainer", "check_chat_template", "located_in_adapter"]


_TEMPLATE_OR_TEXT = "write training.chat_template_path, or give prompt and completion as text."


def check_chat_template(recipe: Recipe, data: TrainingData, tokenizer: Any) -> None:
    """Refuse conversations that no template can turn into text.

    Raises:
        RecipeError: with what to write.
    """
    first = data.train[0]
    columns = ("messages", "conversations", "prompt", "chosen")
    conversational = any(isinstance(first.get(key), list) for key in columns)
    if conversational and tokenizer.chat_template is None and not recipe.training.get("chat_template_path"):
        raise recipe.error(
            ("data", "train"),
            f"the rows are conversations, but the tokenizer of {recipe.model.name} has no chat template; "
            + ("give prompts as text." if recipe.task == "grpo" else _TEMPLATE_OR_TEXT),
        )


def build_trainer(settled: Plan, model: Any, tokenizer: Any, data: TrainingData) -> Any:
    """The trainer of the recipe's task, with the adapter started and our progress bar instead of theirs.

    Raises:
        RecipeError: what only model and data together can tell, at the field it is about.
    """
    recipe = settled.recipe
    with located_in_adapter(recipe, model):
        trainer = _trainer(settled, model, tokenizer, data)
    if not len(trainer.train_dataset):  # of sft, whose trainer leaves such rows out
        raise recipe.error(
            ("training", "max_length"),
            f"no row has a token to learn within max_length {settled.training.max_length}: the prompts fill it; raise "
            "training.max_length.",
        )
    use_training_bar(trainer)
    if settled.regularizers or getattr(settled.adapter, "needs_regularizer", bool)():
        _regularize(settled, trainer)
    return trainer


def _regularize(settled: Plan, trainer: Any) -> None:
    from ..trainers import RegularizerCallback

    given = list(settled.regularizers) or None
    callback = RegularizerCallback(given, teacher=load_teacher(settled.recipe))
    if hasattr(trainer, "use_regularizers"):
        trainer.use_regularizers(callback)
    else:
        trainer.callback_handler.callbacks.insert(0, callback)  # before trackers, which get what it logs


@contextmanager
def located_in_adapter(recipe: Recipe, model: Any) -> Iterator[None]:
    """Refusals of this context get the place of the field they are about."""
    try:
        yield
    except LlmregError as error:
        raise recipe.error(("adapter",), str(error)) from None
    except ValueError as error:
        raise _why_not(recipe, model, error) from None


def _trainer(settled: Plan, model: Any, tokenizer: Any, data: TrainingData) -> Any:
    if settled.recipe.task == "classification":
        from peft import get_peft_model

        from .classification import classification_trainer

        _train_new_modules(settled.adapter, model)
        wrapped = get_peft_model(model, settled.adapter)
        return classification_trainer(wrapped, settled.training, tokenizer, data.train, data.heldout)
    if settled.recipe.task == "grpo":
        from ..trainers import GRPOTrainer

        return GRPOTrainer(
            model=model,
            args=settled.training,
            reward_funcs=reward_functions(settled.recipe),
            train_dataset=data.train,
            processing_class=tokenizer,
            peft_config=settled.adapter,
        )
    from .. import trainers

    trainer_class = {"sft": trainers.SFTTrainer, "dpo": trainers.DPOTrainer}[settled.recipe.task]
    return trainer_class(
        model=model,
        args=settled.training,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        processing_class=tokenizer,
        peft_config=settled.adapter,
    )


def _train_new_modules(adapter: Any, model: Any) -> None:
    """What the checkpoint does not hold is trained in full and saved; PEFT knows heads by these two names only."""
    heads = ("classifier", "score")
    others = {name for name in model.new_modules if not set(heads) & set(name.split("."))}
    if others:
        adapter.modules_to_save = sorted({*(adapter.modules_to_save or ()), *heads, *others})


def _why_not(recipe: Recipe, model: Any, error: ValueError) -> Exception:
    """PEFT's and TRL's refusals in one sentence, at the field they are about."""
    import torch

    text = " ".join(str(error).split())
    if "target" in text.lower() and "modules" in text.lower():
        layers = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        return recipe.error(
            ("adapter", "target_modules"),
            f"target_modules {recipe.adapter.settings.get('target_modules')!r} matches no layer of the model; its "
            f"linear layers are {', '.join(sorted(layers))}, and all-linear stands for all but the head.",
        )
    named = [name for name in recipe.training if name in text]
    return recipe.error(("training", named[0]) if named else (), text if text.endswith(".") else f"{text}.")
