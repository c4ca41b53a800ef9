"""Translation between the live factors of an adapter and the plain LoRA it is stored as (names and tensors).

live    <layer>.lora_A[.adapter].weight and what else its form has (`forms`)      rank r
stored  <layer>.lora_A.weight = down   <layer>.lora_B.weight = up                 rank 2r; r for all but differences
tiny    <layer>.lora_S.weight                                                     `Spectral` only, vectors recomputed
trained <layer>.lora_A.weight   <layer>.lora_B.weight   (<layer>.lora_S.weight)     beside a quantised residual, rank r
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AdapterFileError
from .difference import split
from .forms import CONTAINERS, Difference, Form, Product, ScaledDifference, Spectral

__all__ = ["from_stored", "to_stored"]


def _sibling(key: str, container: str) -> str:
    """The key of another factor of the layer that `key` (of its `lora_A` or `lora_A0`) belongs to."""
    head, _, tail = key.rpartition(".lora_A")
    return f"{head}.{container}.{tail.partition('.')[2]}"


def _is_factor(key: str) -> bool:
    return any(f".{container}." in key for container in CONTAINERS)


def to_stored(
    live: dict[str, Tensor], form: type[Form] = Difference, *, tiny: bool = False, as_trained: bool = False
) -> dict[str, Tensor]:
    """Live tensors (adapter name in the key or not) -> the same keys for `lora_A`, `lora_B` of a plain LoRA.

    A frozen start follows the dtype of the factors, as in the forward pass. Other entries pass through. `tiny` keeps
    the values `lora_S` alone, `as_trained` what trains.
    """
    stored = {key: value for key, value in live.items() if not _is_factor(key)}
    if tiny:
        return stored | {key: value for key, value in live.items() if ".lora_S." in key}
    if as_trained:
        trained = tuple(f".{container}." for container in form.trained)
        return stored | {key: value for key, value in live.items() if any(part in key for part in trained)}
    for key in (key for key in live if ".lora_A0." in key):
        factors = {name: live[_sibling(key, name)].detach() for name in form.containers()}
        if not form.own_dtypes:
            for frozen in form.frozen:
                factors[frozen] = factors[frozen].to(factors[frozen.removesuffix("0")].dtype)
        down, up = form.low_rank(factors)
        stored[_sibling(key, "lora_A")], stored[_sibling(key, "lora_B")] = down.contiguous(), up.contiguous()
    return stored


def from_stored(
    stored: dict[str, Tensor],
    exact: dict[str, Tensor] | None = None,
    form: type[Form] = Difference,
    present: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Stored tensors -> live ones (adapter-name-free keys), bit-exact where `exact` holds the factors.

    Without `exact` the difference form is split: the same function within one rounding, whatever rank-2r LoRA it is.
    The spectral form needs the vectors that the live adapter has (`present`), and reads off how long they became. A
    product is its own stored form, beside the start that the live adapter has.

    Raises:
        AdapterFileError: a factor is missing, or without `exact` the stored form does not tell the factors.
    """
    live = {key: value for key, value in stored.items() if not _is_factor(key)}
    for key in (key for key in stored if ".lora_S." in key):  # tiny: the vectors are those that the adapter has
        head, _, tail = key.rpartition(".lora_S.")
        vectors = {f"{head}.{name}.{tail}" for name in form.frozen} & (present or {}).keys()
        live.update({name: present[name].detach().clone() for name in vectors} if present else {})
        live[key] = stored[key] if exact is None else exact[key]
    for key in (key for key in stored if ".lora_A." in key):
        if exact is not None:
            keys = [_sibling(key, container) for container in form.containers()]
            missing = [name for name in keys if name not in exact]
            if missing:
                raise AdapterFileError(f"The adapter's sidecar lacks {missing[0]!r}; save the adapter again.")
            live.update({name: exact[name] for name in keys})
            continue
        up = stored.get(_sibling(key, "lora_B"))
        if issubclass(form, Product) and up is not None:
            live.update({key: stored[key], _sibling(key, "lora_B"): up})
            for name in form.frozen:  # an adapter that has no start (made on the meta device) takes this for it
                start = (present or {}).get(_sibling(key, name))
                if start is None or start.is_meta:
                    live[_sibling(key, name)] = live[_sibling(key, name.removesuffix("0"))].clone()
            continue
        if form is Spectral and up is not None:
            parts = _spectral(key, stored[key], up, present or {})
            live.update({_sibling(key, name): value for name, value in parts.items()})
            continue
        if up is None or stored[key].shape[0] % 2:
            raise AdapterFileError(f"{key!r} is not half of a difference form (a pair of factors of even rank).")
        live.update({_sibling(key, name): value for name, value in _split(stored[key], up, form).items()})
    return live


def _split(down: Tensor, up: Tensor, form: type[Form]) -> dict[str, Tensor]:
    """Factors that compute what a rank-2r LoRA does; `S0` and `S` take up the lengths of the columns."""
    A, P, A0, P0 = split(down, up)
    if form is not ScaledDifference:
        return {"lora_A": A, "lora_B": P, "lora_A0": A0, "lora_B0": P0}
    S0 = P0.norm(dim=0).clamp_min(torch.finfo(P0.dtype).tiny)
    return {"lora_A": A, "lora_B": P / S0, "lora_S": S0, "lora_A0": A0, "lora_B0": P0 / S0, "lora_S0": S0.clone()}


def _spectral(key: str, down: Tensor, up: Tensor, present: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a layer whose `up` is `B0 diag(S)`: `S` alone where the live adapter has the vectors already."""
    A0, B0 = (present.get(_sibling(key, name)) for name in ("lora_A0", "lora_B0"))
    if A0 is None or B0 is None or A0.is_meta:  # no start to go by: columns of length 1, the start's values unknown
        S = up.float().norm(dim=0)
        if not S.all():
            raise AdapterFileError(
                f"{key!r} does not tell the vectors of values that have not changed; load the folder with its sidecar."
            )
        return {"lora_S": S, "lora_A0": down, "lora_B0": up / S, "lora_S0": torch.zeros_like(S)}
    if A0.shape != down.shape or not torch.equal(A0.to(down), down):
        raise AdapterFileError(f"{key!r} does not hold the singular vectors of the adapter that it is loaded into.")
    B0 = B0.to(up)
    return {"lora_S": (B0 * up).sum(dim=0) / (B0 * B0).sum(dim=0)}
