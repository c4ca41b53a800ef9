"""When a block Krylov basis is large enough: the energy that it captures hardly grows any more."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["EnergyStop", "Spectrum"]

#: Eigenvalues, ascending, and eigenvectors of a Gram matrix.
Spectrum = tuple[Tensor, Tensor]
# The next estimate is likely to be small enough if the trend makes it at most so many times the tolerance.
_NEAR = 2.0


class EnergyStop:
    """Says when more blocks would not lower the residual of the best rank-`rank` approximation by much.

    The energy `E_j` captured with j blocks is the sum of the leading `rank` eigenvalues of `P^T P`. What is
    still to come is taken for the geometric series that the last two gains begin, and compared with the
    residual `T_j = ||A||_F^2 - E_j`: stop once `to come / (2 T_j)`, the relative excess of the residual's
    norm, is below `tolerance`. Convergence speeds up, so the true excess is smaller than this.

    Args:
        squared_norm: `||A||_F^2` of each matrix, or None where it is unknown; then the energy of the basis
            beyond `rank` stands for `T_j`, which is too small and so on the safe side.

    Attributes:
        spectrum: of the last Gram matrix, where the end was near enough to compute it with eigenvectors.
    """

    def __init__(self, rank: int, tolerance: float, squared_norm: Tensor | None) -> None:
        self._rank = rank
        self._tolerance = tolerance
        self._squared_norms = None if squared_norm is None else squared_norm.reshape(-1).tolist()
        self._energies: list[list[float]] = []
        self._expected = math.inf
        self.spectrum: Spectrum | None = None

    def __call__(self, gram: Tensor, spectrum: Callable[[], Spectrum]) -> bool:
        """Whether to stop with the blocks whose Gram matrix this is; `spectrum` computes what `self.spectrum` keeps."""
        columns = gram.shape[-1]
        self.spectrum = None
        if columns <= self._rank:
            self._energies.append(gram.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1).tolist())
            return False
        # Numbers, not tensors: a dozen operations on a handful of values, and one transfer from a device.
        spectra = self._eigenvalues(gram, spectrum).reshape(-1, columns).tolist()
        self._energies.append([sum(values[-self._rank :]) for values in spectra])
        if len(self._energies) < 3:
            return False
        rest = [sum(values[: -self._rank]) for values in spectra]
        if self._squared_norms is not None:
            left = [norm - energy for norm, energy in zip(self._squared_norms, self._energies[-1], strict=True)]
            rest = [max(a, b) if math.isfinite(b) else a for a, b in zip(rest, left, strict=True)]
        noise = 4 * torch.finfo(gram.dtype).eps
        steps = [
            (0.0, 0.0) if last - middle <= noise * last else _trend(first, middle, last, 2 * tail)
            for first, middle, last, tail in zip(*self._energies[-3:], rest, strict=True)
        ]
        self._expected = max(excess * ratio for excess, ratio in steps)
        return all(excess < self._tolerance for excess, _ in steps)

    def _eigenvalues(self, gram: Tensor, spectrum: Callable[[], Spectrum]) -> Tensor:
        """Ascending; with the eigenvectors, which take as long again, where this is likely to be the last time."""
        if self._expected > _NEAR * self._tolerance:
            return torch.linalg.eigvalsh(gram)
        self.spectrum = spectrum()
        return self.spectrum[0]


def _trend(first: float, middle: float, last: float, double_tail: float) -> tuple[float, float]:
    """The relative excess if a sequence's gains go on shrinking as they did, and by what ratio they do."""
    ratio = min((last - middle) / max(middle - first, sys.float_info.min), 0.95)
    to_come = (last - middle) * ratio / (1 - ratio)
    return (to_come / double_tail if double_tail > 0 else math.inf), ratio
