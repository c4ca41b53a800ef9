"""Orthonormal bases that hold the leading right singular vectors, and the projection onto them.

Block Krylov: from `V_1 = orth(A^T G)`, `G` Gaussian, every `A^T A V_j` extends the basis `V`. All blocks
are kept, so the basis holds every polynomial in `A^T A` applied to the start and not only the last power;
for the same number of passes over `A` the error is far smaller than that of subspace iteration, and the
blocks may be narrower than the rank. The products `A V` fall out on the way, and the best approximation
within the basis is their SVD (Rayleigh-Ritz).
Musco & Musco, "Randomized block Krylov methods for stronger and faster approximate SVD" (NeurIPS 2015);
Halko, Martinsson & Tropp, "Finding structure with randomness" (SIAM Review 2011) for subspace iteration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmreg.errors import WeightError
from llmreg.linalg.operators import LinearOperator
from llmreg.linalg.orthonormal import cholesky_qr, orthonormalize
from llmreg.linalg.sketch import gaussian_sketch

__all__ = ["Projection", "krylov_projection", "leading_triplets", "start_block", "subspace_start"]

# Below this ratio sigma_r / sigma_1 a float32 Gram matrix no longer tells the leading vectors apart.
_GRAM_IS_SAFE = 1e-2


class Projection(NamedTuple):
    """`A V = scale P` with orthonormal `V (..., n, q)`, `P (..., m, q)` and `scale (..., 1, 1)`."""

    V: Tensor
    P: Tensor
    scale: Tensor


def start_block(A: LinearOperator, width: int, generator: torch.Generator) -> Tensor:
    """`orth(A^T G)`, `(..., n, width)`, with a Gaussian `G` that all members of a batch share; one pass.

    Raises:
        WeightError: the product is not finite (NaN or Inf in `A`, or an overflow).
    """
    sketch = gaussian_sketch(A.shape[-2], width, generator=generator, dtype=A.dtype, device=A.device)
    Z, _ = _scaled(A.rmatmul(sketch.expand(*A.shape[:-2], *sketch.shape)))
    return orthonormalize(Z, against=None, generator=generator)


def subspace_start(A: LinearOperator, V: Tensor, iterations: int, *, generator: torch.Generator) -> Tensor:
    """Subspace iteration, `V <- orth(A^T orth(A V))` (Halko et al. 2011, algorithm 4.4)."""
    for _ in range(iterations):
        P, _ = _scaled(A.matmul(V))
        Z, _ = _scaled(A.rmatmul(orthonormalize(P, against=None, generator=generator)))
        V = orthonormalize(Z, against=None, generator=generator)
    return V


def krylov_projection(A: LinearOperator, V: Tensor, blocks: int, *, generator: torch.Generator) -> Projection:
    """Grow the basis from an orthonormal start to `blocks * b` columns, in `2 blocks - 1` passes.

    The basis is orthogonalised in full, twice, so nothing is lost when singular values converge. Where the
    Krylov space is exhausted (low rank) it goes on in random directions.

    Args:
        V: the start, `(..., n, b)`.
        blocks: number of blocks kept, `blocks * b <= n`.

    Raises:
        WeightError: a product is not finite (NaN or Inf in `A`, or an overflow).
    """
    width = V.shape[-1]
    P, scale = _scaled(A.matmul(V))
    if blocks == 1:
        return Projection(V, P, scale)
    *batch, m, n = A.shape
    basis = torch.empty(*batch, n, blocks * width, dtype=A.dtype, device=A.device)
    products = torch.empty(*batch, m, blocks * width, dtype=A.dtype, device=A.device)
    basis[..., :width] = V
    products[..., :width] = P
    for start in range(width, blocks * width, width):
        stop = start + width
        Z = A.rmatmul(P / scale)
        block = orthonormalize(Z, against=basis[..., :start], generator=generator)
        basis[..., start:stop] = block
        P = A.matmul(block) / scale
        products[..., start:stop] = P
    return Projection(basis, products, scale)


def leading_triplets(projection: Projection, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of `A V V^T`, `(U, S, Vh)` with `S` descending.

    In float32 the `rank` leading directions are picked by the Gram matrix `P^T P`, whose eigenproblem is
    several times cheaper than an SVD, and then made exact by a QR and a small SVD of `P E` alone. Where the
    Gram matrix would be too coarse for that (`sigma_r < sigma_1 / 100`, or float64) all of `P` takes the
    QR and the SVD.
    """
    V, P, scale = projection
    picked: Tensor | None = None
    if P.dtype != torch.float64:
        eigenvalues, eigenvectors = torch.linalg.eigh(P.mT @ P)
        if bool((eigenvalues[..., -rank] > _GRAM_IS_SAFE**2 * eigenvalues[..., -1]).all()):
            picked = eigenvectors[..., -rank:]
            P = P @ picked
    Q, R = cholesky_qr(P)
    small_U, S, small_Vh = torch.linalg.svd(R.to(torch.float64), full_matrices=False)
    small_V = small_Vh[..., :rank, :].mT.to(P.dtype)
    V = V @ (small_V if picked is None else picked @ small_V)
    return Q @ small_U[..., :rank].to(P.dtype), S[..., :rank].to(P.dtype) * scale.squeeze(-1), V.mT


def _scaled(X: Tensor) -> tuple[Tensor, Tensor]:
    """`X / scale` with `scale = max |x|` of each matrix (1 for zero): squares neither overflow nor vanish."""
    scale = X.abs().amax(dim=(-2, -1), keepdim=True)
    if not bool(scale.isfinite().all()):
        raise WeightError(
            "The matrix contains NaN or Inf, or entries so large that a matrix product overflows in "
            f"{X.dtype}; a decomposition needs finite input."
        )
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return X / scale, scale
