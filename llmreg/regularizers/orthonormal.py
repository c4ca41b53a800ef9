"""SORSA's orthonormal regulariser (arXiv 2409.00055, section 3): singular vectors stay orthonormal.

    R = || A A^T - I ||_F + || B^T B - I ||_F        summed over layers (the paper), or averaged over all factors

The norm is not squared, so its gradient does not fade near orthonormality: `dR/dA = 2 (A A^T - I) A / ||A A^T - I||_F`
has Frobenius norm 2 in the direction of whatever is left, rounding included, and is taken as 0 where nothing is. The
squared norm is smooth, but another method; it is an option.

The paper's update is decoupled from the task's, `W <- W - lr_t dL/dW - gamma_t dR/dW` with `gamma_t = gamma lr_t /
lr_peak`. Its authors' code adds `gamma / lr_peak dR/dW` to the gradient instead, which is the same for SGD only: Adam's
moments mix the two. `decoupled=True` (default) is the paper's update, in the manner of decoupled weight decay.

Factors that do not start orthonormal (PiSSA's, `A0 A0^T = S`) would be destroyed by that; for them the Gram matrices of
the start can stand in place of `I`: `target="initial_gram"`, `|| A A^T - A0 A0^T ||_F`. That is not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError

__all__ = ["OrthonormalRegularizer", "condition_number"]


@dataclass(frozen=True)
class OrthonormalRegularizer:
    """How far factors are from orthonormal, and which way is back.

    A factor is given as a matrix whose rows should be orthonormal: `A (r, in)`, or `B^T (r, out)`.

    Args:
        weight: gamma; of a decoupled step at the peak learning rate, or of the term in the loss. Paper: 4e-4.
        squared: square the Frobenius norms.
        reduction: "mean" over factors (the authors' code, with which 4e-4 was used) or "sum" (the paper's formula).
        decoupled: a step of its own beside the optimizer's, from the same factors; False adds the term to the loss.
        target: "identity", for factors that start orthonormal (SORSA; of EVA, `A`), or "initial_gram".

    Raises:
        UnsupportedError: a weight that is no number >= 0, or an unknown reduction or target.
    """

    weight: float = 4e-4
    squared: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    decoupled: bool = True
    target: Literal["identity", "initial_gram"] = "identity"

    name: ClassVar[str] = "orthonormal"

    def __post_init__(self) -> None:
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not (number and 0 <= self.weight < float("inf")):
            raise UnsupportedError(f"weight must be a number >= 0, got {self.weight!r}.")
        if self.reduction not in ("mean", "sum"):
            raise UnsupportedError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")
        if self.target not in ("identity", "initial_gram"):
            raise UnsupportedError(f"target must be 'identity' or 'initial_gram', got {self.target!r}.")

    def loss(self, factors: Sequence[Tensor], targets: Sequence[Tensor | None] | None = None) -> Tensor:
        """`R`, a scalar with gradients; without the weight. At an exactly orthonormal factor its gradient is 0.

        Args:
            factors: `(r, n)` each. targets: what `A A^T` should be, `(r, r)` each; None: the identity.

        Example:
            >>> round(float(OrthonormalRegularizer().loss([1.1 * torch.eye(4)])), 4)
            0.42
        """
        wanted = targets or [None] * len(factors)
        terms = [_deviation(*pair).square().sum() for pair in zip(factors, wanted, strict=True)]
        if not self.squared:
            terms = [_root(term) for term in terms]
        total = torch.stack(terms).sum()
        return total / len(terms) if self.reduction == "mean" else total

    @torch.no_grad()
    def gradient(self, factor: Tensor, count: int, *, rows: bool = True, target: Tensor | None = None) -> Tensor:
        """`dR / d factor`, in closed form and the factor's dtype; computed in float32 at least.

        Args:
            factor: `(r, n)`, or with `rows=False` one whose columns should be orthonormal, `(n, r)`.
            count: number of factors that `R` is taken over.
            target: (r, r) what the Gram matrix should be; None: the identity.
        """
        exact = factor.to(torch.promote_types(factor.dtype, torch.float32))
        gram = exact @ exact.mT if rows else exact.mT @ exact
        if target is None:
            gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        else:
            gram.sub_(target)
        parts = count if self.reduction == "mean" else 1
        if self.squared:
            gram.mul_(4 / parts)
        else:  # without a question that a GPU would have to be waited for
            norm = gram.norm()
            gram.mul_(torch.where(norm > 0, 2 / norm, torch.zeros_like(norm)) / parts)
        return (gram @ exact if rows else exact @ gram).to(factor.dtype)


def _deviation(factor: Tensor, target: Tensor | None) -> Tensor:
    gram = factor @ factor.mT
    return gram - (torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) if target is None else target)


def _root(term: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0 and not infinite."""
    positive = term > 0
    return torch.where(positive, torch.where(positive, term, torch.ones_like(term)).sqrt(), torch.zeros_like(term))


@torch.no_grad()
def condition_number(factors: Sequence[Tensor]) -> float:
    """The largest ratio of a factor's extreme singular values; infinite where one has lost rank."""
    worst = 1.0
    for factor in factors:
        values = torch.linalg.eigvalsh((factor @ factor.mT).double())
        worst = max(worst, float((values[-1] / values[0].clamp_min(0)).sqrt()))
    return worst
