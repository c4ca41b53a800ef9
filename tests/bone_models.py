"""Bone adapters in tests: one config of each variant, and moving an adapter away from zero."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from llmreg import BoneConfig
from llmreg.adapters.bone_model import bone_layers

#: Settings of each variant that fit every layer of the tiny models.
VARIANTS = {
    "bone": {"variant": "bone", "r": 8},
    "mini": {"variant": "mini", "r": 8, "mini_r": 4},
    "bat": {"variant": "bat", "r": 8},
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
each_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def config(variant: str, **settings: Any) -> BoneConfig:
    """The config of a variant: r 8 unless `settings` say otherwise."""
    return BoneConfig(**{**VARIANTS[variant], "target_modules": LINEAR, **settings})


@torch.no_grad()
def drift(model: nn.Module, adapter: str = "default", *, size: float = 0.05, seed: int = 0) -> Any:
    """Fill the blocks of `adapter` with noise, so that each update's norm is `size` of the weight's (from zero)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in bone_layers(model, adapter).values():
        block = layer.block(adapter)
        block.copy_(torch.randn(block.shape, generator=generator))
        base = layer.get_base_layer()
        from llmreg.weights import read_weight

        block.mul_(size * float(read_weight(base).norm() / layer.get_delta_weight(adapter).norm()))
    return model


def block_bytes(model: nn.Module, adapter: str = "default") -> dict[str, tuple[torch.dtype, bytes]]:
    """The adapter's blocks by layer, as dtype and bytes."""
    blocks = {name: layer.block(adapter) for name, layer in bone_layers(model, adapter).items()}
    return {name: (block.dtype, tiny_models._bytes(block)) for name, block in blocks.items()}


def dense_delta(variant: str, W: Tensor, block: Tensor) -> Tensor:
    """The update `(out, in)` written out entry by entry, from the definitions."""
    out_features, in_features = W.shape
    delta = torch.zeros_like(W)
    for o in range(out_features):
        for j in range(in_features):
            if variant == "bat":
                r = block.shape[-1]
                a, start = o // r, j // r * r
                delta[o, j] = W[o, start : start + r] @ block[a, :, j - start] + block[a, o % r, j - start]
            else:
                delta[o, j] = block[j % block.shape[0], o % block.shape[1]]
    return delta
