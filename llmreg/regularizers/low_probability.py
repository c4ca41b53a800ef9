"""Lp-Reg (arXiv 2510.03222, section 4): tokens that are unlikely but plausible survive reinforcement learning.

    R = 1/n sum_t 1[pi(o_t) < delta, proxy(o_t) > 0, A_t < 0] KL(proxy || pi),    proxy = pi 1[pi > cut] / Z,
    cut = kappa max_v pi(v) (or a fixed tau),   delta: the rho-quantile of sampled tokens' probabilities in the batch

The divergence is taken from the sampled token by the k3 estimator `e^d - d - 1`, `d = log proxy(o) - log pi(o)`, whose
gradient is `(1 - e^d) d log pi(o)`: on the token's own logit a push of `(1/Z - 1)(1 - p)` against the policy
gradient's `|A| (1 - p)`. The exact `KL(proxy || pi) = -log Z` pushes that logit by `(1/Z - 1) p` only, and so hardly
protects the token itself; the paper's numbers were made with k3. Both grow with the filtered mass `1 - Z` and, with
the proxy of the policy that sampled (`policy="old"`), as `pi(o)` falls below it.

What the authors' code does otherwise is `variant="reference"`: the quantile is of the negative-advantage tokens of one
micro-batch (none is selected where that is a single token), the filter is `>=`, `d` is clamped to [-10, 10] and the
value to 10. The last makes the gradient 0 once `d > 2.6`, for just those tokens that fell most. Its selected tokens
also lose the clip of the policy loss; a term that is added to a loss cannot take it away, so that is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import RecipeError, UnsupportedError
from .base import Context, Head, Need, check_weight
from .vocabulary import token_statistics

__all__ = ["PROXY", "THRESHOLD", "LowProbabilityRegularizer"]

#: Keys of `Context.extra`: log-probability below which a token is unlikely; and of the sampled token under the proxy of
#: the policy that sampled: -inf where it was filtered, NaN where it was not looked at.
THRESHOLD, PROXY = "low_probability_threshold", "low_probability_proxy"

_CLAMP = 10.0


@dataclass(frozen=True)
class LowProbabilityRegularizer:
    """Protects sampled tokens of negative advantage that are unlikely, but not so unlikely as to be noise.

    The filter looks at candidates only, tokens of negative advantage below the threshold (1 % of the batch at most):
    the vocabulary is gone through for their hidden states alone.

    Args:
        weight: beta. schedule: of the weight, one of `SCHEDULES`.
        kappa: the proxy keeps tokens above `kappa` times the likeliest (min-p). Paper: 0.02.
        tau: a fixed probability in the place of kappa's (the paper's ablation: worse).
        percentile: rho, the share of sampled tokens that counts as unlikely. Paper: 0.01, or 0.005 (32B).
        threshold: "exact", of the generation batch that the tokens are from (the paper); or "previous_batch", of the
            one before, which costs no further pass and protects nothing in the first.
        policy: whose proxy: "current" (the paper, on-policy), or "old", of the policy that sampled (off-policy).
        divergence: "k3" of the sampled token (default), or "exact", whose gradient on all logits is `pi - proxy`.
        selection_policy: whose log-probabilities are held against the threshold: "current" (the paper) or "old".
        variant: "paper" or "reference"; see the module.

    Raises:
        RecipeError: a number out of its range, or an unknown choice.
        UnsupportedError: `divergence="exact"` with `policy="old"` or `variant="reference"`, or `variant="reference"`
            with a threshold of the previous batch.
    """

    weight: float = 1.0
    schedule: str = "constant"
    kappa: float = 0.02
    tau: float | None = None
    percentile: float = 0.01
    threshold: Literal["exact", "previous_batch"] = "exact"
    policy: Literal["current", "old"] = "current"
    divergence: Literal["k3", "exact"] = "k3"
    selection_policy: Literal["current", "old"] = "current"
    variant: Literal["paper", "reference"] = "paper"

    name = "low_probability"
    reduction = "tokens"

    def __post_init__(self) -> None:
        check_weight(self)
        _check_choices(self)
        for field in ("kappa", "tau", "percentile"):
            value = getattr(self, field)
            if not (field == "tau" and value is None) and not _is_share(value):
                raise RecipeError(f"{self.name}: {field} must be a number between 0 and 1, got {value!r}.")
        if self.divergence == "exact" and self.policy == "old":
            raise UnsupportedError(
                f"{self.name}: divergence='exact' with policy='old' needs the whole distribution of the policy that "
                "sampled, at every token; use divergence='k3', which needs the sampled token's, or policy='current'."
            )
        if self.variant == "reference" and (self.divergence, self.threshold) != ("k3", "exact"):
            raise UnsupportedError(
                f"{self.name}: variant='reference' is the authors' k3 with a threshold of each micro-batch; leave "
                "divergence and threshold out, or use variant='paper'."
            )

    @property
    def needs(self) -> frozenset[Need]:
        """With the old policy's proxy nothing is read from hidden states."""
        of_all: frozenset[Need] = frozenset({"log_probs", "advantages"})
        return of_all if self.policy == "old" else of_all | {"hidden"}

    @property
    def prepared(self) -> frozenset[str]:
        """The keys of `Context.extra` that must be prepared where completions are generated."""
        threshold = {THRESHOLD} if self.variant == "paper" else set()
        return frozenset(threshold | ({PROXY} if self.policy == "old" else set()))

    def loss(self, context: Context) -> Tensor:
        """`R`, a mean over all scored tokens, with gradients; 0, connected to `log_probs`, where nothing is selected.

        Fills `context.log`: `regularizer/low_probability_share`, the share of scored tokens that is selected;
        `regularizer/low_probability_threshold`, a probability; and `regularizer/spark_share`, the share of candidates
        that the filter keeps (0 without candidates): sparks, the paper says, and the rest noise.

        Raises:
            UnsupportedError: something that was to be prepared is not in `context.extra`.
        """
        assert context.log_probs is not None
        count = max(context.log_probs.numel(), 1)
        candidates, log_threshold = self._candidates(context)
        selected, divergence = self._divergence(context, candidates)
        context.log["regularizer/low_probability_share"] = selected.sum() / count
        context.log["regularizer/low_probability_threshold"] = log_threshold.exp()
        context.log["regularizer/spark_share"] = selected.sum() / max(candidates.numel(), 1)
        return divergence.sum() / count + context.log_probs[:0].sum()

    @torch.no_grad()
    def keeps(self, hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the filter keeps `labels` (n,) at `hidden` (n, hidden), and the proxy's `log Z` (n,) there."""
        outputs = ("log_probs", "max_log_prob", "kept_log_mass")
        statistics = token_statistics(hidden, head, labels, outputs=outputs, kappa=self._kappa, tau=self.tau)
        assert statistics.log_probs is not None
        assert statistics.max_log_prob is not None
        assert statistics.kept_log_mass is not None
        log_cut = math.log(self.tau) if self.tau is not None else statistics.max_log_prob + math.log(self.kappa)
        kept = statistics.log_probs >= log_cut if self.variant == "reference" else statistics.log_probs > log_cut
        return kept, statistics.kept_log_mass

    @property
    def _kappa(self) -> float | None:
        return self.kappa if self.tau is None else None

    # -- which tokens -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _candidates(self, context: Context) -> tuple[Tensor, Tensor]:
        """Indices of the tokens of negative advantage below the threshold, and the threshold, a log-probability."""
        old = context.old_log_probs if self.selection_policy == "old" else None
        log_probs = context.log_probs if old is None else old
        assert log_probs is not None
        assert context.advantages is not None
        negative = (context.advantages < 0).nonzero().squeeze(1)
        if self.variant == "reference":
            return self._lowest(log_probs, negative)
        threshold = self._prepared(context, THRESHOLD)
        below = log_probs[negative] < threshold[negative]  # never, where the threshold is NaN or -inf
        known = threshold[~threshold.isnan()]
        return negative[below], known.mean() if known.numel() else known.new_tensor(-math.inf)

    def _lowest(self, log_probs: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The authors' selection: a share of the negative tokens of this micro-batch, unless it is a single one."""
        number = max(1, int(negative.numel() * self.percentile))
        if number == 1:
            return negative[:0], log_probs.new_tensor(-math.inf)
        lowest = log_probs[negative].topk(number, largest=False)
        return negative[lowest.indices], lowest.values.max()

    def _prepared(self, context: Context, key: str) -> Tensor:
        if key not in context.extra:
            raise UnsupportedError(
                f"{self.name}: {key!r} was not prepared; it is made where completions are generated: train with "
                "llmreg.trainers.GRPOTrainer(..., regularizers=[...])."
            )
        return context.extra[key]

    # -- how far each is from the proxy -----------------------------------------------------------------------------

    def _divergence(self, context: Context, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Which candidates are kept by the proxy, and the divergence of those."""
        assert context.log_probs is not None
        log_probs = context.log_probs[candidates]
        if self.policy == "old":
            log_proxy = self._prepared(context, PROXY)[candidates]
            kept = log_proxy > -math.inf  # not where it is NaN
            return kept, self._k3(log_proxy[kept], log_probs[kept])
        assert context.hidden is not None  # without candidates too: a sharded head is gathered by all ranks or none
        assert context.labels is not None
        assert context.head is not None
        hidden, labels = context.hidden[candidates], context.labels[candidates]
        kept, log_mass = self.keeps(hidden.detach(), context.head, labels)
        if self.divergence == "exact":  # once more, of those that have a proxy: where Z = 0 there is no gradient
            states, outputs = hidden[kept], ("kept_log_mass",)
            exact = token_statistics(states, context.head, outputs=outputs, kappa=self._kappa, tau=self.tau)
            assert exact.kept_log_mass is not None
            return kept, -exact.kept_log_mass
        # log proxy from the same log-probabilities as log pi, so that d is -log Z however the trainer rounds them
        return kept, self._k3((log_probs.detach() - log_mass)[kept], log_probs[kept])

    def _k3(self, log_proxy: Tensor, log_probs: Tensor) -> Tensor:
        distance = log_proxy.detach() - log_probs
        if self.variant == "reference":
            distance = distance.clamp(-_CLAMP, _CLAMP)
            return (distance.expm1() - distance).clamp(max=_CLAMP)
        return distance.expm1() - distance


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def _check_choices(regularizer: LowProbabilityRegularizer) -> None:
    choices = {
        "threshold": ("exact", "previous_batch"),
        "policy": ("current", "old"),
        "divergence": ("k3", "exact"),
        "selection_policy": ("current", "old"),
        "variant": ("paper", "reference"),
    }
    for field, allowed in choices.items():
        value = getattr(regularizer, field)
        if value not in allowed:
            named = " or ".join(map(repr, allowed))
            raise RecipeError(f"{regularizer.name}: {field} must be {named}, got {value!r}.")
