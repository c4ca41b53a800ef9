"""A model without its weights: on the meta device, made from its config alone, with the adapter's layers in place."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..errors import RecipeError

__all__ = ["Parameters", "Task", "count", "frozen_factors", "outline", "targets", "with_adapter"]

Task = Literal["sft", "dpo", "grpo", "classification"]


class Parameters(NamedTuple):
    """Numbers of parameters: of the base, trained, and kept frozen beside it (`A0`, `B0` of additive adapters)."""

    base: int
    trainable: int
    frozen_extra: int


def outline(
    path_or_name: str, *, revision: str | None = None, task: Task = "sft", num_labels: int | None = None
) -> nn.Module:
    """The base model on the meta device, from its config alone.

    Args:
        path_or_name: a folder, or a Hub id whose config is in the local cache.
        task: "classification" puts a head of `num_labels` classes on it, the others a language model's head.

    Raises:
        RecipeError: no config on this machine, or one that transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = Path(path_or_name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RecipeError(f"{path_or_name} holds no config.json; write the folder of a model, with its config.")
    labels = {"num_labels": num_labels} if task == "classification" and num_labels else {}
    try:
        config = AutoConfig.from_pretrained(
            path_or_name, revision=revision, local_files_only=True, trust_remote_code=False, **labels
        )
    except OSError:
        raise RecipeError(_no_config(path_or_name, revision)) from None
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise RecipeError(f"the config of {path_or_name} cannot be read: {reason}.") from None
    family = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = family.from_config(config)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise RecipeError(f"{path_or_name} is no model for the task {task}: {reason}.") from None
    model.tie_weights()
    return model


def _no_config(name: str, revision: str | None) -> str:
    command = f"hf download {name} config.json" + (f" --revision {revision}" if revision else "")
    return (
        f"the config of {name} is not on this machine and a dry run downloads nothing; fetch it with `{command}`, or "
        "write the path of a folder."
    )


def with_adapter(model: nn.Module, adapter_config: Any) -> Any:
    """A copy of the outline with the adapter injected; no factor is decomposed on the meta device."""
    from peft import get_peft_model

    config = copy.deepcopy(adapter_config)
    if getattr(config, "quantizes_residual", bool)():
        config.residual = "difference"  # the same factors; an outline has no weights to quantise
    adapted = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    for layer in _additive_layers(adapted):
        layer.set_regularized("default", True)  # as a run does; its memory is a few r x r matrices
        layer.waiting.discard("default")  # data would give it values, which nothing has here
    return adapted


def targets(model: nn.Module, adapter_config: Any) -> dict[str, list[str]]:
    """The layers that carry the adapter, by the pattern of `target_modules` that names them; PEFT's own matching.

    Args:
        model: from `outline`.

    Returns:
        For each pattern the names of its layers, empty where it matches none. A layer that several patterns match
        is listed under each.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    patterns = adapter_config.target_modules
    try:
        adapted = with_adapter(model, adapter_config)
    except ValueError as error:
        if "target modules" not in str(error).lower() or patterns is None:
            raise
        return {pattern: [] for pattern in ([patterns] if isinstance(patterns, str) else sorted(patterns))}
    base = adapted.get_base_model()
    layers = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    if isinstance(patterns, str):
        return {patterns: layers}
    if patterns is None:  # PEFT's choice for this architecture
        patterns = adapted.peft_config["default"].target_modules
    return {pattern: [name for name in layers if _matches(pattern, name)] for pattern in sorted(patterns)}


def _matches(pattern: str, name: str) -> bool:
    return re.search(rf"(^|\.){re.escape(pattern)}$", name) is not None


def count(peft_model: nn.Module) -> Parameters:
    """Parameters by role, each tied one once; of a meta model, or of one that is not quantised."""
    frozen = {id(parameter) for parameter in frozen_factors(peft_model)}
    numbers = {"base": 0, "trainable": 0, "frozen_extra": 0}
    for parameter in peft_model.parameters():
        role = "trainable" if parameter.requires_grad else "frozen_extra" if id(parameter) in frozen else "base"
        numbers[role] += parameter.numel()
    return Parameters(**numbers)


def frozen_factors(model: nn.Module) -> Iterator[nn.Parameter]:
    """What additive adapters keep beside what they train, such as `A0` and `B0`."""
    for layer in _additive_layers(model):
        for adapter in filter(layer.form, layer.lora_A):
            yield from layer.frozen_factors(adapter)


def _additive_layers(model: nn.Module) -> list[Any]:
    from ..adapters.layer import AdditiveLayer

    return [module for module in model.modules() if isinstance(module, AdditiveLayer)]
