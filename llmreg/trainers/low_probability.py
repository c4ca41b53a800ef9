"""What Lp-Reg (arXiv 2510.03222) needs from where completions are generated: its threshold, and the old policy's proxy.

The threshold is the rho-quantile of the sampled tokens' probabilities over a whole generation batch, on all ranks. It
is the same however the batch is then cut into micro-batches, because it is taken where TRL generates, from the
trainer's own log-probabilities. Those of vLLM are another engine's: they differ from the policy's by rounding, most of
all for unlikely tokens, and follow its sampling settings, so they set no threshold here.

Where TRL takes log-probabilities at generation anyway (off-policy, or vLLM with its correction) the threshold is free;
else it costs one forward pass without gradients, as the proxy of the old policy always does. `threshold=
"previous_batch"` costs none.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LlmregWarning, RecipeError, UnsupportedError
from ..files import write_json
from ..regularizers.base import Head
from ..regularizers.low_probability import PROXY, THRESHOLD, LowProbabilityRegularizer
from ..weights import gathered
from .model_parts import head_of

__all__ = ["LowProbabilityPreparation", "RunningThreshold", "check_grpo", "generation_threshold", "old_proxy"]

#: Of (k,) numbers of this rank all numbers of all ranks, in any order; NaN where a rank had fewer than another.
Gather = Callable[[Tensor], Tensor]

SECONDS = "regularizer/low_probability_seconds"
_STATE_FILE = "low_probability_state.json"
#: What a forward pass of TRL takes besides token ids, by its key in a generated batch.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@torch.no_grad()
def generation_threshold(
    log_probs: Tensor, mask: Tensor, percentile: float, gather: Gather = lambda values: values
) -> Tensor:
    """The logarithm of the `percentile`-quantile of the probabilities of all scored tokens, a scalar; -inf of none.

    Between two order statistics it is interpolated as `numpy.percentile` does.

    Args:
        log_probs: (B, T), or any shape, of the sampled tokens. mask: the same shape, true where a token is scored.
        percentile: rho, 0 to 1. gather: from this rank's numbers to those of all.
    """
    values = gather(log_probs[mask.bool()])
    values = values[~values.isnan()].double()
    if not values.numel():
        return log_probs.new_tensor(-math.inf)
    place = percentile * (values.numel() - 1)
    below = int(place)
    lowest = values.topk(min(below + 2, values.numel()), largest=False, sorted=True).values
    low, high = lowest[below], lowest[-1]
    # log((1 - f) e^low + f e^high), exactly `low` at f = 0: a token that is the quantile is not below it
    return (low + torch.log1p((place - below) * torch.expm1(high - low))).to(log_probs.dtype)


def old_proxy(
    regularizer: LowProbabilityRegularizer, hidden: Tensor, head: Head, labels: Tensor, log_probs: Tensor
) -> Tensor:
    """Log-probabilities of sampled tokens under the proxy of the policy that sampled; -inf where it was filtered.

    Args:
        hidden: (n, hidden) inputs of the head. labels: (n,) the sampled tokens. log_probs: (n,) theirs, of the trainer.
    """
    kept, log_mass = regularizer.keeps(hidden, head, labels)
    return torch.where(kept, log_probs.detach() - log_mass, -math.inf)


class RunningThreshold:
    """The threshold of the last completed window of training (a generation batch): `threshold="previous_batch"`.

    Attributes:
        log_threshold: a log-probability; -inf, below which nothing is, until a first window is complete.
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.log_threshold = -math.inf
        self._window: list[Tensor] = []

    def add(self, log_probs: Tensor, mask: Tensor) -> None:
        """Tokens of a micro-batch, (B, T), scored where `mask` is true."""
        self._window.append(log_probs.detach()[mask.bool()])

    def complete(self, gather: Gather = lambda values: values) -> float:
        """End the window, on all ranks at once: its quantile is the threshold from here on. An empty one changes
        nothing, as after a resume."""
        window = torch.cat(self._window) if self._window else torch.zeros(0)
        self._window = []
        threshold = float(generation_threshold(window, torch.ones_like(window), self.percentile, gather))
        if threshold > -math.inf:
            self.log_threshold = threshold
        return self.log_threshold

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs, in numbers that JSON knows; a window that is not complete is not part of it."""
        known = self.log_threshold > -math.inf
        return {"percentile": self.percentile, "log_threshold": self.log_threshold if known else None}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Raises RecipeError for the state of another percentile."""
        if state["percentile"] != self.percentile:
            raise RecipeError(
                f"the checkpoint's low-probability threshold is of percentile {state['percentile']}, and the "
                f"regulariser asks for {self.percentile}; resume with the percentile of the run."
            )
        threshold = state["log_threshold"]
        self.log_threshold = -math.inf if threshold is None else threshold


def check_grpo(args: Any) -> None:
    """Whether Lp-Reg can act as it says beside the loss that a `trl.GRPOConfig` asks for.

    It stands beside losses that weigh each token by its own ratio: grpo, bnpo, dapo, dr_grpo, cispo and sapo; its push
    of beta against `|A|` is token by token. luspo, vespo and `importance_sampling_level="sequence"` weigh a token by
    the ratio of its whole sequence. dr_grpo divides by the longest completion that is allowed and not by the number of
    tokens, so that beta counts for more there than in the paper. Of the paper is dapo: a mean over tokens.

    The paper's clip is `clip(r, 0, 10) A` for both signs: `epsilon=1, epsilon_high=9, delta=10` in TRL.

    Raises:
        UnsupportedError: luspo, vespo, a ratio of sequences, or `use_liger_kernel`.

    Warns:
        LlmregWarning: another clip than the paper's where it acts, off-policy.
    """
    if args.loss_type in ("luspo", "vespo") or args.importance_sampling_level == "sequence":
        raise UnsupportedError(
            f"low_probability: loss_type={args.loss_type!r} with importance_sampling_level="
            f"{args.importance_sampling_level!r} weighs a token by the ratio of its whole sequence, and the "
            "regulariser answers each token's own; use loss_type='dapo' with importance_sampling_level='token'."
        )
    if args.use_liger_kernel:
        raise UnsupportedError(
            "low_probability: use_liger_kernel=True replaces parts of the model that hidden states are read from, and "
            "TRL gives it up; use model_init_kwargs={'use_kernels': True}."
        )
    clipped = args.loss_type in ("grpo", "bnpo", "dapo", "dr_grpo")
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if clipped and _is_off_policy(args) and (args.epsilon, epsilon_high, args.delta) != (1, 9, 10):
        warnings.warn(
            f"low_probability: the clip is epsilon={args.epsilon}, epsilon_high={epsilon_high}, delta={args.delta}; "
            "Lp-Reg's paper has clip(ratio, 0, 10) for both signs: epsilon=1, epsilon_high=9, delta=10.",
            LlmregWarning,
            stacklevel=2,
        )


def _is_off_policy(args: Any) -> bool:
    """Whether TRL trains on completions of an earlier policy; on-policy the ratio is 1 and no clip acts."""
    return args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0


class LowProbabilityPreparation:
    """Mixin in front of `trl.GRPOTrainer`: adds to each generated batch what its low-probability regulariser needs.

    `low_probability_threshold` (B,) and, for `policy="old"`, `low_probability_proxy` (B, T) of completion tokens. They
    are rows like all others of the batch, so TRL's shuffle and split keep them with their completions.

    Attributes:
        _regularizers: the trainer's regularisers.
    """

    _regularizers: Any = ()
    _running_threshold: RunningThreshold | None = None
    _scored: Tensor | None = None

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        regularizer = self._low_probability()
        if regularizer is None or not regularizer.prepared or not self.model.training:
            return output
        start = time.perf_counter()
        log_probs = output.get("old_per_token_logps")
        if PROXY in regularizer.prepared:
            log_probs, output[PROXY] = _sampled_proxy(self, output, regularizer)
        if THRESHOLD in regularizer.prepared:
            rows = output["completion_ids"].shape[0]
            output[THRESHOLD] = self._batch_threshold(output, regularizer, log_probs).float().repeat(rows)
        self._metrics["train"][SECONDS].append(time.perf_counter() - start)
        return output

    def _low_probability(self: Any) -> LowProbabilityRegularizer | None:
        found = [term for term in self._regularizers if isinstance(term, LowProbabilityRegularizer)]
        if len(found) > 1:
            raise UnsupportedError(f"{len(found)} low_probability regularisers were given; give one.")
        return found[0] if found else None

    def _batch_threshold(self: Any, output: Any, regularizer: LowProbabilityRegularizer, log_probs: Any) -> Tensor:
        if regularizer.threshold == "previous_batch":
            running = self._running(regularizer)
            return output["completion_ids"].new_tensor(running.complete(self._gather_ragged), dtype=torch.float32)
        if log_probs is None:
            log_probs = _sampled_log_probs(self, output)
        return generation_threshold(log_probs, _scored(output), regularizer.percentile, self._gather_ragged)

    def _gather_ragged(self: Any, values: Tensor) -> Tensor:
        values = values.to(self.accelerator.device)
        return self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=0, pad_index=math.nan))

    # -- the threshold of the batch before --------------------------------------------------------------------------

    def _running(self: Any, regularizer: LowProbabilityRegularizer) -> RunningThreshold:
        if self._running_threshold is None:
            self._running_threshold = RunningThreshold(regularizer.percentile)
        return self._running_threshold

    def _compute_loss(self: Any, model: Any, inputs: Any) -> Any:
        self._scored = _scored(inputs)
        try:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._scored = None

    def _get_per_token_logps_and_entropies(self: Any, *args: Any, **kwargs: Any) -> Any:
        results = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        regularizer = self._low_probability()
        previous = regularizer is not None and regularizer.threshold == "previous_batch"
        if previous and self._scored is not None and self.model.training:
            self._running(regularizer).add(results[0], self._scored)
        return results

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self._running_threshold is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_json(folder / _STATE_FILE, self._running_threshold.state_dict())

    def _load_optimizer_and_scheduler(self: Any, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        regularizer, path = self._low_probability(), checkpoint and os.path.join(checkpoint, _STATE_FILE)
        if regularizer is not None and path and os.path.isfile(path):
            self._running(regularizer).load_state_dict(json.loads(Path(path).read_text()))


@torch.no_grad()
def _sampled_log_probs(trainer: Any, output: Any) -> Tensor:
    """(B, T) of the sampled tokens, by the policy that trains, as TRL itself takes them."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    return trainer._get_per_token_logps_and_entropies(
        trainer.model,
        ids,
        attention,
        output["completion_ids"].shape[1],
        batch_size=trainer.args.per_device_train_batch_size,
        **{key: output.get(key) for key in _MODEL_INPUTS},
    )[0]


@torch.no_grad()
def _sampled_proxy(trainer: Any, output: Any, regularizer: LowProbabilityRegularizer) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the proxy's, (B, T) each; the latter NaN but at scored tokens of negative advantage.

    Which of those will be unlikely is known when the current policy is, so all have their proxy. It is taken from the
    hidden states of one batch of rows at a time, as the pass goes.
    """
    advantages, labels = output["advantages"], output["completion_ids"]
    wanted = _scored(output) & (advantages if advantages.dim() > 1 else advantages.unsqueeze(1)).lt(0)
    causal = _causal_lm(trainer.accelerator.unwrap_model(trainer.model))
    relative: list[Tensor] = []  # to the token's own log-probability, which the pass has not come to yet

    def take(hidden: Tensor) -> None:
        start = sum(map(len, relative))
        rows = slice(start, start + hidden.shape[0])
        at = wanted[rows]
        states, chosen = hidden[:, -labels.shape[1] - 1 : -1][at], labels[rows][at]
        with gathered([causal.get_output_embeddings()]):
            head = head_of(causal, trainer.temperature)
            proxy = old_proxy(regularizer, states, head, chosen, torch.zeros(len(chosen), device=states.device))
        relative.append(proxy.new_full(at.shape, math.nan).masked_scatter(at, proxy))

    with _hidden_states(causal, take):
        log_probs = _sampled_log_probs(trainer, output)
    return log_probs, log_probs + torch.cat(relative)


def _scored(batch: Any) -> Tensor:
    """(B, T) which completion tokens carry the loss, as in TRL: not padding, and not what a tool said."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _hidden_states(causal: Any, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context `take` is given the last hidden states (B, S, hidden) of each forward of the backbone."""
    handle = causal.base_model.register_forward_hook(lambda module, inputs, output: take(output.last_hidden_state))
    try:
        yield
    finally:
        handle.remove()
