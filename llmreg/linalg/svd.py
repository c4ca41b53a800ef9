"""Truncated singular value decomposition, exact or randomised: `W ~ U diag(S) Vh`.

The randomised route never forms more than bases of a few times `rank` columns, draws from its own
generator and returns the same bits for the same seed; the exact route is LAPACK's or cuSOLVER's. Both fix
the signs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmreg.errors import UnsupportedError, WeightError
from llmreg.linalg.krylov import krylov_projection, leading_triplets, start_block, subspace_start
from llmreg.linalg.operators import LinearOperator, ScaledOperator, TransposedOperator, as_operator, is_finite
from llmreg.linalg.signs import fix_signs
from llmreg.linalg.sketch import make_generator
from llmreg.linalg.stopping import EnergyStop

__all__ = ["SketchPlan", "check_rank", "exact_svd", "plan_sketch", "truncated_svd"]

Method = Literal["randomized", "krylov", "subspace", "exact"]
Triplets = tuple[Tensor, Tensor, Tensor]
# Up to this size a full SVD costs about as much as a basis that nearly fills the matrix.
_SMALL = 256
_MOST_BLOCKS = 12
# Up to this size estimating the residual costs more than the blocks it could save, and an eigenproblem as much as
# several products: the first blocks, which tell least, are not kept.
_UNTESTED, _UNTESTED_POWERS, _UNTESTED_BLOCKS = 512, 2, 4
_TOLERANCE = 3e-4
_METHODS = ("randomized", "krylov", "subspace", "exact")


class SketchPlan(NamedTuple):
    """`width` random vectors, `power_iterations` that keep the last power, then `blocks` that are all kept.

    With a `tolerance` the blocks end as soon as the residual is estimated to be within it of the optimum.
    """

    width: int
    power_iterations: int
    blocks: int
    tolerance: float | None = None

    @property
    def columns(self) -> int:
        """Columns of the basis onto which the matrix is projected, at most."""
        return self.width * self.blocks

    @property
    def passes(self) -> int:
        """Multiplications by the matrix or its transpose, at most."""
        return 2 * (self.power_iterations + self.blocks)


def plan_sketch(
    rank: int,
    *,
    oversample: int | None = None,
    power_iterations: int | None = None,
    method: Literal["krylov", "subspace"] = "krylov",
) -> SketchPlan:
    """The sketch that `truncated_svd` uses for these arguments, if the matrix is large enough for it.

    `subspace` is the textbook method: `rank + oversample` columns and only the last power, which makes
    the final eigenproblem small. `krylov` keeps every power; with neither argument given its blocks are
    about as wide as the rank up to 32, half as wide above (at least 16 columns), and as many are made as
    the spectrum needs to bring the residual within 3e-4 of the optimum (`EnergyStop`), 12 at most (a matrix
    whose shorter side is at most 512 gets 2 power iterations and then 4, without an estimate); else
    there are `power_iterations + 1` of them with `rank + oversample` columns.
    Where an argument is missing it is `max(16, rank / 2)` and 4.
    """
    if method == "krylov" and oversample is None and power_iterations is None:
        width = max(16, _round_up(rank if rank <= 32 else -(-rank // 2)))
        return SketchPlan(width, power_iterations=0, blocks=_MOST_BLOCKS, tolerance=_TOLERANCE)
    width = rank + (max(16, -(-rank // 2)) if oversample is None else oversample)
    iterations = 4 if power_iterations is None else power_iterations
    if method == "krylov":
        return SketchPlan(width=width, power_iterations=0, blocks=iterations + 1)
    return SketchPlan(width=width, power_iterations=iterations, blocks=1)


def _round_up(columns: int) -> int:
    """To a multiple of 8: odd widths cost matrix products as much as the next multiple."""
    return -(-columns // 8) * 8


def _fit(plan: SketchPlan, limit: int, rank: int) -> SketchPlan | None:
    """The plan for a matrix whose shorter side is `limit`; None where an exact SVD is the better choice.

    A basis must hold `rank` columns and be narrower than the matrix. Blocks that do not fit become power
    iterations, so that the number of passes stays; a plan that ends by its tolerance only counts on half.
    """
    if plan.columns < limit:
        return plan
    blocks = (limit - 1) // plan.width
    if blocks * plan.width < rank:
        return None
    lost = (plan.blocks if plan.tolerance is None else plan.blocks // 2) - blocks
    if lost > 0 and limit <= _SMALL:
        return None
    return plan._replace(power_iterations=plan.power_iterations + max(0, lost), blocks=blocks)


def truncated_svd(
    W: Tensor | LinearOperator,
    rank: int,
    *,
    method: Method = "randomized",
    oversample: int | None = None,
    power_iterations: int | None = None,
    seed: int = 0,
) -> Triplets:
    """The leading `rank` singular triplets, `W ~ U diag(S) Vh`.

    Args:
        W: `(..., m, n)` tensor (float64, float32, or half precision, which is computed in float32), or
            a `LinearOperator` such as `ProductOperator(W, C)`. Leading dimensions are a batch.
        rank: `1 <= rank <= min(m, n)`.
        method: `randomized` is `krylov` on a CPU and `subspace` elsewhere, where small eigenproblems are
            dear and products cheap. `exact` is a full SVD, cut. A sketch that would not be narrower than
            the matrix is replaced by `exact`.
        oversample: random vectors beyond `rank`; None chooses (`plan_sketch`).
        power_iterations: products with `W^T W` after the first with `W`; None chooses.
        seed: of the sketch. The global random state is neither read nor changed.

    Returns:
        `U (..., m, rank)`, `S (..., rank)` descending and `Vh (..., rank, n)` in the compute dtype, on the
        device of `W`. `U` and `Vh` are orthonormal also where the matrix has a lower rank (`S` is zero
        there, to rounding), and the largest-magnitude entry of each left vector is positive.

    Raises:
        UnsupportedError: not a dense real floating-point matrix, or an unknown method.
        WeightError: NaN or Inf in `W`, an empty matrix, or a rank outside `1 ... min(m, n)`.

    Source: Musco & Musco 2015 (block Krylov); Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1.

    Example:
        >>> W = torch.diag(0.5 ** torch.arange(600))
        >>> U, S, Vh = truncated_svd(W, rank=2)
        >>> [round(value, 5) for value in S.tolist()], tuple(U.shape), tuple(Vh.shape)
        ([1.0, 0.5], (600, 2), (2, 600))
    """
    A = as_operator(W)
    check_rank(rank, A.shape)
    _check_options(method, oversample, power_iterations)
    if method == "randomized":
        method = "krylov" if A.device.type == "cpu" else "subspace"
    if method != "exact":
        plan = plan_sketch(rank, oversample=oversample, power_iterations=power_iterations, method=method)
        if plan.tolerance is not None and min(A.shape[-2:]) <= _UNTESTED:
            plan = plan._replace(power_iterations=_UNTESTED_POWERS, blocks=_UNTESTED_BLOCKS, tolerance=None)
        fitted = _fit(plan, min(A.shape[-2:]), rank)
        if fitted is not None:
            return _randomized_svd(A, rank, fitted, seed)
    U, S, Vh = exact_svd(A.dense())
    U, Vh = fix_signs(U[..., :rank], Vh[..., :rank, :])
    return U, S[..., :rank].clone(), Vh


def _randomized_svd(A: LinearOperator, rank: int, plan: SketchPlan, seed: int) -> Triplets:
    """`truncated_svd` by a sketch; the bases start on the shorter side of `A`."""
    is_wide = A.shape[-2] < A.shape[-1]
    tall: LinearOperator = TransposedOperator(A) if is_wide else A
    generator = make_generator(seed)
    tall, V = start_block(tall, plan.width, generator)
    V = subspace_start(tall, V, plan.power_iterations, generator=generator)
    stop = None if plan.tolerance is None else EnergyStop(rank, plan.tolerance, tall.squared_norm())
    projection = krylov_projection(tall, V, plan.blocks, generator=generator, stop=stop)
    U, S, Vh = leading_triplets(projection, rank)
    if isinstance(tall, ScaledOperator):
        S = S * tall.scale.squeeze(-1)
    if is_wide:
        U, Vh = Vh.mT, U.mT
    U, Vh = fix_signs(U, Vh)
    return U.contiguous(), S, Vh.contiguous()


def exact_svd(W: Tensor) -> Triplets:
    """Thin SVD `(U, S, Vh)` of float32 or float64 matrices; signs as the library chose them.

    Raises:
        WeightError: NaN or Inf in `W`.
    """
    if not is_finite(W):
        raise WeightError("The matrix contains NaN or Inf; a singular value decomposition needs finite input.")
    try:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer can stop on clustered singular values in float32; float64 then gets through.
        U, S, Vh = (part.to(W.dtype) for part in torch.linalg.svd(W.to(torch.float64), full_matrices=False))
    return U, S, Vh


def check_rank(rank: int, shape: torch.Size) -> None:
    """Raise `WeightError` unless `1 <= rank <= min(m, n)` for a matrix of this shape."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise WeightError(f"rank is {rank!r}; an integer is expected.")
    if 0 in shape:
        raise WeightError(f"The matrix has shape {tuple(shape)} and holds nothing to decompose.")
    limit = min(shape[-2:])
    if not 1 <= rank <= limit:
        raise WeightError(
            f"rank {rank} does not fit a matrix of shape {tuple(shape)}; choose a rank from 1 to {limit}."
        )


def _check_options(method: str, oversample: int | None, power_iterations: int | None) -> None:
    if method not in _METHODS:
        raise UnsupportedError(f"method is {method!r}; choose one of {', '.join(map(repr, _METHODS))}.")
    for name, value in (("oversample", oversample), ("power_iterations", power_iterations)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UnsupportedError(f"{name} is {value!r}; an integer of at least 0, or None, is expected.")
