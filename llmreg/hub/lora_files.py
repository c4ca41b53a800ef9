"""What is common to reading saved plain LoRA adapters: config and tensors, scalings, dtypes by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.registry import QUANTIZED_RESIDUAL, SVFIT_TINY
from ..errors import AdapterFileError, LlmregError, RecipeError, UnsupportedError
from .sidecar import read_sidecar

__all__ = ["HARMLESS_STARTS", "PREFIX", "check_new_folder", "float_dtype", "lora_scaling", "read_lora"]

#: How PEFT begins the names of an adapter's tensors.
PREFIX = "base_model.model."
#: Values of `init_lora_weights` that leave the base weights alone; the others change them at every load.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def float_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that an argument names; None stays None.

    Raises:
        RecipeError: none of float32, bfloat16 and float16.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise RecipeError(f"dtype {name!r} is not known; write one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def check_new_folder(folder: Path) -> None:
    """Refuse to write into a folder that holds something already.

    Raises:
        RecipeError: it is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} is not an empty folder; choose another output or empty it.")


def read_lora(folder: Path, base: str | Path | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of a plain LoRA adapter, or of a Bone or tiny one as the LoRA that it is.

    Args:
        base: where the base of a tiny one lies, if not where the adapter says.

    Raises:
        AdapterFileError: no whole plain-LoRA adapter in safetensors, or one that belongs to changed base weights.
        UnsupportedError: one beside a quantised residual.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise AdapterFileError(
            f"{folder} holds no adapter: {CONFIG_NAME} is missing; give the folder of a saved adapter."
        )
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        pickle = (
            f" ({WEIGHTS_NAME} is a pickle, which llmreg does not read)" if (folder / WEIGHTS_NAME).exists() else ""
        )
        raise AdapterFileError(f"{weights} is missing{pickle}; save the adapter as safetensors.")
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(weights)
        kind = settings.pop("peft_type")
        if kind in ("MISS", "BONE"):
            from .bone_io import as_lora

            return as_lora(folder, read_sidecar(folder))
        if kind == SVFIT_TINY.value:
            from .tiny_io import tiny_as_lora

            return tiny_as_lora(folder, read_sidecar(folder), base)
        if kind == QUANTIZED_RESIDUAL.value:
            raise UnsupportedError(
                f"{folder} holds an adapter beside a quantised residual; on its original base a plain LoRA computes "
                "the same only up to the error that quantisation left. llmreg export ADAPTER DIR --approximate "
                "(llmreg.export_lora(..., approximate=True)) makes one and says how far off it is."
            )
        config = LoraConfig(**settings) if kind == "LORA" else None
    except LlmregError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, SafetensorError, OSError) as error:
        raise AdapterFileError(f"{folder} is damaged ({error}); copy the adapter again.") from error
    if config is None:
        raise AdapterFileError(f"{folder} holds a {kind} adapter; only plain LoRA can be exported.")
    if config.init_lora_weights not in HARMLESS_STARTS:
        raise AdapterFileError(
            f"{folder} has init_lora_weights={config.init_lora_weights!r}: PEFT changes the base weights when loading "
            "it, so its factors alone are no plain LoRA; convert it with PEFT "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)) first."
        )
    config.init_lora_weights, config.eva_config = True, None
    return config, tensors


def lora_scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """`s = alpha / r` of a layer, `alpha / sqrt(r)` with rsLoRA; `alpha_pattern` as PEFT matches it."""
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), layer), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
