"""BA-LoRA's singular value regulariser (arXiv 2408.04556): the leading directions carry more of the logits.

    nlu:  L_SVDR = - sum_{i <= k} sigma_i(Z) / sum_j sigma_j(Z)      Z (N, D), k = 5; from -1 to 0
    nlg:  L_SVDR = - sum_{i <= k} sigma_i(Z) / ||Z||_F               Z (tokens, V), k = 10; from -sqrt(k) to 0

The first generation ("v1") takes the former for both, k = 3, and for a language model of logits as one row a sequence,
(sequences, tokens V).

Logits of a language model are never formed. With `Z = H W^T` and `W^T W = L L^T`, `Z Z^T = (H L) (H L)^T`: the d
columns of `H L` have the singular values of the V columns of `Z`. A bias `b` is one more column of `W`, and one of ones
of `H`. `L (d, d)` is found once. With the k leading vectors held constant, `sum sigma_i = tr(U^T H L V)` has the exact
gradient, so that vectors are found without one. Scale and temperature of the head cancel in the ratio.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import LlmregWarning, UnsupportedError
from ..linalg import truncated_svd
from .balora import BaLoraTerm, at_least_float32, check_count, nothing
from .base import Context, Head, Need
from .logit_blocks import gathered

__all__ = ["SingularValueRegularizer", "head_root"]

#: Rows of the head that are turned into float64 at once.
_CHUNK = 8192
#: Of the sketch: of 1024 x 1024 with k = 10 (one thread of a CPU) 55 to 85 ms, where the product `H L` takes 30 and a
#: full eigendecomposition 270. The gradient is right to 3e-4 where singular values decay, and to 1 % for a matrix of
#: noise, whose leading ones nearly agree; the value to 1e-5 for both.
_OVERSAMPLE, _POWER_ITERATIONS = 22, 8


@dataclass(frozen=True)
class SingularValueRegularizer(BaLoraTerm):
    """Minus the share of the `k` largest singular values of the logits; it is a statistic of a batch.

    Args:
        weight, schedule, variant, task: as in `BaLoraTerm`; paper: 0.005 (nlg), 0.03 (nlu), two_phase.
        k: None: 10 (nlg), 5 (nlu), 3 (v1).
        seed: of the randomised decomposition's own generator.

    Raises:
        RecipeError: `k` is no integer of at least 1.
    """

    k: int | None = None
    seed: int = 0

    name: ClassVar[str] = "singular_values"
    reduction: ClassVar[Literal["batch"]] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "k", 1)

    def _paper(self) -> dict[str, Any]:
        k = 3 if self.variant == "v1" else 5 if self.task == "nlu" else 10
        return {**super()._paper(), "k": k}

    @property
    def needs(self) -> frozenset[Need]:
        """ "v1" has one row of logits for each sequence."""
        needs: set[Need] = {"rows"} if self.variant == "v1" and self.task != "nlu" else set()
        return super().needs | needs

    def loss(self, context: Context) -> Tensor:
        """`L_SVDR`, a scalar with gradients; 0 for fewer than two rows.

        Raises:
            UnsupportedError: the head caps its logits or is trained itself; with "v1", sequences of unequal numbers
                of scored tokens.
        """
        assert self.k is not None
        if self.is_nlu(context):
            (logits,) = self.of(context, "logits")
            return _nuclear_share(at_least_float32(logits), self.k)
        hidden, head = self.of(context, "hidden", "head")
        with torch.autocast(hidden.device.type, enabled=False):
            small = _times_root(at_least_float32(hidden), head)
            if len(hidden) < 2:
                return nothing(small)
            if self.variant == "v1":
                (rows,) = self.of(context, "rows")
                return _nuclear_share(_one_row_a_sequence(small, rows), self.k)
            return _frobenius_share(small, self.k, self.seed)


def _nuclear_share(Z: Tensor, k: int) -> Tensor:
    limit = min(Z.shape)
    if len(Z) < 2:
        return nothing(Z)
    if k >= limit:
        _warn_inert(k, limit)
        return nothing(Z) - 1
    values = torch.linalg.svdvals(Z)
    return -_over(values[:k].sum(), values.sum())


def _frobenius_share(M: Tensor, k: int, seed: int) -> Tensor:
    U, _, Vh = truncated_svd(
        M.detach(),
        min(k, *M.shape),
        method="krylov",
        oversample=_OVERSAMPLE,
        power_iterations=_POWER_ITERATIONS,
        seed=seed,
    )
    leading = (U * (M @ Vh.mT)).sum()
    return -_over(leading, torch.linalg.vector_norm(M))


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """Their quotient, 0 where the whole is 0."""
    return part / torch.where(whole > 0, whole, torch.ones_like(whole))


@functools.cache
def _warn_inert(k: int, limit: int) -> None:
    warnings.warn(
        f"The term 'singular_values' has no effect: the {k} largest singular values of logits with {limit} rows or "
        f"classes are all of them, so that it is always -1. Choose k below {limit}, or give it weight 0.",
        LlmregWarning,
        stacklevel=4,
    )


def _one_row_a_sequence(M: Tensor, rows: Tensor) -> Tensor:
    counts = rows.unique(return_counts=True)[1]
    if bool((counts != counts[0]).any()):
        raise UnsupportedError(
            'singular_values: variant "v1" takes the logits of a sequence as one row, and these sequences have '
            f"{int(counts.min())} to {int(counts.max())} scored tokens (the authors let padding fill them up); write "
            'variant="iclr".'
        )
    return M.reshape(len(counts), -1)


def _times_root(hidden: Tensor, head: Head) -> Tensor:
    """`[H 1] L` (tokens, d) whose products of rows are those of the logits `H W^T + b`, up to scale^2."""
    if head.softcap is not None:
        raise UnsupportedError(
            f"singular_values: this head caps its logits (softcap={head.softcap}), which are then no product of hidden "
            "states and a matrix, and cannot be decomposed without being formed; give the term weight 0."
        )
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        raise UnsupportedError(
            "singular_values: the language-model head is trained, and its W^T W is taken once; leave it out of what "
            "trains (modules_to_save), or give the term weight 0."
        )
    root = head_root(head.weight, head.bias).to(hidden.dtype)
    d = hidden.shape[-1]
    product = hidden @ root[:d]
    return product if head.bias is None else product + root[d]


class _Kept(NamedTuple):
    state: tuple[Any, ...]
    root: Tensor


_ROOTS: MutableMapping[Tensor, _Kept] = WeakIdKeyDictionary()


@torch.no_grad()
def head_root(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`L` with `L L^T = [W b]^T [W b]`, kept for as long as the weight lives and is not written to.

    Args:
        weight: (vocabulary, d), any floating dtype, whole or sharded (then all ranks must call). bias: (vocabulary,).

    Returns:
        (d, d), or (d + 1, d + 1) with a bias: float64 where the weight is, else float32; computed in float64.
    """
    # Not by address: ZeRO-3 gathers the same frozen values into new memory at every step.
    state = (weight._version, weight.dtype, weight.device, None if bias is None else (id(bias), bias._version))
    kept = _ROOTS.get(weight)
    if kept is None or kept.state != state:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with gathered(Head(weight, bias)) as whole:
            kept = _ROOTS[weight] = _Kept(state, _root(_gram(whole.weight, whole.bias)).to(dtype))
    return kept.root


def _gram(weight: Tensor, bias: Tensor | None) -> Tensor:
    d = weight.shape[1] + (bias is not None)
    G = torch.zeros(d, d, dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), _CHUNK):
        part = weight[start : start + _CHUNK].double()
        if bias is not None:
            part = torch.cat([part, bias[start : start + _CHUNK, None].double()], dim=1)
        G.addmm_(part.mT, part)
    return G


def _root(G: Tensor) -> Tensor:
    """`L` with `L L^T = G`: Cholesky's, or of a singular `G` by its eigenvalues, those below zero taken as zero."""
    L, failed = torch.linalg.cholesky_ex(G)
    if not failed:
        return L
    values, vectors = torch.linalg.eigh(G)
    return vectors * values.clamp_min(0).sqrt()
