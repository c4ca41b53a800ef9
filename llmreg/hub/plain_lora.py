"""A plain LoRA adapter on disk, read as the changes it makes to named parameters of its base.

    W <- W + s B A        every adapted linear layer, s = alpha / r (or alpha / sqrt(r) with rsLoRA)
    b <- b + s b_B        where the adapter has biases on B (`lora_bias`)
    p <- p'               copies it trained: `modules_to_save`, biases of `bias: all` or `lora_only`

Whatever changes the model in another way is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from ..adapters.registry import QUANTIZED_RESIDUAL
from ..errors import AdapterFileError, UnsupportedError, WeightError
from .lora_files import HARMLESS_STARTS, PREFIX
from .streaming import SafetensorsFile

__all__ = ["Change", "PlainLora", "read_plain_lora"]

#: Fields that cannot change what a loaded adapter computes, or that are read here.
_UNDERSTOOD = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config "
    "eva_config corda_config lora_ga_config velora_config qalora_group_size runtime_config lora_bias "
    "ensure_weight_tying".split()
)
_WITH_PEFT = "merge it with PEFT's merge_and_unload on the loaded model instead"


@dataclass(frozen=True)
class Change:
    """One change to one parameter.

    Attributes:
        parameter: its name in the model, e.g. `model.layers.0.mlp.up_proj.weight`.
        kind: `lora` (`keys` are A, B), `bias` (added) or `replace`.
        keys: tensors of the adapter's file. scaling: `s`; 1 for `replace`.
        origin: tensor of the adapter's file to add to instead of the base's (PEFT keeps an adapted head's weight).
    """

    parameter: str
    kind: Literal["lora", "bias", "replace"]
    keys: tuple[str, ...]
    scaling: float = 1.0
    origin: str | None = None


@dataclass(frozen=True)
class PlainLora:
    """Config, file and changes of a plain LoRA adapter."""

    folder: Path
    config: LoraConfig
    file: SafetensorsFile
    changes: tuple[Change, ...]


def read_plain_lora(folder: Path) -> PlainLora:
    """The adapter in `folder`.

    Raises:
        AdapterFileError: no adapter there, a damaged or incomplete one, a pickle, NaN or infinite values.
        UnsupportedError: a form whose effect is not a change of named parameters; it is named.
    """
    config = _read_config(folder)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickle = (
            f" ({WEIGHTS_NAME} is a pickle, which llmreg does not read)" if (folder / WEIGHTS_NAME).exists() else ""
        )
        raise AdapterFileError(f"{path} is missing{pickle}; save the adapter as safetensors.")
    try:
        file = SafetensorsFile(path)
    except WeightError as error:
        raise AdapterFileError(str(error)) from error
    changes = _changes(config, file)
    _check_values(file)
    return PlainLora(folder, config, file, changes)


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterFileError(
            f"{folder} holds no adapter: {CONFIG_NAME} is missing; give the folder of a saved adapter."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged ({error!r}); copy the adapter again.") from error
    if kind != "LORA":
        if kind == QUANTIZED_RESIDUAL.value:
            raise UnsupportedError(
                f"{folder} holds an adapter beside a quantised residual, and quantising their sum again would lose "
                "what fitting them to each other gained; make a plain LoRA for the original base of it with llmreg "
                "export ADAPTER DIR --approximate, and merge that."
            )
        exported = "" if _is_bat(settings) else "make one of it with llmreg export and merge that, or "
        raise UnsupportedError(
            f"{folder} holds a {kind} adapter, and only plain LoRA can be merged; {exported}{_WITH_PEFT}."
        )
    defaults = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for name, value in settings.items():
        default = defaults[name].default if name in defaults else None
        if name not in _UNDERSTOOD and value and value != default:
            raise UnsupportedError(f"{path} has {name}={value!r}, which is more than W + s B A; {_WITH_PEFT}.")
    start = settings.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise UnsupportedError(
            f"{path} has init_lora_weights={start!r}: PEFT changes the base weights when loading it, so its factors "
            "alone are no plain LoRA; convert it with PEFT "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)) first."
        )
    settings = {name: value for name, value in settings.items() if name in defaults and name != "peft_type"}
    try:
        return LoraConfig(**{**settings, "init_lora_weights": True, "eva_config": None, "corda_config": None})
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path} is damaged ({error}); copy the adapter again.") from error


def _is_bat(settings: dict[str, Any]) -> bool:
    """Whether it is Bone's block-affine form, whose update has full rank."""
    return "bat" in (settings.get("variant"), settings.get("init_weights"))


def _changes(config: LoraConfig, file: SafetensorsFile) -> tuple[Change, ...]:
    changes: dict[str, Change] = {}
    for key in file.entries:
        change = _change(config, file, key)
        if change is None:
            continue
        known = changes.get(change.parameter)
        if known is not None:
            added, whole = sorted((known, change), key=lambda one: one.kind == "replace")
            if (added.kind == "replace") == (whole.kind == "replace"):
                raise AdapterFileError(f"{file.path} changes {change.parameter!r} twice; copy the adapter again.")
            change = dataclasses.replace(added, origin=whole.keys[0])
        changes[change.parameter] = change
    if not changes:
        raise AdapterFileError(f"{file.path} holds no tensors of an adapter; copy the adapter again.")
    return tuple(changes.values())


def _change(config: LoraConfig, file: SafetensorsFile, key: str) -> Change | None:
    """What tensor `key` does; None for a `B`, which its `A` speaks for."""
    entry, name = file.entries[key], key.removeprefix(PREFIX)
    if entry.dtype is None:
        raise UnsupportedError(f"{key!r} of {file.path} is stored as {entry.code}; {_WITH_PEFT}.")
    if name.endswith(".lora_A.weight"):
        layer = name.removesuffix(".lora_A.weight")
        other = key.removesuffix("lora_A.weight") + "lora_B.weight"
        scaling = _scaling(config, file, layer, key, other)
        return Change(f"{layer}.weight", "lora", (key, other), scaling)
    if name.endswith(".lora_B.weight"):
        if key.removesuffix("lora_B.weight") + "lora_A.weight" not in file.entries:
            raise AdapterFileError(f"{key!r} has no lora_A beside it: the adapter is damaged; copy it again.")
        return None
    if name.endswith(".lora_B.bias"):
        stem, layer = key.removesuffix("lora_B.bias"), name.removesuffix(".lora_B.bias")
        down, up = f"{stem}lora_A.weight", f"{stem}lora_B.weight"
        return Change(f"{layer}.bias", "bias", (key,), _scaling(config, file, layer, down, up))
    if "lora_" in name or "trainable_tokens" in name:
        raise UnsupportedError(
            f"{key!r} of {file.path} is no factor of a linear layer (an embedding, DoRA); {_WITH_PEFT}."
        )
    return Change(name.replace(".base_layer.", "."), "replace", (key,))


def _scaling(config: LoraConfig, file: SafetensorsFile, layer: str, down: str, up: str) -> float:
    """`s` of a layer, after its factors were found whole and of the rank that the config gives it."""
    if down not in file.entries or up not in file.entries:
        raise AdapterFileError(f"{layer!r} has only one of lora_A, lora_B: the adapter is damaged; copy it again.")
    A, B = file.entries[down].shape, file.entries[up].shape
    if len(A) != 2 or len(B) != 2:
        raise UnsupportedError(f"{layer!r} is adapted as a convolution (lora_A is {A}); {_WITH_PEFT}.")
    rank, alpha = (
        _of_pattern(config.rank_pattern, layer, config.r),
        _of_pattern(config.alpha_pattern, layer, config.lora_alpha),
    )
    if not A[0] == B[1] == rank or not isinstance(alpha, int | float):
        raise AdapterFileError(
            f"{layer!r} has factors {A} and {B}, but {CONFIG_NAME} gives it rank {rank!r} and alpha {alpha!r}: one of "
            "the files was changed; copy the adapter again."
        )
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _of_pattern(pattern: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """The value that PEFT's pattern matching gives a layer."""
    try:
        return pattern.get(get_pattern_key(list(pattern), layer), default) if pattern else default
    except (re.error, TypeError) as error:
        raise AdapterFileError(
            f"{CONFIG_NAME} has a pattern that cannot be read ({error}); copy the adapter again."
        ) from error


def _check_values(file: SafetensorsFile) -> None:
    for entry in file.entries.values():
        if not all(bool(torch.isfinite(block).all()) for block in file.blocks(entry)):
            raise AdapterFileError(
                f"{entry.name!r} of {file.path} holds NaN or infinite values; merge another checkpoint of it."
            )
