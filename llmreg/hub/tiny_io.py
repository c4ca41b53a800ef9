"""The tiny form of SVFit as plain LoRA: its vectors are computed again from the base's checkpoint, layer by layer."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.forms import Spectral
from ..adapters.svd_configs import SvfitConfig
from ..adapters.tiny import check_same_vectors, layer_checks
from ..errors import AdapterFileError
from ..weights import read_weight
from ..weights.storage import FLOAT_DTYPES
from .base_checkpoint import BaseCheckpoint, locate_base
from .card_facts import read_config
from .layers_on_disk import LayersOnDisk
from .lora_files import PREFIX, lora_scaling
from .sidecar import SIDECAR_NAME, Sidecar

__all__ = ["tiny_as_lora", "tiny_values"]

_VALUES = ".lora_S.weight"
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def tiny_values(folder: Path, sidecar: Sidecar | None) -> tuple[SvfitConfig, dict[str, Tensor]]:
    """The config of the tiny adapter in `folder`, and the trained change `(r,)` of the singular values by layer.

    Raises:
        AdapterFileError: a damaged adapter, or one without its sidecar.
    """
    if sidecar is None:
        raise AdapterFileError(
            f"{folder} has no {SIDECAR_NAME}, which a tiny adapter cannot be read without; copy the whole folder."
        )
    config = sidecar.adapter_config()
    config.base_model_name_or_path = read_config(folder).get("base_model_name_or_path")
    factors = sidecar.load_factors()
    layers = {key.removesuffix(_VALUES): value for key, value in factors.items() if key.endswith(_VALUES)}
    return config, {key.removeprefix(PREFIX): value for key, value in layers.items()}


@torch.no_grad()
def tiny_as_lora(
    folder: Path, sidecar: Sidecar | None, base: str | Path | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The tiny adapter in `folder` as the plain LoRA of rank r that computes the same function.

    Args:
        base: the checkpoint, as `llmreg.merge` takes it; by default the one that the adapter names.

    Raises:
        AdapterFileError: what `tiny_values` refuses, or vectors that come out otherwise than in training.
        BaseMismatchError: the checkpoint is not the one, or training had it quantised.
        RecipeError: the base cannot be had.
    """
    config, values = tiny_values(folder, sidecar)
    assert sidecar is not None
    saved = sidecar.load_factors()
    checkpoint = BaseCheckpoint(locate_base(base, config, sidecar))
    dtype = _FLOATS.get(sidecar.base.storage)  # None for nf4, int8 and mixtures: the bytes then decide
    on_disk = LayersOnDisk(checkpoint, values, config.fan_in_fan_out, dtype)
    record = on_disk.record(hashed=True)
    sidecar.check_base(record)
    sidecar.check_same_bytes(record)
    tensors = {key: value for key, value in load_file(folder / SAFETENSORS_WEIGHTS_NAME).items() if "lora_" not in key}
    for name, S in values.items():
        layer = on_disk.get_submodule(name)
        scaling = lora_scaling(config, name, S.numel())
        start = config.start(read_weight(layer, name=name), S.numel(), scaling, name)
        made = {"lora_A0": start.A, "lora_B0": start.B, "lora_S0": start.singular_values}
        factors = {container: value.to(Spectral.dtype(layer, container)) for container, value in made.items()}
        key = PREFIX + name
        found = layer_checks(key, factors)
        check_same_vectors(found, {item: saved[item] for item in found})
        down, up = Spectral.low_rank({**factors, "lora_S": S})
        tensors |= {f"{key}.lora_A.weight": down.contiguous(), f"{key}.lora_B.weight": up.contiguous()}
    as_lora = copy.copy(config)
    as_lora.storage = "lora"
    return as_lora.saved_config(), tensors
