"""Singular values of what an adapter adds to each layer, from its saved factors and without any `out x in` product."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import UnsupportedError
from .lora_files import PREFIX, lora_scaling, read_lora

__all__ = ["update_spectra"]


def update_spectra(adapter: str | Path) -> dict[str, list[float]]:
    """Singular values of `s B A` by layer, largest first; layers that are no pair of matrices are left out.

    Args:
        adapter: folder of a saved adapter (plain LoRA, or Bone); empty where the update has full rank.

    Raises:
        AdapterFileError: it is not a whole plain-LoRA adapter in safetensors.
    """
    try:
        config, tensors = read_lora(Path(adapter))
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
