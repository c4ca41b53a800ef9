"""Singular values of what an adapter adds to each layer, from its saved factors and without any `out x in` product."""

from __future__ import annotations

from pathlib import Path

import torch

from ..adapters.registry import SVFIT_TINY
from ..errors import UnsupportedError
from .card_facts import read_config
from .lora_files import PREFIX, lora_scaling, read_lora
from .sidecar import read_sidecar
from .tiny_io import tiny_values

__all__ = ["update_spectra"]


def update_spectra(adapter: str | Path) -> dict[str, list[float]]:
    """Singular values of what is added to each layer, largest first; layers of other shapes are left out.

    Args:
        adapter: folder of a saved adapter (plain LoRA, Bone, tiny SVFit); empty where the update has full rank.

    Raises:
        AdapterFileError: it is not a whole adapter of these in safetensors.
    """
    folder = Path(adapter)
    if read_config(folder)["peft_type"] == SVFIT_TINY.value:
        settings, values = tiny_values(folder, read_sidecar(folder))
        scalings = {layer: lora_scaling(settings, layer, S.numel()) for layer, S in values.items()}
        return {layer: (scalings[layer] * S.abs()).sort(descending=True).values.tolist() for layer, S in values.items()}
    try:
        config, tensors = read_lora(folder)
    except UnsupportedError:
        return {}
    spectra = {}
    for key, down in tensors.items():
        up = tensors.get(key.replace(".lora_A.", ".lora_B.")) if ".lora_A." in key else None
        if up is None or down.dim() != 2:
            continue
        layer = key.split(".lora_A.")[0].removeprefix(PREFIX)
        _, R_up = torch.linalg.qr(up.float(), mode="r")
        _, R_down = torch.linalg.qr(down.float().t(), mode="r")
        scaling = lora_scaling(config, layer, down.shape[0])
        spectra[layer] = (scaling * torch.linalg.svdvals(R_up @ R_down.t())).tolist()
    return spectra
