"""The catalogue: one row a method, from which the command line, the recipe schema, the cards and the docs are printed.

Third parties add rows through the entry-point group `llmreg.methods`: an entry point named like its method that
points at a `Method`. Nothing heavy is imported here: a row names its config class, `Method.config_class` imports it.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import LlmregError, LlmregWarning, RecipeError

__all__ = ["ENTRY_POINT_GROUP", "Method", "Paper", "catalogue", "get_method"]

ENTRY_POINT_GROUP = "llmreg.methods"


@dataclass(frozen=True)
class Paper:
    """Where a method comes from: title, arXiv id, and the section that defines it."""

    title: str
    arxiv: str
    section: str


@dataclass(frozen=True)
class Method:
    """A row of the catalogue.

    Attributes:
        name: as recipes and `llmreg methods NAME` write it. title: the name in prose.
        kind: "lora" (plain PEFT), "additive" (a low-rank term over an untouched base, zero at the start but for
            EoRA's), or "bone".
        config: import path of the config class, "module:Class".
        paper: what to read and cite.
        what, when, when_not: one sentence each.
        cost: time and memory beyond plain LoRA of equal rank.
        defaults: what is used where the recipe says nothing.
        needs: extras, data or hardware beyond the base install; empty if none.
        recipe: the runnable recipe, relative to the repository.
        saved_rank: the saved adapter has this times `r` as its rank. saved_form: what it is saved as.
        other_forms: what it is saved as at a `storage` or `residual` of its config other than the default.
    """

    name: str
    title: str
    kind: str
    config: str
    paper: Paper
    what: str
    when: str
    when_not: str
    cost: str
    defaults: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    recipe: str = ""
    saved_rank: int = 1
    saved_form: str = "plain LoRA"
    other_forms: dict[str, str] = field(default_factory=dict)

    def config_class(self) -> Any:
        """Import and return the config class.

        Raises:
            LlmregError: the path names nothing that can be imported.
        """
        module, _, name = self.config.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise LlmregError(
                f"The method {self.name!r} names the config class {self.config!r}, which cannot be imported ({error}); "
                "reinstall the package that adds it."
            ) from error

    def form_of(self, config: Any) -> str:
        """What an adapter of this config is saved as."""
        chosen = (getattr(config, name, "") for name in ("storage", "residual"))
        return next((self.other_forms[value] for value in chosen if value in self.other_forms), self.saved_form)

    def rank_of(self, config: Any) -> int:
        """How many times its rank the rank of a saved adapter of this config is."""
        return getattr(config, "saved_rank", lambda: self.saved_rank)()

    def takes_data(self) -> bool:
        """Whether the start is made from calibration data, so that a recipe may have a `calibration` section."""
        return bool(getattr(self.config_class(), "NEEDS_DATA", False))

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return asdict(self)


#: What `residual="quantized"` (QPiSSA) saves.
_BESIDE_RESIDUAL = {"quantized": "adapter and quantised residual"}

_ROWS = (
    Method(
        name="pissa",
        title="PiSSA",
        kind="additive",
        config="llmreg.adapters:PissaConfig",
        paper=Paper(
            "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
            "2404.02948",
            "3",
        ),
        what="Starts A and B from the r largest singular components of each weight and trains those, "
        "instead of noise and zero.",
        when="The task is far from what the base can do and steps are few: it moves faster than LoRA at the same rank.",
        when_not="What the base knows must be kept above all, or the learning rate was tuned for plain LoRA: principal "
        "directions move, so it forgets more at an equal rate (try a smaller one).",
        cost="One truncated SVD a layer before training (seconds for 1B), A0 and B0 held beside A and B, and a step "
        "that costs about what LoRA's does; the saved LoRA has rank 2r unless exported with a rank. On NF4 or int8 "
        "residual: quantized (QPiSSA) quantises each layer five times more and saves the base it makes.",
        defaults={
            "lora_alpha": "r",
            "svd": "randomized",
            "lora_dropout": 0.0,
            "residual": "difference",
            "residual_iterations": 5,
        },
        recipe="recipes/quickstart.yaml",
        saved_rank=2,
        other_forms=_BESIDE_RESIDUAL,
    ),
    Method(
        name="sorsa",
        title="SORSA",
        kind="additive",
        config="llmreg.adapters:SorsaConfig",
        paper=Paper(
            "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
            "2409.00055",
            "3",
        ),
        what="Trains the r largest singular values and their vectors as three factors, and keeps the vectors near "
        "orthonormal by a regulariser.",
        when="You want PiSSA's quick start with well-conditioned factors: the vectors turn, the values scale.",
        when_not="Under DeepSpeed or FSDP, where the regulariser is refused (weights: null takes the start alone), or "
        "when fewest moving parts matter.",
        cost="PiSSA's start, memory and step, plus two r x r Gram matrices a layer and step for the regulariser; the "
        "saved LoRA has rank 2r unless exported with a rank.",
        defaults={"lora_alpha": "r", "weights": 4e-4, "squared": False, "reduction": "mean", "decoupled": True},
        recipe="recipes/pocket-sorsa.yaml",
        saved_rank=2,
        other_forms=_BESIDE_RESIDUAL,
    ),
    Method(
        name="balora",
        title="BA-LoRA",
        kind="additive",
        config="llmreg.adapters:BaLoraConfig",
        paper=Paper(
            "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language "
            "Models",
            "2408.04556",
            "3",
        ),
        what="PiSSA with three terms on the model's outputs: near the base's, diverse, and of few leading directions.",
        when="You want PiSSA's progress and less forgetting, or the classes of a task are unequally many.",
        when_not="The base itself should be unlearned, or steps must be cheap: the consistency term asks the base "
        "about every batch.",
        cost="PiSSA's start and memory; a step runs the base forward once more (consistency) and passes the scored "
        "tokens through the head again for each term, in tiles, and W^T W of the head is decomposed once; the saved "
        "LoRA has rank 2r unless exported with a rank.",
        defaults={
            "lora_alpha": "r",
            "weights": 1.0,
            "consistency": None,
            "diversity": None,
            "singular_values": None,
            "variant": "iclr",
            "task_kind": None,
        },
        recipe="recipes/pocket-balora.yaml",
        saved_rank=2,
        other_forms=_BESIDE_RESIDUAL,
    ),
    Method(
        name="svfit",
        title="SVFit",
        kind="additive",
        config="llmreg.adapters:SvfitConfig",
        paper=Paper(
            "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
            "2409.05926",
            "3",
        ),
        what="Trains only how much r singular values of each weight change, over frozen singular vectors.",
        when="Adapters must be tiny (r numbers a layer, kilobytes with storage: tiny), or the base's directions are "
        "good and only their strength should change.",
        when_not="The task needs directions that the base lacks, or memory is short: vectors of rank r are held for "
        "every layer, and near full rank they are as large as the layer.",
        cost="One truncated SVD a layer before training, frozen vectors of r (in + out) values a layer in the base's "
        "dtype, less activation memory than LoRA (inputs are not kept), and a learning rate of its own: in the pocket "
        "classification's sweep 5e-2 was best (1e-2 to 1e-1 all learn it), 25 times LoRA's.",
        defaults={"r": 64, "lora_alpha": "r", "svd": "randomized", "storage": "lora"},
        recipe="recipes/pocket-classification-svfit.yaml",
        other_forms={"tiny": "SVFit values"},
    ),
    Method(
        name="corda",
        title="CorDA",
        kind="additive",
        config="llmreg.adapters:CordaConfig",
        paper=Paper(
            "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
            "Parameter-Efficient Fine-tuning",
            "2406.05223",
            "3",
        ),
        what="PiSSA with each weight seen through its inputs on calibration data: trains the components that matter "
        "most there (mode: ipm) or least (mode: kpm).",
        when="kpm: what the base knows must be kept while a task is learned, and there is data that shows it. ipm: as "
        "PiSSA, where inputs use few directions of a weight.",
        when_not="Data to calibrate on is missing or unlike what is meant. With the paper's factors (balance: false) "
        "kpm wants a far smaller rate than LoRA: A holds the inverse of the inputs' moment, so what calibration did "
        "not show moves much; balance: true takes LoRA's rates.",
        cost="Forwards over the calibration rows and for each distinct layer input a matrix of in x in float32 (a "
        "sketch within calibration.memory_budget), then one decomposition a layer; memory and step as PiSSA. The saved "
        "LoRA has rank 2r unless exported with a rank. CorDA++'s covariances and dynamic_ranks are from a secondary "
        "source, and take full spectra.",
        defaults={
            "lora_alpha": "r",
            "mode": "ipm",
            "damping": 0.01,
            "power": 1.0,
            "sample_scale": "signed_max",
            "covariances": 1,
            "dynamic_ranks": False,
            "svd": "randomized",
        },
        needs=("calibration data (the training data unless calibration.data says otherwise; kpm must say)",),
        recipe="recipes/pocket-corda.yaml",
        saved_rank=2,
        other_forms=_BESIDE_RESIDUAL,
    ),
    Method(
        name="eva",
        title="EVA",
        kind="additive",
        config="llmreg.adapters:EvaConfig",
        paper=Paper("Parameter Efficient Fine-tuning via Explained Variance Adaptation", "2410.07170", "3"),
        what="A LoRA whose A starts at the principal components of each layer's inputs on the training data and B at "
        "zero; ranks go to the layers whose inputs need them (rho).",
        when="You want LoRA's form and rates with a start that fits the data, or ranks that differ by layer within one "
        "budget; it works on any quantised base.",
        when_not="Every layer must have one rank, as vLLM wants without output.rank (write rho: 1); or there is no "
        "data before training.",
        cost="Forwards over the calibration rows and for each distinct layer input a matrix of in x in float32 (a "
        "sketch within calibration.memory_budget) with its leading eigenvectors. In training nothing beyond LoRA but "
        "A0 held beside A.",
        defaults={"lora_alpha": "r", "rho": 2.0, "centered": True, "whiten": False, "tau": None, "lora_dropout": 0.0},
        needs=("calibration data (the training data unless calibration.data says otherwise)",),
        recipe="recipes/pocket-eva.yaml",
    ),
    Method(
        name="eora",
        title="EoRA",
        kind="additive",
        config="llmreg.adapters:EoraConfig",
        paper=Paper(
            "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
            "2410.21271",
            "3",
        ),
        what="Starts at the rank-r correction of a quantised base's error that is best on its layers' inputs, and "
        "trains from there; so it does not start at zero.",
        when="The base is NF4 or int8 and the quantisation's loss should be made up for first.",
        when_not="The base is not quantised; a disabled adapter serves as reference (DPO), since that is the quantised "
        "base and not where training starts; or the full-precision checkpoint is not at hand.",
        cost="Forwards over the calibration rows and for each distinct layer input a matrix of in x in, then each "
        "layer read once more in full precision and decomposed, in float64; memory and step as LoRA of the same rank.",
        defaults={"r": 128, "lora_alpha": "r", "ridge": 1e-6, "svd": "randomized"},
        needs=(
            "calibration data (the training data unless calibration.data says otherwise)",
            "a quantised base, model.quantization (pip install 'llmreg[quant]')",
            "the base's full-precision checkpoint",
        ),
        recipe="recipes/pocket-eora.yaml",
    ),
    Method(
        name="lora",
        title="LoRA",
        kind="lora",
        config="peft:LoraConfig",
        paper=Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685", "4.1"),
        what="PEFT's own LoRA, A random and B zero: the baseline every other method is compared with.",
        when="You want the reference, dropout on the adapter, or the smallest saved rank.",
        when_not="You want quick progress at small learning rates; B starts at zero and grows from there.",
        cost="The baseline: no decomposition, 2 r (in + out) values a layer in training and on disk.",
        defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0},
        recipe="recipes/pocket-lora.yaml",
    ),
    Method(
        name="bone",
        title="Bone",
        kind="bone",
        config="llmreg.adapters:BoneConfig",
        paper=Paper(
            "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing",
            "2409.15371",
            "3",
        ),
        what="Trains one small matrix a layer, whose rows all groups of r inputs share (PEFT's MiSS), or with variant "
        "bat r x r blocks that multiply the weight itself.",
        when="Memory and step time count: row sharing trains half of LoRA's parameters at equal r, needs no product "
        "with A and starts exactly at the base.",
        when_not="The adapter must be served as LoRA and you want bat, whose update has full rank; or the base is "
        "quantised and speed matters, since bat dequantises every layer twice a step.",
        cost="Row sharing: r out values a layer, and less than LoRA's time. bat: as many values, and three products "
        "with the weight a step where LoRA has two; nothing the size of the weights is kept.",
        defaults={"r": 64, "variant": "bone", "bone_dropout": 0.0},
        recipe="recipes/pocket-bone.yaml",
        saved_form="PEFT MiSS",
    ),
)
_BUILT_IN = {row.name: row for row in _ROWS}


def catalogue() -> dict[str, Method]:
    """All methods by name: the built-in ones, then those of installed packages.

    A third-party row that cannot be loaded is left out with an `LlmregWarning` that names it.

    Raises:
        LlmregError: a package adds a method under a name that is taken.
    """
    rows = dict(_BUILT_IN)
    for name, point in _third_party().items():
        try:
            rows[name] = _load(point)
        except LlmregError as error:
            warnings.warn(str(error), LlmregWarning, stacklevel=2)
    return rows


def get_method(name: str) -> Method:
    """The row of one method; no other package's code is run for it.

    Raises:
        RecipeError: there is no such method; the message names the nearest.
        LlmregError: the package that adds it cannot be loaded.

    Example:
        >>> get_method("pissa").config_class().__name__
        'PissaConfig'
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    third_party = _third_party()
    if name in third_party:
        return _load(third_party[name])
    known = [*_BUILT_IN, *third_party]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"there is no method {name!r};{hint} Known methods: {', '.join(known)}.")


def _third_party() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _BUILT_IN or point.name in points:
            raise LlmregError(
                f"The package {_package(point)} adds a method under the name {point.name!r}, which is taken; uninstall "
                "it or ask its authors to rename the method."
            )
        points[point.name] = point
    return points


def _load(point: EntryPoint) -> Method:
    try:
        row = point.load()
    except Exception as error:  # another package's import may raise anything
        raise LlmregError(
            f"The method {point.name!r} of the package {_package(point)} cannot be loaded ({error}); repair or "
            "uninstall that package."
        ) from error
    if not isinstance(row, Method) or row.name != point.name:
        raise LlmregError(
            f"The entry point {point.name!r} of the package {_package(point)} must point at an llmreg.methods.Method "
            f"of that name, not at {type(row).__name__} {getattr(row, 'name', '')!r}."
        )
    return row


def _package(point: EntryPoint) -> str:
    return repr(point.dist.name) if point.dist else "that defines it"
