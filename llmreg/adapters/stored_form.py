"""Translation between the live factors of an adapter and the plain LoRA it is stored as (names and tensors).

live    <layer>.lora_A[.adapter].weight  lora_B  lora_A0  lora_B0        rank r
stored  <layer>.lora_A.weight = [A ; A - A0]   <layer>.lora_B.weight = [B - B0 | B0]     rank 2r
"""

from __future__ import annotations

from torch import Tensor

from ..errors import AdapterFileError
from .difference import concatenate, split

__all__ = ["FACTOR_NAMES", "from_stored", "to_stored"]

FACTOR_NAMES = ("lora_A", "lora_B", "lora_A0", "lora_B0")


def _sibling(key: str, factor: str) -> str:
    """The key of another factor of the layer that `key` (of its `lora_A`) belongs to."""
    head, _, tail = key.rpartition(".lora_A.")
    return f"{head}.{factor}.{tail}"


def _is_down(key: str) -> bool:
    return ".lora_A." in key


def to_stored(live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Live tensors (adapter name in the key or not) -> the same keys for `lora_A`, `lora_B` in difference form.

    The frozen start follows the dtype of the factors, as in the forward pass. Other entries pass through.
    """
    stored = {key: value for key, value in live.items() if ".lora_A" not in key and ".lora_B" not in key}
    for key in filter(_is_down, live):
        A, B, A0, B0 = (live[_sibling(key, factor)] for factor in FACTOR_NAMES)
        down, up = concatenate(A.detach(), B.detach(), A0.detach().to(A.dtype), B0.detach().to(B.dtype))
        stored[key], stored[_sibling(key, "lora_B")] = down, up
    return stored


def from_stored(stored: dict[str, Tensor], exact: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Stored tensors -> live ones (adapter-name-free keys), bit-exact where `exact` holds the factors.

    Without `exact` the difference form is split: the same function within one rounding, whatever rank-2r LoRA it is.

    Raises:
        AdapterFileError: a factor is missing, or of odd rank without `exact`.
    """
    live = {key: value for key, value in stored.items() if ".lora_A" not in key and ".lora_B" not in key}
    for key in filter(_is_down, stored):
        if exact is not None:
            keys = [_sibling(key, factor) for factor in FACTOR_NAMES]
            missing = [name for name in keys if name not in exact]
            if missing:
                raise AdapterFileError(f"The adapter's sidecar lacks {missing[0]!r}; save the adapter again.")
            live.update({name: exact[name] for name in keys})
            continue
        up = stored.get(_sibling(key, "lora_B"))
        if up is None or stored[key].shape[0] % 2:
            raise AdapterFileError(f"{key!r} is not half of a difference form (a pair of factors of even rank).")
        live.update(zip((_sibling(key, factor) for factor in FACTOR_NAMES), split(stored[key], up), strict=True))
    return live
