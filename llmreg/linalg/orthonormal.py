"""Orthonormal bases of tall blocks: Cholesky-QR, and Householder QR where that would lose digits.

Cholesky-QR factors the small Gram matrix, `X^T X = R^T R`, and solves `Q = X R^{-1}`: matrix products
instead of a Householder sweep, about ten times faster for the blocks used here. Its error grows with
the square of the condition number of `X`, so it is done twice (the second pass sees a nearly
orthonormal matrix) and is given up for Householder QR when the first factor shows nearly dependent
columns. Yamamoto, Nakatsukasa, Yanagisawa & Fukaya, "Roundoff error analysis of the CholeskyQR2
algorithm" (ETNA 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmreg.linalg.sketch import gaussian_sketch

__all__ = ["cholesky_qr", "orthonormalize"]

# Gram-Schmidt twice is enough unless the second projection still removes a visible part of a column.
_SETTLED = 0.7
_MAX_ROUNDS = 8


def cholesky_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR of a tall matrix by Cholesky-QR, done twice.

    Falls back to Householder QR (`torch.linalg.qr`) when a column lies within an angle of
    `8 sqrt(eps)` of the ones before it (3e-3 in float32), where the Gram matrix has lost the difference.
    So `Q` is orthonormal to working precision for every finite input, zero and rank-deficient included.

    Args:
        X: `(..., m, k)` with `m >= k`, float32 or float64.

    Returns:
        `Q (..., m, k)` with orthonormal columns and `R (..., k, k)` upper triangular with a diagonal
        that is not negative, `X = Q R`.
    """
    Q, R1, independent = _cholesky_step(X)
    if independent:
        Q, R2, _ = _cholesky_step(Q)
        if _settled(R2):
            return Q, R2 @ R1
    Q, R = torch.linalg.qr(X)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(X.dtype)
    return Q * sign.unsqueeze(-2), R * sign.unsqueeze(-1)


def orthonormalize(X: Tensor, *, against: Tensor | None, generator: torch.Generator) -> Tensor:
    """Orthonormal columns that span, together with the basis `against`, what `X` and that basis span.

    Block Gram-Schmidt twice with Cholesky-QR; Householder QR where columns are nearly dependent.
    Directions that `X` does not have (zero, rank-deficient) are filled with random ones.

    Args:
        X: `(..., m, k)`, float32 or float64, finite.
        against: None or an orthonormal basis `(..., m, j)` with `j + k <= m`.
        generator: what the random directions are drawn from; untouched where none is needed.

    Returns:
        `Q (..., m, k)` with `Q^T Q = I` and `against^T Q = 0` to working precision.
    """
    Q, _, independent = _cholesky_step(_project_out(X, against))
    if independent:
        Q, R, _ = _cholesky_step(_project_out(Q, against))
        if _settled(R):
            return Q
    return _orthonormalize_dependent(X, against, generator)


def _cholesky_step(X: Tensor) -> tuple[Tensor, Tensor, bool]:
    """One round of Cholesky-QR: `(Q, R, independent)`; `Q` is meaningless unless `independent`.

    The test is on `R_jj / ||x_j||`, the sine of the angle between a column and the ones before it.
    Above `8 sqrt(eps)` a second round ends orthonormal to working precision.
    """
    gram = X.mT @ X
    R, info = torch.linalg.cholesky_ex(gram, upper=True)
    sine = R.diagonal(dim1=-2, dim2=-1) / gram.diagonal(dim1=-2, dim2=-1).sqrt()
    limit = 8.0 * torch.finfo(X.dtype).eps ** 0.5
    independent = bool(((sine > limit) & (info == 0).unsqueeze(-1)).all())
    Q = torch.linalg.solve_triangular(R, X, upper=True, left=False) if independent else X
    return Q, R, independent


def _settled(R: Tensor) -> bool:
    """Whether this round, whose columns came in with norm 1, changed none of them by much."""
    return bool((R.diagonal(dim1=-2, dim2=-1).abs() > _SETTLED).all())


def _project_out(X: Tensor, basis: Tensor | None) -> Tensor:
    return X if basis is None else X - basis @ (basis.mT @ X)


def _orthonormalize_dependent(X: Tensor, basis: Tensor | None, generator: torch.Generator) -> Tensor:
    """`orthonormalize` for nearly dependent columns: Householder QR, lost directions drawn anew."""
    scale = torch.linalg.vector_norm(X, dim=-2, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    Q = X / scale
    lost_below = 100 * torch.finfo(X.dtype).eps
    for _ in range(_MAX_ROUNDS):
        Q, R = torch.linalg.qr(_project_out(Q, basis))
        if _settled(R):
            break
        lost = (R.diagonal(dim1=-2, dim2=-1).abs() < lost_below).unsqueeze(-2)
        if bool(lost.any()):
            fresh = gaussian_sketch(*X.shape[-2:], generator=generator, dtype=X.dtype, device=X.device)
            Q = torch.where(lost, fresh / X.shape[-2] ** 0.5, Q)
        # From the second round on the columns are orthonormal: what shrinks now lies in the basis.
        lost_below = 1e-2
    return Q
