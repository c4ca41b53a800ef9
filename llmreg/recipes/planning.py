"""What a recipe comes to, settled before anything is loaded: the method, its config, TRL's arguments, the conflicts.

`plan` reads no data and no weights and writes nothing; what it accepts can still fail on the data or the model, but not
on the recipe's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import LlmregError, RecipeError
from ..methods import Method, get_method
from ..quiet import quiet
from .conflicts import (
    check_adapter,
    check_calibration,
    check_environment,
    check_output,
    check_sources,
    check_training,
    chooses_ranks,
)
from .fields import check_fields
from .regularizing import build_regularizers
from .reinforcement import check_generations, check_reinforcement
from .rewards import check_rewards
from .schema import Recipe
from .tasks import TASKS, TaskKind, config_class

__all__ = ["Plan", "adapter_fields_left_out", "plan", "training_fields_left_out"]

_ADAPTER_MANAGED = {
    "peft_type": "the method decides it",
    "task_type": "the recipe's task decides it",
    "base_model_name_or_path": "write it under model.name",
    "revision": "write it under model.revision",
    "inference_mode": "train always trains",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "runtime_config": "it is not stored with an adapter",
}
_TRAINING_MANAGED = {
    "output_dir": "write it under output.dir",
    "seed": "write it as seed at the top of the recipe",
    "model_init_kwargs": "write revision, dtype and quantization under model",
    "trust_remote_code": "llmreg runs no code from model repositories",
    "push_to_hub": "publish the result with llmreg push",
    "resume_from_checkpoint": "continue with llmreg train RECIPE --resume",
    "save_only_model": "a checkpoint that cannot be resumed is of no use; the adapter is saved at the end anyway",
    "do_train": "train always trains",
    "do_eval": "write what to measure under evaluation",
    "do_predict": "write what to measure under evaluation",
    "local_rank": "the launcher sets it",
    "disable_tqdm": "progress is shown on a terminal only",
    "hub_token": "a recipe holds no secrets",
}
_DEPRECATED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@dataclass(frozen=True)
class Plan:
    """A recipe that holds together.

    Attributes:
        recipe: as given. method: its row in the catalogue.
        adapter: an instance of the method's config class.
        training: an instance of the task's config class; its output folder is `output.dir/checkpoints`.
        exported_rank: the largest rank of the plain LoRA that is published.
        regularizers: what the recipe lists; where it lists nothing the adapter's config decides.
    """

    recipe: Recipe
    method: Method
    adapter: Any
    training: Any
    exported_rank: int
    regularizers: tuple[Any, ...] = ()

    @property
    def ranks_known(self) -> bool:
        """Whether the ranks are settled before calibration data is seen."""
        return not chooses_ranks(self.adapter)


def plan(recipe: Recipe, *, new_output: bool = True) -> Plan:
    """Settle a recipe.

    Args:
        new_output: refuse an output folder that holds something; False where nothing new is begun in it.

    Raises:
        RecipeError: unknown fields, wrong types, or a conflict of law 6; with where it was written.
    """
    with quiet():
        method = _method(recipe)
        adapter = _adapter(recipe, method)
        training = _training(recipe)
        check_calibration(recipe, method, adapter)
        exported_rank = check_adapter(recipe, method, adapter)
        regularizers = build_regularizers(recipe, adapter)
        check_training(recipe, training)
        check_reinforcement(recipe, training)
        check_rewards(recipe)
        check_environment(recipe, training)
        check_sources(recipe)
        if new_output:
            check_output(recipe)
    return Plan(recipe, method, adapter, training, exported_rank, tuple(regularizers))


def _method(recipe: Recipe) -> Method:
    try:
        return get_method(recipe.adapter.method)
    except RecipeError as error:
        raise recipe.error(("adapter", "method"), str(error)) from None


def _adapter(recipe: Recipe, method: Method) -> Any:
    """The config instance; its own refusals get the place of the field they name."""
    peft_class = method.config_class()
    settings = recipe.adapter.settings
    managed = dict(_ADAPTER_MANAGED)
    if method.kind == "lora":
        managed.update(_changes_base(settings))
    check_fields(recipe, "adapter", settings, peft_class, managed=managed, hidden=_refused_by(method))
    if method.kind == "additive":
        settings.setdefault("seed", recipe.seed)
    try:
        return peft_class(task_type=TASKS[recipe.task].peft_task_type, **settings)
    except (LlmregError, ValueError, TypeError) as error:
        raise recipe.error(_field_in(str(error), "adapter", settings), _sentence(error)) from None


def _refused_by(method: Method) -> frozenset[str]:
    """Inherited fields that the method's config refuses itself."""
    if method.kind != "additive":
        return frozenset()
    from ..adapters.config import REFUSED_FIELDS

    return frozenset(REFUSED_FIELDS)


def adapter_fields_left_out(method: Method) -> frozenset[str]:
    """Fields of the method's config that a recipe does not set."""
    return frozenset(_ADAPTER_MANAGED) | _refused_by(method)


def training_fields_left_out(kind: TaskKind) -> frozenset[str]:
    """Fields of the task's config that a recipe does not set."""
    return frozenset(_training_managed(kind))


def _training_managed(kind: TaskKind) -> dict[str, str]:
    known = config_class(kind)
    renamed = {
        old: f"it has been renamed, write training.{new}" for old, new in _DEPRECATED.items() if hasattr(known, new)
    }
    return {**_TRAINING_MANAGED, **kind.refused, **renamed}


def _changes_base(settings: dict[str, Any]) -> dict[str, str]:
    """PEFT's initialisations that rewrite the base weight are methods of their own here."""
    start = settings.get("init_lora_weights", True)
    if isinstance(start, bool) or start in ("gaussian", "orthogonal"):
        return {}
    return {"init_lora_weights": f"{start!r} changes the base weights; see `llmreg methods` for methods that do not"}


def _training(recipe: Recipe) -> Any:
    """The task's config, with what the machine and the recipe's other sections decide."""
    import torch

    kind = TASKS[recipe.task]
    arguments_class = config_class(kind)
    check_fields(recipe, "training", recipe.training, arguments_class, managed=_training_managed(kind))
    check_generations(recipe)
    gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
    # transformers has renamed it; the older versions that are supported know the older name only.
    renamed = hasattr(arguments_class, "activation_checkpointing")
    defaults: dict[str, Any] = {
        "use_cpu": not gpu,
        "bf16": gpu and not recipe.training.get("fp16", False) and torch.cuda.is_bf16_supported(),
        "activation_checkpointing" if renamed else "gradient_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
        "report_to": "none",
    }
    fixed = {"output_dir": f"{recipe.output.dir}/checkpoints", "seed": recipe.seed, "disable_tqdm": True}
    if recipe.task == "grpo" and recipe.rewards:
        fixed["reward_weights"] = [reward.weight for reward in recipe.rewards]
    settings = {**defaults, **recipe.training, **fixed}
    try:
        return arguments_class(**settings)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise recipe.error(_field_in(str(error), "training", recipe.training), _sentence(error)) from None


def _field_in(message: str, section: str, settings: dict[str, Any]) -> tuple[str, ...]:
    """The location of the field that a library's message names, or of the section."""
    named = [name for name in settings if name in message]
    return (section, max(named, key=len)) if named else (section,)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "?")) else f"{text}."
