"""The config classes of the methods that start from calibration data: CorDA and EVA (EoRA: `eora_config`).

`peft.get_peft_model` wraps the model and leaves such an adapter waiting; `llmreg.initialize` gathers the statistics
and hands them, one distinct layer input at a time (`DataGroup`), to the methods below.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..calibration import InputStatistics, Need
from ..errors import LlmregWarning, RecipeError, UnsupportedError
from ..initializers import (
    EvaComponents,
    Factors,
    allocate_ranks,
    corda,
    damp,
    eva,
    eva_components,
    most_components,
    redistribute,
    scaled_alpha,
    select_covariance,
)
from ..weights import check_finite
from .config import AdditiveConfig
from .convergence import Convergence
from .data_group import DataGroup, DataLayer, second_moment
from .svd_configs import ResidualConfig

__all__ = ["CordaConfig", "DataConfig", "EvaConfig", "is_number"]


@dataclass
class DataConfig(AdditiveConfig):
    """Base of the methods whose start comes from data; see `llmreg.initialize`."""

    NEEDS_DATA: ClassVar[bool] = True
    #: Layers of a live adapter that were left no rank; an adapter of the same settings beside it has none there either.
    removed_layers: ClassVar[frozenset[str]] = frozenset()
    #: `request()` of a live adapter before its start rewrote ranks and targets.
    asked: ClassVar[dict[str, Any] | None] = None

    #: Names that PEFT's own config of the method has for a setting -> what to write here.
    PEFTS_NAMES: ClassVar[dict[str, str]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() & cls.PEFTS_NAMES.keys():
            raise UnsupportedError(
                f"{name} is a setting of PEFT's own {cls.__name__}; llmreg.{cls.__name__} takes "
                f"{cls.PEFTS_NAMES[name]}."
            )
        return super().__new__(cls, *args, **kwargs)

    def request(self) -> dict[str, Any]:
        """The settings that decide a start and where it goes."""
        free = set("inference_mode base_model_name_or_path revision task_type auto_mapping peft_version".split())
        free.add("fan_in_fan_out")  # corrected when it is put on a model
        values = {key: value for key, value in self.to_dict().items() if key not in free}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def redistributes(self) -> bool:
        """Whether the start chooses ranks."""
        return False

    def need(self) -> Need:
        """What calibration must gather."""
        return Need()

    def candidates(self) -> int:
        """On how many sub-sets of the data statistics are gathered separately."""
        return 1

    def stopping_rule(self, ranks: Mapping[str, int]) -> Convergence | None:
        """What may end calibration before its data does; None: nothing."""
        return None

    def survey(self, group: DataGroup) -> Any:
        """What the choice of ranks needs to know of one input; kept until the starts are made."""
        return None

    def new_ranks(self, groups: Sequence[DataGroup], surveys: Sequence[Any]) -> dict[str, int] | None:
        """The rank of every layer, 0 to remove it; None: ranks stay."""
        return None

    def needs_original(self) -> bool:
        """Whether the start needs weights as they were before quantisation."""
        return self.quantizes_residual()

    def new_alpha(self, alpha: float, rank: int, new_rank: int) -> float:
        """The `lora_alpha` of a layer whose rank changes: its scaling stays."""
        return scaled_alpha(alpha, rank, new_rank, self.use_rslora)

    def starts(self, group: DataGroup, survey: Any) -> list[Factors]:
        """The start of each layer of `group`."""
        raise NotImplementedError

    def decompositions(self, group: DataGroup, survey: Any) -> list[Callable[[Tensor], Factors]]:
        """What makes the start of each layer of `group` from a matrix `(out, in)`, where residuals are quantised."""
        raise NotImplementedError

    def start_settings(self, layer: str = "") -> tuple:
        return (self.METHOD, self.seed)

    def start(self, W: Any, rank: int, scaling: float, layer: str = "") -> Factors:
        raise UnsupportedError(f"{self.METHOD} starts from data: call llmreg.initialize.")


@dataclass
class CordaConfig(ResidualConfig, DataConfig):
    """CorDA (arXiv 2406.05223): PiSSA's difference form over components weighed by the layer's inputs.

    `W C_f` is decomposed, `C_f` the damped second moment of the inputs on calibration data; the adapter trains the
    components that matter most there (`ipm`, with data of the task) or least (`kpm`, with data of what is to be kept).
    Wrap the model, then call `llmreg.initialize(trainer)` or `llmreg.initialize(model, dataloader)`.

    Args:
        mode: "ipm" (instruction-previewed, the largest components) or "kpm" (knowledge-preserved, the smallest).
        damping: `C_f = C + damping mean(diag C) I`; doubles until `C_f` is invertible.
        power: 1 weighs by `C_f` as the paper does; 0.5 by its root, which minimises the error on the outputs.
        balance: make `A` and `B` of a component equally long; the paper's are not, `C_f^{-1}` is in `A` alone.
        sample_scale: divide each sample's inputs by "signed_max", `|max x|` (the authors' code), by "abs_max",
            `max |x|` (better scaled where the largest entry is negative), or None.
        covariances: CorDA++'s covariance selection among this many sub-sets of the data; 1 takes all data as one.
            From a secondary source: the formulas were not checked against the paper (`initializers/corda_plus.py`).
        dynamic_ranks: CorDA++'s rank allocation within the parameters of a uniform `r`; from a secondary source too.
        svd, oversample, power_iterations, residual, residual_iterations: as in `PissaConfig`.

    Example:
        >>> CordaConfig(r=16, mode="kpm", target_modules="all-linear").mode
        'kpm'
    """

    mode: Literal["ipm", "kpm"] = field(default="ipm", metadata={"help": "train the largest or smallest components"})
    damping: float = field(default=0.01, metadata={"help": "of the second moment, relative to its mean diagonal"})
    power: float = field(default=1.0, metadata={"help": "weigh by C (1, the paper) or its root (0.5)"})
    balance: bool = field(default=False, metadata={"help": "make both factors of a component equally long"})
    sample_scale: Literal["signed_max", "abs_max"] | None = field(
        default="signed_max", metadata={"help": "what each sample's inputs are divided by"}
    )
    covariances: int = field(default=1, metadata={"help": "CorDA++: select among so many sub-sets of the data"})
    dynamic_ranks: bool = field(default=False, metadata={"help": "CorDA++: allocate ranks by compactness"})

    METHOD: ClassVar[str] = "corda"
    PEFTS_NAMES: ClassVar[dict[str, str]] = {
        "corda_method": "mode='ipm' or mode='kpm'",
        "cache_file": "its statistics through llmreg.initialize(..., cache=...)",
        "covariance_file": "its statistics through llmreg.initialize(..., statistics=...)",
        "use_float16_for_covariance": "sums in float32, or a sketch: llmreg.initialize(..., sketch=...)",
    }

    def redistributes(self) -> bool:
        return self.dynamic_ranks

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("ipm", "kpm"):
            raise UnsupportedError(f"mode must be 'ipm' (largest components) or 'kpm' (smallest), got {self.mode!r}.")
        if not (is_number(self.damping) and 0 < self.damping < float("inf")):
            raise UnsupportedError(f"damping must be a positive number, got {self.damping!r}.")
        if self.power not in (0.5, 1.0):
            raise UnsupportedError(f"power must be 1 (the paper's) or 0.5, got {self.power!r}.")
        if self.sample_scale not in ("signed_max", "abs_max", None):
            raise UnsupportedError(f"sample_scale must be 'signed_max', 'abs_max' or None, got {self.sample_scale!r}.")
        _check_flags(self, "balance", "dynamic_ranks")
        if not isinstance(self.covariances, int) or isinstance(self.covariances, bool) or self.covariances < 1:
            raise UnsupportedError(f"covariances must be a positive integer, got {self.covariances!r}.")

    def need(self) -> Need:
        return Need(sample_scale=self.sample_scale)

    def candidates(self) -> int:
        return self.covariances

    def start_settings(self, layer: str = "") -> tuple:
        chosen = (self.mode, self.damping, self.power, self.balance, self.sample_scale, self.covariances)
        return (*super().start_settings(layer), *chosen, self.dynamic_ranks)

    def survey(self, group: DataGroup) -> Any:
        """By layer: all singular values of `W C_f`, and which covariance is used."""
        if self.covariances == 1 and not self.dynamic_ranks:
            return None
        moments = [self._damped(part, group) for part in group.parts]
        return {layer.name: self._spectrum(layer, moments) for layer in group.layers}

    def _spectrum(self, layer: DataLayer, moments: list[Any]) -> tuple[Tensor, int]:
        W = layer.weight()
        check_finite(W, layer.name)
        spectra = [torch.linalg.svdvals(moment.like(W).weighted(W, 1.0).dense()).cpu() for moment in moments]
        chosen = select_covariance(spectra, layer.rank, layer.shape[0])
        return spectra[chosen], chosen

    def new_ranks(self, groups: Sequence[DataGroup], surveys: Sequence[Any]) -> dict[str, int] | None:
        if not self.dynamic_ranks:
            return None
        spectra = {name: spectrum for survey in surveys for name, (spectrum, _) in survey.items()}
        shapes = {layer.name: layer.shape for group in groups for layer in group.layers}
        requested = {layer.rank for group in groups for layer in group.layers}
        if len(requested) > 1:
            raise UnsupportedError(
                "dynamic_ranks allocates the parameters of a uniform rank, and rank_pattern asks for several "
                f"({sorted(requested)}); leave rank_pattern out."
            )
        rank = requested.pop()
        return allocate_ranks(spectra, shapes, rank)

    def starts(self, group: DataGroup, survey: Any) -> list[Factors]:
        decompositions = self.decompositions(group, survey)
        return [decompose(layer.weight()) for layer, decompose in zip(group.layers, decompositions, strict=True)]

    def decompositions(self, group: DataGroup, survey: Any) -> list[Callable[[Tensor], Factors]]:
        """As in `DataConfig`; layers of one input share its damped moment."""
        used = {layer.name: 0 if survey is None else survey[layer.name][1] for layer in group.layers}
        moments = {index: self._damped(group.parts[index], group) for index in set(used.values())}
        return [functools.partial(self._start, layer, moments[used[layer.name]]) for layer in group.layers]

    def _damped(self, part: InputStatistics | None, group: DataGroup) -> Any:
        """Of an input that no token reached: the identity, which makes PiSSA's components of CorDA's."""
        moment = torch.eye(group.layers[0].shape[1]) if part is None else second_moment(part)
        return damp(moment, self.damping, dtype=torch.float32, device=group.device, overwrite=True)

    def _start(self, layer: DataLayer, moment: Any, W: Tensor) -> Factors:
        return corda(
            W,
            layer.rank,
            layer.scaling,
            moment,
            mode=self.mode,
            power=self.power,
            balance=self.balance,
            **self.svd_options(),
        )


@dataclass
class EvaConfig(DataConfig):
    """EVA (arXiv 2410.07170): a plain LoRA whose `A` starts at the principal components of the layer's inputs.

    `B` starts at zero and the base is untouched. With `rho > 1` ranks are redistributed by explained variance: their
    sum stays, a layer may get none and is then left out. Wrap the model, then call `llmreg.initialize`. Settings are
    this class's own; `peft.EvaConfig` belongs to PEFT's `LoraConfig(init_lora_weights="eva")`.

    Args:
        rho: a layer gets at most `rho r` ranks; 1 leaves ranks as they are.
        centered: components of the covariance (the authors' code), or with False of the second moment (the theory).
        whiten: divide each component by the root of its singular value (the authors' option).
        tau: stop reading data once no component of any layer turned by more than this cosine between two looks (the
            reference: 0.99); None reads all of it, whose result does not depend on the order of batches.
        use_label_mask: count only tokens whose label is not -100.
        adjust_scaling: keep each layer's `lora_alpha / r` (under rsLoRA `lora_alpha / sqrt(r)`) when its rank changes;
            False keeps `lora_alpha`, as the authors' code does.

    Example:
        >>> EvaConfig(r=16, target_modules="all-linear").rho
        2.0
    """

    rho: float = field(default=2.0, metadata={"help": "a layer gets at most rho r ranks; 1: ranks stay"})
    centered: bool = field(default=True, metadata={"help": "components of the covariance, not the second moment"})
    whiten: bool = field(default=False, metadata={"help": "divide components by the root of their singular value"})
    tau: float | None = field(default=None, metadata={"help": "cosine at which calibration may stop early"})
    use_label_mask: bool = field(default=True, metadata={"help": "count only tokens with a label"})
    adjust_scaling: bool = field(default=True, metadata={"help": "keep lora_alpha / r when a rank changes"})

    METHOD: ClassVar[str] = "eva"
    FORM: ClassVar[str] = "projection"
    SAVED_RANK: ClassVar[int] = 1
    PEFTS_NAMES: ClassVar[dict[str, str]] = {
        "adjust_scaling_factors": "adjust_scaling",
        "label_mask_value": "use_label_mask alone: tokens of label -100 do not count",
    }
    ALSO_SUPPORTED: ClassVar[frozenset[str]] = frozenset({"lora_dropout"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.rho) and 1 <= self.rho < float("inf")):
            raise UnsupportedError(
                f"rho must be a number >= 1 (1 keeps all ranks, the paper takes 2), got {self.rho!r}."
            )
        _check_flags(self, "centered", "whiten", "use_label_mask", "adjust_scaling")
        if self.tau is not None and not (is_number(self.tau) and 0 < self.tau <= 1):
            raise UnsupportedError(f"tau is a cosine in (0, 1], for example 0.99, or None, got {self.tau!r}.")
        if not (is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise UnsupportedError(f"lora_dropout is a share in [0, 1), got {self.lora_dropout!r}.")

    def redistributes(self) -> bool:
        return self.rho > 1

    def need(self) -> Need:
        return Need(mean=self.centered, use_label_mask=self.use_label_mask)

    def start_settings(self, layer: str = "") -> tuple:
        chosen = (self.rho, self.centered, self.whiten, self.tau, self.use_label_mask, self.adjust_scaling)
        return (*super().start_settings(layer), *chosen)

    def stopping_rule(self, ranks: Mapping[str, int]) -> Convergence | None:
        return None if self.tau is None else Convergence(self.tau, dict(ranks), self._components)

    def survey(self, group: DataGroup) -> EvaComponents | None:
        """As many components of the input as any of its layers may get."""
        part = group.parts[0]
        if part is None:
            return None
        most = most_components({layer.name: layer.rank for layer in group.layers}, self.rho)
        wanted = max(min(most[layer.name], *layer.shape) for layer in group.layers)
        columns = part.low_rank().shape[1] if not part.exact else wanted
        if columns < wanted:
            raise RecipeError(
                f"a sketch of {columns} columns cannot tell the {wanted} components that layer "
                f"{group.layers[0].name!r} may get; give sketch={4 * wanted} or more, or exact=True"
            )
        if part.count - self.centered < wanted:
            warnings.warn(
                f"{part.count} tokens cannot tell the {wanted} components that layer {group.layers[0].name!r} may get; "
                "calibrate on more data.",
                LlmregWarning,
                stacklevel=2,
            )
        return self._components(part, wanted, group.device)

    def _components(self, part: InputStatistics, wanted: int, device: Any = None) -> EvaComponents:
        moment = second_moment(part, mean=self.centered, device=device)
        return eva_components(moment, min(wanted, part.dim), centered=self.centered, seed=self.seed)

    def new_ranks(self, groups: Sequence[DataGroup], surveys: Sequence[Any]) -> dict[str, int] | None:
        """By explained variance; a layer that no token reached (an expert) explains nothing and gets no rank."""
        ranks = {layer.name: layer.rank for group in groups for layer in group.layers}
        if self.rho == 1:
            unreached = {layer.name for group in groups if group.parts[0] is None for layer in group.layers}
            return {name: 0 if name in unreached else rank for name, rank in ranks.items()} if unreached else None
        ratios = {
            layer.name: torch.zeros(0) if survey is None else survey.ratios[: min(layer.shape)]
            for group, survey in zip(groups, surveys, strict=True)
            for layer in group.layers
        }
        shared = [[layer.name for layer in group.layers] for group in groups]
        return redistribute(ratios, ranks, self.rho, groups=shared)

    def new_alpha(self, alpha: float, rank: int, new_rank: int) -> float:
        return super().new_alpha(alpha, rank, new_rank) if self.adjust_scaling else alpha

    def starts(self, group: DataGroup, survey: Any) -> list[Factors]:
        return [eva(survey, layer.rank, layer.shape[0], whiten_components=self.whiten) for layer in group.layers]


def _check_flags(config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise UnsupportedError(f"{name} must be True or False, got {getattr(config, name)!r}.")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
