"""CorDA++'s covariance selection and rank allocation (arXiv 2506.13187), **from a secondary source**.

The formulas come from a third-party port, not from the paper's text; which matrix the compactness is taken of, the
number of candidates and what happens at the edge of the budget are not certain. They act on spectra alone:
`sigma`, all `min(out, in)` singular values of `W C_f`, descending.

    compactness      pi = sqrt(out sigma_1) / sigma_min
    selection        smallest   log pi * sum_{i <= r} sigma_{-i} / sigma_1
    allocation       +1 to the layer with the smallest   log pi * sigma_{-r} / sum_{k <= R - r} sigma_k

Both look at the components that the knowledge-preserved mode trains, the smallest. `pi` is not free of units: it
shrinks with the root of the scale of `W C`, so compare spectra of statistics that were scaled alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import RecipeError, WeightError

__all__ = ["allocate_ranks", "compactness", "select_covariance"]


def compactness(singular_values: Tensor, out_features: int) -> float:
    """`pi = sqrt(out sigma_1) / sigma_min`: small for a flat spectrum. From a secondary source.

    Args:
        singular_values: `(m,)`, descending, not negative. A smallest value below rounding counts as rounding.
        out_features: rows of the weight.

    Raises:
        WeightError: empty, NaN, Inf, or all zero.

    Source: CorDA++, arXiv 2506.13187, by way of a third-party port (unverified).
    """
    values = _checked(singular_values, "")
    smallest = max(float(values[-1]), torch.finfo(torch.float64).eps * float(values[0]))
    return (out_features * float(values[0])) ** 0.5 / smallest


def select_covariance(
    spectra: Sequence[Tensor], rank: int, out_features: int, *, moment_spectra: Sequence[Tensor] | None = None
) -> int:
    """Which of several calibration sets to use for one layer: the index with the smallest score. Secondary source.

    Args:
        spectra: for each candidate the singular values `(m,)` of `W C_f`, descending.
        rank: number of smallest components that the adapter trains.
        out_features: rows of the weight.
        moment_spectra: for each candidate the values that the compactness is taken of, if not `spectra` (the source can
            be read as meaning those of `C_f`).

    Returns:
        The index; the first on a tie.

    Raises:
        RecipeError: no candidate, or as many `moment_spectra` as there are not `spectra`.
        WeightError: see `compactness`.

    Source: CorDA++, arXiv 2506.13187, by way of a third-party port (unverified).
    """
    compact = spectra if moment_spectra is None else moment_spectra
    if not spectra or len(compact) != len(spectra):
        raise RecipeError(f"{len(spectra)} spectra and {len(compact)} moment_spectra; one of each a candidate, >= 1.")
    scores = []
    for spectrum, other in zip(spectra, compact, strict=True):
        values = _checked(spectrum, "")
        tail = float(values[-min(rank, len(values)) :].sum() / values[0])
        scores.append(_log(compactness(other, out_features)) * tail)
    return min(range(len(scores)), key=scores.__getitem__)


def allocate_ranks(spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
    """A rank for each layer within the parameters of a uniform `rank`: dynamic rank allocation. Secondary source.

    Every layer starts at 1; the one with the smallest score gets the next, as long as `sum (out + in) rank_l` stays
    within `rank sum (out + in)`. A layer whose next rank no longer fits is passed over for narrower ones (the source
    stops there or overshoots; that is not known).

    Args:
        spectra: all singular values `(m,)` of each layer's `W C_f`, descending.
        shapes: `(out, in)` of each layer.
        rank: of the uniform adapter, at least 1.

    Returns:
        Rank of each layer, from 1 to `m`, in the order of `spectra`. Ties go to the first layer.

    Raises:
        RecipeError: `rank` below 1, no layer, or a layer without a shape.
        WeightError: see `compactness`.

    Source: CorDA++, arXiv 2506.13187, by way of a third-party port (unverified).
    """
    missing = [name for name in spectra if name not in shapes]
    if not spectra or missing or rank < 1:
        raise RecipeError(f"rank is {rank}, layers without a shape are {missing}; rank >= 1 and all shapes are needed.")
    budget = rank * sum(sum(shapes[name]) for name in spectra)
    scores = {name: _rank_scores(_checked(values, name), shapes[name][0]) for name, values in spectra.items()}
    ranks = dict.fromkeys(spectra, 1)
    spent = sum(sum(shapes[name]) for name in spectra)
    queue = [(scores[name][0], index, name) for index, name in enumerate(spectra) if scores[name]]
    heapq.heapify(queue)
    while queue:
        _, index, name = heapq.heappop(queue)
        if spent + sum(shapes[name]) > budget:
            continue
        spent += sum(shapes[name])
        ranks[name] += 1
        if ranks[name] <= len(scores[name]):
            heapq.heappush(queue, (scores[name][ranks[name] - 1], index, name))
    return ranks


def _rank_scores(values: Tensor, out_features: int) -> list[float]:
    """Score of a layer at rank 1, 2, ..., R - 1."""
    if len(values) < 2:
        return []
    larger = values.cumsum(0).flip(0)[1:]  # of the R - r largest
    return (_log(compactness(values, out_features)) * values.flip(0)[:-1] / larger).tolist()


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())


def _checked(singular_values: Tensor, name: str) -> Tensor:
    values = singular_values.detach().double().cpu()
    if values.ndim != 1 or len(values) == 0 or not bool(values.isfinite().all()) or not float(values[0]) > 0:
        raise WeightError(
            f"The spectrum {name and f'of {name!r} '}is not a vector of finite singular values, the first positive."
        )
    return values
