"""Logits of a language-model head in blocks: some hundred tokens by the whole vocabulary, one block after another.

    z = cap(scale (h W^T + b)) / temperature,    cap(y) = softcap tanh(y / softcap)

in this order, as in TRL's fused head. A block holds whole rows, so that everything about a token, its gradient too,
comes from one product with `W`; online sums over narrower tiles would make each tile again for whatever needs the
maximum or the normaliser first. Its size does not depend on the number of tokens, and is a fraction of that of `W`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..weights.storage import is_dtensor
from .base import Head

__all__ = ["HeadGradients", "LogitBlocks", "gathered"]

#: Tokens of a block, on a CPU and elsewhere. Fewer read `W` too often: on a CPU 64 take 1.7 times as long as 256, and
#: more gain nothing; on a GPU 512 make a half-precision product bound by arithmetic.
TOKENS = {"cpu": 256, "accelerator": 512}
#: Logits that are worked on at a time: they and what is made of them stay in a CPU's cache.
PIECE = {"cpu": 1 << 18, "accelerator": 1 << 24}
#: Elements of `W` that are converted at a time, where its dtype cannot be multiplied as it is.
CONVERTED = 1 << 22

_HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def gathered(head: Head) -> Iterator[Head]:
    """The head with whole weights, for as long as the context lasts.

    A collective where they are sharded (ZeRO-3 parameters, DTensors of FSDP2): every rank must enter, in one order.
    """
    tensors: tuple[Any, Any] = (head.weight, head.bias)
    # What a running forward holds is whole already, and not ours to take away afterwards.
    partitioned = [one for one in tensors if hasattr(one, "ds_id") and one.ds_status.name != "AVAILABLE"]
    context: Any = nullcontext()
    if partitioned:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None)
    with context:
        weight, bias = (one.full_tensor() if is_dtensor(one) else one for one in tensors)
        yield replace(head, weight=weight, bias=bias)


class HeadGradients:
    """Sums over blocks of the gradients with respect to hidden states, weight and bias; None: not asked for."""

    def __init__(self, hidden: Tensor, head: Head, asked: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
        tensors = (hidden, head.weight, head.bias)
        made = [
            torch.zeros(one.shape, dtype=dtype, device=one.device) if one is not None and wanted else None
            for one, wanted in zip(tensors, asked, strict=True)
        ]
        self._dtypes = [None if one is None else one.dtype for one in tensors]
        self.hidden, self.weight, self.bias = made

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three, each in its tensor's dtype."""
        made = (self.hidden, self.weight, self.bias)
        hidden, weight, bias = (None if one is None else one.to(to) for one, to in zip(made, self._dtypes, strict=True))
        return hidden, weight, bias


class LogitBlocks:
    """The logits of `hidden` (n, d), block by block, in one buffer; each block becomes its gradient in place.

        for rows in blocks.rows():
            for tokens, z in blocks.pieces(rows):       # z: (len(tokens), vocabulary)
                z.copy_(blocks.before_cap(gradient, z))
            blocks.add_gradients(rows, gradients)

    Sums are float32; float64 where an input is. Half-precision inputs are multiplied as they are on CUDA, with float32
    results, and elsewhere in float32.

    Attributes:
        dtype: of logits and sums.
    """

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head
        dtypes = {hidden.dtype, head.weight.dtype}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        as_they_are = hidden.is_cuda and len(dtypes) == 1 and hidden.dtype in _HALVES
        self._factor_dtype = hidden.dtype if as_they_are else self.dtype
        device = "cpu" if hidden.device.type == "cpu" else "accelerator"
        self._tokens = min(len(hidden), TOKENS[device]) or 1
        self._piece = max(1, PIECE[device] // len(head.weight))
        self._buffer = torch.empty(self._tokens, len(head.weight), dtype=self.dtype, device=hidden.device)

    def rows(self) -> Iterator[slice]:
        """The tokens of each block. There is always one, of no tokens where there are none."""
        for start in range(0, max(1, len(self.hidden)), self._tokens):
            yield slice(start, min(start + self._tokens, len(self.hidden)))

    def pieces(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Makes the logits of a block and gives them in turn: which tokens, and their rows of the buffer."""
        block = self._buffer[: rows.stop - rows.start]
        hidden = self.hidden[rows].to(self._factor_dtype)
        for columns, W in self._weight():
            _product(hidden, W.mT, out=block[:, columns])
        for first in range(0, max(1, len(block)), self._piece):
            z = block[first : first + self._piece]
            self._finish(z)
            yield slice(rows.start + first, rows.start + first + len(z)), z

    def before_cap(self, gradient: Tensor, z: Tensor) -> Tensor:
        """In place: the gradient with respect to logits `z` becomes that with respect to `h W^T + b`."""
        head = self.head
        if head.softcap is not None:
            tanh = z * (head.temperature / head.softcap)
            gradient.mul_(tanh.square_().neg_().add_(1))
        slope = head.scale / head.temperature
        return gradient if slope == 1 else gradient.mul_(slope)

    def add_gradients(self, rows: slice, gradients: HeadGradients) -> None:
        """Add what follows from the block, which holds the gradient with respect to `h W^T + b`."""
        block = self._buffer[: rows.stop - rows.start]
        if gradients.bias is not None:
            gradients.bias += block.sum(0)
        hidden = self.hidden[rows].to(self._factor_dtype)
        for columns, W in self._weight():
            part = block[:, columns].to(self._factor_dtype)
            if gradients.hidden is not None:
                _add_product(gradients.hidden[rows], part, W)
            if gradients.weight is not None:
                _add_product(gradients.weight[columns], part.mT, hidden)

    def add_sparse(self, tokens: slice, index: Tensor, values: Tensor, hidden: Tensor) -> None:
        """Add to `hidden` the gradient of tokens for which that of `h W^T + b` is `values` at `index`, else 0."""
        W = self.head.weight[index].to(self.dtype)  # (tokens, k, d)
        hidden[tokens] += torch.bmm(values.unsqueeze(1), W).squeeze(1)

    def _weight(self) -> Iterator[tuple[slice, Tensor]]:
        weight = self.head.weight
        size = len(weight)
        if weight.dtype != self._factor_dtype:
            size = max(1, CONVERTED // weight.shape[1])
        for start in range(0, len(weight), size):
            columns = slice(start, start + size)
            yield columns, weight[columns].to(self._factor_dtype)

    def _finish(self, z: Tensor) -> None:
        head = self.head
        if head.bias is not None:
            z.add_(head.bias.to(z.dtype))
        if head.softcap is not None:
            z.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / head.temperature)
        elif head.scale != head.temperature:
            z.mul_(head.scale / head.temperature)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype in _HALVES:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype in _HALVES:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a, b)
