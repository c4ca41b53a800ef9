"""Second moment of a layer's inputs, as the statistics of a calibration hand it over.

Data-driven initialisers weigh the columns of a weight by `C = E[x x^T]` `(in, in)`, uncentred. It comes exact, or as a
sketch `F` `(in, k)` with `C ~ F F^T`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightError
from ..linalg.operators import is_finite

__all__ = ["SecondMoment", "as_second_moment"]


@dataclass(frozen=True)
class SecondMoment:
    """`C = E[x x^T]` of a layer's inputs, exact or sketched, with what else one pass over the data knows.

    Attributes:
        matrix: `(..., in, in)`, symmetric; or None, then `factor` is given.
        factor: `(..., in, k)` with `C ~ factor factor^T`; or None, then `matrix` is given.
        mean: `(in,)`, `E[x]`; only EVA's centred components need it.
        count: number of tokens in the mean; only EVA's singular values need it.
        trace: exact `trace(C) = E[|x|^2]`. A sketch loses some of it; None takes what `matrix` or `factor` has.

    Raises:
        WeightError: neither or both of `matrix` and `factor`, shapes that do not fit, NaN or Inf.
    """

    matrix: Tensor | None = None
    factor: Tensor | None = None
    mean: Tensor | None = None
    count: int | None = None
    trace: float | None = None

    def __post_init__(self) -> None:
        if (self.matrix is None) == (self.factor is None):
            raise WeightError("A second moment is either `matrix` (in, in) or `factor` (in, k); give exactly one.")
        given = self.values
        if given.ndim < 2 or (self.matrix is not None and given.shape[-1] != given.shape[-2]):
            expected = "(in, in)" if self.factor is None else "(in, k)"
            raise WeightError(f"The second moment has shape {tuple(given.shape)}; {expected} is expected.")
        if self.mean is not None and self.mean.shape[-1] != self.width:
            raise WeightError(f"The mean has {self.mean.shape[-1]} entries, the second moment {self.width} inputs.")
        for name, values in (("second moment", given), ("mean", self.mean)):
            if values is not None and not is_finite(values):
                raise WeightError(
                    f"The {name} of the layer's inputs contains NaN or Inf: an activation was not finite. Calibrate in "
                    "bfloat16 or float32 rather than float16, and look for the batch."
                )

    @property
    def values(self) -> Tensor:
        """Whichever of `matrix` and `factor` is given."""
        values = self.factor if self.matrix is None else self.matrix
        assert values is not None
        return values

    @property
    def width(self) -> int:
        """Number of inputs of the layer, `in`."""
        return self.values.shape[-2]

    def total(self) -> Tensor:
        """`trace(C)`, `(...)`, float64: exact where `trace` is given."""
        if self.trace is not None:
            return torch.as_tensor(self.trace, dtype=torch.float64, device=self.values.device)
        if self.matrix is not None:
            return self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
        return torch.linalg.vector_norm(self.values, dim=(-2, -1), dtype=torch.float64) ** 2


def as_second_moment(second_moment: Tensor | SecondMoment) -> SecondMoment:
    """A tensor as the exact matrix; a `SecondMoment` as it is."""
    return SecondMoment(matrix=second_moment) if isinstance(second_moment, Tensor) else second_moment
