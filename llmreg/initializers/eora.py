"""EoRA: an adapter that makes up for quantisation where the inputs are (Liu et al. 2024, arXiv 2410.21271, section 3).

With `C = E[x x^T] = Q diag(l) Q^T` of the layer's inputs and the quantised weight `Wq`,

    (W - Wq) Q diag(l)^{1/2} ~ U_r diag(S_r) V_r^T      B = U_r S_r^{1/2}      A = S_r^{1/2} V_r^T diag(l)^{-1/2} Q^T

is the `B A` of rank `r` that minimises `||(W - Wq - B A) X||_F`, with scaling 1 and no training. Any root of `C` gives
the same `U_r`, `S_r` and factors, so a Cholesky factor stands for the eigenvectors: it is `corda` of the
quantisation error with power 0.5. Where `C` is singular the formula divides by 0; a relative ridge stands in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import WeightError
from .corda import corda
from .damping import DampedMoment, LowRankDampedMoment, damp
from .factors import Factors
from .second_moment import SecondMoment

__all__ = ["eora"]


def eora(
    W: Tensor,
    W_quantized: Tensor,
    rank: int,
    second_moment: Tensor | SecondMoment | DampedMoment | LowRankDampedMoment,
    *,
    ridge: float = 1e-6,
    svd: Literal["randomized", "exact"] = "randomized",
    seed: int = 0,
) -> Factors:
    """The best correction of rank `rank` of `W_quantized` towards `W` on the inputs behind `second_moment`.

    Args:
        W: `(..., out, in)`, the full-precision weight, any float dtype.
        W_quantized: `(..., out, in)`, what the stored weight dequantises to.
        rank: at most `min(out, in)`.
        second_moment: `C` `(in, in)`, one for each of a batch, a `SecondMoment`, or what `damp` made of it.
        ridge: `C + ridge mean(diag C) I` is decomposed, in float64; it doubles, 30 times at most, where rounding of `C`
            leaves that indefinite. Not used where `second_moment` is damped already.
        svd, seed: as in `llmreg.linalg.truncated_svd`.

    Returns:
        `Factors` with `W ~ W_quantized + B @ A` (scaling 1: set lora_alpha = r); float64 if `W` is, else float32.

    Raises:
        WeightError: shapes that differ, or what `corda` refuses.

    Source: EoRA, arXiv 2410.21271, section 3; written from the formula.
    """
    if W.shape != W_quantized.shape:
        raise WeightError(
            f"W is {tuple(W.shape)} and W_quantized {tuple(W_quantized.shape)}; give the dequantised matrix (out, in)."
        )
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    error = W.to(dtype) - W_quantized.to(dtype)
    if isinstance(second_moment, Tensor | SecondMoment):
        second_moment = damp(second_moment, ridge, dtype=torch.float64, device=W.device)
    return corda(error, rank, 1.0, second_moment, power=0.5, svd=svd, seed=seed)
