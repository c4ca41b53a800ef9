"""The config class of EoRA, which starts from data to make up for the quantisation of its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ..errors import UnsupportedError
from ..initializers import Factors, damp, eora
from .data_configs import DataConfig, is_number
from .data_group import DataGroup, DataLayer, second_moment

__all__ = ["EoraConfig"]


@dataclass
class EoraConfig(DataConfig):
    """EoRA (arXiv 2410.21271): an adapter that makes up for the quantisation of its base, to begin training from.

    `B A` is the rank-r correction of an NF4 or int8 weight that is best on the outputs over calibration data. So the
    model with the adapter is better than the base from the start, and differs from it: a disabled adapter is the
    quantised base. The full-precision weights are read from the model's checkpoint, layer by layer. Wrap the quantised
    model, then call `llmreg.initialize`.

    Args:
        r: of the correction (paper: 128).
        ridge: relative ridge on the second moment, which the formula divides by.
        svd: "randomized" (default) or "exact".

    Example:
        >>> EoraConfig(r=32, target_modules="all-linear").lora_alpha
        32
    """

    r: int | None = field(default=128, metadata={"help": "rank of the correction"})
    ridge: float = field(default=1e-6, metadata={"help": "on the second moment, relative to its mean diagonal"})
    svd: Literal["randomized", "exact"] = field(default="randomized", metadata={"help": "how to decompose"})

    METHOD: ClassVar[str] = "eora"
    FORM: ClassVar[str] = "product"
    SAVED_RANK: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.ridge) and 0 < self.ridge < 1):
            raise UnsupportedError(f"ridge is a small positive number, for example 1e-6, got {self.ridge!r}.")
        if self.svd not in ("randomized", "exact"):
            raise UnsupportedError(f"svd must be 'randomized' or 'exact', got {self.svd!r}.")

    def needs_original(self) -> bool:
        return True

    def start_settings(self, layer: str = "") -> tuple:
        return (*super().start_settings(layer), self.ridge, self.svd)

    def starts(self, group: DataGroup, survey: Any) -> list[Factors]:
        part = group.parts[0]
        moment = torch.eye(group.layers[0].shape[1]) if part is None else second_moment(part)
        damped = damp(moment, self.ridge, dtype=torch.float64, device=group.device, overwrite=True)
        return [self._start(layer, damped) for layer in group.layers]

    def _start(self, layer: DataLayer, moment: Any) -> Factors:
        start = eora(layer.original(), layer.weight(), layer.rank, moment, svd=self.svd, seed=self.seed)
        root = layer.scaling**0.5
        return Factors(start.A / root, start.B / root, start.singular_values)
