"""What the start of one layer is found by on disk: everything that decides its bits, and nothing else.

That is a hash of the layer's stored bytes, the method with all its settings, and the arithmetic. A weight that was
edited, merged into or quantised since has another key, so no checkpoint, path or revision needs to be trusted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import LlmregError, WeightError
from ..weights import is_sharded, storage_of
from ..weights.hashing import update
from ..weights.quantized import quantized_parts
from ..weights.read import whole
from .config import AdditiveConfig

__all__ = ["START_VERSION", "StartKey", "fast_digest", "start_keys", "weight_hash"]

#: Raise it whenever an initialiser or what it uses of `linalg` gives other numbers: every entry then misses.
START_VERSION = 2


@dataclass(frozen=True)
class StartKey:
    """Everything that decides the bits of one layer's start.

    Not among it, because it moves only the last bits and would keep a start made on one machine from another: the
    number of threads, and the model of CPU or GPU. The seed drives the sketch, so the start is the same to rounding.

    Attributes:
        weight: hash of the stored bytes (`weight_hash`), so NF4 and the float it came from differ.
        rank: None where the start chooses it.
        batch: layers decomposed together stop together, and batched kernels round in their own way: the others'
            hashes and this layer's place; None for a layer alone.
        device: its type. A CPU and a GPU decompose by different algorithms.
        precision: of float32 matrix products; TF32 has 10 bits.
        torch: the full version. Another one has other kernels, and the run records this one as what made its numbers
            (law 4); an upgrade costs one decomposition.
        bitsandbytes: the version that turned codes into floats; None for a float weight.
    """

    method: str
    rank: int | None
    scaling: float
    seed: int
    settings: tuple
    shape: tuple[int, int]
    weight: str
    batch: str | None
    device: str
    precision: str
    torch: str
    bitsandbytes: str | None
    dtype: str = "float32"
    algorithm: int = START_VERSION

    def text(self) -> str:
        """The key as JSON, the same for equal keys.

        Raises:
            TypeError, ValueError: a setting that JSON cannot express.
        """
        return json.dumps(vars(self), sort_keys=True, allow_nan=False)

    @property
    def file_name(self) -> str:
        return f"start-{hashlib.sha256(self.text().encode()).hexdigest()}.safetensors"


def start_keys(
    bases: Sequence[nn.Module],
    config: AdditiveConfig,
    layer: str,
    rank: int,
    scaling: float,
    device: str | None = None,
) -> list[StartKey] | None:
    """The keys of layers that are decomposed together on `device` (None: where each is); None: not to be cached.

    `layer` names one of them: they share their settings.

    Sharded weights (ZeRO-3, FSDP) are not: reading one is a collective, and a rank whose own disk has the entry would
    leave the others waiting. Nor are weights without bytes in memory (meta, offloaded). Nor is a method from outside
    llmreg: `START_VERSION` cannot know when its numbers change.
    """
    if type(config).__module__.partition(".")[0] != __name__.partition(".")[0]:
        return None
    if any(is_sharded(base) for base in bases):
        return None
    try:
        hashes = [weight_hash(base) for base in bases]
        asked = None if config.chooses_rank(layer) else rank
        settings = config.start_settings(layer)
        keys = [
            StartKey(
                method=config.method,
                rank=asked,
                scaling=float(scaling),
                seed=config.seed,
                settings=settings,
                shape=storage_of(base).shape,
                weight=weight,
                batch=None,
                device=device or cast(Tensor, base.weight).device.type,
                precision=_precision(device or cast(Tensor, base.weight).device.type),
                torch=torch.__version__,
                bitsandbytes=_bitsandbytes_version() if storage_of(base).quantized else None,
            )
            for base, weight in zip(bases, hashes, strict=True)
        ]
        keys[0].text()
    except (LlmregError, TypeError, ValueError):  # no bytes, not quantised yet, ...: reading says what is wrong
        return None
    if len(keys) == 1:
        return keys
    together = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return [replace(key, batch=f"{place} of {len(keys)} in {together}") for place, key in enumerate(keys, 1)]


def _precision(device: str) -> str:
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    chosen = backend.matmul.fp32_precision  # not get_float32_matmul_precision, which raises where this was used to set
    return "ieee" if chosen == "none" else chosen


def _bitsandbytes_version() -> str:
    import bitsandbytes

    return bitsandbytes.__version__


def weight_hash(base: nn.Module) -> str:
    """XXH3 (128 bits, hex) over the same parts of a stored weight as `weights.module_bytes_hash`.

    sha256 takes longer than the decomposition itself on a CPU without instructions for it (0.25 GB/s; this: 4.5), and
    a hit must not. 128 bits leave accidents no chance. Who forges a collision gets a poor start for the model they
    made: whatever the factors are, the adapter begins at a difference of exactly zero.

    Raises:
        WeightError: no data (meta, not quantised yet, scales lost). UnsupportedError: unknown storage.
    """
    storage = storage_of(base)
    if storage.kind == "meta":
        raise WeightError("a weight on the meta device has no bytes to hash")
    digest = fast_digest(f"{storage.kind}|{storage.shape}|{storage.transposed}")
    if storage.kind == "float":
        update(digest, "weight", whole(base.weight))  # type: ignore[arg-type]
    else:
        for label, part in quantized_parts(base, storage, ""):
            update(digest, label, part)
    return digest.hexdigest()


def fast_digest(text: str) -> Any:
    """XXH3 (128 bits) over `text`, to be updated with more."""
    import xxhash  # what `datasets` fingerprints with

    return xxhash.xxh3_128(text.encode())
