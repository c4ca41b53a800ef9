"""Layers that share one input, with the statistics of it: what the methods that start from data are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration import InputStatistics
from ..initializers import SecondMoment

__all__ = ["DataGroup", "DataLayer", "second_moment"]


@dataclass(frozen=True)
class DataLayer:
    """One layer to start.

    Attributes:
        name: in the base model. shape: (out, in) of its weight.
        rank, scaling: that the adapter has there.
        weight: reads `W` (out, in), float32, however it is stored.
        original: reads it as it was before quantisation.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    weight: Callable[[], Tensor]
    original: Callable[[], Tensor]


@dataclass(frozen=True)
class DataGroup:
    """One distinct layer input.

    Attributes:
        parts: the input's statistics, one for each sub-set of the data; None where no token reached it.
        layers: those that are given this input.
        device: where to compute; None: where things are.
    """

    parts: tuple[InputStatistics | None, ...]
    layers: tuple[DataLayer, ...]
    device: torch.device | str | None = None


def second_moment(part: InputStatistics, *, mean: bool = False, device: Any = None) -> SecondMoment:
    """`C = E[x x^T]` as the initialisers take it: exact, or the factor of a sketch; with `E[x]` where asked for."""
    forms: dict[str, Tensor] = {"matrix": part.second_moment()} if part.exact else {"factor": part.low_rank()}
    forms = {name: value.to(device) if device is not None else value for name, value in forms.items()}
    return SecondMoment(
        **forms,
        mean=part.mean() if mean else None,
        count=part.count,
        trace=part.trace / part.count,
    )
