"""A quantised residual and the adapter that completes it: QPiSSA, and the same for SORSA and CorDA.

QPiSSA (Meng et al. 2024, arXiv 2404.02948, section on QPiSSA) splits `W` into what the adapter
carries and a residual that is stored in few bits, `q(.)` quantised and read back:

    P_1 = decompose(W)                 R_1 = q(W - P_1)
    P_t = decompose(W - R_{t-1})       R_t = q(W - P_t)        t = 2 ... T       error_t = ||W - (R_t + P_t)||

`P_t` is the adapter's product. (The paper's listing subtracts `P_{t-1}` in the second line: a misprint, its code does
not.) The error need not fall with every step, so the best iterate is kept, and `t = 0`, the quantised `W` with an
adapter that adds nothing (QLoRA), is a candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import RecipeError, WeightError
from ..linalg.operators import compute_matrix, is_finite
from .factors import Factors

__all__ = ["QuantizedResidual", "ResidualError", "quantized_residual"]

Q = TypeVar("Q")
Norm = Literal["frobenius", "nuclear"]
#: What the adapter adds: `s B A` (PiSSA, CorDA) or `s B diag(S) A` (SORSA).
Form = Literal["product", "diagonal"]


@dataclass(frozen=True)
class ResidualError:
    """`||W - (R_t + P_t)||` in the Frobenius norm, and in the nuclear norm where it was asked for."""

    frobenius: float
    nuclear: float | None = None


@dataclass(frozen=True)
class QuantizedResidual(Generic[Q]):
    """The kept iterate.

    Attributes:
        quantized: the object that `quantize` returned for the residual; train on it, do not quantise again.
        factors: of the adapter. Where `iteration` is 0 they are those of `W` with `B` (for "diagonal" the singular
            values) set to zero.
        iteration: which iterate this is, 0 ... T.
        errors: of all of them, `errors[0]` is QLoRA's.
    """

    quantized: Q
    factors: Factors
    iteration: int
    errors: tuple[ResidualError, ...]

    def reduction(self, norm: Norm = "nuclear") -> float:
        """Share of QLoRA's error that is gone, `1 - error / error_0`; the paper reports it in the nuclear norm.

        Raises:
            RecipeError: the nuclear norm was not measured.
        """
        first, kept = (_value(self.errors[index], norm) for index in (0, self.iteration))
        return 1 - kept / first if first > 0 else 0.0


def quantized_residual(
    W: Tensor,
    decompose: Callable[[Tensor], Factors],
    quantize: Callable[[Tensor], tuple[Q, Tensor]],
    *,
    scaling: float,
    iterations: int = 5,
    form: Form = "product",
    norm: Norm = "frobenius",
    nuclear: bool = False,
) -> QuantizedResidual[Q]:
    """Quantise what the adapter does not carry, `iterations` times, and keep the best.

    Args:
        W: `(out, in)`, the full-precision weight, any float dtype; not changed.
        decompose: `(out, in)` to the adapter's factors, whose product approximates its argument, rounded as they will
            be trained. It is called with `W`, then with what the quantised residual leaves.
        quantize: a residual `(out, in)` to `(object, dequantised)`, with exactly the settings of the base that will be
            trained on.
        scaling: the adapter's `s`.
        iterations: `T >= 0`; 1 is plain QPiSSA, 5 the paper's setting, 0 QLoRA.
        form: what the factors add, "product" or "diagonal".
        norm: in which the best is chosen.
        nuclear: measure the nuclear norm too, a full set of singular values for each iterate.

    Returns:
        `QuantizedResidual`; its error in `norm` never rises with `iterations`.

    Raises:
        RecipeError: `iterations` negative, an unknown `form` or `norm`.
        WeightError: NaN or Inf in `W` or in what `quantize` returns, or another shape.

    Source: arXiv 2404.02948, section on QPiSSA.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise RecipeError(f"iterations is {iterations!r}; an integer of at least 0 is expected (the paper's is 5).")
    if form not in ("product", "diagonal") or norm not in ("frobenius", "nuclear"):
        raise RecipeError(f"form {form!r} and norm {norm!r}: choose 'product' or 'diagonal', 'frobenius' or 'nuclear'.")
    W = compute_matrix(W)
    nuclear = nuclear or norm == "nuclear"
    kept, dequantized = quantize(W)
    _check(W, dequantized)
    errors = [_error(W - dequantized, nuclear)]
    best: Factors | None = None
    iteration = 0
    for step in range(1, iterations + 1):
        factors = decompose(W if step == 1 else W - dequantized)
        if best is None:
            best = _adding_nothing(factors, form)
        carried = _product(factors, scaling, form).to(W.dtype)
        quantized, dequantized = quantize(W - carried)
        _check(W, dequantized)
        errors.append(_error(W - dequantized - carried, nuclear))
        if _value(errors[-1], norm) < _value(errors[iteration], norm):
            kept, best, iteration = quantized, factors, step
    if best is None:
        best = _adding_nothing(decompose(W), form)
    return QuantizedResidual(kept, best, iteration, tuple(errors))


def _product(factors: Factors, scaling: float, form: Form) -> Tensor:
    left = factors.B if form == "product" else factors.B * factors.singular_values.unsqueeze(-2)
    return scaling * (left @ factors.A)


def _adding_nothing(factors: Factors, form: Form) -> Factors:
    if form == "diagonal":
        return replace(factors, singular_values=torch.zeros_like(factors.singular_values))
    return replace(factors, B=torch.zeros_like(factors.B))


def _error(difference: Tensor, nuclear: bool) -> ResidualError:
    frobenius = torch.linalg.vector_norm(difference, dtype=torch.float64).item()
    return ResidualError(frobenius, torch.linalg.svdvals(difference).double().sum().item() if nuclear else None)


def _value(error: ResidualError, norm: Norm) -> float:
    value = error.frobenius if norm == "frobenius" else error.nuclear
    if value is None:
        raise RecipeError("The nuclear norm was not measured; pass nuclear=True to quantized_residual.")
    return value


def _check(W: Tensor, dequantized: Tensor) -> None:
    if dequantized.shape != W.shape:
        raise WeightError(f"quantize gave back {tuple(dequantized.shape)} for a residual of {tuple(W.shape)}.")
    if not is_finite(dequantized):
        raise WeightError("The weight or its quantised residual contains NaN or Inf; quantisation needs finite input.")
