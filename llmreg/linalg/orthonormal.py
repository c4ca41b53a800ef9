"""Orthonormal bases of tall blocks: Cholesky-QR, and Householder QR where that would lose digits.

Cholesky-QR factors the small Gram matrix, `X^T X = R^T R`, and solves `Q = X R^{-1}`: matrix products
instead of a Householder sweep, about ten times faster for the blocks used here. Its error grows with
the square of the condition number of `X`, so it is done twice (the second pass sees a nearly
orthonormal matrix) and is given up for Householder QR when the first factor shows nearly dependent
columns. Yamamoto, Nakatsukasa, Yanagisawa & Fukaya, "Roundoff error analysis of the CholeskyQR2
algorithm" (ETNA 2015).

A basis that only has to span the right space, because what is read off it is orthonormalised anyway, gets one
round where that leaves it close to orthonormal (`extend`), which is most of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmreg.errors import WeightError
from llmreg.linalg.sketch import gaussian_sketch

__all__ = ["cholesky_qr", "extend", "largest_entry", "one_round", "orthonormalize"]

# Gram-Schmidt twice is enough unless the second projection still removes a visible part of a column.
_SETTLED = 0.7
_MAX_ROUNDS = 8
# One round leaves about `eps (largest / smallest)^2` of the diagonal of the Cholesky factor, and a projection by a
# basis that is off by `d` leaves `d` times what it took away over what is left: together below 1e-2 at these limits.
_WELL_CONDITIONED = 1e-2
_WELL_SEPARATED = 1e-3
# Lengths of columns whose squares, and those of what a product with the matrix makes of them, are normal numbers.
_SAFE_LENGTHS = (1e-6, 1e6)


def cholesky_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR of a tall matrix by Cholesky-QR, done twice.

    Falls back to Householder QR (`torch.linalg.qr`) when the first round leaves `Q^T Q` further than 1/2
    from the identity, which happens once the condition number of `X` (columns scaled to one length) nears
    `1 / sqrt(eps)`, 3e3 in float32. So `Q` is orthonormal to working precision for every finite input,
    zero and rank-deficient included.

    Args:
        X: `(..., m, k)` with `m >= k`, float32 or float64.

    Returns:
        `Q (..., m, k)` with orthonormal columns and `R (..., k, k)` upper triangular with a diagonal
        that is not negative, `X = Q R`.
    """
    R1 = _cholesky(X.mT @ X)
    Q = torch.linalg.solve_triangular(R1, X, upper=True, left=False)
    gram = Q.mT @ Q
    if _nearly_identity(gram):
        R2 = _cholesky(gram)
        return torch.linalg.solve_triangular(R2, Q, upper=True, left=False), R2 @ R1
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
    first = _project_out(X, against)
    R = _cholesky(first.mT @ first)
    Q = _project_out(torch.linalg.solve_triangular(R, first, upper=True, left=False), against)
    gram = Q.mT @ Q
    if _nearly_identity(gram):
        return torch.linalg.solve_triangular(_cholesky(gram), Q, upper=True, left=False)
    return _orthonormalize_dependent(X, against, generator)


def one_round(X: Tensor) -> Tensor | None:
    """One round of Cholesky-QR; None where `X` is too ill-conditioned for it, too large, too small or not finite.

    Args:
        X: `(..., m, k)`, float32 or float64.

    Returns:
        Columns that span what `X` spans, orthonormal to about 1e-3 in float32 and often far better.
    """
    L = torch.linalg.cholesky_ex(X.mT @ X)[0]
    low, high = _SAFE_LENGTHS
    if all(low < min(row) and max(row) < high and _is_even(row) for row in _diagonals(L)):
        return X @ _inverse(L)
    return None


def extend(Z: Tensor, basis: Tensor, overlap: Tensor, *, generator: torch.Generator) -> Tensor:
    """Columns by which the range of `Z` extends a basis: `Z - basis overlap`, nearly orthonormal.

    Block Gram-Schmidt and Cholesky-QR once; twice (`orthonormalize`) where `Z` brings little that is new or where its
    new columns are nearly dependent.

    Args:
        Z: `(..., m, k)`, float32 or float64; overwritten.
        basis: `(..., m, j)` with orthonormal columns, or nearly so, `j + k <= m`.
        overlap: `basis^T Z`, `(..., j, k)`; a Krylov method has it at hand.
        generator: see `orthonormalize`.

    Returns:
        `(..., m, k)`; with the basis, orthonormal to about 1e-2 in float32, which loses no direction.

    Raises:
        WeightError: `Z` is not finite.
    """
    rest = Z.addmm_(basis, overlap, alpha=-1) if Z.ndim == 2 else Z - basis @ overlap
    L = torch.linalg.cholesky_ex(rest.mT @ rest)[0]
    removed = torch.linalg.vector_norm(overlap, ord=float("inf"), dim=(-2, -1)).reshape(-1).tolist()
    if all(_is_even(row) and min(row) > _WELL_SEPARATED * top for row, top in zip(_diagonals(L), removed, strict=True)):
        return rest @ _inverse(L)
    return orthonormalize(rest / largest_entry(rest), against=basis, generator=generator)


def largest_entry(X: Tensor) -> Tensor:
    """`max |x|` of each matrix, `(..., 1, 1)`, 1 for zero: divided by it, squares neither overflow nor vanish.

    Raises:
        WeightError: an entry is NaN or Inf.
    """
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    if not bool(largest.isfinite().all()):
        raise WeightError(
            "The matrix contains NaN or Inf, or entries so large that a matrix product overflows in "
            f"{X.dtype}; a decomposition needs finite input."
        )
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _diagonals(L: Tensor) -> list[list[float]]:
    """The diagonal of each matrix as numbers: comparing a handful of them takes less time than one operation."""
    return L.diagonal(dim1=-2, dim2=-1).reshape(-1, L.shape[-1]).tolist()


def _is_even(diagonal: list[float]) -> bool:
    """Whether this is the diagonal of a Cholesky factor that exists and is well conditioned; NaN answers no."""
    limit = _WELL_CONDITIONED * max(diagonal)
    return all(limit < value < float("inf") for value in diagonal)


def _inverse(L: Tensor) -> Tensor:
    """`R^{-1}` of the well-conditioned `R = L^T`: a product with it leaves the layout that later products want."""
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity, upper=False).mT


def _cholesky(gram: Tensor) -> Tensor:
    """Upper triangular `R` with `R^T R = gram`; garbage, never an exception, where there is none."""
    return torch.linalg.cholesky_ex(gram)[0].mT


def _nearly_identity(gram: Tensor) -> bool:
    """Whether one more round of Cholesky-QR ends orthonormal to working precision.

    `gram` belongs to the columns after the first round (and the second projection). They span the right
    space whatever the first factor was worth; a Gram matrix within 1/2 of the identity also makes them
    well conditioned and says that the second projection removed little. NaN answers no.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return bool((torch.linalg.matrix_norm(gram - identity) < 0.5).all())


def _project_out(X: Tensor, basis: Tensor | None) -> Tensor:
    """`X - basis basis^T X`."""
    if basis is None:
        return X
    if X.ndim == 2:
        return torch.addmm(X, basis, basis.mT @ X, alpha=-1)
    return X - basis @ (basis.mT @ X)


def _orthonormalize_dependent(X: Tensor, basis: Tensor | None, generator: torch.Generator) -> Tensor:
    """`orthonormalize` for nearly dependent columns: Householder QR, lost directions drawn anew."""
    scale = torch.linalg.vector_norm(X, dim=-2, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    Q = X / scale
    lost_below = 100 * torch.finfo(X.dtype).eps
    for _ in range(_MAX_ROUNDS):
        Q, R = torch.linalg.qr(_project_out(Q, basis))
        kept = R.diagonal(dim1=-2, dim2=-1).abs()
        if bool((kept > _SETTLED).all()):
            break
        lost = (kept < lost_below).unsqueeze(-2)
        if bool(lost.any()):
            fresh = gaussian_sketch(*X.shape[-2:], generator=generator, dtype=X.dtype, device=X.device)
            Q = torch.where(lost, fresh / X.shape[-2] ** 0.5, Q)
        # From the second round on the columns are orthonormal: what shrinks now lies in the basis.
        lost_below = 1e-2
    return Q
