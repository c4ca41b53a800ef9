"""The smallest singular triplets of a matrix or of a product, by inverse iteration.

Subtracting the large components leaves the small ones drowned in rounding, and the Gram matrix squares the
condition number. Here the factors are reduced by QR to triangles, `F1 F2 = Q R1 R2` (the product of the
triangles is never formed), and the block Krylov method runs on `(R1 R2)^{-T}`, applied by triangular solves:
its largest components are the smallest of the product. Golub & Van Loan, "Matrix Computations" (4th ed.),
section 8.6 (inverse iteration) and Musco & Musco 2015; CorDA's knowledge-preserved mode needs them (Yang et
al. 2024, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmreg.errors import UnsupportedError, WeightError
from llmreg.linalg.krylov import krylov_projection, start_block
from llmreg.linalg.operators import InverseProductOperator, ProductOperator, TransposedOperator
from llmreg.linalg.orthonormal import cholesky_qr
from llmreg.linalg.signs import fix_signs
from llmreg.linalg.sketch import make_generator
from llmreg.linalg.svd import Triplets, check_rank

__all__ = ["smallest_svd"]

_BLOCKS = 6


def smallest_svd(W: Tensor | ProductOperator, rank: int, *, seed: int = 0) -> Triplets:
    """The smallest `rank` of the `min(m, n)` singular triplets: the tail of a full SVD.

    Args:
        W: `(..., m, n)` tensor, or `ProductOperator(W, C)` whose inner dimensions are at least
            `min(m, n)`. Half precision is computed in float32.
        rank: `1 <= rank <= min(m, n)`.
        seed: of the random start; the global random state is neither read nor changed.

    Returns:
        `U (..., m, rank)`, `S (..., rank)` descending (the smallest comes last) and `Vh (..., rank, n)`.
        Values are accurate to rounding of the largest singular value, vectors too where the tail is
        separated from the rest; in a flat tail, vectors of neighbouring values mix. Where the matrix is
        rank-deficient by more than `rank`, the triplets are some of the null space's.

    Memory: QR needs an orthonormal copy of each factor in turn, and one triangle `(..., k, k)` with
    `k = min(m, n)` for each factor stays.

    Raises:
        UnsupportedError: not a dense real floating-point matrix, or an inner dimension below `min(m, n)`.
        WeightError: NaN or Inf, an empty matrix, or a rank outside `1 ... min(m, n)`.
    """
    product = W if isinstance(W, ProductOperator) else ProductOperator(W)
    check_rank(rank, product.shape)
    factors = product.factors
    is_wide = product.shape[-2] < product.shape[-1]
    if is_wide:
        factors = [factor.mT for factor in reversed(factors)]
    Q, triangles, scale = _product_qr(factors)
    U, S, V = _smallest_of_triangles(triangles, rank, seed)
    U = Q @ U
    if is_wide:
        U, V = V, U
    U, Vh = fix_signs(U, V.mT)
    return U.contiguous(), S * scale, Vh.contiguous()


def _product_qr(factors: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """`F1 ... Fk = scale Q R1 ... Rk`: `Q (..., m, n)`, upper triangles with largest entry 1, `scale (..., 1)`."""
    n = factors[-1].shape[-1]
    narrowest = min(factor.shape[-2] for factor in factors)
    if narrowest < n:
        raise UnsupportedError(
            f"The product passes through {narrowest} dimensions and has {n} on its shorter side, so its smallest "
            "singular values are all zero; inner dimensions of at least that size are expected."
        )
    triangles: list[Tensor] = []
    Q: Tensor | None = None
    scale = factors[0].new_ones(*factors[0].shape[:-2], 1, 1)
    for factor in reversed(factors):
        Q, R = torch.linalg.qr(factor if Q is None else factor @ Q)
        size = R.abs().amax(dim=(-2, -1), keepdim=True)
        if not bool(size.isfinite().all()):
            raise WeightError("A factor contains NaN or Inf; a decomposition needs finite input.")
        size = torch.where(size > 0, size, torch.ones_like(size))
        triangles.insert(0, R / size)
        scale = scale * size
    assert Q is not None
    return Q, triangles, scale.squeeze(-1)


def _smallest_of_triangles(triangles: list[Tensor], rank: int, seed: int) -> Triplets:
    """`(U, S, V)`, the smallest triplets of `K = R1 ... Rk`, `V` in columns."""
    n = triangles[0].shape[-1]
    width = max(16, rank + rank // 4)
    if width * _BLOCKS >= n:
        return _exact_tail(triangles, rank)
    inverse = TransposedOperator(InverseProductOperator([_without_zeros(R) for R in triangles]))
    generator = make_generator(seed)
    try:
        basis = krylov_projection(*start_block(inverse, width, generator), _BLOCKS, generator=generator).V
    except WeightError:  # the input is finite, so a solve overflowed: too singular even for inverse iteration
        return _exact_tail(triangles, rank)
    if not bool(basis.isfinite().all()):
        return _exact_tail(triangles, rank)
    basis, _ = cholesky_qr(basis)
    V = basis @ _tail_of(_apply(triangles, basis), rank)
    # K v loses the direction of u where sigma is near rounding, and K^{-T} v is nothing but u there; the
    # smallest goes first, so that QR takes its share out of the others.
    U, _ = torch.linalg.qr(inverse.matmul(V.flip(-1)))
    left, S, right_h = _svd64(U.mT @ _apply(triangles, V))
    return U @ left, S, V @ right_h.mT


def _exact_tail(triangles: list[Tensor], rank: int) -> Triplets:
    K = _apply([R.to(torch.float64) for R in triangles[:-1]], triangles[-1].to(torch.float64))
    U, S, Vh = torch.linalg.svd(K)
    dtype = triangles[0].dtype
    return U[..., -rank:].to(dtype), S[..., -rank:].to(dtype), Vh[..., -rank:, :].mT.to(dtype)


def _tail_of(P: Tensor, rank: int) -> Tensor:
    """The right singular vectors `(..., q, rank)` of the smallest singular values of `P (..., n, q)`."""
    return _svd64(torch.linalg.qr(P, mode="r").R)[2][..., -rank:, :].mT


def _svd64(B: Tensor) -> Triplets:
    """SVD of a small matrix, computed in float64 and returned in the dtype of `B`."""
    U, S, Vh = torch.linalg.svd(B.to(torch.float64), full_matrices=False)
    return U.to(B.dtype), S.to(B.dtype), Vh.to(B.dtype)


def _apply(triangles: list[Tensor], X: Tensor) -> Tensor:
    for R in reversed(triangles):
        X = R @ X
    return X


def _without_zeros(R: Tensor) -> Tensor:
    """`R` with a diagonal of at least `16 eps`: a change within rounding (entries are at most 1)."""
    floor = 16 * torch.finfo(R.dtype).eps
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    safe = torch.where(diagonal < 0, diagonal.clamp_max(-floor), diagonal.clamp_min(floor))
    return R + torch.diag_embed(safe - diagonal)
