"""PiSSA: principal singular values and singular vectors adaptation (Meng et al. 2024, arXiv 2404.02948, section 3).

With the truncated decomposition `W ~ U_r diag(S_r) V_r^T` and the adapter's scaling `s`,

    B0 = U_r sqrt(S_r / s)        A0 = sqrt(S_r / s) V_r^T        so that   s B0 A0 = W_r.

The paper trains `A`, `B` from there beside the residual `W - W_r`; here the base stays `W` and the adapter adds the
difference `s (B A - B0 A0)` (see `llmreg.adapters.layer`), which is the same function and the same gradient.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .components import singular_components
from .factors import Factors

__all__ = ["pissa"]


def pissa(
    W: Tensor,
    rank: int,
    scaling: float,
    *,
    svd: Literal["randomized", "exact"] = "randomized",
    oversample: int | None = None,
    power_iterations: int | None = None,
    seed: int = 0,
) -> Factors:
    """The principal `rank` components of `W`, split evenly between both factors.

    Args:
        W: `(..., out, in)` float weight; leading dimensions are a batch of equal shapes.
        rank: number of components `r`, at most `min(out, in)`.
        scaling: the adapter's `s > 0`; `s * B @ A` is the rank-`r` part of `W` whatever `s` is.
        svd: "randomized" (default; residual within 0.05 % of optimal on decaying spectra) or "exact".
        oversample: extra sketch columns of the randomised route; `None` lets `truncated_svd` choose.
        power_iterations: passes of the randomised route; `None` lets `truncated_svd` choose.
        seed: of the randomised route's own generator.

    Returns:
        `Factors` with `A A^T = B^T B = diag(S_r) / s`.

    Raises:
        ValueError: for a scaling that is not positive, or what `truncated_svd` refuses.
    """
    if not scaling > 0:
        raise ValueError(f"PiSSA needs a positive scaling lora_alpha / r, got {scaling}; set lora_alpha > 0.")
    parts = singular_components(W, rank, svd=svd, oversample=oversample, power_iterations=power_iterations, seed=seed)
    root = (parts.singular_values / scaling).sqrt()
    return Factors(root.unsqueeze(-1) * parts.A, parts.B * root.unsqueeze(-2), parts.singular_values)
