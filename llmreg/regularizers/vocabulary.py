"""Quantities of the next-token distribution from hidden states and the head, without (tokens, vocabulary) memory.

`token_statistics` gives what `token_distribution` defines, `teacher_kl` the divergence from another model.

Logits are made block by block (`logit_blocks`). One output with a frozen head costs two products with `W`: its gradient
is one row a token times what comes in, so the rows are made along with the values and kept, (n, d). Several outputs, or
a head that trains, make the logits again in the backward pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import RecipeError, UnsupportedError
from ..weights.storage import is_dtensor
from .base import Head
from .logit_blocks import HeadGradients, LogitBlocks, gathered
from .token_distribution import Asked, Distribution, TokenStatistics

__all__ = ["TokenStatistics", "teacher_kl", "token_statistics"]


def token_statistics(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None = None,
    *,
    outputs: Collection[str],
    kappa: float | None = None,
    tau: float | None = None,
    top_k: int | None = None,
) -> TokenStatistics:
    """What is asked for of each token's distribution, with exact gradients to `hidden` and a head that trains.

    Args:
        hidden: (n, d) inputs of the head, float32, float64, bfloat16 or float16.
        head: what makes logits of them; weight (vocabulary, d), in hidden's dtype or another, whole or sharded.
        labels: (n,) integers; where negative (-100), `log_probs` is 0 and gives no gradient.
        outputs: names of `TokenStatistics` fields. What is not named costs nothing.
        kappa, tau: exactly one, in (0, 1), for `kept_log_mass`: which tokens are kept. Where `tau` keeps none, the most
            probable token is.
        top_k: for `top_k_entropy`, 1 to vocabulary; among equal logits at the edge any may be taken.

    Raises:
        RecipeError: an unknown output, an argument that an output needs and has not, or shapes that do not fit.
        UnsupportedError: the head is sharded and trains.

    Example:
        >>> head = Head(torch.zeros(50, 8))
        >>> token_statistics(torch.ones(1, 8), head, outputs=["top_k_entropy"], top_k=20).top_k_entropy.exp()
        tensor([20.0000])
    """
    _check_fit("hidden", hidden, head)
    _check_trainable(head)
    _check_asked(hidden, head, labels, outputs, kappa, tau, top_k)
    asked = Asked(tuple(name for name in TokenStatistics._fields if name in outputs), kappa, tau, top_k)
    results = _Statistics.apply(hidden, head.weight, head.bias, head, labels, asked, torch.is_grad_enabled())
    return TokenStatistics(**dict(zip(asked.outputs, results, strict=True)))


def _sweep(
    blocks: LogitBlocks,
    labels: Tensor | None,
    asked: Asked,
    incoming: Mapping[str, Tensor] | None = None,
    gradients: HeadGradients | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of all tokens; with `gradients`, what `incoming` of each output makes is added to them."""
    found: list[tuple[Tensor, ...]] = []
    for rows in blocks.rows():
        for tokens, z in blocks.pieces(rows):
            some = Distribution(z, None if labels is None else labels[tokens], asked)
            found.append(tuple(getattr(some, name) for name in asked.outputs))
            if incoming is not None and gradients is not None:
                pushes = {name: one[tokens] for name, one in incoming.items()}
                z.copy_(blocks.before_cap(some.gradient(pushes), z))
        if gradients is not None:
            blocks.add_gradients(rows, gradients)
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _top_k_sweep(blocks: LogitBlocks, asked: Asked, gradients: HeadGradients) -> tuple[Tensor, ...]:
    """The top-k entropy alone: its gradient takes k rows of `W` a token instead of a product with all."""
    assert gradients.hidden is not None
    found: list[Tensor] = []
    for rows in blocks.rows():
        for tokens, z in blocks.pieces(rows):
            some = Distribution(z, None, asked)
            found.append(some.top_k_entropy)
            values = some.top_k_gradient(torch.ones_like(some.top_k_entropy))
            values = blocks.before_cap(values, z.gather(1, some.top[1]))
            blocks.add_sparse(tokens, some.top[1], values, gradients.hidden)
    return (torch.cat(found),)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor | None,
        asked: Asked,
        with_gradients: bool,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kept_rows = with_gradients and ctx.needs_input_grad[:3] == (True, False, False) and len(asked.outputs) == 1
        with gathered(head) as whole, torch.autocast(hidden.device.type, enabled=False):
            blocks = LogitBlocks(hidden, whole)
            if not ctx.kept_rows:
                if with_gradients:
                    ctx.save_for_backward(hidden, weight, bias, labels)
                    ctx.head, ctx.asked = head, asked
                return _sweep(blocks, labels, asked)
            rows = HeadGradients(hidden, whole, (True, False, False), blocks.dtype)
            if asked.outputs == ("top_k_entropy",):
                results = _top_k_sweep(blocks, asked, rows)
            else:
                ones = torch.ones(len(hidden), dtype=blocks.dtype, device=hidden.device)
                results = _sweep(blocks, labels, asked, {asked.outputs[0]: ones}, rows)
        ctx.save_for_backward(rows.hidden)
        ctx.dtype = hidden.dtype
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 4
        if ctx.kept_rows:
            return _scaled_rows(ctx, given[0]), None, None, *rest
        hidden, weight, bias, labels = ctx.saved_tensors
        incoming = {name: one for name, one in zip(ctx.asked.outputs, given, strict=True) if one is not None}
        head = replace(ctx.head, weight=weight, bias=bias)
        with gathered(head) as whole, torch.autocast(hidden.device.type, enabled=False):
            blocks = LogitBlocks(hidden, whole)
            gradients = HeadGradients(hidden, whole, ctx.needs_input_grad[:3], blocks.dtype)
            _sweep(blocks, labels, replace(ctx.asked, outputs=tuple(incoming)), incoming, gradients)
        return *gradients.finished(), *rest


def _scaled_rows(ctx: Any, incoming: Tensor | None) -> Tensor | None:
    """The gradient of hidden states from the rows that the forward pass made."""
    (rows,) = ctx.saved_tensors
    return None if incoming is None else (rows * incoming.unsqueeze(1)).to(ctx.dtype)


def teacher_kl(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, *, temperature: float = 1.0
) -> Tensor:
    """`KL(softmax(z_teacher / T) || softmax(z / T))` of each token, (n,), as `TokenStatistics` are.

    The gradient, `(softmax(z / T) - softmax(z_teacher / T)) / T`, goes to `hidden` and to a head that trains, never to
    the teacher. Equal logits give exactly 0. It costs one product with each head, and one more for the gradient (with a
    student's head that trains, all again in the backward pass).

    Args:
        hidden: (n, d). teacher_hidden: (n, d') where the teacher's head has width d'.
        head, teacher_head: of one vocabulary.
        temperature: T, > 0; it divides logits that each head's own temperature has divided already.

    Raises:
        RecipeError: shapes that do not fit, or a temperature that is not > 0.
        UnsupportedError: the student's head is sharded and trains.
    """
    _check_fit("hidden", hidden, head)
    _check_fit("teacher_hidden", teacher_hidden, teacher_head)
    _check_trainable(head)
    if len(hidden) != len(teacher_hidden):
        raise RecipeError(f"hidden has {len(hidden)} tokens and teacher_hidden {len(teacher_hidden)}; give the same.")
    if head.vocabulary != teacher_head.vocabulary:
        raise RecipeError(
            f"the head has {head.vocabulary} tokens in its vocabulary and the teacher's "
            f"{teacher_head.vocabulary}; a divergence needs one vocabulary."
        )
    if not temperature > 0:
        raise RecipeError(f"temperature must be > 0, got {temperature!r}.")
    student = replace(head, temperature=head.temperature * temperature)
    teacher = replace(teacher_head, temperature=teacher_head.temperature * temperature)
    return _TeacherKl.apply(
        hidden, head.weight, head.bias, teacher_hidden.detach(), student, teacher, torch.is_grad_enabled()
    )


def _divergence(
    student: LogitBlocks, teacher: LogitBlocks, incoming: Tensor, gradients: HeadGradients | None
) -> Tensor:
    found = []
    for rows in student.rows():
        for (tokens, z), (_, teacher_z) in zip(student.pieces(rows), teacher.pieces(rows), strict=True):
            log_p, log_q = torch.log_softmax(z, 1), torch.log_softmax(teacher_z, 1).to(z.dtype)
            q = log_q.exp()
            gradient = log_p.exp() - q
            # The gradient sums to 0 but for rounding: adding it takes what the normalisers' rounding does to the value.
            found.append(torch.linalg.vecdot(q, log_q - log_p) + gradient.sum(1))
            if gradients is not None:
                z.copy_(student.before_cap(gradient.mul_(incoming[tokens].unsqueeze(1)), z))
        if gradients is not None:
            student.add_gradients(rows, gradients)
    return torch.cat(found)


class _TeacherKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        head: Head,
        teacher_head: Head,
        with_gradients: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.kept_rows = with_gradients and ctx.needs_input_grad[:3] == (True, False, False)
        asked = (ctx.kept_rows, False, False)
        value, gradients = _kl(hidden, head, teacher_hidden, teacher_head, None, asked)
        if ctx.kept_rows:
            assert gradients is not None
            ctx.save_for_backward(gradients.hidden)
            ctx.dtype = hidden.dtype
        elif with_gradients:
            ctx.save_for_backward(hidden, weight, bias, teacher_hidden, teacher_head.weight, teacher_head.bias)
            ctx.heads = head, teacher_head
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 4
        if incoming is None:
            return None, None, None, *rest
        if ctx.kept_rows:
            return _scaled_rows(ctx, incoming), None, None, *rest
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = ctx.saved_tensors
        head = replace(ctx.heads[0], weight=weight, bias=bias)
        teacher_head = replace(ctx.heads[1], weight=teacher_weight, bias=teacher_bias)
        _, gradients = _kl(hidden, head, teacher_hidden, teacher_head, incoming, ctx.needs_input_grad[:3])
        assert gradients is not None
        return *gradients.finished(), *rest


def _kl(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    incoming: Tensor | None,
    asked: tuple[bool, bool, bool],
) -> tuple[Tensor, HeadGradients | None]:
    """Values and, where any is asked for, gradients for `incoming`; None is one for each token."""
    with torch.autocast(hidden.device.type, enabled=False), gathered(head) as whole:
        if teacher_head.weight is head.weight:  # gathered once
            teacher_head = replace(teacher_head, weight=whole.weight)
        with gathered(teacher_head) as whole_teacher:
            student, teacher = LogitBlocks(hidden, whole), LogitBlocks(teacher_hidden, whole_teacher)
            gradients = HeadGradients(hidden, whole, asked, student.dtype) if any(asked) else None
            if incoming is None:
                incoming = torch.ones(len(hidden), dtype=student.dtype, device=hidden.device)
            return _divergence(student, teacher, incoming, gradients), gradients


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _check_fit(name: str, hidden: Tensor, head: Head) -> None:
    weight = _shape(head.weight)
    if hidden.ndim != 2 or len(weight) != 2 or hidden.shape[1] != weight[1]:
        raise RecipeError(
            f"{name} must be (n, d) and the head's weight (vocabulary, d), got {tuple(hidden.shape)} and {weight}; "
            f"of a batch give hidden[mask], its scored positions."
        )
    if head.bias is not None and _shape(head.bias) != weight[:1]:
        raise RecipeError(f"the head's bias must be {weight[:1]}, got {_shape(head.bias)}.")


def _check_trainable(head: Head) -> None:
    for one in (head.weight, head.bias):
        trains = one is not None and one.requires_grad and torch.is_grad_enabled()
        if trains and (hasattr(one, "ds_id") or is_dtensor(one)):
            raise UnsupportedError(
                "the head is sharded (ZeRO-3, FSDP2) and trains: its gradient cannot be made outside of its module. "
                "Freeze it (requires_grad_(False)), or use ZeRO-2 or DDP."
            )


def _check_asked(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None,
    outputs: Collection[str],
    kappa: float | None,
    tau: float | None,
    top_k: int | None,
) -> None:
    names = TokenStatistics._fields
    for name in outputs:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}."
            raise RecipeError(f"output {name!r} is unknown; {hint}")
    if not outputs:
        raise RecipeError(f"outputs is empty; name some of {', '.join(names)}.")
    if "log_probs" in outputs and (labels is None or labels.shape != hidden.shape[:1]):
        given = "none" if labels is None else f"{tuple(labels.shape)}"
        raise RecipeError(f"log_probs needs labels of shape {tuple(hidden.shape[:1])}, got {given}.")
    if "kept_log_mass" in outputs:
        if (kappa is None) == (tau is None):
            raise RecipeError(f"kept_log_mass needs exactly one of kappa and tau, got kappa={kappa}, tau={tau}.")
        share = kappa if kappa is not None else tau
        if not (isinstance(share, int | float) and 0 < share < 1):
            raise RecipeError(f"{'tau' if kappa is None else 'kappa'} must be between 0 and 1, got {share!r}.")
    vocabulary = head.vocabulary
    if "top_k_entropy" in outputs and not (isinstance(top_k, int) and 0 < top_k <= vocabulary):
        raise RecipeError(f"top_k_entropy needs top_k of 1 to {vocabulary}, the vocabulary, got {top_k!r}.")
