"""The config classes of the additive methods: what `peft.get_peft_model` and TRL's `peft_config=` take."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..errors import UnsupportedError
from ..initializers import Factors, pissa, rank_of_energy, singular_components, sliced_components
from .config import AdditiveConfig, only
from .registry import QUANTIZED_RESIDUAL, SVFIT_TINY

__all__ = ["DecomposedConfig", "PissaConfig", "ResidualConfig", "SorsaConfig", "SvfitConfig"]

#: A layer's frozen vectors may take this share of its weight before consent is asked for.
LARGE = 0.25


@dataclass
class DecomposedConfig(AdditiveConfig):
    """Base of the methods that start from a truncated SVD.

    Args:
        svd: "randomized" (default) or "exact" truncated SVD of each targeted weight.
        oversample: extra columns of the randomised sketch; `None` = chosen from the rank.
        power_iterations: passes of the randomised SVD; `None` = default of `llmreg.linalg.truncated_svd`.
    """

    svd: Literal["randomized", "exact"] = field(default="randomized", metadata={"help": "how to decompose"})
    oversample: int | None = field(default=None, metadata={"help": "extra columns of the randomised sketch"})
    power_iterations: int | None = field(default=None, metadata={"help": "passes of the randomised SVD"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.svd not in ("randomized", "exact"):
            raise UnsupportedError(f"svd must be 'randomized' or 'exact', got {self.svd!r}.")

    def start_settings(self, layer: str = "") -> tuple:
        return (self.METHOD, self.svd, self.oversample, self.power_iterations, self.seed)

    def svd_options(self) -> dict[str, Any]:
        names = ("svd", "oversample", "power_iterations", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class ResidualConfig(DecomposedConfig):
    """Base of the methods that can train beside a quantised residual (see `quantized_start`).

    Args:
        residual: "difference" (default) leaves the base as it is. "quantized" is QPiSSA (arXiv 2404.02948): the base
            layers, loaded in nf4, fp4 or int8, come to hold what the adapter does not carry, read from the
            full-precision checkpoint and quantised as they are. The model then starts closer to the full-precision one
            than QLoRA's, but a disabled adapter is no base and no reference any more: that is refused.
        residual_iterations: times that residual and adapter are fitted to each other; the best is kept (paper: 5).
    """

    residual: Literal["difference", "quantized"] = field(
        default="difference", metadata={"help": "quantized: the base comes to hold what the adapter does not (QPiSSA)"}
    )
    residual_iterations: int = field(default=5, metadata={"help": "how often the quantised residual is fitted"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual not in ("difference", "quantized"):
            raise UnsupportedError(f"residual must be 'difference' or 'quantized', got {self.residual!r}.")
        number = self.residual_iterations
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UnsupportedError(
                f"residual_iterations must be an integer of at least 1 (the paper's is 5), got {number!r}."
            )

    def quantizes_residual(self) -> bool:
        return self.residual == "quantized"

    def form(self) -> str:
        return self.FORM.replace("difference", "product") if self.quantizes_residual() else self.FORM

    def saved_rank(self) -> int:
        return 1 if self.quantizes_residual() else self.SAVED_RANK

    def saved_config(self) -> LoraConfig:
        if not self.quantizes_residual():
            return super().saved_config()
        config = copy.copy(self)
        config.peft_type = QUANTIZED_RESIDUAL
        return config

    def start_settings(self, layer: str = "") -> tuple:
        quantized = ("quantized residual", self.residual_iterations) if self.quantizes_residual() else ()
        return (*super().start_settings(layer), *quantized)


@dataclass
class PissaConfig(ResidualConfig):
    """PiSSA (arXiv 2404.02948) over an untouched base: `peft.get_peft_model(base, PissaConfig(r=16, ...))`.

    Trains `A`, `B`, which start at the principal components, and adds `s (B A - B0 A0) x`.

    Args:
        svd: "randomized" (default) or "exact" truncated SVD of each targeted weight.
        oversample: extra columns of the randomised sketch; `None` = chosen from the rank.
        power_iterations: passes of the randomised SVD; `None` = default of `llmreg.linalg.truncated_svd`.
        residual, residual_iterations: "quantized" is QPiSSA, see `ResidualConfig`.

    Example:
        >>> PissaConfig(r=16, target_modules="all-linear").lora_alpha
        16
    """

    METHOD: ClassVar[str] = "pissa"

    def start(self, W: Any, rank: int, scaling: float, layer: str = "") -> Factors:
        return pissa(W, rank, scaling, **self.svd_options())


@dataclass
class SorsaConfig(ResidualConfig):
    """SORSA (arXiv 2409.00055): trains `A = V^T`, `S` and `B = U` of the principal part, kept near orthonormal.

    Adds `s (B diag(S) A - B0 diag(S0) A0) x` to an untouched `W x`; `s = 1` unless `lora_alpha` says otherwise. The
    orthonormal regulariser is applied by `llmreg.RegularizerCallback` (a recipe brings it along); training without it
    is refused unless `weights=None`.

    Args:
        weights: the regulariser's weight gamma (paper: 4e-4); `None` takes only the start.
        squared: square the Frobenius norms, `||A A^T - I||_F^2`: smooth, but another method than the paper's.
        reduction: "mean" over all factors (the authors' code) or "sum" over layers (the paper's formula).
        decoupled: a step of its own beside the optimizer's, `gamma lr_t / lr_peak` long (the paper's update), in the
            manner of decoupled weight decay; False adds the term to the loss, where Adam's moments mix it in.
        svd, oversample, power_iterations, residual, residual_iterations: as in `PissaConfig`.

    Example:
        >>> SorsaConfig(r=16, target_modules="all-linear").weights
        0.0004
    """

    weights: float | None = field(default=4e-4, metadata={"help": "weight gamma of the orthonormal regulariser"})
    squared: bool = field(default=False, metadata={"help": "square the regulariser's norms"})
    reduction: Literal["mean", "sum"] = field(default="mean", metadata={"help": "over factors, or sum over layers"})
    decoupled: bool = field(default=True, metadata={"help": "a step of its own, not a term of the loss"})

    METHOD: ClassVar[str] = "sorsa"
    FORM: ClassVar[str] = "scaled difference"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and not (isinstance(self.weights, int | float) and 0 <= self.weights < 1e6):
            raise UnsupportedError(f"weights must be a number >= 0, or None for the start only, got {self.weights!r}.")
        if self.reduction not in ("mean", "sum"):
            raise UnsupportedError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")

    def needs_regularizer(self) -> bool:
        return bool(self.weights)

    def regularizers(self) -> list[Any]:
        from ..regularizers import OrthonormalRegularizer

        if not self.needs_regularizer():
            return []
        assert self.weights is not None
        return [OrthonormalRegularizer(self.weights, self.squared, self.reduction, self.decoupled)]

    def start(self, W: Any, rank: int, scaling: float, layer: str = "") -> Factors:
        parts = singular_components(W, rank, **self.svd_options())
        if self.quantizes_residual():  # the adapter's `s B diag(S) A` is itself a part of `W` then
            return Factors(parts.A, parts.B, parts.singular_values / scaling)
        return parts


@dataclass
class SvfitConfig(DecomposedConfig):
    """SVFit (arXiv 2409.05926): trains only the change of `r` singular values, `U diag(S) V^T x` added to `W x`.

    `U` and `V` are frozen and kept in the base's dtype; `S` starts at zero and is float32. It wants a learning rate
    far above LoRA's: start at 5e-2, and try 1e-2 and 1e-1 (`evals/sweep.py`). The paper has no alpha: `s = 1` unless
    `lora_alpha` says otherwise.

    Args:
        r: components a layer; default 64. Of a layer in `slices`, all slices together.
        energy: choose each layer's rank as the least that holds this share instead (paper: 0.99), and record it in
            `rank_pattern`; needs all singular values, so `svd` is "exact". At 0.99 the rank is near full.
        energy_measure: of the "squares" of the singular values, or "nuclear": of their sum. The paper does not say.
        allow_large: consent to frozen vectors above a quarter of a layer's size, which `energy` may choose.
        slices: number of equal row blocks to decompose separately, by layer name as in `rank_pattern`: a fused
            projection is several matrices, `{"c_attn": 3}`.
        storage: save as plain "lora", or "tiny": the values alone (kilobytes), under a peft type that plain PEFT
            refuses; loading recomputes the vectors and checks base, singular values and vectors first.
        svd, oversample, power_iterations: as in `PissaConfig`.

    Example:
        >>> SvfitConfig(r=32, target_modules="all-linear").to_lora_config().r
        32
    """

    r: int | None = field(default=None, metadata={"help": "components a layer; default 64, or chosen by energy"})
    energy: float | None = field(default=None, metadata={"help": "share that the chosen rank holds"})
    energy_measure: Literal["squares", "nuclear"] = field(default="squares", metadata={"help": "what it is a share of"})
    allow_large: bool = field(default=False, metadata={"help": "allow vectors above a quarter of a layer"})
    slices: dict[str, int] = field(default_factory=dict, metadata={"help": "row blocks to decompose separately"})
    storage: Literal["lora", "tiny"] = field(default="lora", metadata={"help": "what save_pretrained writes"})

    METHOD: ClassVar[str] = "svfit"
    FORM: ClassVar[str] = "spectral"
    SAVED_RANK: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self._check_energy()
        if self.r is None:
            self.r = 64 if self.energy is None else 1
        if self.energy is not None:
            self.svd = "exact"
        super().__post_init__()
        for pattern, number in (self.slices or {}).items():
            if not isinstance(number, int) or number < 2:
                raise UnsupportedError(f"slices[{pattern!r}] must be an integer above 1, got {number!r}.")
        if self.storage not in ("lora", "tiny"):
            raise UnsupportedError(f"storage must be 'lora' or 'tiny', got {self.storage!r}.")

    def _check_energy(self) -> None:
        if self.energy_measure not in ("squares", "nuclear"):
            raise UnsupportedError(f"energy_measure must be 'squares' or 'nuclear', got {self.energy_measure!r}.")
        if self.energy is None:
            return
        if not isinstance(self.energy, int | float) or not 0 < self.energy <= 1:
            raise UnsupportedError(f"energy is a share in (0, 1], for example 0.99, got {self.energy!r}.")
        if self.r is not None and self.r != 1 and not self.rank_pattern:
            raise UnsupportedError(f"energy={self.energy} chooses each layer's rank; leave r={self.r} out.")
        alone = sorted((self.alpha_pattern or {}).keys() - (self.rank_pattern or {}).keys())
        if alone:
            raise UnsupportedError(
                f"energy={self.energy} chooses each layer's rank at one lora_alpha / r for all; leave {alone[0]!r} out "
                "of alpha_pattern, or give its rank in rank_pattern."
            )

    def saved_config(self) -> LoraConfig:
        if self.storage == "lora":
            return super().saved_config()
        config = copy.copy(self)
        config.peft_type = SVFIT_TINY
        return config

    def chooses_rank(self, layer: str) -> bool:
        ranks = self.rank_pattern or {}
        return self.energy is not None and get_pattern_key(list(ranks), layer) not in ranks

    def slices_of(self, layer: str) -> int:
        """In how many row blocks a layer is decomposed."""
        slices = self.slices or {}
        return slices.get(get_pattern_key(list(slices), layer), 1)

    def check_layer(self, layer: str, shape: tuple[int, int], rank: int) -> None:
        slices = self.slices_of(layer)
        if shape[0] % slices:
            raise UnsupportedError(
                f"Layer {layer!r} has {shape[0]} outputs, which {slices} equal slices do not divide; correct slices."
            )
        if slices == 1 or self.chooses_rank(layer):
            return
        largest = min(shape[0] // slices, shape[1])
        if rank % slices or rank // slices > largest:
            raise UnsupportedError(
                f"Rank {rank} does not fit layer {layer!r}: its {slices} slices are {shape[0] // slices} x {shape[1]} "
                f"and share it, so it must be a multiple of {slices} and at most {slices * largest}; set rank_pattern."
            )

    def start_settings(self, layer: str = "") -> tuple:
        by_energy = self.chooses_rank(layer) or (self.energy is not None and only(layer) in (self.rank_pattern or {}))
        chosen = (self.energy, self.energy_measure) if by_energy else ()
        return (*super().start_settings(layer), self.slices_of(layer), *chosen)

    def start(self, W: Any, rank: int, scaling: float, layer: str = "") -> Factors:
        slices = self.slices_of(layer)
        if self.chooses_rank(layer):
            rank = slices * self.rank_for(W, slices)
        if slices == 1:
            return singular_components(W, rank, **self.svd_options())
        return sliced_components(W, rank, slices, **self.svd_options())

    def rank_for(self, W: Any, slices: int = 1) -> int:
        """The rank that `energy` chooses for a weight `(out, in)`: of its slices the largest."""
        assert self.energy is not None
        parts = W.reshape(slices, -1, W.shape[-1])
        spectra = torch.linalg.svdvals(parts.float())
        return max(rank_of_energy(spectrum, self.energy, self.energy_measure) for spectrum in spectra)

    def accept_rank(self, layer: str, shape: tuple[int, int], rank: int, alpha: float) -> None:
        share = rank * sum(shape) / (shape[0] * shape[1])
        if share > LARGE and not self.allow_large:
            raise UnsupportedError(
                f"energy={self.energy} chooses rank {rank} of {min(shape)} for layer {layer!r}, whose frozen vectors "
                f"would take {share:.0%} of the layer's size; write allow_large=True, lower energy, or give r."
            )
        super().accept_rank(layer, shape, rank, alpha)
