"""SORSA's and SVFit's start: the singular components themselves, not split between the factors.

With the truncated decomposition `W ~ U_r diag(S_r) V_r^T`,

    A = V_r^T (r, in)       S = S_r (r,)       B = U_r (out, r)       so that   B diag(S) A = W_r.

SORSA (arXiv 2409.00055, section 3) trains all three, SVFit (Sun et al. 2024, arXiv 2409.05926) `S`
alone. The adapter's scaling does not enter: the base stays `W`, and either adapter adds a difference that starts at 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..linalg import truncated_svd
from .factors import Factors

__all__ = ["rank_of_energy", "singular_components", "sliced_components"]

#: Share that the leading components must hold: of the sum of squares, or of the sum of the singular values.
Measure = Literal["squares", "nuclear"]


def singular_components(
    W: Tensor,
    rank: int,
    *,
    svd: Literal["randomized", "exact"] = "randomized",
    oversample: int | None = None,
    power_iterations: int | None = None,
    seed: int = 0,
) -> Factors:
    """The principal `rank` components of `W`.

    Args:
        W: `(..., out, in)` float weight; leading dimensions are a batch of equal shapes.
        rank: number of components `r`, at most `min(out, in)`.
        svd, oversample, power_iterations, seed: as in `llmreg.linalg.truncated_svd`.

    Returns:
        `Factors` with `A A^T = B^T B = I`, and the singular values.

    Raises:
        ValueError: for what `truncated_svd` refuses.
    """
    options = {"oversample": oversample, "power_iterations": power_iterations}
    given = {name: value for name, value in options.items() if value is not None}
    U, S, Vh = truncated_svd(W, rank, method=svd, seed=seed, **given)
    return Factors(A=Vh, B=U, singular_values=S)


def sliced_components(W: Tensor, rank: int, slices: int, **options: object) -> Factors:
    """Each of `slices` equal row blocks of `W` decomposed on its own, with `rank / slices` components.

    A fused projection (`c_attn`, `qkv_proj`) stacks several matrices; one decomposition of the stack would let a
    singular value act on all of them. `B` is block-diagonal, `A` and the singular values are stacked.

    Args:
        W: `(..., out, in)`, `out` divisible by `slices`.
        rank: of all slices together, divisible by `slices`.
        options: of `singular_components`.
    """
    rows, per_slice = W.shape[-2] // slices, rank // slices
    parts = [
        singular_components(W[..., index * rows : (index + 1) * rows, :], per_slice, **options)  # type: ignore[arg-type]
        for index in range(slices)
    ]
    B = W.new_zeros(*W.shape[:-1], rank)
    for index, part in enumerate(parts):
        B[..., index * rows : (index + 1) * rows, index * per_slice : (index + 1) * per_slice] = part.B
    return Factors(
        A=torch.cat([part.A for part in parts], dim=-2),
        B=B,
        singular_values=torch.cat([part.singular_values for part in parts], dim=-1),
    )


def rank_of_energy(singular_values: Tensor, share: float, measure: Measure = "squares") -> int:
    """The least number of leading components that hold `share` of all.

    Args:
        singular_values: `(m,)`, descending, all of them.
        share: in (0, 1].
        measure: "squares" for the sum of squares (Frobenius norm), "nuclear" for the sum. The paper says "99 % of
            the information" and not which.

    Example:
        >>> sigma = torch.tensor([10.0, 1.0, 0.1])
        >>> rank_of_energy(sigma, 0.99), rank_of_energy(sigma, 0.99, "nuclear")
        (1, 2)
    """
    values = singular_values.double()
    cumulative = (values**2 if measure == "squares" else values).cumsum(0)
    reached = cumulative >= share * cumulative[-1] * (1 - 4 * torch.finfo(torch.float64).eps)
    return int(reached.to(torch.int8).argmax()) + 1
