"""EVA's redistribution of ranks by explained variance, and the scaling that goes with it (arXiv 2410.07170).

The components of all layers are sorted together by the share of their layer's variance that they explain, and the best
`sum_l r_l` win: a layer gets as many ranks as it has winners, from 0 to `round(rho r_l)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..errors import RecipeError, WeightError

__all__ = ["most_components", "redistribute", "scaled_alpha"]


def most_components(ranks: Mapping[str, int], rho: float, groups: Iterable[Sequence[str]] = ()) -> dict[str, int]:
    """How many components each layer may get, `round(rho * r_l)`: as many have to be computed.

    Args:
        ranks: requested rank of each layer.
        rho: at least 1.
        groups: names of layers that share an input; all of them take the largest cap of the group.

    Raises:
        RecipeError: rho below 1 or not finite, a rank below 1, a group with an unknown layer.
    """
    if not 1 <= rho < math.inf:
        raise RecipeError(f"rho is {rho}; at least 1 is expected (1 keeps all ranks, the paper's default is 2).")
    low = [name for name, rank in ranks.items() if rank < 1]
    if not ranks or low:
        raise RecipeError(f"The requested ranks of {low or 'no layers'} are below 1; each layer needs r >= 1.")
    most = {name: round(rho * rank) for name, rank in ranks.items()}
    for group in groups:
        unknown = [name for name in group if name not in most]
        if unknown:
            raise RecipeError(f"The group {list(group)} has layers without a rank: {unknown}.")
        cap = max((most[name] for name in group), default=0)
        most.update(dict.fromkeys(group, cap))
    return most


def redistribute(
    ratios: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    rho: float = 2.0,
    *,
    groups: Iterable[Sequence[str]] = (),
) -> dict[str, int]:
    """A new rank for each layer; their sum is that of the requested ranks.

    Args:
        ratios: explained-variance ratios `(k,)` of each layer, descending. Layers that share an input give the same
            ones, and each takes its own ranks.
        ranks: requested rank of each layer.
        rho: how much more than requested a layer may get; 1 leaves all as they are.
        groups: names of layers that share an input, see `most_components`.

    Returns:
        Rank of each layer in the order of `ratios`; 0 means that the layer gets no adapter. Equal ratios go to the
        lower component, then to the earlier layer. The total is exact unless all layers together have fewer
        components than that.

    Raises:
        RecipeError: what `most_components` refuses, or layers that have ratios and no rank or the reverse.
        WeightError: ratios that are NaN, Inf or not a vector.

    Source: arXiv 2410.07170, section 3.
    """
    if set(ratios) != set(ranks):
        raise RecipeError(f"Layers with only one of ratios and rank: {sorted(set(ratios) ^ set(ranks))}.")
    most = most_components(ranks, rho, groups)
    candidates = []
    for position, (name, values) in enumerate(ratios.items()):
        if values.ndim != 1 or not bool(values.isfinite().all()):
            raise WeightError(f"The explained-variance ratios of {name!r} are not a vector of finite numbers.")
        shares = values.detach().double().cpu().tolist()[: most[name]]
        candidates += [(-share, index, position, name) for index, share in enumerate(shares)]
    chosen = dict.fromkeys(ratios, 0)
    for *_, name in sorted(candidates)[: sum(ranks.values())]:
        chosen[name] += 1
    return chosen


def scaled_alpha(alpha: float, rank: int, new_rank: int, use_rslora: bool = False) -> float:
    """The `lora_alpha` of a layer whose rank changed from `rank` to `new_rank`, so that its scaling stays.

    `alpha_l / r_l = alpha / r`, and under rsLoRA `alpha_l / sqrt(r_l) = alpha / sqrt(r)`. The reference multiplies by
    `r_l / r` in both cases, which changes the scaling under rsLoRA.

    Raises:
        RecipeError: a rank below 1; a layer of rank 0 has no adapter and no scaling.

    Source: arXiv 2410.07170; the rule for rsLoRA is ours.
    """
    if rank < 1 or new_rank < 1:
        raise RecipeError(f"Ranks {rank} and {new_rank} were given; both are at least 1 (rank 0 has no adapter).")
    share = new_rank / rank
    return alpha * (math.sqrt(share) if use_rslora else share)
