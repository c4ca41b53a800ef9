"""Bases that hold the leading right singular vectors, and the projection onto them.

Block Krylov: from `V_1 = orth(A^T G)`, `G` Gaussian, every `A^T A V_j` extends the basis `V`. All blocks
are kept, so the basis holds every polynomial in `A^T A` applied to the start and not only the last power;
for the same number of passes over `A` the error is far smaller than that of subspace iteration, and the
blocks may be narrower than the rank. The products `P = A V` fall out on the way, `P^T P` is both the
projection of `A^T A` and what the next block has in common with the basis, and the best approximation
within the basis is the SVD of `P` (Rayleigh-Ritz).
Musco & Musco, "Randomized block Krylov methods for stronger and faster approximate SVD" (NeurIPS 2015);
Halko, Martinsson & Tropp, "Finding structure with randomness" (SIAM Review 2011) for subspace iteration.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llmreg.linalg.operators import LinearOperator, ScaledOperator
from llmreg.linalg.orthonormal import cholesky_qr, extend, largest_entry, one_round, orthonormalize
from llmreg.linalg.sketch import gaussian_sketch
from llmreg.linalg.stopping import EnergyStop, Spectrum

__all__ = ["Projection", "krylov_projection", "leading_triplets", "start_block", "subspace_start"]

# Below this ratio sigma_r / sigma_1 a float32 Gram matrix no longer tells the leading vectors apart.
_GRAM_IS_SAFE = 1e-2
# Blocks for which room is made at once.
_GROWTH = 6


class Projection(NamedTuple):
    """`A V = P`: nearly orthonormal `V (..., n, q)`, `P (..., m, q)`, `gram = P^T P` and its spectrum, if known."""

    V: Tensor
    P: Tensor
    gram: Tensor
    spectrum: Spectrum | None = None


def start_block(A: LinearOperator, width: int, generator: torch.Generator) -> tuple[LinearOperator, Tensor]:
    """`orth(A^T G)`, `(..., n, width)`, with a Gaussian `G` that all members of a batch share; one pass.

    Returns:
        `A`, divided by the scale of its entries where squares of them would overflow or vanish, and the block.

    Raises:
        WeightError: the product is not finite (NaN or Inf in `A`, or an overflow).
    """
    sketch = gaussian_sketch(A.shape[-2], width, generator=generator, dtype=A.dtype, device=A.device)
    Z = A.rmatmul(sketch.expand(*A.shape[:-2], *sketch.shape))
    V = one_round(Z)
    if V is not None:
        return A, V
    scale = largest_entry(Z)
    return ScaledOperator(A, scale), orthonormalize(Z / scale, against=None, generator=generator)


def subspace_start(A: LinearOperator, V: Tensor, iterations: int, *, generator: torch.Generator) -> Tensor:
    """Subspace iteration, `V <- orth(A^T orth(A V))` (Halko et al. 2011, algorithm 4.4).

    The inner `orth` is left out as long as `A^T A V` is well conditioned, which is nearly always for a narrow `V`.
    """
    inner = False
    for _ in range(iterations):
        P = A.matmul(V)
        W = None if inner else one_round(A.rmatmul(P))
        if W is None:
            inner = True
            W = _orthonormal(A.rmatmul(_orthonormal(P, generator)), generator)
        V = W
    return V


def _orthonormal(X: Tensor, generator: torch.Generator) -> Tensor:
    Q = one_round(X)
    return orthonormalize(X / largest_entry(X), against=None, generator=generator) if Q is None else Q


def krylov_projection(
    A: LinearOperator, V: Tensor, blocks: int, *, generator: torch.Generator, stop: EnergyStop | None = None
) -> Projection:
    """Grow the basis from a nearly orthonormal start to `blocks * b` columns, in `2 blocks - 1` passes.

    Every block is orthogonalised against the whole basis, so nothing is lost when singular values converge. Where
    the Krylov space is exhausted (low rank) it goes on in random directions.

    Args:
        V: the start, `(..., n, b)`.
        blocks: number of blocks kept, `blocks * b <= n`; fewer when `stop` says so.

    Raises:
        WeightError: a product is not finite (NaN or Inf in `A`, or an overflow).
    """
    width = V.shape[-1]
    P = A.matmul(V)
    basis, products, gram = V[..., :0], P[..., :0], V.new_empty(*V.shape[:-2], 0, 0)
    spectrum: Spectrum | None = None
    for block in range(blocks):
        start, end = block * width, (block + 1) * width
        if block % _GROWTH == 0:
            columns = min(blocks, block + _GROWTH) * width
            basis, products = _with_columns(basis, columns, like=V), _with_columns(products, columns, like=P)
            gram = _with_columns(_with_columns(gram, columns).mT, columns)
        if block:
            V = extend(A.rmatmul(P), basis[..., :start], gram[..., :start, start - width : start], generator=generator)
            P = A.matmul(V)
        basis[..., start:end], products[..., start:end] = V, P
        new = products[..., :end].mT @ P
        gram[..., :end, start:end], gram[..., start:end, :end] = new, new.mT
        known = basis[..., :end], gram[..., :end, :end]
        if stop is not None and end < blocks * width and stop(known[1], partial(ritz_spectrum, *known)):
            spectrum = stop.spectrum
            break
    return Projection(basis[..., :end], products[..., :end], gram[..., :end, :end], spectrum)


def _with_columns(X: Tensor, columns: int, *, like: Tensor | None = None) -> Tensor:
    """A copy of `X (..., m, k)` with room for `columns`, in the memory order of `like`; the new ones hold anything."""
    *batch, rows, known = X.shape
    if like is not None and like.stride(-2) == 1 and rows > 1:
        grown = X.new_empty(*batch, columns, rows).mT
    else:
        grown = X.new_empty(*batch, rows, columns)
    grown[..., :known] = X
    return grown


def ritz_spectrum(V: Tensor, gram: Tensor) -> Spectrum:
    """Ritz values `(..., q)`, ascending, and vectors `E`: `E^T gram E` is diagonal and `V E` orthonormal.

    With `M = V^T V`, near the identity, they are the eigenvectors of `C gram C` times `C = M^{-1/2}`, which three terms
    of its series give to a third of the cube of the distance.
    """
    M = V.mT @ V
    C = M @ M * 0.375 - M * 1.25 if M.ndim > 2 else torch.addmm(M, M, M, beta=-1.25, alpha=0.375)
    C.diagonal(dim1=-2, dim2=-1).add_(1.875)
    values, vectors = torch.linalg.eigh(C @ gram @ C)
    return values, C @ vectors


def leading_triplets(projection: Projection, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of `A` within the span of `V`, `(U, S, Vh)` with `S` descending.

    In float32 the `rank` leading directions are picked by the Gram matrix `P^T P`, whose eigenproblem is several times
    cheaper than an SVD, and then made exact. Where the Gram matrix would be too coarse for that
    (`sigma_r < sigma_1 / 100`, or float64) all of `P` takes a QR and an SVD.
    """
    if projection.P.dtype != torch.float64:
        values, vectors = projection.spectrum or ritz_spectrum(projection.V, projection.gram)
        if bool((values[..., -rank] > _GRAM_IS_SAFE**2 * values[..., -1]).all()):
            return _picked_triplets(projection, values[..., -rank:], vectors[..., -rank:])
    V, R = cholesky_qr(projection.V)
    Q, T = cholesky_qr(torch.linalg.solve_triangular(R, projection.P, upper=True, left=False))
    small_U, S, small_Vh = torch.linalg.svd(T.to(torch.float64), full_matrices=False)
    dtype = Q.dtype
    V = V @ small_Vh[..., :rank, :].mT.to(dtype)
    return Q @ small_U[..., :rank].to(dtype), S[..., :rank].to(dtype), V.mT


def _picked_triplets(projection: Projection, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of `A` within the span of `V E`, for eigenvectors `E` of `P^T P`.

    `Q = P E / sqrt(values)` is close to orthonormal whatever the spread of `values`, and so is `Y = V E = Y' R`. With
    `K = sqrt(values) R^{-1}`, `A Y' = Q K` has the Gram matrix `K^T (Q^T Q) K`, whose eigenvectors, in float64, are the
    right singular vectors within `Y'`.
    """
    lengths = values.sqrt().unsqueeze(-2)
    Q, Y = projection.P @ (vectors / lengths), projection.V @ vectors
    identity = torch.eye(values.shape[-1], dtype=torch.float64, device=Q.device)
    R = torch.linalg.cholesky_ex((Y.mT @ Y).to(torch.float64))[0].mT
    inverse = torch.linalg.solve_triangular(R, identity, upper=True)
    K = lengths.mT * inverse
    squares, turn = torch.linalg.eigh(K.mT @ (Q.mT @ Q).to(torch.float64) @ K)
    squares, turn = squares.flip(-1), turn.flip(-1)
    S = squares.sqrt()
    U = Q @ (K @ turn / S.unsqueeze(-2)).to(Q.dtype)
    return U, S.to(Q.dtype), (Y @ (inverse @ turn).to(Q.dtype)).mT
