"""EVA's stopping rule: enough data was read once the components of every layer stay where they are.

The reference looks after every batch and what it has then depends on their order. Here the components come from sums,
so the rule only decides how much data is read; and it looks at growing intervals, so that looking stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..calibration import InputStatistics
from ..errors import WeightError
from ..initializers import has_converged

__all__ = ["Convergence"]

#: Batches between two looks grow by this factor.
_GROWTH = 1.3


class Convergence:
    """Whether calibration may stop: called with the sums after every batch.

    Attributes:
        key: what decides its answers, for the cache.
    """

    def __init__(self, tau: float, ranks: Mapping[str, int], components: Callable[[InputStatistics, int], Any]) -> None:
        """
        Args:
            tau: the least cosine between a component and what it was at the look before.
            ranks: of each layer: as many components must have settled.
            components: principal components `V (k, in)` of an input.
        """
        self.tau, self.ranks = tau, dict(ranks)
        self._components = components
        self._batches, self._next = 0, 1
        self._before: dict[str, Tensor] = {}

    @property
    def key(self) -> str:
        return f"cosine {self.tau} of ranks {sorted(self.ranks.items())}, looking at intervals of {_GROWTH}"

    def __call__(self, sums: Mapping[str, InputStatistics]) -> bool:
        self._batches += 1
        if self._batches < self._next:
            return False
        self._next = max(self._batches + 1, int(self._batches * _GROWTH))
        now: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}
        for name, part in sums.items():
            if id(part) not in seen:
                wanted = max(self.ranks.get(other, 0) for other, same in sums.items() if same is part)
                try:
                    seen[id(part)] = self._components(part, wanted).V
                except WeightError:  # too few tokens yet
                    return False
            now[name] = seen[id(part)]
        settled = all(
            has_converged(self._before.get(name), V, self.ranks.get(name, 0), self.tau) for name, V in now.items()
        )
        self._before = now
        return settled and bool(now)
