"""`llmreg.initialize`: the start of adapters that begin from data (CorDA, EVA, EoRA), between wrapping and training.

    trainer = trl.SFTTrainer(model, peft_config=llmreg.EvaConfig(...), ...)
    llmreg.initialize(trainer)            # on what it trains on
    trainer.train()

Calibration runs the base, with all adapters off, over the data once, and gathers of each distinct layer input what the
methods need (`llmreg.calibration`); then ranks are chosen, if the method chooses them, and factors made. It must come
before the optimizer is built, because ranks change the parameters.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..adapters.data_configs import CordaConfig, DataConfig
from ..adapters.data_start import start_from_data, start_from_statistics, waiting_adapters, waiting_layers
from ..adapters.forms import FORMS
from ..adapters.start import is_distributed
from ..calibration import CalibrationCache, Statistics, calibrate
from ..calibration.passes import Forward
from ..errors import LlmregWarning, RecipeError, UnsupportedError
from ..sizes import parse_size
from ..weights import gathering_forwards
from .calibration_data import batches_of_trainer

__all__ = ["InitializationReport", "initialize"]

logger = logging.getLogger("llmreg")


@dataclass(frozen=True)
class InitializationReport:
    """What `initialize` did.

    Attributes:
        adapters: name -> method. ranks: name -> rank of each layer, 0 where the adapter was removed.
        calibration: of each calibration: tokens, batches, passes, exact or sketched and why, every distinct input.
        seconds: of the whole; calibration_seconds: of it, gathering statistics.
    """

    adapters: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, dict[str, int]] = field(default_factory=dict)
    calibration: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0
    calibration_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def initialize(
    model_or_trainer: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    calibration_dataset: Any = None,
    statistics: Statistics | Sequence[Statistics] | None = None,
    samples: int | None = 256,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    memory_budget: int | str | None = None,
    exact: bool | None = None,
    sketch: int | None = None,
    forward: Forward | None = None,
    cache: CalibrationCache | None = None,
    seed: int = 0,
) -> InitializationReport:
    """Start every adapter that waits for data, on a prebuilt model or on a trainer before `train()`.

    Args:
        model_or_trainer: a `PeftModel` with such an adapter, or a trainer of TRL or transformers that holds one. A
            trainer brings its own data: what it trains on (SFT), prompt and chosen (DPO), prompts (GRPO).
        dataloader: batches as the model takes them, any iterable (for several passes over the data one that can be
            read anew); with a trainer, in place of its data.
        calibration_dataset: with a trainer, rows in TRL's formats in place of its training set.
        statistics: gathered before (`llmreg.calibration.calibrate`, `load_statistics`), in place of any data.
        samples, batch_size: of the rows that are taken from a data set; None: all, the trainer's.
        max_tokens, memory_budget, exact, sketch, forward, cache: as in `llmreg.calibration.calibrate`; the budget also
            as text, such as "2GB".
        seed: chooses the rows, and draws a sketch's test matrix.

    In a distributed run every process calls this; each reads its share of a trainer's data, and must be given its share
    as `dataloader`. All get the same start.

    Raises:
        UnsupportedError: no adapter waits for data; the trainer has its optimizer already.
        RecipeError, WeightError: what `calibrate` and the methods refuse: no data, no token that counts, a layer never
            reached, inputs that are not finite, statistics of another model.
    """
    started = time.perf_counter()
    trainer = model_or_trainer if hasattr(model_or_trainer, "train_dataset") else None
    model = model_or_trainer if trainer is None else trainer.accelerator.unwrap_model(trainer.model)
    tuner = _tuner(model)
    names = waiting_adapters(tuner.model)
    if not names:
        raise _nothing_to_do(model)
    memory_budget = _checked_arguments(trainer, dataloader, calibration_dataset, statistics, samples, memory_budget)
    if isinstance(dataloader, Iterator) and len(names) > 1:
        dataloader = list(dataloader)  # each adapter may need statistics of its own
    if trainer is not None:
        _check_trainer(trainer, model, names)
    given = [statistics] if isinstance(statistics, Statistics) else list(statistics or ())
    rows = _Rows(trainer, calibration_dataset, samples, batch_size, seed)
    options = {
        "max_tokens": max_tokens,
        "memory_budget": memory_budget,
        "exact": exact,
        "sketch": sketch,
        "forward": forward,
        "cache": cache,
        "seed": seed,
    }
    work = _Work(model, tuner, given, dataloader, rows, options)
    ranks = {name: work.start(name) for name in names}
    report = InitializationReport(
        adapters={name: tuner.peft_config[name].method for name in names},
        ranks=ranks,
        calibration=tuple(one.describe() for one in work.gathered),
        seconds=time.perf_counter() - started,
        calibration_seconds=sum(one.report.seconds for one in work.gathered),
    )
    logger.info("%s initialized in %.1f s", ", ".join(names), report.seconds)
    return report


def _checked_arguments(
    trainer: Any, dataloader: Any, dataset: Any, statistics: Any, samples: Any, memory_budget: Any
) -> int | None:
    """The memory budget in bytes; refuses what contradicts each other, and what is no data."""
    given = {"dataloader": dataloader, "calibration_dataset": dataset, "statistics": statistics}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} were given, and only one of them can be used; leave the others out.")
    if trainer is None and dataset is not None:
        raise RecipeError("calibration_dataset needs a trainer, which tokenizes it; pass a dataloader with a model.")
    if isinstance(dataloader, Mapping | str | Tensor):
        raise RecipeError(
            f"dataloader is {type(dataloader).__name__}, not a sequence of batches; give a list of what the model "
            "takes, such as [{'input_ids': ..., 'attention_mask': ...}]."
        )
    if isinstance(dataset, Mapping | str):
        raise RecipeError(
            f"calibration_dataset is {type(dataset).__name__}, not rows; give one split of a data set, or a list of "
            "rows."
        )
    known = [statistics] if isinstance(statistics, Statistics) else list(statistics or ())
    if not all(isinstance(one, Statistics) for one in known):
        raise RecipeError("statistics are what llmreg.calibration.calibrate or load_statistics returns.")
    if samples is not None and samples < 1:
        raise RecipeError(f"samples is {samples}; give a positive number, or None for all rows.")
    if isinstance(memory_budget, str):
        size = parse_size(memory_budget)
        if size is None:
            raise RecipeError(f"memory_budget is {memory_budget!r}; give bytes, or a size such as '2GB'.")
        return size
    return memory_budget


@dataclass(frozen=True)
class _Rows:
    """A trainer's data, or rows in its place."""

    trainer: Any
    dataset: Any
    samples: int | None
    batch_size: int | None
    seed: int

    def batches(self, config: DataConfig) -> list[Any]:
        if self.trainer is None:
            raise RecipeError(
                f"{config.method} starts from data: call llmreg.initialize(model, dataloader), with batches as the "
                "model takes them."
            )
        if self.dataset is None and isinstance(config, CordaConfig) and config.mode == "kpm":
            warnings.warn(
                "CorDA's knowledge-preserved mode keeps what its calibration data shows, and is given the training "
                "data here; pass calibration_dataset= with what is to be kept.",
                LlmregWarning,
                stacklevel=4,
            )
        return batches_of_trainer(
            self.trainer, self.dataset, samples=self.samples, batch_size=self.batch_size, seed=self.seed
        )


@dataclass
class _Work:
    """One call of `initialize`; `gathered` are the statistics that it took itself."""

    model: Any
    tuner: Any
    given: list[Statistics]
    dataloader: Iterable[Any] | None
    rows: _Rows
    options: dict[str, Any]
    gathered: list[Statistics] = field(default_factory=list)

    def start(self, name: str) -> dict[str, int]:
        """Start one adapter; from a sibling that was started a moment ago where it has the same settings."""
        start_from_data(self.tuner, name)
        if waiting_layers(self.tuner.model, name):
            return start_from_statistics(self.tuner, name, self.given or self._gather(name))
        layers = self.tuner.model.named_modules()
        return {layer: module.r[name] for layer, module in layers if name in getattr(module, "lora_A", ())}

    def _gather(self, name: str) -> list[Statistics]:
        """The statistics that the adapter needs, one for each sub-set of the data, of the base without adapters."""
        config: DataConfig = self.tuner.peft_config[name]
        layers = waiting_layers(self.tuner.model, name)
        rule = config.stopping_rule({layer: module.r[name] for layer, module in layers.items()})
        data = self.rows.batches(config) if self.dataloader is None else self.dataloader
        parts, options = [data], self.options
        if config.candidates() > 1:  # their cache entries would all have the key of the whole
            parts, options = _subsets(data, config.candidates()), {**options, "cache": None}
        with _bare(self.model), gathering_forwards(self.model):
            found = [
                calibrate(
                    self.tuner.model, part, layers, config.need(), until=rule, distributed=is_distributed(), **options
                )
                for part in parts
            ]
        self.gathered += found
        return found


def _subsets(data: Iterable[Any], number: int) -> list[Iterable[Any]]:
    batches = list(data)
    if len(batches) < number:
        raise RecipeError(
            f"covariances={number} sub-sets cannot be made of {len(batches)} batches; give more data, smaller batches, "
            "or covariances=1."
        )
    return [batches[first::number] for first in range(number)]


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """The base without adapters; flags that PEFT sets when it switches them on again come back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _tuner(model: Any) -> Any:
    tuner = getattr(model, "base_model", None)
    if not hasattr(model, "peft_config") or not hasattr(tuner, "targeted_module_names"):
        raise UnsupportedError(
            f"llmreg.initialize starts an adapter on a model, and {type(model).__name__} has none; wrap it first: "
            "peft.get_peft_model(model, llmreg.EvaConfig(...)), or pass the trainer that was given peft_config=."
        )
    return tuner


def _check_trainer(trainer: Any, model: Any, names: Sequence[str]) -> None:
    configs = {name: model.peft_config[name] for name in names}
    if trainer.optimizer is not None and any(config.redistributes() for config in configs.values()):
        raise UnsupportedError(
            "ranks are chosen from the data, and the trainer has its optimizer already; call "
            "llmreg.initialize(trainer) before train(), and let the trainer make the optimizer."
        )

    for config in configs.values():
        begins_elsewhere = not FORMS[config.form()].starts_at_zero
        if begins_elsewhere and getattr(trainer.args, "precompute_ref_log_probs", False):
            raise UnsupportedError(
                f"precompute_ref_log_probs took the reference before {config.method} had its start; set it to False, "
                "or call llmreg.initialize(model, dataloader) before the trainer is built."
            )
    reference_is_base = getattr(trainer, "ref_model", model) is None and getattr(trainer, "beta", 1) != 0
    for config in configs.values():
        if reference_is_base and "ref" not in model.peft_config and not FORMS[config.form()].starts_at_zero:
            raise UnsupportedError(
                f"{config.method} makes the model differ from its base at once, and this trainer's reference is the "
                "base; put the adapter on the model first (peft.get_peft_model) and pass that: the trainer then keeps "
                "a copy of the adapter as its reference."
            )


def _nothing_to_do(model: Any) -> UnsupportedError:
    for name, config in model.peft_config.items():
        if isinstance(config, DataConfig):
            return UnsupportedError(
                f"The adapter {name!r} ({config.method}) has its start already (an adapter of the same settings beside "
                "another takes that one's); to start one on other data, give it another seed."
            )
        own = getattr(config, "init_lora_weights", None)
        if own in ("eva", "corda"):
            function = {"eva": "peft.initialize_lora_eva_weights", "corda": "peft.tuners.lora.corda.preprocess_corda"}
            theirs = {"eva": "llmreg.EvaConfig", "corda": "llmreg.CordaConfig"}
            return UnsupportedError(
                f"The adapter {name!r} is PEFT's own (init_lora_weights={own!r}) and is started by {function[own]}; "
                f"for llmreg's, wrap the model with {theirs[own]}(...) instead of LoraConfig."
            )
    return UnsupportedError(
        "No adapter of this model starts from data; llmreg.initialize is for EvaConfig, CordaConfig and EoraConfig."
    )
