"""The damped second moment that CorDA multiplies a weight by and divides it by again.

`C_f = C + d mean(diag C) I` (Yang et al. 2024, arXiv 2406.05223; in the reference implementation): `d` starts at 0.01
and doubles until `||C_f inv(C_f) - I||_F < 0.05`. No inverse is formed: an exact `C` is solved with by its Cholesky
factor, a sketch `C ~ F F^T` in the eigenvectors of the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import RecipeError, WeightError
from ..linalg import LinearOperator, ProductOperator, gaussian_sketch, make_generator
from ..linalg.operators import compute_matrix
from .second_moment import SecondMoment, as_second_moment

__all__ = ["DampedMoment", "LowRankDampedMoment", "damp"]

_MAX_DOUBLINGS = 30
_INVERSE_ERROR = 0.05
_PROBES = 16
# `||C_f X - I||_F` of a computed inverse was at most 6 eps ||C||_F / shift over spectra from flat to one massive
# direction; below this multiple of it the inverse needs no test.
_ERROR_BOUND = 8


@dataclass(frozen=True)
class DampedMoment:
    """`C_f = C + shift I` as a matrix `(..., in, in)`, and its lower Cholesky factor `L`, `C_f = L L^T`.

    What a weight is multiplied by is `M`: `C_f` for power 1, `L` for power 0.5.
    """

    matrix: Tensor
    known_cholesky: Tensor | None = None

    @property
    def width(self) -> int:
        return self.matrix.shape[-1]

    @cached_property
    def cholesky(self) -> Tensor:
        """`L` `(..., in, in)`, computed when it is first needed; the paper's largest components never ask for it."""
        if self.known_cholesky is not None:
            return self.known_cholesky
        L, failed = torch.linalg.cholesky_ex(self.matrix)
        if bool(failed.any()):
            raise WeightError("The damped second moment is not positive definite. Calibrate again.")
        return L

    def like(self, W: Tensor) -> DampedMoment:
        """The same in the dtype and on the device of `W`; the factor is computed in the dtype that it had."""
        if (self.matrix.dtype, self.matrix.device) == (W.dtype, W.device):
            return self
        return DampedMoment(self.matrix.to(W), self.cholesky.to(W))

    def weighted(self, W: Tensor, power: float) -> LinearOperator:
        """`W M` `(..., out, in)`, not formed."""
        return self.factors(W, power)

    def factors(self, W: Tensor, power: float) -> ProductOperator:
        """`W M` as its two factors."""
        M = self.matrix if power == 1 else self.cholesky
        return ProductOperator(W, M.expand(*W.shape[:-2], *M.shape[-2:]))

    def unweighted(self, Vh: Tensor, power: float) -> Tensor:
        """`Vh M^{-1}` `(..., r, in)` by triangular solves."""
        if power == 1:
            Vh = torch.linalg.solve_triangular(self.cholesky.mT, Vh, upper=True, left=False)
        return torch.linalg.solve_triangular(self.cholesky, Vh, upper=False, left=False)


@dataclass(frozen=True)
class LowRankDampedMoment:
    """`C_f = basis diag(values) basis^T + shift I`, every power of it in `O(in k)` a column.

    Attributes:
        basis: `(..., in, k)`, orthonormal columns.
        values: `(..., k)`, eigenvalues of the sketch.
        shift: `(..., 1, 1)`.
    """

    basis: Tensor
    values: Tensor
    shift: Tensor

    @property
    def width(self) -> int:
        return self.basis.shape[-2]

    def like(self, W: Tensor) -> LowRankDampedMoment:
        """The same in the dtype and on the device of `W`."""
        return LowRankDampedMoment(self.basis.to(W), self.values.to(W), self.shift.to(W))

    def apply(self, X: Tensor, power: float) -> Tensor:
        """`C_f^power X`, `(..., in, n)`; for -1 this is Woodbury's identity in the eigenvectors of the sketch."""
        inside = self.basis.mT @ X
        outside = X - self.basis @ inside
        scaled = (self.values.unsqueeze(-1) + self.shift) ** power * inside
        return torch.add(self.basis @ scaled, outside * self.shift**power)

    def weighted(self, W: Tensor, power: float) -> LinearOperator:
        """`W C_f^power` `(..., out, in)`, not formed."""
        return _WeightedOperator(W, self, power)

    def factors(self, W: Tensor, power: float) -> ProductOperator:
        """`W M` as two matrices, the second `(..., in, in)`: inverse iteration solves with both of them."""
        eye = torch.eye(self.width, dtype=W.dtype, device=W.device)
        M = self.apply(eye, power)
        return ProductOperator(W, M.expand(*W.shape[:-2], *M.shape[-2:]))

    def unweighted(self, Vh: Tensor, power: float) -> Tensor:
        """`Vh C_f^{-power}` `(..., r, in)`."""
        return self.apply(Vh.mT, -power).mT


class _WeightedOperator:
    """`W C_f^power` for a low-rank damped moment; a `LinearOperator`."""

    def __init__(self, W: Tensor, moment: LowRankDampedMoment, power: float) -> None:
        self._W, self._moment, self._power = W, moment, power
        self.shape, self.dtype, self.device = W.shape, W.dtype, W.device

    def matmul(self, X: Tensor) -> Tensor:
        return self._W @ self._moment.apply(X, self._power)

    def rmatmul(self, Y: Tensor) -> Tensor:
        return self._moment.apply((Y.mT @ self._W).mT, self._power)

    def dense(self) -> Tensor:
        return self._moment.apply(self._W.mT, self._power).mT

    def squared_norm(self) -> Tensor | None:
        return None


def damp(
    second_moment: Tensor | SecondMoment,
    damping: float = 0.01,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
) -> DampedMoment | LowRankDampedMoment:
    """`C_f = C + d mean(diag C) I`, with what applies and inverts it; layers that share an input can share it.

    `d` starts at `damping` and doubles, 30 times at most, until `||C_f X - I||_F < 0.05` for the computed inverse `X`.
    Where `||C||_F / shift` bounds that, nothing is factored; else the norm is estimated from 16 random columns (its
    square without bias), so that no inverse is formed. On the border it may stop one doubling apart from the
    reference. A sketch with `2 k >= in` is multiplied out.

    Args:
        second_moment: `(..., in, in)` or a `SecondMoment`; leading dimensions are a batch, each damped on its own.
        damping: the first `d > 0`, relative to the mean of the diagonal.
        dtype: of the computation: None takes float64 for a float64 moment and float32 for all others.
        device: None stays where the moment is.
        overwrite: the matrix may be damped in place, which spares a copy; `second_moment` must not be used afterwards.

    Raises:
        RecipeError: `damping` is not positive and finite.
        WeightError: NaN or Inf, not symmetric, zero (no token reached the layer), or no `d` made it invertible.

    Source: CorDA, arXiv 2406.05223; the doubling is the reference implementation's.
    """
    if not 0 < damping < float("inf"):
        raise RecipeError(f"damping is {damping}; a positive number is expected (the paper's start is 0.01).")
    moment = as_second_moment(second_moment)
    values = compute_matrix(moment.values, "second moment").to(device=device, dtype=dtype)
    mean = (moment.total() / moment.width).to(values.device)
    if not bool((mean > 0).all()):
        raise WeightError(
            "The second moment of the layer's inputs is zero (or its diagonal negative): no token reached the layer. "
            "Calibrate on more data, or leave the layer out of target_modules."
        )
    mean = mean.to(values.dtype)[..., None, None]
    if moment.factor is not None and 2 * values.shape[-1] < values.shape[-2]:
        return _damp_low_rank(values, mean, damping)
    if moment.factor is not None:
        values = values @ values.mT
    else:
        _check_symmetric(values)
    rounding = max(torch.finfo(dtype).eps for dtype in (moment.values.dtype, values.dtype))
    is_own = overwrite or values.data_ptr() != moment.values.data_ptr()
    return _damp_dense(values if is_own else values.clone(), mean, damping, rounding)


def _check_symmetric(C: Tensor) -> None:
    """By two products with one random vector: reading a large matrix along both its sides takes longer than those."""
    Z = _probes(C)[..., :1]
    right, left = C @ Z, (Z.mT @ C).mT
    if bool((right - left).abs().amax() > 1e-3 * right.abs().amax()):
        raise WeightError("The second moment is not symmetric; E[x x^T] over the layer's inputs is expected.")


def _damp_dense(C: Tensor, mean: Tensor, damping: float, rounding: float) -> DampedMoment:
    """Of `C`, in place."""
    shift = mean.expand(*C.shape[:-2], 1, 1) * damping
    diagonal = C.diagonal(dim1=-2, dim2=-1)
    undamped = diagonal.clone()
    size = torch.linalg.matrix_norm(C)[..., None, None]
    if bool((_ERROR_BOUND * rounding * size < _INVERSE_ERROR * shift).all()):
        diagonal.add_(shift.squeeze(-1))
        return DampedMoment(C)
    Z = _probes(C)
    for _ in range(_MAX_DOUBLINGS + 1):
        torch.add(undamped, shift.squeeze(-1), out=diagonal)
        L, failed = torch.linalg.cholesky_ex(C)
        settled = (failed == 0) & _is_inverse(C @ torch.cholesky_solve(Z.expand(*L.shape[:-1], _PROBES), L), Z)
        if bool(settled.all()):
            return DampedMoment(C, L)
        shift = torch.where(settled[..., None, None], shift, 2 * shift)
    raise _not_invertible(damping)


def _damp_low_rank(F: Tensor, mean: Tensor, damping: float) -> LowRankDampedMoment:
    Q, R = torch.linalg.qr(F)
    values, vectors = torch.linalg.eigh((R @ R.mT).to(torch.float64))
    basis, values = Q @ vectors.to(F.dtype), values.clamp_min(0).to(F.dtype)
    shift = mean.expand(*F.shape[:-2], 1, 1) * damping
    Z = _probes(F)
    for _ in range(_MAX_DOUBLINGS + 1):
        damped = LowRankDampedMoment(basis, values, shift)
        settled = _is_inverse(damped.apply(damped.apply(Z, -1), 1), Z)
        if bool(settled.all()):
            return damped
        shift = torch.where(settled[..., None, None], shift, 2 * shift)
    raise _not_invertible(damping)


def _probes(like: Tensor) -> Tensor:
    return gaussian_sketch(like.shape[-2], _PROBES, generator=make_generator(0), dtype=like.dtype, device=like.device)


def _is_inverse(product: Tensor, Z: Tensor) -> Tensor:
    """Whether `||C_f X - I||_F < 0.05`, from `product = C_f X Z`: `E |E z|^2 = ||E||_F^2`. NaN answers no."""
    return torch.linalg.vector_norm(product - Z, dim=(-2, -1)) < _INVERSE_ERROR * _PROBES**0.5


def _not_invertible(damping: float) -> WeightError:
    return WeightError(
        f"The second moment stayed singular after its damping was doubled {_MAX_DOUBLINGS} times from {damping}; it is "
        "not positive semidefinite. Calibrate again."
    )
