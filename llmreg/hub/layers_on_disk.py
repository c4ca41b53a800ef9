"""The layers that an adapter is for, read from a checkpoint one by one: no model is built, one weight is in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..weights import bytes_hash
from .base_checkpoint import BaseCheckpoint
from .sidecar import BaseRecord

__all__ = ["LayersOnDisk"]


class LayersOnDisk(nn.Module):
    """Stands for a model where only the adapter's layers matter: `get_submodule` reads the one that is asked for.

    Args:
        checkpoint: the base. names: of the layers, as the model has them, e.g. `model.layers.0.mlp.up_proj`.
        fan_in_fan_out: whether weights are (in, out), where the class of the layer is not known.
        dtype: what they are loaded in; None: as the checkpoint has them.

    Raises:
        UnsupportedError, BaseMismatchError: see `BaseCheckpoint.find`.
    """

    def __init__(
        self, checkpoint: BaseCheckpoint, names: Iterable[str], fan_in_fan_out: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.checkpoint, self.dtype = checkpoint, dtype
        found = {name: checkpoint.find(f"{name}.weight") for name in names}
        self.entries = {name: entry for name, (_, entry) in found.items()}
        self.transposed = {
            name: checkpoint.is_transposed(parameter, default=fan_in_fan_out) for name, (parameter, _) in found.items()
        }

    def get_submodule(self, target: str) -> nn.Module:
        entry = self.entries[target]
        with torch.device("meta"):
            layer: Any = Conv1D(1, 1) if self.transposed[target] else nn.Linear(1, 1)
        weight = self.checkpoint.file_of(entry).read(entry.name)
        layer.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        return layer

    def record(self, *, hashed: bool) -> BaseRecord:
        """The checkpoint's identity and the dtypes of the layers; with the digest of their bytes if `hashed`."""
        identity = self.checkpoint.identity
        dtypes = {self.dtype or entry.dtype for entry in self.entries.values()}
        storage = "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        stored_bytes = bytes_hash(self, self.entries) if hashed else None
        return BaseRecord(identity.digest, identity.source, identity.name, identity.revision, stored_bytes, storage)
