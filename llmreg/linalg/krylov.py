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

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from llmreg.errors import WeightError
from llmreg.linalg.operators import LinearOperator
from llmreg.linalg.orthonormal import cholesky_qr, orthonormalize
from llmreg.linalg.sketch import gaussian_sketch

__all__ = ["EnergyStop", "Projection", "krylov_projection", "leading_triplets", "start_block", "subspace_start"]

# Below this ratio sigma_r / sigma_1 a float32 Gram matrix no longer tells the leading vectors apart.
_GRAM_IS_SAFE = 1e-2
# Blocks for which room is made at once.
_GROWTH = 6


class Projection(NamedTuple):
    """`A V = scale P`: orthonormal `V (..., n, q)`, `P (..., m, q)`, `gram = P^T P` and `scale (..., 1, 1)`."""

    V: Tensor
    P: Tensor
    gram: Tensor
    scale: Tensor


class EnergyStop:
    """Says when more blocks would not lower the residual of the best rank-`rank` approximation by much.

    The energy `E_j` captured with j blocks is the sum of the leading `rank` eigenvalues of `P^T P`. What is
    still to come is taken for the geometric series that the last two gains begin, and compared with the
    residual `T_j = ||A||_F^2 - E_j`: stop once `to come / (2 T_j)`, the relative excess of the residual's
    norm, is below `tolerance`. Convergence speeds up, so the true excess is smaller than this.

    Args:
        squared_norm: `||A||_F^2` of each matrix, or None where it is unknown; then the energy of the basis
            beyond `rank` stands for `T_j`, which is too small and so on the safe side.
    """

    def __init__(self, rank: int, tolerance: float, squared_norm: Tensor | None) -> None:
        self._rank = rank
        self._tolerance = tolerance
        self._squared_norms = None if squared_norm is None else squared_norm.reshape(-1).tolist()
        self._energies: list[list[float]] = []

    def __call__(self, gram: Tensor, scale: Tensor) -> bool:
        """Whether to stop with the blocks whose Gram matrix, divided by `scale^2`, this is."""
        columns = gram.shape[-1]
        if columns <= self._rank:
            self._energies.append(gram.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1).tolist())
            return False
        # Numbers, not tensors: a dozen operations on a handful of values, and one transfer from a device.
        spectra = torch.linalg.eigvalsh(gram).reshape(-1, columns).tolist()
        self._energies.append([sum(values[-self._rank :]) for values in spectra])
        if len(self._energies) < 3:
            return False
        rest = [sum(values[: -self._rank]) for values in spectra]
        if self._squared_norms is not None:
            squares = [value**2 for value in scale.reshape(-1).tolist()]
            left = [n / s - e for n, s, e in zip(self._squared_norms, squares, self._energies[-1], strict=True)]
            rest = [max(a, b) if math.isfinite(b) else a for a, b in zip(rest, left, strict=True)]
        noise = 4 * torch.finfo(gram.dtype).eps
        return all(
            last - middle <= noise * last or _geometric_rest(first, middle, last) < 2 * self._tolerance * tail
            for first, middle, last, tail in zip(*self._energies[-3:], rest, strict=True)
        )


def _geometric_rest(first: float, middle: float, last: float) -> float:
    """What a sequence still gains if its gains go on shrinking as they did."""
    ratio = min((last - middle) / max(middle - first, sys.float_info.min), 0.95)
    return (last - middle) * ratio / (1 - ratio)


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


def krylov_projection(
    A: LinearOperator, V: Tensor, blocks: int, *, generator: torch.Generator, stop: EnergyStop | None = None
) -> Projection:
    """Grow the basis from an orthonormal start to `blocks * b` columns, in `2 blocks - 1` passes.

    The basis is orthogonalised in full, twice, so nothing is lost when singular values converge. Where the
    Krylov space is exhausted (low rank) it goes on in random directions.

    Args:
        V: the start, `(..., n, b)`.
        blocks: number of blocks kept, `blocks * b <= n`; fewer when `stop` says so.

    Raises:
        WeightError: a product is not finite (NaN or Inf in `A`, or an overflow).
    """
    width = V.shape[-1]
    *batch, m, n = A.shape
    P, scale = _scaled(A.matmul(V))
    basis, products, gram = V.new_empty(*batch, n, 0), V.new_empty(*batch, m, 0), V.new_empty(*batch, 0, 0)
    for block in range(blocks):
        start, end = block * width, (block + 1) * width
        if block % _GROWTH == 0:
            columns = min(blocks, block + _GROWTH) * width
            basis, products = _with_columns(basis, columns), _with_columns(products, columns)
            gram = _with_columns(_with_columns(gram, columns).mT, columns)
        if block:
            V = orthonormalize(A.rmatmul(P / scale), against=basis[..., :start], generator=generator)
            P = A.matmul(V) / scale
        basis[..., start:end], products[..., start:end] = V, P
        new = products[..., :end].mT @ P
        gram[..., :end, start:end], gram[..., start:end, :end] = new, new.mT
        if stop is not None and end < blocks * width and stop(gram[..., :end, :end], scale):
            break
    return Projection(basis[..., :end], products[..., :end], gram[..., :end, :end], scale)


def _with_columns(X: Tensor, columns: int) -> Tensor:
    """A copy of `X (..., m, k)` with room for `columns`; the new ones are not initialised."""
    grown = X.new_empty(*X.shape[:-1], columns)
    grown[..., : X.shape[-1]] = X
    return grown


def leading_triplets(projection: Projection, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of `A V V^T`, `(U, S, Vh)` with `S` descending.

    In float32 the `rank` leading directions are picked by the Gram matrix `P^T P`, whose eigenproblem is
    several times cheaper than an SVD, and then made exact by a QR and a small SVD of `P E` alone. Where the
    Gram matrix would be too coarse for that (`sigma_r < sigma_1 / 100`, or float64) all of `P` takes the
    QR and the SVD.
    """
    V, P, gram, scale = projection
    picked: Tensor | None = None
    if P.dtype != torch.float64:
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
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
