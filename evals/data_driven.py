"""Starting every linear layer of a model from data, with llmreg and with PEFT: what the calibration benchmarks time.

llmreg: `calibrate` sums the second moments, `damp` once for each distinct input, `corda` for each layer; or the
principal components once for each distinct input, ranks redistributed over all layers (EVA). PEFT: its own
`preprocess_corda` and `get_eva_state_dict`, unmodified.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmreg.calibration import InputStatistics, Need, Statistics, calibrate
from llmreg.calibration.forward import run_batch, undisturbed
from llmreg.initializers import Factors, SecondMoment, corda, damp, eva, eva_components
from llmreg.initializers.eva_ranks import most_components, redistribute

__all__ = [
    "CORDA_NEED",
    "EVA_NEED",
    "Batches",
    "calibration_functions",
    "corda_factors",
    "eva_factors",
    "linear_layers",
    "moment_of",
    "peft_corda",
    "peft_eva",
    "random_batches",
    "start_corda",
    "start_eva",
]

#: What each method asks of calibration: CorDA the reference's scale of a sample, EVA the mean.
CORDA_NEED = Need(sample_scale="signed_max")
EVA_NEED = Need(mean=True)

Batches = Sequence[dict[str, Tensor]]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, without the output head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def random_batches(
    vocabulary: int, count: int, rows: int, columns: int, *, device: str = "cpu", seed: int = 0
) -> list[dict[str, Tensor]]:
    """`count` batches of (rows, columns) random tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    return [{"input_ids": torch.randint(0, vocabulary, shape, generator=generator).to(device)} for _ in range(count)]


def moment_of(statistics: InputStatistics, *, dtype: torch.dtype | None = None) -> SecondMoment:
    """`C` of one distinct input, exact or as its sketch's factor, with its mean where that was summed."""
    values = statistics.second_moment() if statistics.exact else statistics.low_rank()
    values = values if dtype is None else values.to(dtype)
    known: dict[str, Any] = {"matrix" if statistics.exact else "factor": values}
    mean = None if statistics.sum is None else statistics.mean()
    return SecondMoment(**known, mean=mean, count=statistics.count, trace=statistics.trace / statistics.count)


def calibration_functions(model: nn.Module, batches: Batches, sketch: int) -> dict[str, Callable[[], Any]]:
    """Forward passes alone, just as calibration makes them, and with what CorDA and EVA ask of it, in both forms."""
    layers = linear_layers(model)
    run = run_batch(model)

    def bare() -> None:
        with undisturbed(model):
            for batch in batches:
                run(batch)

    functions: dict[str, Callable[[], Any]] = {"bare": bare}
    for method, need in (("corda", CORDA_NEED), ("eva", EVA_NEED)):
        functions[f"{method} exact"] = partial(calibrate, model, batches, layers, need)
        functions[f"{method} sketch"] = partial(calibrate, model, batches, layers, need, sketch=sketch)
    return functions


# -- llmreg -----------------------------------------------------------------------------------------------------


def start_corda(
    model: nn.Module,
    batches: Iterable[Any],
    rank: int,
    *,
    sketch: int | None = None,
    mode: Literal["ipm", "kpm"] = "ipm",
) -> dict[str, Factors]:
    """CorDA's factors of every linear layer, from data to factors."""
    layers = linear_layers(model)
    return corda_factors(layers, calibrate(model, batches, layers, CORDA_NEED, sketch=sketch), rank, mode=mode)


def corda_factors(
    layers: dict[str, nn.Linear], statistics: Statistics, rank: int, *, mode: Literal["ipm", "kpm"] = "ipm"
) -> dict[str, Factors]:
    """The decomposition alone."""
    factors = {}
    for names, part in statistics.groups():
        moment = damp(moment_of(part), overwrite=True)
        for name in names:
            factors[name] = corda(layers[name].weight.detach(), rank, 1.0, moment, mode=mode)
    return factors


def start_eva(
    model: nn.Module, batches: Iterable[Any], rank: int, *, rho: float = 2.0, sketch: int | None = None
) -> dict[str, Factors]:
    """EVA's factors of every linear layer that is left a rank, from data to factors."""
    layers = linear_layers(model)
    return eva_factors(layers, calibrate(model, batches, layers, EVA_NEED, sketch=sketch), rank, rho)


def eva_factors(
    layers: dict[str, nn.Linear], statistics: Statistics, rank: int, rho: float = 2.0
) -> dict[str, Factors]:
    """The components of each distinct input, ranks redistributed, and the factors."""
    groups = [names for names, _ in statistics.groups()]
    ranks = dict.fromkeys(layers, rank)
    most = most_components(ranks, rho, groups)
    components = {}
    for names, part in statistics.groups():
        found = eva_components(moment_of(part), most[names[0]])
        components |= dict.fromkeys(names, found)
    chosen = redistribute({name: components[name].ratios for name in layers}, ranks, rho, groups=groups)
    return {
        name: eva(components[name], new_rank, layers[name].out_features)
        for name, new_rank in chosen.items()
        if new_rank
    }


# -- PEFT -------------------------------------------------------------------------------------------------------


def peft_corda(model: nn.Module, batches: Batches, rank: int) -> dict[str, Factors]:
    """`preprocess_corda` with its own defaults, one batch of one row at a time (it takes no other)."""
    _provide_attrs()
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    layers = linear_layers(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )

    def run_model() -> None:
        for batch in batches:
            model(**batch)

    preprocess_corda(model, config, run_model=run_model)
    factors = {}
    for name, layer in layers.items():
        root = layer.eigens.S_WC.sqrt()
        factors[name] = Factors(
            A=root[:, None] * layer.eigens.V_WC.mT, B=layer.eigens.U_WC * root, singular_values=root**2
        )
        del layer.eigens
    return factors


def peft_eva(
    model: nn.Module, batches: Batches, rank: int, forward: Callable[[nn.Module, Any], Any], rho: float = 2.0
) -> dict[str, Tensor]:
    """`get_eva_state_dict` with its own defaults: the components of each layer that is left a rank.

    It goes over the batches again and again until every component has converged, without an end to that; `forward`
    runs the model on one batch and may raise.
    """
    from peft import LoraConfig
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(linear_layers(model)),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
    )
    return get_eva_state_dict(model, batches, config, forward, show_progress_bar=False)


def _provide_attrs() -> None:
    """PEFT's CorDA imports `dataclass` from `attrs`, which it does not require; the standard one does as well."""
    if importlib.util.find_spec("attr") is None and "attr" not in sys.modules:
        module: Any = types.ModuleType("attr")
        module.dataclass = dataclasses.dataclass
        sys.modules["attr"] = module
