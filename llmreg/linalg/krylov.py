"""Orthonormal bases that hold the leading singular vectors, and the projection onto them.

Block Golub-Kahan: from a random block `V1`, every product `A V_j` extends the left basis `U` and every
`A^T U_j` the right basis `V`. All blocks are kept, so the basis holds every polynomial in `A^T A` applied
to the start and not only the last power; for the same number of passes over `A` the error is far smaller
than that of subspace iteration, and the blocks may be narrower than the rank.
Musco & Musco, "Randomized block Krylov methods for stronger and faster approximate SVD" (NeurIPS 2015);
Golub, Luk & Overton, "A block Lanczos method for computing the singular values ..." (TOMS 1981);
Halko, Martinsson & Tropp, "Finding structure with randomness" (SIAM Review 2011) for subspace iteration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmreg.errors import WeightError
from llmreg.linalg.operators import LinearOperator
from llmreg.linalg.orthonormal import orthonormalize
from llmreg.linalg.sketch import gaussian_sketch

__all__ = ["Projection", "golub_kahan", "leading_triplets", "subspace_start"]

# Below this ratio sigma_r / sigma_1 the eigenproblem of B^T B in float64 would cost float32 digits.
_GRAM_IS_SAFE = 1e-4


class Projection(NamedTuple):
    """`A V = scale U B` with orthonormal `U (..., m, q)`, `V (..., n, q)`, and small `B (..., q, q)`."""

    U: Tensor
    B: Tensor
    V: Tensor
    scale: Tensor


def start_block(A: LinearOperator, width: int, generator: torch.Generator) -> Tensor:
    """An orthonormal random `(..., n, width)` start, the same one for every member of a batch."""
    sketch = gaussian_sketch(A.shape[-1], width, generator=generator, dtype=A.dtype, device=A.device)
    V = orthonormalize(sketch, against=None, generator=generator)
    return V.expand(*A.shape[:-2], *V.shape)


def subspace_start(A: LinearOperator, V: Tensor, iterations: int, *, generator: torch.Generator) -> Tensor:
    """Subspace iteration, `V <- orth(A^T orth(A V))` (Halko et al. 2011, algorithm 4.4)."""
    for _ in range(iterations):
        P, _ = _scaled(A.matmul(V))
        U = orthonormalize(P, against=None, generator=generator)
        Z, _ = _scaled(A.rmatmul(U))
        V = orthonormalize(Z, against=None, generator=generator)
    return V


def golub_kahan(A: LinearOperator, V: Tensor, blocks: int, *, generator: torch.Generator) -> Projection:
    """Grow the bases from an orthonormal start to `blocks * b` columns, in `2 blocks - 1` passes.

    Both bases are orthogonalised in full, twice, so nothing is lost when singular values converge. Where the
    Krylov space is exhausted (low rank) it goes on in random directions.

    Args:
        V: the start, `(..., n, b)`.
        blocks: number of blocks kept, `blocks * b <= min(m, n)`.

    Raises:
        WeightError: a product is not finite (NaN or Inf in `A`, or an overflow).
    """
    width = V.shape[-1]
    size = blocks * width
    batch = A.shape[:-2]
    left = torch.empty(*batch, A.shape[-2], size, dtype=A.dtype, device=A.device)
    right = torch.empty(*batch, A.shape[-1], size, dtype=A.dtype, device=A.device)
    B = torch.zeros(*batch, size, size, dtype=A.dtype, device=A.device)
    scale = torch.ones(*batch, 1, 1, dtype=A.dtype, device=A.device)
    right[..., :width] = V
    for start in range(0, size, width):
        stop = start + width
        P = A.matmul(right[..., start:stop])
        if start == 0:
            P, scale = _scaled(P)
        else:
            P = P / scale
        known = left[..., :start] if start else None
        left[..., start:stop] = orthonormalize(P, against=known, generator=generator)
        B[..., :stop, start:stop] = left[..., :stop].mT @ P
        if stop < size:
            Z = A.rmatmul(left[..., start:stop]) / scale
            right[..., stop : stop + width] = orthonormalize(Z, against=right[..., :stop], generator=generator)
    return Projection(left, B, right, scale)


def leading_triplets(projection: Projection, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of the projected matrix, `(U, S, Vh)` with `S` descending."""
    small_U, S, small_V = _small_svd(projection.B, rank)
    U = projection.U @ small_U
    Vh = small_V.mT @ projection.V.mT
    return U, S * projection.scale.squeeze(-1), Vh


def _small_svd(B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(U_r, S_r, V_r)` of small square matrices, `V_r` in columns, in the dtype of `B`.

    For float32 the eigenproblem of `B^T B` in float64 keeps all digits while `sigma_r > 1e-4 sigma_1`, and is
    several times faster than an SVD.
    """
    wide = B.to(torch.float64)
    if B.dtype != torch.float64:
        eigenvalues, eigenvectors = torch.linalg.eigh(wide.mT @ wide)
        squares = eigenvalues[..., -rank:].flip(-1)
        if bool((squares[..., -1] > _GRAM_IS_SAFE**2 * squares[..., 0]).all()):
            V = eigenvectors[..., -rank:].flip(-1)
            S = squares.sqrt()
            U = (wide @ V) / S.unsqueeze(-2)
            return U.to(B.dtype), S.to(B.dtype), V.to(B.dtype)
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    return U[..., :rank].to(B.dtype), S[..., :rank].to(B.dtype), Vh[..., :rank, :].mT.to(B.dtype)


def _scaled(X: Tensor) -> tuple[Tensor, Tensor]:
    """`X / scale` with `scale = max |x|` of each matrix (1 for zero): squares neither overflow nor vanish."""
    scale = X.abs().amax(dim=(-2, -1), keepdim=True)
    if not bool(scale.isfinite().all()):
        raise WeightError(
            "The matrix contains NaN or Inf, or entries so large that a matrix product overflows in "
            f"{X.dtype}; a singular value decomposition needs finite input."
        )
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return X / scale, scale
