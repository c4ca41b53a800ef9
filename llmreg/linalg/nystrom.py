"""Low-rank factor of a positive semidefinite matrix that was only ever multiplied by a test matrix.

`M ~ F F^T` from `Y = M Omega`: the Nyström approximation `Y (Omega^T Y)^+ Y^T`, made stable by a small shift.
Tropp, Yurtsever, Udell & Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data"
(NeurIPS 2017), Algorithm 3, without its final truncation, which is for whoever decomposes `F`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmreg.errors import WeightError

__all__ = ["nystrom_factor"]

_MAX_SHIFTS = 12


def nystrom_factor(Y: Tensor, Omega: Tensor) -> Tensor:
    """`F` (n, k) with `F F^T ~ M`, for `Y = M Omega` (n, k) and `M` (n, n) symmetric positive semidefinite.

    Exact up to rounding where the rank of `M` is at most k. The shift adds at most a few float32 roundings of
    `||Y||_F` along the range of `Omega`. `Omega` must have well-conditioned columns, as Gaussian ones for k <= n/2 are.

    Returns:
        `F` in the dtype of `Y`; the k-sized core is factored in float64 (one Cholesky, no SVD).

    Raises:
        WeightError: `Y` is not finite.
    """
    Y64, Omega64 = Y.double(), Omega.double()
    norm = torch.linalg.matrix_norm(Y64).item()
    if norm == 0:
        return torch.zeros_like(Y)
    # Y was summed in its own precision: below its rounding the core is noise and may be indefinite.
    shift = torch.finfo(Y.dtype).eps * norm
    for _ in range(_MAX_SHIFTS):
        shifted = torch.add(Y64, Omega64, alpha=shift)
        core = Omega64.mT @ shifted
        L, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
        if int(info) == 0 and bool(L.isfinite().all()):
            return torch.linalg.solve_triangular(L, shifted.mT, upper=False).mT.to(Y.dtype)
        shift *= 10
    raise WeightError("the sketch of a second moment is not finite or not positive semidefinite")
