"""The full-precision weights that a quantised base was made of, read layer by layer from its checkpoint.

Quantising rounds; what makes up for that (EoRA, QPiSSA) needs the weight as it was. The model is in memory in 4 or 8
bits, its checkpoint lies on disk: one layer at a time is read from there, never the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmreg.errors import WeightError
from llmreg.weights.hashing import unwrapped
from llmreg.weights.identity import checkpoint_folder
from llmreg.weights.read import read_weight
from llmreg.weights.source import SafetensorsSource
from llmreg.weights.storage import storage_of

__all__ = ["OriginalWeights", "original_checkpoint"]

#: Quantising to 4 bits moves a weight by about a tenth of its norm; another model's weight is off by more than all.
_MOST_ERROR = 0.5

_FOLDER: ContextVar[Path | None] = ContextVar("llmreg_original_checkpoint", default=None)


@contextmanager
def original_checkpoint(path: str | os.PathLike | None) -> Iterator[None]:
    """In this context full-precision weights are read from `path`; None: from where the model was loaded."""
    token = _FOLDER.set(None if path is None else Path(path))
    try:
        yield
    finally:
        _FOLDER.reset(token)


class OriginalWeights:
    """The checkpoint that a quantised model was loaded from.

    Args:
        model: bare or wrapped. Its checkpoint is the folder (or the entry of the local Hub cache) that its config
            names, or the one of the surrounding `original_checkpoint`.

    Raises:
        WeightError: no checkpoint on this machine, or none in safetensors.
    """

    def __init__(self, model: nn.Module) -> None:
        folder = _FOLDER.get() or checkpoint_folder(model)
        if folder is None:
            where = getattr(getattr(unwrapped(model), "config", None), "_name_or_path", None) or "nowhere on disk"
            raise WeightError(
                f"the full-precision weights of this quantised base are needed, and it was loaded from {where!r}, "
                "which holds none here; load the model from its full-precision checkpoint with a quantization_config, "
                "or name that checkpoint: with llmreg.weights.original_checkpoint(folder): ..."
            )
        self.folder = folder
        self._source = SafetensorsSource(folder)

    def read(self, base: Any, name: str, *, device: torch.device | str | None = None) -> Tensor:
        """`W` (out, in) of a quantised layer before quantisation, float32.

        Args:
            base: the layer. name: its qualified name.
            device: of the result; None: where the layer is.

        Raises:
            WeightError: the checkpoint lacks it, has another shape, or is not what this layer was quantised from.
        """
        W = self.reread(base, name, device=device)
        error = W - read_weight(base, name=name, device=W.device)
        if not float(error.norm()) <= _MOST_ERROR * float(W.norm()):
            raise WeightError(
                f"layer {name!r} was not quantised from {self._source.path}: they differ by more than half of the "
                "weight; give the full-precision checkpoint of this very model"
            )
        return W

    def reread(self, base: Any, name: str, *, device: torch.device | str | None = None) -> Tensor:
        """As `read`, of a layer that holds something else by now, so that only the shapes are compared."""
        storage = storage_of(base)
        W = self._source.read_weight_of(name)
        if tuple(W.shape) != storage.shape or not W.is_floating_point():
            raise WeightError(
                f"layer {name!r} is {storage.shape}, and {self._source.path} holds {tuple(W.shape)} {W.dtype} for it; "
                "give the full-precision checkpoint of this very model"
            )
        return W.to(device=base.weight.device if device is None else device, dtype=torch.float32)
