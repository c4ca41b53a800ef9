"""The passes of one process over its batches: plan them, run them, put their sums together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from llmreg.calibration.budget import Plan, plan_unlimited, plan_within
from llmreg.calibration.forward import RandomState, is_head, run_batch, undisturbed
from llmreg.calibration.hooks import Collector
from llmreg.calibration.report import CalibrationReport
from llmreg.calibration.results import Statistics, input_width
from llmreg.calibration.statistics import InputStatistics, Need
from llmreg.calibration.tokens import BatchTokens, batch_tokens
from llmreg.errors import RecipeError, UnsupportedError
from llmreg.progress import meter

__all__ = ["Forward", "Passes", "StoppingRule"]

Forward = Callable[[nn.Module, Any], Any]


class StoppingRule(Protocol):
    """Whether sums over batches are enough; `key` says what decides that, for the cache."""

    @property
    def key(self) -> str: ...

    def __call__(self, sums: Mapping[str, InputStatistics]) -> bool: ...


@dataclass
class Passes:
    """One calibration in this process; the fields are the arguments of `calibrate`, `modules` its layers by name."""

    model: nn.Module
    batches: Iterable[Any]
    modules: dict[str, nn.Module]
    need: Need
    max_tokens: int | None
    forward: Forward | None
    seed: int
    share_inputs: bool
    until: StoppingRule | None = None

    def run(self, budget: int | None, exact: bool | None, sketch: int | None) -> Statistics:
        """The statistics of the layers that were reached, in the order of `modules`; raises what `calibrate` does."""
        started = time.monotonic()
        of_layer: dict[str, InputStatistics] = {}
        reports: list[CalibrationReport] = []
        with undisturbed(self.model):
            state = RandomState()
            iterator = iter(self.batches)
            first = list(itertools.islice(iterator, 1))
            plan = self._plan(first, budget, exact, sketch)
            for number, names in enumerate(plan.passes):
                if number:
                    state.restore()
                    first, iterator = [], iter(self.batches)
                part = self._pass(itertools.chain(first, iterator), names, plan, number)
                of_layer.update(part)
                reports.append(part.report)
        report = replace(
            reports[0],
            seconds=time.monotonic() - started,
            unreached=tuple(name for name in self.modules if name not in of_layer),
            unaligned=tuple(sorted({name for report in reports for name in report.unaligned})),
            masks_missed=tuple(sorted({name for report in reports for name in report.masks_missed})),
        )
        return Statistics({name: of_layer[name] for name in self.modules if name in of_layer}, report)

    def _plan(self, first: list[Any], budget: int | None, exact: bool | None, sketch: int | None) -> Plan:
        """Without knowing who shares an input if that fits anyway; else after a forward that finds out."""
        if budget is None:
            return plan_unlimited(self.modules, exact=exact, sketch=sketch)
        dims = {name: _width(name, module) for name, module in self.modules.items()}
        groups = [(name,) for name in self.modules]
        plan = plan_within(budget, groups, dims, self.need, exact=exact, sketch=sketch)
        settled = len(plan.passes) == 1 and (plan.size is None or exact is False)
        if not settled and self.share_inputs and first:
            plan = plan_within(budget, self._sharing(first[0]), dims, self.need, exact=exact, sketch=sketch)
        if len(plan.passes) > 1 and isinstance(self.batches, Iterator):
            raise RecipeError(
                f"within this memory budget calibration needs {len(plan.passes)} passes over the data, but these "
                f"batches can be read only once; give a list or a DataLoader, or {plan.one_pass_bytes} bytes"
            )
        return plan

    def _sharing(self, batch: Any) -> list[tuple[str, ...]]:
        """Which layers share an input, in the order in which a forward reaches them; last those that it does not."""
        collector = Collector(self.modules, self.need, lambda dim: None, record_only=True)
        forward = self._forward()
        with collector.attached(), collector.batch(BatchTokens(None, None)):
            forward(self.model, batch)
        groups: dict[str, list[str]] = {}
        for name, leader in collector.leader_of.items():
            groups.setdefault(leader, []).append(name)
        unreached = [(name,) for name in self.modules if name not in collector.leader_of]
        return [*map(tuple, groups.values()), *unreached]

    def _forward(self) -> Forward:
        if self.forward is not None:
            return self.forward
        run = run_batch(self.model, head_needed=any(is_head(self.model, module) for module in self.modules.values()))
        return lambda model, batch: run(batch)

    def _pass(self, batches: Iterable[Any], names: Iterable[str], plan: Plan, number: int) -> Statistics:
        layers = {name: self.modules[name] for name in names}
        collector = Collector(layers, self.need, plan.sketch_of, seed=self.seed, share_inputs=self.share_inputs)
        forward, started = self._forward(), time.monotonic()
        counted = seen = 0
        title = "calibration" if len(plan.passes) == 1 else f"calibration {number + 1}/{len(plan.passes)}"
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        with meter(title, total) as advance, collector.attached():
            for batch in batches:
                left = None if self.max_tokens is None else self.max_tokens - counted
                tokens = batch_tokens(batch, use_label_mask=self.need.use_label_mask, limit=left)
                with collector.batch(tokens):
                    forward(self.model, batch)
                seen += 1
                counted = collector.most_tokens() if tokens.rows is None else counted + tokens.rows.count
                rate = counted / max(time.monotonic() - started, 1e-9)
                advance(f"{rate:,.0f} tokens/s, {len(collector.leader_of)} layers")
                if self.max_tokens is not None and counted >= self.max_tokens:
                    break
                if self.until is not None and self.until(collector.of_layer()):
                    break
        unaligned, missed = tuple(collector.unaligned), tuple(collector.masks_missed)
        report = CalibrationReport(counted, seen, len(plan.passes), 0.0, plan.reason, (), unaligned, missed)
        return Statistics(collector.of_layer(), report)


def _width(name: str, module: nn.Module) -> int:
    width = input_width(module)
    if width is None:
        raise UnsupportedError(
            f"layer {name!r} ({type(module).__name__}) does not tell the width of its input, which a memory budget "
            "needs; calibrate without one"
        )
    return width
