"""The tiny storage form of SVFit: the values alone are saved, and the vectors are computed again from the base.

That is only as good as the vectors are the same. Beside the values lie what tells: the singular values of the start,
and of each component one number that depends on both its vectors and not on their joint sign,

    probe_i = (p . u_i) (v_i . z)        with p, z drawn from a seed that is the layer's name.

Singular values that nearly coincide let other libraries and machines turn their vectors; then the numbers differ, and
loading refuses.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError
from .layer import AdditiveLayer

__all__ = ["check_same_vectors", "check_vectors", "is_tiny", "layer_checks", "vector_checks"]

#: Largest error of a singular value, relative to the layer's largest: float32 decompositions agree to 1e-6.
_VALUE_TOLERANCE = 1e-4
#: Largest error of a probe, whose size is about 1. Vectors rounded to bfloat16 by two machines differ by 2e-3.
_PROBE_TOLERANCE = 1e-2


def is_tiny(config: Any) -> bool:
    """Whether an adapter of this config is saved as its values alone."""
    return getattr(config, "storage", None) == "tiny"


@torch.no_grad()
def vector_checks(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """`<layer>.lora_S0.weight` `(r,)` and `<layer>.probe` `(r,)` of every layer, float32."""
    checks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdditiveLayer) and module.form(adapter_name):
            checks |= layer_checks(_wrapped(name), module.factors(adapter_name))
    return checks


def layer_checks(layer: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The two entries of one layer, from its frozen factors by container; `layer` as files name it."""
    values = factors["lora_S0"].detach().float().cpu()
    return {
        f"{layer}.lora_S0.weight": values,
        f"{layer}.probe": _probe(layer, factors["lora_A0"], factors["lora_B0"]),
    }


def check_vectors(model: Any, adapter_name: str, expected: dict[str, Tensor]) -> None:
    """Refuse vectors of a live adapter that are not those that the values were trained for.

    Raises:
        AdapterFileError: the layer, and what differs.
    """
    check_same_vectors(vector_checks(model, adapter_name), expected)


def check_same_vectors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same for checks that were computed already."""
    for key in sorted(found.keys() | expected.keys()):
        layer, _, _ = key.partition(".probe" if key.endswith(".probe") else ".lora_S0")
        if key not in found or key not in expected or found[key].shape != expected[key].shape:
            raise AdapterFileError(f"Layer {layer!r} has other components here than when the adapter was saved.")
        error = (found[key] - expected[key]).abs().max()
        limit = _PROBE_TOLERANCE if key.endswith(".probe") else _VALUE_TOLERANCE * float(expected[key].max())
        if not error <= limit:
            what = "vectors" if key.endswith(".probe") else "values"
            raise AdapterFileError(
                f"The singular {what} of layer {layer!r} are not those that the adapter was trained on (off by "
                f"{float(error):.1e}): another base, or a decomposition that comes out otherwise on this machine; "
                "save the adapter with storage='lora' where it was trained."
            )


def _wrapped(name: str) -> str:
    """The layer's name as files have it, also where PEFT has not wrapped the model yet."""
    return f"base_model.model.{name.removeprefix('base_model.model.')}"


def _probe(layer: str, A0: Tensor, B0: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
    p, z = (torch.randn(size, generator=generator) for size in (B0.shape[0], A0.shape[1]))
    return (p @ B0.detach().float().cpu()) * (A0.detach().float().cpu() @ z)
