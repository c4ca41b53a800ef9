"""Terms on what a model puts out, added to the gradient of any trainer's loss without touching the trainer.

A hook on the model looks at each training forward pass, gives every regulariser what it needs from that very pass
(hidden states, log-probabilities; the teacher's with adapters switched off) and ties the weighted term to the output
that the loss is taken from. The tie is an identity whose backward hands the term a gradient of one: whatever the
trainer does to its loss, the gradient is the task's plus `weight(t) dR`, and the loss it reports stays the task's.

Over an accumulation window and all processes a term counts as one mean: of tokens where its reduction is "tokens" and
the trainer tells how many there are (`llmreg.trainers`), else of micro-batches, as TRL averages its own added terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..regularizers.base import Context, Head, Regularizer, schedule_factor
from ..regularizers.vocabulary import token_statistics
from .model_parts import (
    backbone_of,
    check_next_tokens,
    check_teacher,
    evaluating,
    has_head,
    head_of,
    recomputes_in_backward,
    without_adapters,
)

__all__ = ["Batch", "OutputTerms"]

_SCORED = frozenset(("hidden", "teacher", "log_probs", "advantages", "rows"))
_IGNORED = -100


@dataclass
class Batch:
    """What the trainer knows of the micro-batch that is run, where it is one of `llmreg.trainers`.

    Attributes:
        window: micro-batches in this accumulation window.
        tokens: scored tokens of the window on all processes over the number of processes, by which a sum over this
            process's tokens becomes its share of the mean; None: not known.
        advantages, old_log_probs, mask: (batch, completion) or, of advantages, (batch,); None: not that kind of
            trainer. mask: which completion tokens count.
        extra: (batch,) or (batch, completion) tensors by name, for `Context.extra`.
    """

    window: int
    tokens: float | Tensor | None = None
    advantages: Tensor | None = None
    old_log_probs: Tensor | None = None
    mask: Tensor | None = None
    extra: Mapping[str, Tensor] | None = None


class _Tie(torch.autograd.Function):
    """`output` as it is; in backward `term` gets a gradient of one."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, term: Tensor, fired: list[int]) -> Tensor:
        ctx.fired, ctx.term = fired, term.new_ones(())
        return output.clone()  # trainers scale a loss in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.fired.append(1)
        return gradient, ctx.term, None


class OutputTerms:
    """The output terms of one training, on its model from construction to `remove()`.

    Args:
        model: the wrapped model, not the parallel wrapper around it.
        temperature: that the trainer's log-probabilities are taken at.
        teacher: a model for classification, with a trained head; None: none.
        probing: entered while gradients are taken only to be looked at.

    Raises:
        UnsupportedError: the model cannot give what a regulariser needs.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizers: Sequence[Regularizer],
        *,
        temperature: float = 1.0,
        teacher: Any = None,
        probing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        task = "nlg" if has_head(model) else "nlu"
        self.regularizers = [one.for_task(task) if hasattr(one, "for_task") else one for one in regularizers]
        self.model = model
        self.teacher = None if teacher is None else teacher.to(next(model.parameters()).device)
        self.batch: Batch | None = None
        self.progress, self.window = 0.0, 1
        self._temperature, self._probing = temperature, probing
        self._backbone_call: tuple[Any, tuple, dict] | None = None
        self._hidden: Tensor | None = None
        self._tied, self._expected = 0, 1
        self._fired: list[int] = []
        self._verified: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._weights: dict[str, float] = {}
        self._check_model()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        backbone = backbone_of(model)
        if backbone is not None and any(one.needs & {"hidden", "teacher", "log_probs"} for one in self.regularizers):
            self._handles.append(backbone.register_forward_hook(self._keep_hidden, with_kwargs=True))

    def _check_model(self) -> None:
        needs = frozenset[str]().union(*(one.needs for one in self.regularizers))
        if "logits" not in needs and needs & _SCORED:
            check_next_tokens(self.model, self._names())
            if "teacher" in needs:
                check_teacher(self.model)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    # -- the trainer's events ---------------------------------------------------------------------------------------

    def begin_step(self, progress: float, window: int) -> None:
        """Before the forward passes of an optimizer step, `window` micro-batches; `progress` of training is done."""
        self.progress, self.window = progress, window
        self._tied = 0
        self._fired.clear()

    def before_optimizer_step(self, step: int) -> None:
        """Every term that was tied must have been reached by the loss's backward, once (law 3)."""
        if self._acting() and not self._tied:
            raise UnsupportedError(
                f"At step {step} no training forward pass of the model was seen, so the regularisers "
                f"{self._names()} did not act; train the model that the callback was given."
            )
        if len(self._fired) != self._tied:
            raise UnsupportedError(
                f"At step {step} the loss reached {len(self._fired)} of {self._tied} outputs that the regularisers "
                f"{self._names()} were tied to; this trainer takes its loss from another output."
            )
        if self._tied and self._tied != self._expected:
            raise UnsupportedError(
                f"At step {step} the model ran {self._tied} training forward passes in a window of {self._expected} "
                f"micro-batches, so the regularisers {self._names()} would count {self._tied / self._expected:g} times "
                "what their weights say; use a trainer that runs the model once for each micro-batch."
            )

    def values(self) -> dict[str, float]:
        """Means over the micro-batches since the last call, and over processes; the weights as they are now."""
        means = {name: float(self._sums[name] / self._counts[name]) for name in self._sums}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # By name: a term may log what not every process came to, such as where one had no scored token.
            of_all: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, means)
            names = {name: None for found in of_all for name in found}
            values = {name: [found[name] for found in of_all if name in found] for name in names}
            means = {name: sum(found) / len(found) for name, found in values.items()}
        self._sums, self._counts = {}, {}
        return {**means, **self._weights}

    # -- the forward pass -------------------------------------------------------------------------------------------

    def _acting(self) -> list[tuple[Regularizer, float]]:
        factors = [(one, one.weight * schedule_factor(one.schedule, self.progress)) for one in self.regularizers]
        self._weights = {f"regularizer/{one.name}_weight": weight for one, weight in factors}
        return [(one, weight) for one, weight in factors if weight]

    def _names(self) -> str:
        return ", ".join(one.name for one in self.regularizers)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._hidden = self._backbone_call = None

    def _keep_hidden(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if torch.is_grad_enabled() and self.model.training:
            self._hidden = _last_hidden(output)
            self._backbone_call = (module, args, kwargs)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Tie the terms to the output of a training forward pass; any other passes by."""
        try:
            if torch.is_grad_enabled() and module.training and (acting := self._acting()):
                return self._tie(acting, kwargs, output)
            return output
        finally:
            self._hidden = self._backbone_call = None

    def _tie(self, acting: list[tuple[Regularizer, float]], kwargs: dict, output: Any) -> Any:
        carriers = [key for key in ("log_probs", "loss", "logits") if getattr(output, key, None) is not None][:1]
        if not carriers or not getattr(output, carriers[0]).requires_grad:
            return output
        context = self._context(acting, kwargs, output)
        context.loss_from = carriers[0]
        total = None
        for one, weight in acting:
            value = one.loss(context)
            if one.name not in self._verified:
                self._verify(one, value, context)
            self._add(f"regularizer/{one.name}", value)
            part = weight * self._share(one, context) * value
            total = part if total is None else total + part
        for key, logged in context.log.items():
            self._add(key, logged)
        self._tied, self._expected = self._tied + 1, self.window if self.batch is None else self.batch.window
        setattr(output, carriers[0], _Tie.apply(getattr(output, carriers[0]), total, self._fired))
        return output

    def _share(self, one: Regularizer, context: Context) -> float | Tensor:
        """What a micro-batch's value counts for in the window's mean, before processes are averaged."""
        window = self.window if self.batch is None else self.batch.window
        if one.reduction == "batch" or self.batch is None or self.batch.tokens is None or context.labels is None:
            return 1 / window
        return len(context.labels) / self.batch.tokens

    def _add(self, key: str, value: float | Tensor) -> None:
        value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
        self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._counts[key] = self._counts.get(key, 0) + 1

    def _verify(self, one: Regularizer, value: Tensor, context: Context) -> None:
        """Where a term first acts it must depend on a trainable parameter."""
        self._verified.add(one.name)
        inputs: list[Tensor] = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if recomputes_in_backward(self.model):  # what the layers put out stands for their parameters
            offered = (context.hidden, context.log_probs, context.logits)
            inputs += [tensor for tensor in offered if tensor is not None and tensor.requires_grad]
        found: Sequence[Tensor | None] = ()
        if value.requires_grad:
            with self._probing():
                found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise UnsupportedError(
                f"The regulariser {one.name!r} reaches no trainable parameter, so its weight {one.weight} would do "
                "nothing; train parameters that its inputs depend on, or leave it out."
            )
        if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in found):
            raise UnsupportedError(
                f"The regulariser {one.name!r} has NaN or infinite gradients at the first step; look at its inputs and "
                "weight, or leave it out."
            )

    # -- what it offers ---------------------------------------------------------------------------------------------

    def _context(self, acting: list[tuple[Regularizer, float]], kwargs: dict, output: Any) -> Context:
        needs = frozenset[str]().union(*(one.needs for one, _ in acting))
        context = Context(progress=self.progress, model=self.model)
        if "logits" in needs:
            self._classify(context, needs, kwargs, output)
        elif needs & _SCORED:
            self._score(context, needs, kwargs, output)
        return context

    def _classify(self, context: Context, needs: frozenset[str], kwargs: dict, output: Any) -> None:
        logits = context.logits = output.logits
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise UnsupportedError(
                f"The regularisers {self._names()} are about a classifier's logits, (batch, classes) with at least two "
                f"classes, and {type(self.model).__name__} puts out {tuple(logits.shape)}; leave them out."
            )
        if "teacher" not in needs:
            return
        if self.teacher is None:
            raise UnsupportedError(
                "The consistency of a classifier needs a teacher with a trained head, and the base's head is new; pass "
                "RegularizerCallback([...], teacher=model), or leave the consistency regulariser out."
            )
        inputs = {key: value for key, value in kwargs.items() if key != "labels"}
        with torch.no_grad(), evaluating(self.teacher):
            teacher_logits = context.teacher_logits = self.teacher(**inputs).logits.to(logits.device)
        if teacher_logits.shape != logits.shape:
            raise UnsupportedError(
                f"The teacher puts out {teacher_logits.shape[1]} classes and the model {logits.shape[1]}; give a "
                "teacher of the same classes, in the same order."
            )

    def _score(self, context: Context, needs: frozenset[str], kwargs: dict, output: Any) -> None:
        """Fill in everything that is per scored token."""
        labels, mask, first = _scored(kwargs, output)
        if "rows" in needs and kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None:
            raise UnsupportedError(
                "Packed batches mix documents in a row, and a regulariser here is a statistic of rows; set "
                "packing=False and padding_free=False."
            )
        if self.batch is not None and self.batch.mask is not None:
            mask = mask & _beside(self.batch.mask, mask).bool()
        context.labels, context.rows = labels[mask], mask.nonzero()[:, 0]
        if needs & {"hidden", "teacher", "log_probs"}:
            context.head = head_of(self.model, self._temperature)
            context.hidden = self._at(self._hidden, first, mask)
        if "teacher" in needs:
            teacher_hidden, context.teacher_head = self._teach()
            context.teacher_hidden = self._at(teacher_hidden, first, mask)
        if getattr(output, "log_probs", None) is not None:
            width = mask.shape[1]  # prompt learning puts virtual tokens in front
            context.log_probs = output.log_probs[:, -width:][mask]
            if output.entropy is not None and output.entropy.requires_grad:
                context.extra["entropy"] = output.entropy[:, -width:][mask]
        elif "log_probs" in needs:
            assert context.hidden is not None
            assert context.head is not None
            found = token_statistics(context.hidden, context.head, context.labels, outputs=("log_probs",))
            context.log_probs = found.log_probs
        if "advantages" in needs:
            self._judge(context, mask)

    def _at(self, hidden: Tensor | None, first: int, mask: Tensor) -> Tensor:
        """(n, hidden) at the scored positions; `first` positions at the end predict nothing."""
        if hidden is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} has no backbone whose hidden states go into a head; the regularisers "
                f"{self._names()} need one: a causal language model of transformers."
            )
        return hidden[:, -mask.shape[1] - first : hidden.shape[1] - first][mask]

    def _judge(self, context: Context, mask: Tensor) -> None:
        batch = self.batch
        if batch is None or batch.advantages is None:
            raise UnsupportedError(
                f"The regularisers {self._names()} need advantages, which only GRPO has; use "
                "llmreg.trainers.GRPOTrainer(..., regularizers=[...])."
            )
        context.advantages = _beside(batch.advantages, mask)[mask]
        if batch.old_log_probs is not None:
            context.old_log_probs = _beside(batch.old_log_probs, mask)[mask]
        for name, values in (batch.extra or {}).items():
            context.extra[name] = _beside(values, mask)[mask]

    def _teach(self) -> tuple[Tensor | None, Head | None]:
        """The base's hidden states on the same inputs, and its head: another where modules_to_save trains the head."""
        if self._backbone_call is None:
            return None, None
        backbone, args, kwargs = self._backbone_call
        with torch.no_grad(), without_adapters(self.model), evaluating(backbone):
            hidden = _last_hidden(backbone(*args, **{**kwargs, "use_cache": False}))
            return hidden, head_of(self.model, self._temperature)


def _last_hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _scored(kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor, int]:
    """(rows, columns) labels of what follows each position, whether it is scored, and positions without a follower."""
    labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
    if shifted is not None:
        return shifted, shifted != _IGNORED, 0
    if labels is None:
        raise UnsupportedError(
            "The model was called without labels, which say the tokens that a regulariser is about; use a trainer that "
            "passes them: TRL's do, unless label_smoothing_factor or compute_loss_func is set."
        )
    labels = labels[:, 1:]
    return labels, labels != _IGNORED, 1


def _beside(values: Tensor, mask: Tensor) -> Tensor:
    """(rows,) or (rows, completion) values in the shape of `mask`, whose last columns are the completion's."""
    if values.dim() == 1:
        return values.unsqueeze(1).expand(mask.shape)
    wide = values.new_zeros(mask.shape)
    wide[:, -values.shape[1] :] = values
    return wide
