"""Starting an adapter from calibration statistics: ranks first, then the factors, one distinct input at a time.

A moment is damped (or its components found) once for all layers that share the input, and let go before the next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..calibration import InputStatistics, Need, Statistics
from ..errors import RecipeError, UnsupportedError, WeightError
from ..initializers import Factors
from ..progress import track
from ..weights import OriginalWeights, check_finite, gathered, read_weight, storage_of
from .data_configs import DataConfig
from .data_group import DataGroup, DataLayer
from .layer import AdditiveLayer, layers_of
from .loading import current_statistics
from .quantized_start import forget_records, set_residual, share_residual
from .rollback import unchanged_on_error
from .start import broadcast_start, decomposing_device, is_distributed

__all__ = ["start_from_data", "start_from_statistics", "waiting_adapters", "waiting_layers"]


@torch.no_grad()
def start_from_data(tuner: Any, adapter_name: str) -> None:
    """Start a new adapter from a sibling of the same settings (TRL's reference copy asks for no data), from the
    surrounding `use_statistics`, or let it wait for `llmreg.initialize`."""
    for layer in layers_of(tuner.model, adapter_name).values():
        layer.wait(adapter_name)
    sibling = _started_sibling(tuner, adapter_name)
    if sibling is not None:
        _copy_start(tuner, adapter_name, sibling)
    statistics = current_statistics()
    if statistics and waiting_layers(tuner.model, adapter_name):
        start_from_statistics(tuner, adapter_name, statistics)


def waiting_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The layers of `model` on which an adapter waits for its start, by name."""
    return {name: layer for name, layer in layers_of(model, adapter_name).items() if adapter_name in layer.waiting}


def waiting_adapters(model: nn.Module) -> list[str]:
    """The adapters that wait for their start on some layer."""
    names: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, AdditiveLayer):
            names.update(dict.fromkeys(sorted(module.waiting)))
    return list(names)


@torch.no_grad()
def start_from_statistics(tuner: Any, adapter_name: str, statistics: Sequence[Statistics]) -> dict[str, int]:
    """Give every layer on which `adapter_name` waits its rank and its factors; the config records what was chosen.

    Args:
        tuner: the tuner, whose `model` is the base with its adapters injected.
        statistics: of the layers' inputs, by the layers' names in the base; one for each sub-set of the data.

    Returns:
        The rank of each layer, in the order of the model; 0 where the adapter was removed.

    Raises:
        RecipeError: the statistics lack a layer.
        WeightError, UnsupportedError: what the method's initialiser refuses; names the layer. Model and config are then
            as they were, and the adapter waits.
    """
    config: DataConfig = tuner.peft_config[adapter_name]
    if any(layer.lora_A[adapter_name].weight.is_meta for layer in waiting_layers(tuner.model, adapter_name).values()):
        raise UnsupportedError(
            f"The factors of {adapter_name!r} are on the meta device and cannot be given a start; leave "
            "low_cpu_mem_usage=True out, which is for adapters that are loaded."
        )
    if len(statistics) != config.candidates():
        raise RecipeError(
            f"{len(statistics)} sets of statistics were given and {config.METHOD} takes {config.candidates()} here; "
            "put them together with Statistics.merge, or set covariances to their number (CorDA)."
        )
    if config.quantizes_residual():
        forget_records(tuner)
    before = dict(vars(config))
    try:
        with unchanged_on_error(tuner):
            return _start(tuner, adapter_name, config, statistics)
    except BaseException:
        config.__dict__.update(before)
        for layer in waiting_layers(tuner.model, adapter_name).values():
            layer.wait(adapter_name)  # references came back, values did not
        raise


def _start(tuner: Any, adapter_name: str, config: DataConfig, statistics: Sequence[Statistics]) -> dict[str, int]:
    layers = waiting_layers(tuner.model, adapter_name)
    weights = _original_weights(config, tuner.model, layers)
    members = _groups(layers, statistics)

    def group_of(parts: tuple[InputStatistics | None, ...], names: Sequence[str]) -> DataGroup:
        return _data_group(adapter_name, config, layers, parts, names, weights)

    groups = [group_of(parts, names) for parts, names in members]
    surveys = []
    for group in track(groups, f"{config.method}: looking at inputs"):
        with _whole(group, layers):
            surveys.append(config.survey(group))
    ranks = _agreed(config.new_ranks(groups, surveys))
    if ranks is not None:
        _set_ranks(tuner, adapter_name, config, layers, ranks)
        layers = {name: layer for name, layer in layers.items() if ranks[name]}
        members = [(parts, [name for name in names if ranks[name]]) for parts, names in members]
    for (parts, names), survey in track(list(zip(members, surveys, strict=True)), f"{config.method}: decomposing"):
        if names:
            _set_starts(adapter_name, config, group_of(parts, names), survey, layers, weights)
    final = {name: layer.r[adapter_name] for name, layer in layers.items()}
    return final if ranks is None else {name: final.get(name, 0) for name in ranks}


def _remove_layer(tuner: Any, adapter_name: str, name: str) -> None:
    """Take an adapter off one layer; what no adapter is left on becomes the base's own layer again."""
    layer = tuner.model.get_submodule(name)
    active, layer._active_adapter = layer._active_adapter, []  # or PEFT would activate another adapter in its place
    layer.delete_adapter(adapter_name)
    layer._active_adapter = active
    if not layer.r:
        parent, _, child = name.rpartition(".")
        setattr(tuner.model.get_submodule(parent), child, layer.get_base_layer())
        tuner.targeted_module_names = [other for other in tuner.targeted_module_names if other != name]


def _keep_targets(config: DataConfig, names: Sequence[str], model: nn.Module) -> None:
    """Let the config's targets be exactly the layers of `model` called `names`."""
    others = {name for name, _ in model.named_modules()} - set(names)
    ends = {other[cut + 1 :] for other in others for cut, letter in enumerate(other) if letter == "."}
    if not ends.isdisjoint(names):  # PEFT takes a listed name for every layer whose name ends like it
        config.target_modules = "|".join(name.replace(".", r"\.") for name in names)
    else:
        config.target_modules = set(names)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


# -- siblings -----------------------------------------------------------------------------------------------------


def _started_sibling(tuner: Any, adapter_name: str) -> str | None:
    config = tuner.peft_config[adapter_name]
    for name, other in tuner.peft_config.items():
        if name == adapter_name or type(other) is not type(config):
            continue
        layers = layers_of(tuner.model, name)
        started = layers and not any(name in layer.waiting for layer in layers.values())
        if started and _same_request(config, other):
            return name
    return None


def _same_request(config: DataConfig, other: DataConfig) -> bool:
    """Whether both were asked for alike: as the user gave them, or as a start has rewritten one (TRL hands that on)."""
    return config.request() == other.request() or config.request() == (other.asked or other.request())


def _copy_start(tuner: Any, adapter_name: str, sibling: str) -> None:
    """Ranks and start of a sibling; where it redistributed ranks and has none, this adapter has none either."""
    config: DataConfig = tuner.peft_config[adapter_name]
    layers = layers_of(tuner.model, adapter_name)
    shared = {name: layer for name, layer in layers.items() if layer.form(sibling)}
    ranks = {name: layer.r[sibling] for name, layer in shared.items()}
    absent = layers.keys() - shared.keys()
    if not absent <= tuner.peft_config[sibling].removed_layers:
        return
    ranks |= dict.fromkeys(absent, 0)
    if any(rank != layers[name].r[adapter_name] for name, rank in ranks.items()):
        _set_ranks(tuner, adapter_name, config, layers, ranks)
    for layer in shared.values():
        layer.take_dtypes(adapter_name, sibling)
        layer.set_start(adapter_name, layer.start(sibling))
    if config.quantizes_residual():
        share_residual(tuner, adapter_name, start=False)


# -- groups -------------------------------------------------------------------------------------------------------


def _groups(
    layers: dict[str, Any], statistics: Sequence[Statistics]
) -> list[tuple[tuple[InputStatistics | None, ...], list[str]]]:
    """Layers that share all their statistics, in the order of the model."""
    found: dict[tuple[int, ...] | str, tuple[tuple[InputStatistics | None, ...], list[str]]] = {}
    for name in layers:
        parts = tuple(one.get(name) for one in statistics)
        for one, part in zip(statistics, parts, strict=True):
            if part is None and name not in one.report.unreached:
                raise RecipeError(
                    f"the statistics lack layer {name!r}: they are of another model or of other targets; calibrate "
                    "this model with the layers that the adapter targets"
                )
        reached = all(part is not None for part in parts)
        key: tuple[int, ...] | str = tuple(map(id, parts)) if reached else name
        found.setdefault(key, (parts, []))[1].append(name)
    return list(found.values())


def _data_group(
    adapter_name: str,
    config: DataConfig,
    layers: dict[str, Any],
    parts: tuple[InputStatistics | None, ...],
    names: Sequence[str],
    weights: OriginalWeights | None,
) -> DataGroup:
    device = decomposing_device()
    members = tuple(_data_layer(name, layers[name], adapter_name, config, weights, device) for name in names)
    for part in parts:
        if part is not None and part.dim != members[0].shape[1]:
            raise RecipeError(
                f"the statistics of layer {names[0]!r} are of {part.dim} inputs, and it has {members[0].shape[1]}: "
                "they are of another model; calibrate this one"
            )
        if part is not None and not _serves(part.need, config.need()):
            raise RecipeError(
                f"the statistics of layer {names[0]!r} were gathered as {part.need}, and {config.METHOD} needs "
                f"{config.need()}; gather them with config.need()"
            )
    return DataGroup(parts, members, device)


def _serves(gathered: Need, needed: Need) -> bool:
    same = (gathered.sample_scale, gathered.use_label_mask) == (needed.sample_scale, needed.use_label_mask)
    return same and (gathered.mean or not needed.mean)


def _data_layer(
    name: str, layer: Any, adapter_name: str, config: DataConfig, weights: OriginalWeights | None, device: Any
) -> DataLayer:
    base = layer.get_base_layer()

    def original() -> Tensor:
        if weights is None:
            raise UnsupportedError(f"layer {name!r} has no full-precision weight to read.")
        return weights.read(base, name, device=device)

    stored = functools.partial(read_weight, base, name=name, device=device)

    return DataLayer(
        name=name,
        shape=(layer.out_features, layer.in_features),
        rank=layer.r[adapter_name],
        scaling=layer.scaling[adapter_name],
        weight=original if config.quantizes_residual() else stored,
        original=original,
    )


def _original_weights(config: DataConfig, model: nn.Module, layers: dict[str, Any]) -> OriginalWeights | None:
    """What reads weights as they were before quantisation; None where the method does not ask for them."""
    if not config.needs_original():
        return None
    for name, layer in layers.items():
        if not storage_of(layer.get_base_layer()).quantized:
            raise UnsupportedError(
                f"{config.METHOD} makes up for quantisation, and layer {name!r} is not quantised; load the model with "
                "a BitsAndBytesConfig (nf4 or int8), or choose another method."
            )
    return OriginalWeights(model)


# -- what they get ------------------------------------------------------------------------------------------------


def _set_ranks(
    tuner: Any, adapter_name: str, config: DataConfig, layers: dict[str, Any], ranks: dict[str, int]
) -> None:
    removed = [name for name, rank in ranks.items() if rank == 0]
    if len(removed) == len(ranks):
        raise WeightError("No layer is left with a rank; calibrate on more data, or choose other targets.")
    # Every layer gets an entry of its own; the user's patterns, which were read already, might match before it.
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, layer in layers.items():
        before, after = layer.r[adapter_name], ranks[name]
        if after == 0:
            continue
        alpha = layer.lora_alpha[adapter_name]
        if after != before:
            alpha = config.new_alpha(alpha, before, after)
            layer.resize(adapter_name, after, alpha)
        config.accept_rank(name, (layer.out_features, layer.in_features), after, alpha)
    if removed:
        for name in removed:
            _remove_layer(tuner, adapter_name, name)
        config.removed_layers = config.removed_layers | frozenset(removed)  # type: ignore[misc]
        _keep_targets(config, [name for name, rank in ranks.items() if rank], tuner.model)


def _set_starts(
    adapter_name: str,
    config: DataConfig,
    group: DataGroup,
    survey: Any,
    layers: dict[str, Any],
    weights: OriginalWeights | None,
) -> None:
    if config.quantizes_residual() and weights is not None:
        for one, decompose in zip(group.layers, config.decompositions(group, survey), strict=True):
            layer = layers[one.name]
            set_residual(layer, adapter_name, one.name, one.weight(), decompose, weights, config.residual_iterations)
        return
    with _whole(group, layers):
        try:
            starts: list[Factors] = config.starts(group, survey)
        except (WeightError, UnsupportedError) as error:
            for layer in group.layers if isinstance(error, WeightError) else ():  # most often NaN or Inf
                check_finite(layer.weight(), layer.name)
            raise type(error)(f"{_named(group)}: {error}") from error
    for layer, start in zip(group.layers, starts, strict=True):
        layers[layer.name].set_start(adapter_name, start)
        broadcast_start(layers[layer.name], adapter_name)


def _whole(group: DataGroup, layers: dict[str, Any]) -> AbstractContextManager:
    return gathered([layers[layer.name].get_base_layer() for layer in group.layers])


def _named(group: DataGroup) -> str:
    names = [layer.name for layer in group.layers]
    return f"layer {names[0]!r}" if len(names) == 1 else f"layers {names[0]!r} to {names[-1]!r}"


def _agreed(ranks: dict[str, int] | None) -> dict[str, int] | None:
    """Rank 0's choice: sums that agree to rounding could order two components differently."""
    if not is_distributed():
        return ranks
    common = [ranks]
    dist.broadcast_object_list(common, src=0)
    return common[0]
