"""The statistics of many layers: one object per distinct input, a report, sums over data sets and processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmreg.calibration.distributed import reduce_over_processes
from llmreg.calibration.report import CalibrationReport
from llmreg.calibration.statistics import InputStatistics
from llmreg.errors import BaseMismatchError

__all__ = ["Statistics", "input_width"]


class Statistics(Mapping[str, InputStatistics]):
    """Layer name -> statistics of its input. Layers that share an input share the object.

    Layers that saw no token are not in it; `report.unreached` names them.

    Attributes:
        report: how they came about.
    """

    def __init__(self, of_layer: Mapping[str, InputStatistics], report: CalibrationReport) -> None:
        self._of_layer = dict(of_layer)
        self.report = report

    def __getitem__(self, name: str) -> InputStatistics:
        return self._of_layer[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of_layer)

    def __len__(self) -> int:
        return len(self._of_layer)

    def groups(self) -> list[tuple[tuple[str, ...], InputStatistics]]:
        """Each distinct input once, with the layers that share it."""
        found: dict[int, tuple[list[str], InputStatistics]] = {}
        for name, statistics in self._of_layer.items():
            found.setdefault(id(statistics), ([], statistics))[0].append(name)
        return [(tuple(names), statistics) for names, statistics in found.values()]

    @property
    def bytes(self) -> int:
        """What all sums hold, without test matrices."""
        return sum(statistics.bytes for _, statistics in self.groups())

    def describe(self) -> dict[str, Any]:
        """The report with the bytes and every distinct input's layers, form and counts; for JSON."""
        groups = [
            {
                "layers": list(names),
                "dim": part.dim,
                "form": "exact" if part.exact else f"sketch of {part.moment.flat.shape[1]}",
                "count": part.count,
                "samples": part.samples,
                "bytes": part.bytes,
            }
            for names, part in self.groups()
        ]
        return {**self.report.as_dict(), "bytes": self.bytes, "groups": groups}

    def check(self, model: nn.Module) -> None:
        """Raise unless every layer is one of `model` and has an input of the width that was gathered.

        Raises:
            BaseMismatchError: naming the first layer that is absent or of another width.
        """
        modules = dict(model.named_modules())
        for name, statistics in self._of_layer.items():
            if name not in modules:
                raise BaseMismatchError(f"these statistics are of another model: this one has no layer {name!r}")
            width = input_width(modules[name])
            if width not in (None, statistics.dim):
                raise BaseMismatchError(
                    f"these statistics are of another model: layer {name!r} has an input of width {width} here, "
                    f"they are of width {statistics.dim}; calibrate this model"
                )

    def merge(self, other: Statistics) -> Statistics:
        """Of both data sets together. Layers share an object where they do so in both.

        Raises:
            RecipeError: gathered with different arguments.
        """
        merged: dict[tuple[int | None, int | None], InputStatistics] = {}
        names = [*self, *(name for name in other if name not in self)]
        of_layer = {}
        for name in names:
            mine, theirs = self.get(name), other.get(name)
            key = (None if mine is None else id(mine), None if theirs is None else id(theirs))
            if key not in merged:
                part = mine if mine is not None else theirs
                assert part is not None
                merged[key] = part.merge(part.like() if mine is None or theirs is None else theirs)
            of_layer[name] = merged[key]
        return Statistics(of_layer, self.report.merge(other.report))

    def all_reduce(self) -> Statistics:
        """The sums over all processes of the default group; every process calls this and gets the same.

        Moments are added as float32, the rest as float64. Layers share an object where they do on every process that
        reached them; one that this process never reached enters as zeros. These statistics must not be used afterwards:
        their memory is taken over.

        Raises:
            RecipeError: the processes gathered with different arguments.
        """
        of_layer, report = reduce_over_processes(self, self.report)
        return Statistics(of_layer, report)


def input_width(module: nn.Module) -> int | None:
    """Width of a linear layer's input, without touching its weight; None where the layer does not tell."""
    width = getattr(module, "in_features", None)
    if isinstance(width, int):
        return width
    inner = getattr(module, "base_layer", None)
    if isinstance(inner, nn.Module):
        return input_width(inner)
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):
        return weight.shape[0]
    return None
