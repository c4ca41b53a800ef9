"""Which tokens of a batch count, and to which sample each belongs.

Read from the batch itself: `attention_mask`, `position_ids` (packed rows: each document is a sample), and `labels`
where the method asks for them. A layer's input is matched to the batch by its leading dimensions: one that has the
batch's (rows, columns), or as many flattened tokens, is *aligned* and the masks apply. Any other input, such as the
tokens that a router sends to one expert, counts whole; each of its rows is a sample if it has the batch's number of
rows, else the whole call is one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmreg.errors import RecipeError

__all__ = ["BatchTokens", "TokenRows", "batch_tokens"]

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenRows:
    """The counted rows of one flattened input (tokens, in).

    Attributes:
        index: (count,) ascending row numbers; None: all rows.
        sample_of: (count,) number of each row's sample, 0 to samples - 1, ascending.
        count, samples: tokens, and samples with at least one of them.
    """

    index: Tensor | None
    sample_of: Tensor
    count: int
    samples: int

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each sample; read from the device once for all layers of a batch."""
        return [self.count] if self.samples == 1 else self.sample_of.bincount().tolist()

    def largest(self, values: Tensor) -> Tensor:
        """(samples,) the largest of each sample's `values` (count,)."""
        if self.count and len(set(self.sizes)) == 1:
            return values.view(self.samples, -1).amax(1)
        lowest = values.new_full((self.samples,), -torch.inf)
        return lowest.scatter_reduce_(0, self.sample_of, values, "amax")

    def to(self, device: torch.device) -> TokenRows:
        index = None if self.index is None else self.index.to(device)
        return TokenRows(index, self.sample_of.to(device), self.count, self.samples)


class BatchTokens:
    """The tokens of one batch: what its masks say, for the inputs that they fit.

    Attributes:
        shape: leading shape of an aligned input, such as (rows, columns); None if the batch does not tell.
        rows: the counted tokens; None if `shape` is.
        masked: whether the batch's masks leave out some token.
    """

    def __init__(self, shape: tuple[int, ...] | None, rows: TokenRows | None, masked: bool = False) -> None:
        self.shape, self.rows, self.masked = shape, rows, masked
        self._moved: dict[tuple[Any, ...], TokenRows] = {}

    def aligned(self, leading: tuple[int, ...]) -> bool:
        """Whether an input of this leading shape has the batch's tokens, in the batch's order."""
        if self.shape is None:
            return False
        return leading == self.shape or (
            math.prod(leading) == math.prod(self.shape) and sum(size != 1 for size in leading) <= 1
        )

    def one_a_row(self, leading: tuple[int, ...]) -> bool:
        """Whether an input of this leading shape is one vector a row, as a pooled one is; no mask leaves it out."""
        return self.shape is not None and leading == self.shape[:1]

    def rows_of(self, leading: tuple[int, ...], device: torch.device) -> TokenRows:
        """The counted rows of an input with this leading shape, on its device; built once per batch."""
        key = (None, device) if self.rows is not None and self.aligned(leading) else (leading, device)
        if key not in self._moved:
            rows = self.rows if key[0] is None else None
            self._moved[key] = (rows or self._whole(leading)).to(device)
        return self._moved[key]

    def _whole(self, leading: tuple[int, ...]) -> TokenRows:
        by_row = len(leading) > 1 and (self.shape is None or leading[0] == self.shape[0])
        count, samples = math.prod(leading), leading[0] if by_row else 1
        if count == 0:
            return TokenRows(None, torch.zeros(0, dtype=torch.long), 0, 0)
        return TokenRows(None, torch.arange(samples).repeat_interleave(count // samples), count, samples)


def batch_tokens(batch: Any, *, use_label_mask: bool = False, limit: int | None = None) -> BatchTokens:
    """What counts in `batch`: a mapping as the model takes it, a tensor, or a tuple whose first entry is one.

    Args:
        use_label_mask: leave out tokens whose own label is -100, where the batch has (rows, columns) labels.
        limit: at most the first so many counted tokens, in row-major order.

    Raises:
        RecipeError: an attention mask that is not (rows, columns).
    """
    fields = batch if isinstance(batch, Mapping) else {}
    shape = _shape(batch)
    if shape is None:
        return BatchTokens(None, None)
    valid = _valid(fields, shape)
    samples = _samples(fields, shape, valid)
    keep = valid
    labels = fields.get("labels")
    if use_label_mask and isinstance(labels, Tensor) and tuple(labels.shape) == shape:
        keep = keep & (labels.reshape(-1) != IGNORED_LABEL).to(keep.device)
    every = keep.nonzero().squeeze(1)
    index = every[:limit]
    _, sample_of = samples[index].unique_consecutive(return_inverse=True)
    count = index.numel()
    number = int(sample_of[-1]) + 1 if count else 0
    rows = TokenRows(None if count == keep.numel() else index, sample_of, count, number)
    return BatchTokens(shape, rows, masked=every.numel() < keep.numel())


def _shape(batch: Any) -> tuple[int, ...] | None:
    """Leading shape of the model's first activations: that of token ids, or of features without their last size."""
    if isinstance(batch, Mapping):
        for key, features in (("input_ids", 0), ("inputs_embeds", 1), ("attention_mask", 0)):
            if isinstance(batch.get(key), Tensor):
                return tuple(batch[key].shape[: batch[key].dim() - features])
        return None
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        return None
    return tuple(batch.shape[:-1] if batch.is_floating_point() else batch.shape)


def _valid(fields: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    mask = fields.get("attention_mask")
    if not isinstance(mask, Tensor):
        return torch.ones(math.prod(shape), dtype=torch.bool)
    if tuple(mask.shape) != shape:
        raise RecipeError(
            f"the batch's attention_mask has shape {tuple(mask.shape)}, but calibration needs one of {shape} that says "
            "which tokens count; give a (rows, columns) mask, or packed rows with position_ids and no mask"
        )
    return mask.reshape(-1) != 0


def _samples(fields: Mapping[str, Any], shape: tuple[int, ...], valid: Tensor) -> Tensor:
    """(tokens,) number of each token's sample: its row, split wherever the position ids of valid tokens restart."""
    columns = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    row = torch.arange(math.prod(shape), device=valid.device) // max(1, columns)
    positions = fields.get("position_ids")
    if not isinstance(positions, Tensor) or len(shape) != 2 or tuple(positions.shape) not in (shape, (1, columns)):
        return row
    index = valid.nonzero().squeeze(1)
    position, row_of = positions.to(valid.device).expand(shape).reshape(-1)[index], row[index]
    starts = torch.ones_like(index, dtype=torch.bool)
    starts[1:] = (row_of[1:] != row_of[:-1]) | (position[1:] <= position[:-1])
    samples = torch.zeros_like(row)
    samples[index] = starts.cumsum(0)
    return samples
