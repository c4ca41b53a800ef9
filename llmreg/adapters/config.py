"""Configs of the additive methods: PEFT's `LoraConfig` plus what the start needs.

Every field inherited from `LoraConfig` is either supported or refused here with the reason (`REFUSED_FIELDS`);
a test enumerates them, so that a field PEFT adds later cannot slip through unread.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from peft import LoraConfig

from ..errors import UnsupportedError
from ..initializers import Factors
from .loading import is_saving
from .registry import ADDITIVE, QUANTIZED_RESIDUAL

__all__ = ["REFUSED_FIELDS", "SUPPORTED_FIELDS", "AdditiveConfig", "base_change", "only"]

#: Inherited fields that work as in PEFT.
SUPPORTED_FIELDS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha fan_in_fan_out use_rslora modules_to_save layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern trainable_token_indices runtime_config megatron_core".split()
)

#: Inherited field -> why any value but PEFT's default is refused.
REFUSED_FIELDS = {
    "lora_dropout": "dropout on the adapter's input would drop principal components of the weight itself, not of a "
    "correction (23 % noise on the logits at step 0 with 0.05); set lora_dropout=0",
    "bias": "training the base's biases changes the base model; leave bias='none', or list the module in "
    "modules_to_save to train a copy of it",
    "init_lora_weights": "the config class is the initialisation; leave init_lora_weights out",
    "loftq_config": "it belongs to LoftQ; use peft.LoraConfig(init_lora_weights='loftq')",
    "eva_config": "it belongs to PEFT's own EVA, peft.LoraConfig(init_lora_weights='eva'); llmreg.EvaConfig takes its "
    "settings (rho, tau, whiten, ...) itself",
    "corda_config": "it belongs to PEFT's own CorDA, peft.LoraConfig(init_lora_weights='corda'); llmreg.CordaConfig "
    "takes its settings (mode, damping, ...) itself",
    "lora_ga_config": "it belongs to LoRA-GA; use peft.LoraConfig(init_lora_weights='lora_ga')",
    "use_dora": "DoRA rescales the base weight's columns, which the difference form does not express",
    "velora_config": "VeLoRA replaces the forward pass that this method defines",
    "alora_invocation_tokens": "aLoRA switches the adapter on inside a sequence; not defined for this method",
    "use_qalora": "QA-LoRA groups the input features of GPTQ layers, whose weight cannot be decomposed here",
    "qalora_group_size": "it belongs to QA-LoRA",
    "monteclora_config": "MonteCLoRA perturbs the factors, so the step-0 identity would not hold",
    "layer_replication": "replicated layers share one base weight; replicate the model before adding the adapter",
    "lora_bias": "a bias on B is not part of the method and does not export to plain LoRA",
    "target_parameters": "3-D expert parameters have no single decomposition here; target nn.Linear modules instead",
    "megatron_config": "Megatron's sharded layers hold only a part of the weight to decompose",
    "use_bdlora": "block-diagonal factors cannot hold singular vectors",
    "arrow_config": "Arrow routes between plain LoRA experts; export this adapter first and route over the export",
    "kasa_config": "KaSA truncates the base weight in place, which would change the base model",
    "ensure_weight_tying": "it concerns embedding adapters, which are not supported; leave it False",
}


def _default(spec: dataclasses.Field) -> Any:
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default


_LORA_DEFAULTS = {spec.name: _default(spec) for spec in dataclasses.fields(LoraConfig)}


@dataclass
class AdditiveConfig(LoraConfig):
    """Base of the configs whose adapter adds a low-rank term, zero at the start, to an untouched `W x`.

    `AdditiveConfig(method="pissa", ...)` builds the config class of that method (how a saved config comes back).

    Args:
        lora_alpha: `s = lora_alpha / r` (or `/ sqrt(r)` with rsLoRA); default each layer's rank, so `s = 1` as in
            the papers (with rsLoRA `sqrt(r)`); with an `alpha_pattern`, `r` for the layers that it does not name.
        rank_pattern, alpha_pattern: as in PEFT, where the first match counts; here in sorted order, as saved.
        method: name in `llmreg methods`; set by the class.
        seed: of the initialiser's own random generator.
        exact_unmerge: keep a copy of each merged layer's weight, so that unmerging is bit-exact (costs the memory
            of the merged layers); otherwise unmerging is within rounding, as in PEFT.
    """

    lora_alpha: float | None = field(default=None, metadata={"help": "s = lora_alpha / r; default r, so s = 1"})
    method: str = field(default="", metadata={"help": "name of the method; set by the config class"})
    seed: int = field(default=0, metadata={"help": "seed of the initialiser's own generator"})
    exact_unmerge: bool = field(default=False, metadata={"help": "keep merged layers' weights to unmerge bit-exactly"})

    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "r by layer name"})
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "lora_alpha by layer name"})

    if TYPE_CHECKING:
        r: Any = None  # `None` where the method chooses it

    METHOD: ClassVar[str] = ""
    #: What the adapter holds and adds, a key of `forms.FORMS`, unless `form()` says otherwise.
    FORM: ClassVar[str] = "difference"
    #: The saved plain LoRA has this times `r` as its rank, unless `saved_rank()` says otherwise.
    SAVED_RANK: ClassVar[int] = 2
    #: Whether the start is made from calibration data (`data_configs`), so that an adapter waits for it.
    NEEDS_DATA: ClassVar[bool] = False
    #: Of `REFUSED_FIELDS`, those that make sense for this method.
    ALSO_SUPPORTED: ClassVar[frozenset[str]] = frozenset()
    _CLASSES: ClassVar[dict[str, type[AdditiveConfig]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.METHOD:
            AdditiveConfig._CLASSES[cls.METHOD] = cls

    def __new__(cls, *args: Any, method: str = "", **kwargs: Any) -> AdditiveConfig:
        if cls is AdditiveConfig and method:
            if method not in cls._CLASSES:
                raise UnsupportedError(f"Unknown method {method!r}; known here: {sorted(cls._CLASSES)}.")
            cls = cls._CLASSES[method]
        return super().__new__(cls)

    def __post_init__(self) -> None:
        #: Read from the `adapter_config.json` of an adapter that only its sidecar can be mounted from.
        self.needs_sidecar = getattr(self, "peft_type", None) == QUANTIZED_RESIDUAL
        if self.lora_alpha is None:
            self.lora_alpha = self.r
            self.alpha_pattern = self.alpha_pattern or dict(self.rank_pattern or {})
        # PEFT writes patterns sorted and takes the first that matches: unsorted, a reloaded adapter would be another.
        self.rank_pattern = dict(sorted((self.rank_pattern or {}).items()))
        self.alpha_pattern = dict(sorted((self.alpha_pattern or {}).items()))
        self._check_numbers()
        self._refuse_fields()
        super().__post_init__()
        if self.METHOD == "":
            raise UnsupportedError("AdditiveConfig is abstract; use PissaConfig or another method's config.")
        if self.method not in ("", self.METHOD):
            raise UnsupportedError(f"{type(self).__name__} is {self.METHOD!r}, not {self.method!r}; leave method out.")
        self.method = self.METHOD
        self.peft_type = ADDITIVE

    def _check_numbers(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or rank < 1:
                raise UnsupportedError(f"{name} must be a positive integer, got {rank!r}.")
        alphas = {f"alpha_pattern[{key!r}]": alpha for key, alpha in (self.alpha_pattern or {}).items()}
        for name, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items():
            if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise UnsupportedError(f"{name} must be a positive number, got {alpha!r}.")

    def _refuse_fields(self) -> None:
        for name, reason in REFUSED_FIELDS.items():
            value = getattr(self, name)
            if name in self.ALSO_SUPPORTED:
                continue
            if value != _LORA_DEFAULTS[name]:
                raise UnsupportedError(f"{type(self).__name__} does not support {name}={value!r}: {reason}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; but the config of an adapter that lies on a model is saved with it, by `PeftModel`.

        Raises:
            UnsupportedError: from elsewhere, as transformers' own `save_pretrained` of a model with adapters does it:
                the folder would lack what llmreg needs to load it.
        """
        if getattr(self, "on_model", False) and not is_saving():
            raise UnsupportedError(
                f"A {self.method} adapter is saved by PeftModel.save_pretrained; wrap the model with "
                "peft.get_peft_model instead of model.add_adapter, and save that (a config alone is saved before it is "
                "put on a model)."
            )
        super().save_pretrained(save_directory, **kwargs)

    def form(self) -> str:
        """What an adapter of this config holds and adds: a key of `forms.FORMS`."""
        return self.FORM

    def saved_rank(self) -> int:
        """How many times `r` the rank of the saved adapter is."""
        return self.SAVED_RANK

    def quantizes_residual(self) -> bool:
        """Whether the base layers come to hold what is left beside the adapter, quantised (QPiSSA)."""
        return False

    def needs_regularizer(self) -> bool:
        """Whether training must be given a regulariser that this config asks for."""
        return False

    def regularizers(self) -> list[Any]:
        """The regularisers that this config asks for; empty unless `needs_regularizer()`."""
        return []

    def chooses_rank(self, layer: str) -> bool:
        """Whether the start decides the rank of this layer, and not `r` or `rank_pattern`."""
        return False

    def records_start(self) -> bool:
        """Whether the start changes the config, so that an adapter needs a config of its own."""
        return self.NEEDS_DATA or self.chooses_rank("")

    def accept_rank(self, layer: str, shape: tuple[int, int], rank: int, alpha: float) -> None:
        """Record the rank that the start chose for a layer of `shape` (out, in), or refuse it."""
        ranks: dict[str, int] = {**(self.rank_pattern or {}), only(layer): rank}
        alphas: dict[str, float] = {**(self.alpha_pattern or {}), only(layer): alpha}
        self.rank_pattern, self.alpha_pattern = dict(sorted(ranks.items())), dict(sorted(alphas.items()))
        if rank > self.r:  # together, so that their quotient stays every layer's scaling
            self.r, self.lora_alpha = rank, alpha

    def check_layer(self, layer: str, shape: tuple[int, int], rank: int) -> None:
        """Refuse a layer for which the settings make no sense; `shape` is its weight's (out, in)."""

    def start_settings(self, layer: str = "") -> tuple:
        """Everything besides the weight, rank and scaling that decides a layer's start (hashable)."""
        raise NotImplementedError

    def start(self, W: Any, rank: int, scaling: float, layer: str = "") -> Factors:
        """The start for weight `W` `(..., out, in)`, of `rank` unless `chooses_rank`; see the method's initialiser."""
        raise NotImplementedError

    def saved_config(self) -> LoraConfig:
        """What `adapter_config.json` of a saved adapter holds: a plain LoRA's, unless it must not be taken for one."""
        return self.to_lora_config()

    def to_lora_config(self) -> LoraConfig:
        """The plain `LoraConfig` that describes the saved form: rank 2r for a difference, the same scaling.

        `alpha / r` keeps with alpha doubled; with rsLoRA `alpha / sqrt(r)` keeps with alpha times sqrt(2).
        """
        times = self.saved_rank()
        grow = times**0.5 if self.use_rslora else times
        kept = {name: getattr(self, name) for name in (SUPPORTED_FIELDS - {"peft_type"}) | self.ALSO_SUPPORTED}
        assert self.lora_alpha is not None
        kept.update(
            r=times * self.r,
            lora_alpha=self.lora_alpha * grow,
            rank_pattern={key: times * rank for key, rank in (self.rank_pattern or {}).items()},
            alpha_pattern={key: alpha * grow for key, alpha in (self.alpha_pattern or {}).items()},
        )
        return LoraConfig(**kept)


def only(layer: str) -> str:
    """The pattern of this layer alone; without the anchor PEFT takes it for every name that ends like it."""
    return f"^{layer}"


#: Values of `LoraConfig.init_lora_weights` (up to `_niter_k`) that subtract from the base weight or replace it.
_BASE_CHANGING_INITS = frozenset({"pissa", "olora", "corda", "loftq", "lora_ga"})


def base_change(config: LoraConfig) -> str | None:
    """The setting by which a plain `LoraConfig` changes the base weights themselves; None if it leaves them alone."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().split("_niter_")[0] in _BASE_CHANGING_INITS:
        return f"init_lora_weights={init!r}"
    if config.bias != "none":
        return f"bias={config.bias!r}"
    return "kasa_config" if config.kasa_config is not None else None
