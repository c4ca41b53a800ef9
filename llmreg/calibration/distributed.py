"""Sums over the processes of torch.distributed's default group.

What is exchanged are the sums, not activations: their size does not grow with the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from llmreg.calibration.report import CalibrationReport
from llmreg.calibration.statistics import InputStatistics
from llmreg.errors import RecipeError

__all__ = ["everyones", "reduce_over_processes"]


def everyones(value: Any) -> list[Any]:
    """`value` of each process, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_over_processes(
    of_layer: Mapping[str, InputStatistics], report: CalibrationReport
) -> tuple[dict[str, InputStatistics], CalibrationReport]:
    """The statistics and the report of all processes together; see `Statistics.all_reduce`."""
    leaders: dict[int, str] = {}
    mine = {name: (leaders.setdefault(id(part), name), part.form()) for name, part in of_layer.items()}
    everyone = everyones((mine, report))
    tables: list[dict[str, tuple[str, tuple]]] = [table for table, _ in everyone]
    members: dict[tuple[str | None, ...], list[str]] = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        members.setdefault(tuple(table[name][0] if name in table else None for table in tables), []).append(name)
    uses = Counter(id(of_layer[names[0]]) for names in members.values() if names[0] in of_layer)
    reduced = {}
    for names in members.values():
        form = _common_form(names[0], tables)
        part = of_layer.get(names[0])
        if part is None:
            part = _zeros(form, of_layer)
        elif uses[id(part)] > 1:  # shared here, but not on every process
            part = part.merge(part.like())
        reduced.update(dict.fromkeys(names, _summed(part)))
    return reduced, _common_report([report for _, report in everyone])


def _common_form(name: str, tables: list[dict[str, tuple[str, tuple]]]) -> tuple:
    forms = {table[name][1] for table in tables if name in table}
    if len(forms) > 1:
        raise RecipeError(
            f"the processes gathered layer {name!r} in different forms ({forms}); give every process the same "
            "arguments, and exact=True or a sketch size if a memory budget decides differently among them"
        )
    return forms.pop()


def _zeros(form: tuple, of_layer: Mapping[str, InputStatistics]) -> InputStatistics:
    """What a process adds for an input that it never saw."""
    dim, need, *sketch = form
    size, seed = sketch or (None, 0)
    device = next((part.squares.device for part in of_layer.values()), _collective_device())
    return InputStatistics(dim, need, sketch=size, seed=seed, device=device)


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _summed(part: InputStatistics) -> InputStatistics:
    """`part` with its sums replaced by those over all processes."""
    counts = torch.tensor([part.count, part.samples], dtype=torch.int64, device=part.squares.device)
    for tensor in (*part.parts(), counts):
        dist.all_reduce(tensor)
    part.count, part.samples = counts.tolist()
    return part


def _common_report(reports: list[CalibrationReport]) -> CalibrationReport:
    common = reports[0]
    for report in reports[1:]:
        common = common.merge(report)
    return replace(common, seconds=max(report.seconds for report in reports))
