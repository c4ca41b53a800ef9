"""EVA: explained variance adaptation (Paischer et al. 2024, arXiv 2410.07170, section 3), from merged moments.

`A0` is the leading principal components of the layer's inputs, `B0 = 0`; the base is untouched. With the uncentred
second moment `C` and the mean `mu` over `n` tokens,

    C - mu mu^T = V^T diag(l) V        S_i = sqrt(n l_i)        ratio_i = l_i / trace(C - mu mu^T)

`V` in rows, `S` the singular values of the centred matrix of activations, `ratio` the share of the layer's variance
that a component explains: what the ranks of all layers are redistributed by (`eva_ranks`). The reference computes the
same by incremental PCA over batches, which ends early and depends on their order; sums of moments do not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError, WeightError
from ..linalg import truncated_svd
from ..linalg.operators import compute_matrix
from ..linalg.signs import fix_signs
from ..linalg.svd import check_rank
from .factors import Factors
from .second_moment import SecondMoment

__all__ = ["EvaComponents", "component_cosines", "eva", "eva_components", "has_converged", "whiten"]


class EvaComponents(NamedTuple):
    """Principal components of a layer's inputs; layers that share an input share them.

    Attributes:
        V: `(k, in)`, orthonormal rows, in descending order; the largest-magnitude entry of each is positive.
        S: `(k,)`, float64, singular values `sqrt(count * eigenvalue)`; without a count those of the covariance's root.
        ratios: `(k,)`, float64, explained variance over the total variance of the layer, in 0 ... 1.
    """

    V: Tensor
    S: Tensor
    ratios: Tensor


def eva_components(
    moments: SecondMoment,
    components: int,
    *,
    centered: bool = True,
    method: Literal["randomized", "exact"] = "randomized",
    seed: int = 0,
) -> EvaComponents:
    """The leading `components` principal components of a layer's inputs.

    Args:
        moments: second moment `(in, in)` or its factor `(in, k)`, and the mean where `centered`. With a factor, `trace`
            should be given: the variance that a sketch has lost still counts in the ratios.
        components: at most `in`. Where the inputs have fewer dimensions the rest are orthonormal with ratio 0.
        centered: subtract the mean (reference and PEFT, default). The paper's theory is uncentred; with inputs that
            have a strong mean the first components differ widely.
        method: "randomized" (block Krylov, then Rayleigh-Ritz; captures over 0.9999 of the best variance) or "exact"
            (`eigh` of `(in, in)`). A factor with fewer columns than half of `in` is always decomposed exactly, by QR.
        seed: of the randomised route.

    Returns:
        `EvaComponents`, `V` in float32 (float64 for float64 moments).

    Raises:
        WeightError: `components` outside `1 ... in`, no mean where `centered`, no variance at all, batched moments.
        UnsupportedError: an unknown method.

    Source: arXiv 2410.07170, section 3; ratios as the reference implementation normalises them.
    """
    if method not in ("randomized", "exact"):
        raise UnsupportedError(f"method is {method!r}; choose 'randomized' or 'exact'.")
    values = compute_matrix(moments.values, "second moment")
    if values.ndim != 2:
        raise WeightError(f"The moments have shape {tuple(values.shape)}; EVA takes one layer's at a time.")
    check_rank(components, torch.Size((moments.width, moments.width)))
    mean = None
    if centered:
        if moments.mean is None:
            raise WeightError("Centred components need the mean of the inputs: gather it, or set centered=False.")
        mean = moments.mean.to(device=values.device, dtype=torch.float64)
    total = moments.total().item() - (0.0 if mean is None else mean.square().sum().item())
    if not total > 0:
        raise WeightError("The layer's inputs have no variance (none, or all tokens alike); calibrate on more data.")
    if moments.factor is not None and 2 * (values.shape[1] + 1) < moments.width:
        eigenvalues, vectors = _of_factor(values, mean, components)
    else:
        eigenvalues, vectors = _of_matrix(_covariance(values, moments, mean), components, method, seed)
    V, _ = fix_signs(vectors, vectors.mT)
    count = 1 if moments.count is None else moments.count
    eigenvalues = eigenvalues.clamp_min(0)
    return EvaComponents(V.mT.to(values.dtype).contiguous(), (count * eigenvalues).sqrt(), eigenvalues / total)


def _covariance(values: Tensor, moments: SecondMoment, mean: Tensor | None) -> Tensor:
    """`C - mu mu^T` `(in, in)`; the difference, where a large mean cancels, is taken in float64."""
    C = values @ values.mT if moments.matrix is None else values
    return C if mean is None else torch.addr(C.double(), mean, mean, alpha=-1).to(C.dtype)


def _of_matrix(C: Tensor, components: int, method: str, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (float64) and vectors `(in, components)`, descending, of a symmetric matrix."""
    wider = components + max(8, components // 4)
    if method == "exact" or 2 * wider > C.shape[-1]:
        eigenvalues, vectors = torch.linalg.eigh(C.double())
        return eigenvalues.flip(-1)[:components], vectors.flip(-1)[:, :components]
    U, _, _ = truncated_svd(C, wider, seed=seed)
    # Orthonormal in float64: beside a massive direction, float32 would leave some of it in every other component.
    U, _ = torch.linalg.qr(U.double())
    # The rotation within the span that makes them eigenvectors, with signed eigenvalues: rounding may have made small
    # ones negative, and a singular value does not tell.
    small = U.mT @ (C @ U.to(C.dtype)).double()
    eigenvalues, turn = torch.linalg.eigh((small + small.mT) / 2)
    return eigenvalues.flip(-1)[:components], U @ turn.flip(-1)[:, :components]


def _of_factor(F: Tensor, mean: Tensor | None, components: int) -> tuple[Tensor, Tensor]:
    """The same of `F F^T - mu mu^T`, exactly: `[F, mu] = Q R`, and `R diag(1, ..., 1, -1) R^T` is small."""
    columns = F.double() if mean is None else torch.cat([F.double(), mean.unsqueeze(-1)], dim=-1)
    missing = components - columns.shape[-1]
    if missing > 0:  # directions without variance, from the unit vectors, complete the basis
        columns = torch.cat([columns, torch.eye(len(F), missing, dtype=columns.dtype, device=F.device)], dim=-1)
    Q, R = torch.linalg.qr(columns)
    signs = torch.ones(columns.shape[-1], dtype=columns.dtype, device=F.device)
    signs[F.shape[-1] :] = 0
    if mean is not None:
        signs[F.shape[-1]] = -1
    eigenvalues, turn = torch.linalg.eigh((R * signs) @ R.mT)
    return eigenvalues.flip(-1)[:components], Q @ turn.flip(-1)[:, :components]


def eva(components: EvaComponents, rank: int, out_features: int, *, whiten_components: bool = False) -> Factors:
    """EVA's start of one layer: `A` the first `rank` components, `B = 0`.

    Args:
        components: of the layer's input; not changed, other layers may share it.
        rank: at most as many as there are components; ranks after redistribution differ between layers.
        out_features: rows of the weight.
        whiten_components: divide each component by the root of its singular value (`whiten`).

    Returns:
        `Factors` with `A (rank, in)`, `B (out, rank)` zero, `singular_values (rank,)`, own copies.

    Raises:
        WeightError: `rank` outside `1 ... k`, or what `whiten` refuses.

    Source: arXiv 2410.07170, section 3.
    """
    known = len(components.V)
    if not 1 <= rank <= known:
        raise WeightError(f"rank is {rank}, {known} components are known; compute more, or remove a layer of rank 0.")
    V, S = components.V[:rank], components.S[:rank]
    A = whiten(V, S) if whiten_components else V.clone()
    return Factors(A=A, B=A.new_zeros(out_features, rank), singular_values=S.to(A.dtype))


def whiten(V: Tensor, S: Tensor) -> Tensor:
    """`V_i / sqrt(S_i)`, a new tensor: the reference's `whiten`.

    It is not a whitening in the usual sense, which divides by the standard deviation `S_i / sqrt(n)`. The reference
    divides in place what several layers share, so the second of them is whitened twice; this does not.

    Args:
        V: components in rows, `(k, in)`.
        S: singular values, `(k,)`.

    Raises:
        WeightError: a singular value that is not positive.

    Source: EVA's reference implementation (option `whiten`).
    """
    if not bool((S > 0).all()):
        index = int((S <= 0).to(torch.int8).argmax())
        raise WeightError(
            f"Component {index} has no variance and cannot be whitened; lower the rank to {index}, calibrate on more "
            "tokens, or set whiten=False."
        )
    return V / S.to(V.dtype).sqrt().unsqueeze(-1)


def component_cosines(previous: Tensor, current: Tensor) -> Tensor:
    """Signed cosine `(k,)` between corresponding rows of two estimates `(k, in)`; the sign rule makes it meaningful."""
    return torch.cosine_similarity(previous.double(), current.double(), dim=-1)


def has_converged(previous: Tensor | None, current: Tensor, rank: int, tau: float = 0.99) -> bool:
    """Whether the first `rank` components of a layer moved little between two estimates; a stopping rule only.

    Args:
        previous, current: `(k, in)`; None before there were two estimates, which have not converged then.
        rank: of the layer after redistribution; a layer of rank 0 has converged.
        tau: the least cosine of each component.

    Source: arXiv 2410.07170, section 3; in the reference the components themselves depend on when it stops.
    """
    if rank == 0:
        return True
    if previous is None or previous.shape != current.shape:
        return False
    return bool((component_cosines(previous[:rank], current[:rank]) >= tau).all())
