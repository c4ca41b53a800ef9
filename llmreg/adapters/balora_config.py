"""BA-LoRA's config: PiSSA's start, and three terms of the loss that it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from ..errors import UnsupportedError
from .svd_configs import PissaConfig

__all__ = ["BaLoraConfig"]

_TERMS = ("consistency", "diversity", "singular_values")


@dataclass
class BaLoraConfig(PissaConfig):
    """BA-LoRA (arXiv 2408.04556): PiSSA, with outputs held near the base's, diverse, and of few directions.

    The adapter is PiSSA's. Its three regularisers, of the outputs, are applied by `llmreg.RegularizerCallback` (a
    recipe brings it along); training without them is refused unless `weights=None`. The teacher is the base itself,
    which additive adapters leave as it is.

    Args:
        weights: a factor on the three weights; `None` takes only the start, which is PiSSA's.
        consistency: weight of the divergence from the base's outputs; `None`: the paper's, 0.025 for language models
            and 0.15 for classifiers ("v1": 1e-4); 0: off.
        diversity: weight of minus the entropy, or of the covariances between classes; paper: 0.005 and 0.03
            ("v1": 3e-4).
        singular_values: weight of minus the share of the leading singular values; paper: 0.005 and 0.03 ("v1": 1e-4).
        variant: "iclr", the formulas and schedules of the authors' later code, or "v1", those of their first.
        task_kind: "nlg" or "nlu" formulas; `None`: "nlu" where `task_type` is "SEQ_CLS", else "nlg".
        svd, oversample, power_iterations, residual, residual_iterations: as in `PissaConfig`.

    Raises:
        UnsupportedError: a weight that is no number >= 0; consistency beside a quantised residual, where a disabled
            adapter is no base; singular values of a language-model head that is trained.

    Example:
        >>> [term.weight for term in BaLoraConfig(r=16, diversity=0).regularizers()]
        [0.025, 0.005]
    """

    weights: float | None = field(default=1.0, metadata={"help": "a factor on the three weights; None: the start only"})
    consistency: float | None = field(default=None, metadata={"help": "weight of the consistency term; 0: off"})
    diversity: float | None = field(default=None, metadata={"help": "weight of the diversity term; 0: off"})
    singular_values: float | None = field(default=None, metadata={"help": "weight of the singular value term; 0: off"})
    variant: Literal["iclr", "v1"] = field(default="iclr", metadata={"help": "generation of the formulas"})
    task_kind: Literal["nlg", "nlu"] | None = field(default=None, metadata={"help": "formulas; None: by task_type"})

    METHOD: ClassVar[str] = "balora"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weights", *_TERMS):
            weight = getattr(self, name)
            if isinstance(weight, bool) or not (
                weight is None or (isinstance(weight, int | float) and 0 <= weight < 1e6)
            ):
                left_out = "the start only" if name == "weights" else "the paper's"
                raise UnsupportedError(f"{name} must be a number >= 0, or None for {left_out}, got {weight!r}.")
        if self.variant not in ("iclr", "v1"):
            raise UnsupportedError(f"variant must be 'iclr' or 'v1', got {self.variant!r}.")
        if self.task_kind not in ("nlg", "nlu", None):
            raise UnsupportedError(f"task_kind must be 'nlg', 'nlu' or None, got {self.task_kind!r}.")
        self._refuse_conflicts()

    def _refuse_conflicts(self) -> None:
        if not self.needs_regularizer():
            return
        if self.quantizes_residual() and self.consistency != 0:
            raise UnsupportedError(
                "consistency compares with the base, and beside residual='quantized' a disabled adapter is no base; "
                "write consistency=0, or leave residual out."
            )
        trained = {name.rsplit(".", 1)[-1] for name in self.modules_to_save or ()}
        if self.task() == "nlg" and self.singular_values != 0 and "lm_head" in trained:
            raise UnsupportedError(
                "singular_values takes the head's W^T W once, and modules_to_save trains 'lm_head'; take it out, or "
                "write singular_values=0."
            )

    def task(self) -> Literal["nlg", "nlu"]:
        """Whose formulas are meant."""
        if self.task_kind is not None:
            return self.task_kind
        task_type = getattr(self.task_type, "value", self.task_type)
        return "nlu" if task_type == "SEQ_CLS" else "nlg"

    def needs_regularizer(self) -> bool:
        return bool(self.weights) and any(getattr(self, name) != 0 for name in _TERMS)

    def regularizers(self) -> list[Any]:
        from ..regularizers import ConsistencyRegularizer, DiversityRegularizer, SingularValueRegularizer

        if not self.needs_regularizer():
            return []
        assert self.weights is not None
        settings: dict[str, Any] = {"variant": self.variant, "task": self.task()}
        terms = (
            ConsistencyRegularizer(self.consistency, **settings),
            DiversityRegularizer(self.diversity, **settings),
            SingularValueRegularizer(self.singular_values, **settings),
        )
        return [replace(term, weight=self.weights * (term.weight or 0)) for term in terms if term.weight]
