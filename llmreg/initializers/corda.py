"""CorDA: context-oriented decomposition adaptation (Yang et al. 2024, arXiv 2406.05223, section 3).

With the damped second moment `C_f` of the layer's inputs (see `damping`) and `W C_f = U diag(S) V^T`,

    B0 = U_r sqrt(S_r / s)        A0 = sqrt(S_r / s) V_r^T C_f^{-1}        so that   s B0 A0 = U_r U_r^T W,

for the largest `r` components (instruction-previewed mode, `ipm`) or the smallest of the `min(out, in)` ones
(knowledge-preserved mode, `kpm`). All components together give `W` for any damping, because the matrix that was
multiplied is the one that is inverted.

The last form is how the largest are computed: `V^T C_f^{-1} = diag(1/S) U^T W`, without a solve, and for an
approximate `U` the closest to `W C_f` that it allows. The smallest come from inverse iteration and solves, because
`U^T W` would be a difference of large numbers there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError, WeightError
from ..linalg import plan_sketch, smallest_svd, truncated_svd
from ..linalg.operators import LinearOperator, compute_matrix
from ..linalg.signs import fix_signs
from ..linalg.svd import check_rank, exact_svd
from .damping import DampedMoment, LowRankDampedMoment, damp
from .factors import Factors
from .second_moment import SecondMoment, as_second_moment

__all__ = ["corda"]

Mode = Literal["ipm", "kpm"]


def corda(
    W: Tensor,
    rank: int,
    scaling: float,
    second_moment: Tensor | SecondMoment | DampedMoment | LowRankDampedMoment,
    *,
    mode: Mode = "ipm",
    damping: float = 0.01,
    power: float = 1.0,
    balance: bool = False,
    svd: Literal["randomized", "exact"] = "randomized",
    oversample: int | None = None,
    power_iterations: int | None = None,
    seed: int = 0,
) -> Factors:
    """The `rank` components of `W` that matter most (`ipm`) or least (`kpm`) on the inputs behind `second_moment`.

    Args:
        W: `(..., out, in)` float weight; leading dimensions are a batch of equal shapes.
        rank: number of components `r`, at most `min(out, in)`.
        scaling: the adapter's `s > 0`; `s * B @ A` is the same whatever `s` is.
        second_moment: `C` `(in, in)`, one for each of a batch, a `SecondMoment` (exact or sketched), or what `damp`
            made of either, which layers that share an input need only once.
        mode: "ipm" trains the largest components (statistics of the task), "kpm" the smallest (statistics of the
            knowledge to keep).
        damping: the first `d`; see `damp`. Not used where `second_moment` is damped already.
        power: 1 is the paper's `W C`. 0.5 weighs by a square root of `C` instead: then the largest components minimise
            `||(W - W_r) X||_F` over all matrices of rank `r`. Every root `L` with `L L^T = C_f` gives the same `U`, `S`
            and factors, so the Cholesky factor serves.
        balance: make both factors of a component equally long. The paper's are not: `C_f^{-1}` is in `A` alone.
            Unbalanced, `B` also grows and `A` shrinks with the unit of `C`; balanced, neither depends on it.
        svd: "randomized" (`ipm`: block Krylov; `kpm`: shift-invert) or "exact", the full SVD.
        oversample, power_iterations, seed: as in `llmreg.linalg.truncated_svd`; `kpm` uses the seed alone.

    Returns:
        `Factors`, singular values descending, of `W C_f^power`. A component whose singular value is zero to rounding
        has a zero `A`.

    Raises:
        ValueError: for a scaling that is not positive, an unknown mode or power, or what `damp`, `truncated_svd` and
            `smallest_svd` refuse (all of them `RecipeError`, `WeightError` or `UnsupportedError`).

    Source: arXiv 2406.05223, section 3. `power=0.5`: as ASVD and SVD-LLM weigh.
    """
    if not scaling > 0:
        raise UnsupportedError(f"CorDA needs a positive scaling lora_alpha / r, got {scaling}; set lora_alpha > 0.")
    if mode not in ("ipm", "kpm"):
        raise UnsupportedError(f"mode is {mode!r}; choose 'ipm' (largest components) or 'kpm' (smallest).")
    if power not in (0.5, 1.0):
        raise UnsupportedError(f"power is {power!r}; choose 1.0 (the paper's W C) or 0.5 (activation-optimal).")
    if svd not in ("randomized", "exact"):
        raise UnsupportedError(f"svd is {svd!r}; choose 'randomized' or 'exact'.")
    W = compute_matrix(W)
    check_rank(rank, W.shape)
    moment = as_second_moment(second_moment) if isinstance(second_moment, Tensor) else second_moment
    _check_width(W, moment.width)
    dtype = W.dtype
    if mode == "kpm" and svd == "exact":
        W = W.double()  # a float32 SVD leaves rounding of the largest components where the smallest should be
    if isinstance(moment, SecondMoment):
        moment = damp(moment, damping, dtype=W.dtype, device=W.device)
    moment = moment.like(W)
    if mode == "ipm":
        operator: LinearOperator | Tensor = moment.weighted(W, power)
        if svd == "randomized" and _is_cheaper_formed(rank, W, oversample, power_iterations):
            operator = moment.weighted(W, power).dense()
        options = {"oversample": oversample, "power_iterations": power_iterations}
        U, S, _ = truncated_svd(operator, rank, method=svd, seed=seed, **options)
        right = _safe_inverse(S).unsqueeze(-1) * (U.mT @ W)
    else:
        U, S, Vh = _smallest(W, rank, moment, power, svd, seed)
        right = moment.unweighted(Vh, power)
    root = (S / scaling).sqrt()
    B, A = U * root.unsqueeze(-2), root.unsqueeze(-1) * right
    if balance:
        B, A = _balanced(B, A)
    return Factors(A=A.to(dtype), B=B.to(dtype), singular_values=S.to(dtype))


def _smallest(
    W: Tensor, rank: int, moment: DampedMoment | LowRankDampedMoment, power: float, svd: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    if svd == "randomized":
        return smallest_svd(moment.factors(W, power), rank, seed=seed)
    U, S, Vh = exact_svd(moment.weighted(W, power).dense())
    U, Vh = fix_signs(U[..., -rank:], Vh[..., -rank:, :])
    return U, S[..., -rank:], Vh


def _check_width(W: Tensor, width: int) -> None:
    if width != W.shape[-1]:
        raise WeightError(
            f"The second moment is of {width} inputs, the weight {tuple(W.shape)} has {W.shape[-1]}: statistics of "
            "another layer or model. Calibrate again."
        )


def _is_cheaper_formed(rank: int, W: Tensor, oversample: int | None, power_iterations: int | None) -> bool:
    """Whether `W C` costs less to form, `out in^2`, than the products with `C` that it saves, `in^2` a column.

    The randomised route seldom takes more than half of its passes.
    """
    plan = plan_sketch(rank, oversample=oversample, power_iterations=power_iterations)
    passes = plan.passes if plan.tolerance is None else plan.passes // 2
    return passes * plan.width > W.shape[-2]


def _safe_inverse(S: Tensor) -> Tensor:
    """`1 / S`, and 0 where `S` is rounding of the largest."""
    floor = 4 * torch.finfo(S.dtype).eps * S[..., :1]
    return torch.where(floor < S, 1 / S, torch.zeros_like(S))


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same products `B_i A_i` with `|B_i| = |A_i|`; a component that is zero on one side stays as it is."""
    left, right = torch.linalg.vector_norm(B, dim=-2), torch.linalg.vector_norm(A, dim=-1)
    usable = (left > 0) & (right > 0)
    ratio = torch.where(usable, right / left, torch.ones_like(left)).sqrt()
    return B * ratio.unsqueeze(-2), A / ratio.unsqueeze(-1)
