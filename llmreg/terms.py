"""The catalogue of regularisers: one row a term, as `methods.py` is of methods; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .methods import Paper

__all__ = ["TERMS", "Term"]


@dataclass(frozen=True)
class Term:
    """A row of the catalogue.

    Attributes:
        name: as recipes write it under `regularizers`. title: in prose. config: import path of its class.
        paper: what to read and cite; None: it is PEFT's own.
        what, when, when_not, cost: one sentence each.
        tasks: where it acts. defaults: what is used where the recipe says nothing. recipe: a runnable one.
    """

    name: str
    title: str
    config: str
    paper: Paper | None
    what: str
    when: str
    when_not: str
    cost: str
    tasks: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for JSON."""
        return {"kind": "regularizer", **asdict(self)}


_BALORA = Paper(
    "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models",
    "2408.04556",
    "3",
)
_OUTPUTS = ("sft", "dpo", "grpo", "classification")

TERMS = {
    row.name: row
    for row in (
        Term(
            "orthonormal",
            "SORSA's orthonormal regulariser",
            "llmreg.regularizers:OrthonormalRegularizer",
            Paper(
                "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language "
                "Models",
                "2409.00055",
                "3",
            ),
            "Keeps factors orthonormal that start so, or at the Gram matrices that they start with.",
            "Factors that should stay well conditioned (SORSA, EVA's A).",
            "PiSSA's factors with the default target, which it would destroy; sharded training.",
            "Two small products a factor and step.",
            _OUTPUTS,
            {"weight": 4e-4, "reduction": "mean", "decoupled": True, "target": "identity"},
            "recipes/pocket-sorsa.yaml",
        ),
        Term(
            "consistency",
            "BA-LoRA's consistency regulariser",
            "llmreg.regularizers:ConsistencyRegularizer",
            _BALORA,
            "Holds the outputs near the base's, by the KL divergence at temperature 2.",
            "What the base knows should be kept.",
            "A classifier without a teacher that has a trained head.",
            "A forward pass of the base, and three products with the head.",
            _OUTPUTS,
            {"weight": 0.025, "schedule": "cosine", "temperature": 2.0},
            "recipes/pocket-balora.yaml",
        ),
        Term(
            "diversity",
            "BA-LoRA's diversity regulariser",
            "llmreg.regularizers:DiversityRegularizer",
            _BALORA,
            "Raises the entropy of the 20 likeliest tokens; of a classifier, lowers covariances between classes.",
            "Outputs that collapse; imbalanced classes.",
            "Tasks with one right answer a token, where entropy is error.",
            "One product with the head.",
            _OUTPUTS,
            {"weight": 0.005, "schedule": "two_phase", "top_k": 20},
            "recipes/pocket-balora.yaml",
        ),
        Term(
            "singular_values",
            "BA-LoRA's singular value regulariser",
            "llmreg.regularizers:SingularValueRegularizer",
            _BALORA,
            "Raises the share of the leading singular values of a batch's logits, without forming them.",
            "With the other two, as the paper has it.",
            "Few classes: with k of them or fewer it is constant; heads with a soft cap.",
            "One product of hidden size squared, a few of the leading directions, and a root of W^T W once.",
            _OUTPUTS,
            {"weight": 0.005, "schedule": "two_phase", "k": 10},
            "recipes/pocket-balora.yaml",
        ),
        Term(
            "low_probability",
            "Lp-Reg",
            "llmreg.regularizers:LowProbabilityRegularizer",
            Paper(
                "Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable Reward",
                "2510.03222",
                "4",
            ),
            "Protects sampled tokens of negative advantage that are unlikely but plausible.",
            "GRPO whose entropy collapses.",
            "Losses that weigh whole sequences (luspo, vespo).",
            "The head for 1 % of the tokens; on-policy, an exact threshold takes a forward pass a generated batch.",
            ("grpo",),
            {"weight": 1.0, "kappa": 0.02, "percentile": 0.01, "threshold": "exact", "divergence": "k3"},
            "recipes/pocket-grpo-lpreg.yaml",
        ),
        Term(
            "targeted_entropy",
            "Two-sided targeted entropy",
            "llmreg.regularizers:TargetedEntropyRegularizer",
            None,
            "Holds the mean token entropy at a target, from both sides.",
            "Reinforcement learning that collapses or drifts.",
            "After a first stage: its authors drop it then.",
            "Nothing in GRPO, which has the entropy; elsewhere two products with the head.",
            ("sft", "dpo", "grpo"),
            {"weight": 0.001, "target": 0.55},
        ),
        Term(
            "tuner",
            "PEFT's auxiliary losses",
            "llmreg.trainers:TunerRegularizer",
            None,
            "Applies the losses of AdaLoRA, KaSA and MonteCLoRA, which TRL's trainers drop.",
            "One of these tuners in a TRL trainer.",
            "transformers' own Trainer with AdaLoRA, which adds its loss already.",
            "What PEFT computes for it.",
            _OUTPUTS,
            {"weight": 1.0},
        ),
    )
}
