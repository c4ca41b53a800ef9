"""What calibration knows of one layer input: sums over its tokens, from which the methods take their moments.

Of the counted tokens `X` (count, in), each sample's rows divided by that sample's scale where the method asks for it:
`X^T X` (whole or sketched), the column sums, the sum of squares, the numbers of tokens and of samples. Nothing is
normalised until it is read, so that sums of two data sets are the sums of both together.
CorDA (arXiv 2406.05223, section 3.2) uses `1/samples sum_n (X_n/m_n)^T (X_n/m_n)`, which is `second_moment()` times
count / samples, a factor that its subspaces and its relative damping do not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmreg.calibration.sums import HALVES, SketchSum, TriangleSum
from llmreg.calibration.tokens import TokenRows
from llmreg.errors import RecipeError, UnsupportedError

__all__ = ["InputStatistics", "Need"]

_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}  # elements of a temporary float32 copy
_LONG_SAMPLE = 256  # tokens from which one product a sample is efficient on a GPU


@dataclass(frozen=True)
class Need:
    """What a method asks of calibration.

    Attributes:
        sample_scale: divide each sample's tokens `X_n` by a scale before anything is summed: "signed_max" is
            `|max(X_n)|`, the absolute value of the signed maximum, as CorDA's reference does; "abs_max" is
            `max|X_n|`. The maximum runs over counted tokens only. A sample whose signed maximum is 0 is divided by
            `max|X_n|`, one of zeros by nothing.
        mean: keep the column sums, for `mean()` and the centred forms (EVA).
        use_label_mask: count only tokens whose label is not -100, where a batch has labels.
    """

    sample_scale: Literal["signed_max", "abs_max"] | None = None
    mean: bool = False
    use_label_mask: bool = False

    def __post_init__(self) -> None:
        if self.sample_scale not in (None, "signed_max", "abs_max"):
            raise RecipeError(f"sample_scale is {self.sample_scale!r}; known are 'signed_max', 'abs_max' and None")


class InputStatistics:
    """Sums over the counted tokens of one distinct layer input.

    Attributes:
        dim: width of the input, the layer's in.
        need: what was summed.
        count: tokens. samples: sequences, or documents of packed rows, that they came from.
        sum: (in,) float64 column sums; None unless `need.mean`.
        moment: `X^T X`, whole or sketched.
    """

    def __init__(
        self,
        dim: int,
        need: Need | None = None,
        *,
        sketch: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Empty sums: exact, or with `sketch` columns of a test matrix drawn from `seed`."""
        self.dim, self.need = dim, need or Need()
        self.count = self.samples = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device) if self.need.mean else None
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        self.moment: TriangleSum | SketchSum = (
            TriangleSum(dim, device) if sketch is None else SketchSum(dim, sketch, seed, device)
        )

    @property
    def exact(self) -> bool:
        """Whether `X^T X` is whole, not sketched."""
        return isinstance(self.moment, TriangleSum)

    @property
    def trace(self) -> float:
        """Sum of the squares of all summed entries, the trace of `X^T X`; exact in the sketched form too."""
        return self.squares.item()

    @property
    def bytes(self) -> int:
        """What the sums hold, without a sketch's test matrix."""
        parts = (self.moment.flat, self.sum)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    # -- summing ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, X: Tensor, rows: TokenRows | None = None) -> None:
        """Add the counted `rows` (default: all, as one sample) of `X` (tokens, in), of any floating dtype.

        Products and sums are float32, column sums and squares are carried on in float64. Copies are made in pieces
        of a few MiB (on CUDA 256 MiB), whatever the number of tokens.
        """
        X = X.detach().to(self.moment.flat.device)
        if rows is None:
            rows = TokenRows(None, X.new_zeros(X.shape[0], dtype=torch.long), X.shape[0], int(X.shape[0] > 0))
        if rows.count == 0:
            return
        scale = None if self.need.sample_scale is None else self._scales(X, rows)
        if X.is_cuda and self._fits_tensor_cores(X, rows, scale):
            self._add_half(X if rows.index is None else X[rows.index], rows, scale)
        else:
            for span, piece in _pieces(X, rows):
                self._add_piece(piece, None if scale is None else scale[rows.sample_of[span]])
        self.count += rows.count
        self.samples += rows.samples

    def _add_piece(self, piece: Tensor, scale: Tensor | None) -> None:
        piece = piece.float()
        norms = torch.linalg.vector_norm(piece, dim=1)
        self.squares += (norms if scale is None else norms * scale).double().square().sum()
        if self.sum is not None:
            self.sum += piece.sum(0) if scale is None else piece.mT @ scale
        self.moment.add(piece, scale)

    def _fits_tensor_cores(self, X: Tensor, rows: TokenRows, scale: Tensor | None) -> bool:
        if isinstance(self.moment, SketchSum):
            return X.dtype == torch.bfloat16
        return X.dtype in HALVES and (scale is None or rows.count >= _LONG_SAMPLE * rows.samples)

    def _add_half(self, X: Tensor, rows: TokenRows, scale: Tensor | None) -> None:
        """Half-precision products are exact in tensor cores, so a scale goes onto the products instead.

        One sequence is little work for a GPU, so what is launched for it is kept to a few kernels.
        """
        row_scale = None if scale is None else scale[rows.sample_of]
        norms = torch.linalg.vector_norm(X, dim=1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(norms if row_scale is None else norms * row_scale, dtype=torch.float64)
        self.squares.addcmul_(norm, norm)
        if self.sum is not None:
            for start in range(0, rows.count, 8192):
                span = slice(start, start + 8192)
                part = X[span]
                self.sum += part.sum(0, dtype=torch.float32) if row_scale is None else part.float().mT @ row_scale[span]
        if isinstance(self.moment, SketchSum) or scale is None:
            self.moment.add_half(X, row_scale)
            return
        weights = scale.square()
        for number, part in enumerate(X.split(rows.sizes)):
            self.moment.add_half(part, weights[number])

    def _scales(self, X: Tensor, rows: TokenRows) -> Tensor:
        """(samples,) float32 factors, the inverses of each sample's scale."""
        highs, lows = zip(*((piece.amax(1), piece.amin(1)) for _, piece in _pieces(X, rows)), strict=True)
        top, bottom = rows.largest(torch.cat(highs).float()), rows.largest(-torch.cat(lows).float())
        largest = torch.maximum(top, bottom)
        scale = top.abs() if self.need.sample_scale == "signed_max" else largest
        scale = torch.where(scale == 0, largest, scale)
        return torch.where(scale == 0, 1.0, 1 / scale)

    # -- reading ----------------------------------------------------------------------------------------------------

    def mean(self) -> Tensor:
        """(in,) float64 mean of the counted tokens.

        Raises:
            UnsupportedError: column sums were not asked for (`Need(mean=True)`), or no token was counted.
        """
        if self.sum is None:
            raise UnsupportedError("these statistics were gathered without column sums; ask with Need(mean=True)")
        return self.sum / self._counted()

    def second_moment(self, *, centred: bool = False) -> Tensor:
        """`C = X^T X / count` (in, in), float32, symmetric; `centred`: less `mean mean^T`, the covariance.

        In the sketched form it is rebuilt as `F F^T` from `low_rank()`, of rank at most the sketch's size, and takes
        the memory that the sketch was to save.

        Raises:
            UnsupportedError: no token was counted; `centred` without column sums.
        """
        count = self._counted()
        if not isinstance(self.moment, TriangleSum):
            F = self.low_rank(centred=centred)
            return F @ F.mT
        C = self.moment.dense().div_(count)
        if centred:
            mean = self.mean()
            for first in range(0, self.dim, 512):  # in float64, by rows: the two terms may cancel
                outer = torch.outer(mean[first : first + 512], mean)
                C[first : first + 512] = (C[first : first + 512].double() - outer).float()
        return C

    def low_rank(self, *, centred: bool = False) -> Tensor:
        """`F` (in, size) float32 with `C ~ F F^T`, from the sketch (single-pass Nyström); columns not orthogonal.

        Raises:
            UnsupportedError: the exact form is held (take `second_moment()`); no token was counted.
        """
        count = self._counted()
        if not isinstance(self.moment, SketchSum):
            raise UnsupportedError("these statistics are exact: take second_moment(), which loses nothing")
        return self.moment.factor(self.mean() if centred else None, count) / count**0.5

    def _counted(self) -> int:
        if self.count == 0:
            raise UnsupportedError("these statistics hold no token; the layer was never reached")
        return self.count

    # -- combining --------------------------------------------------------------------------------------------------

    def like(self) -> InputStatistics:
        """Empty sums of the same form, on the same device."""
        size, seed = (self.moment.size, self.moment.seed) if isinstance(self.moment, SketchSum) else (None, 0)
        return InputStatistics(self.dim, self.need, sketch=size, seed=seed, device=self.moment.flat.device)

    def form(self) -> tuple:
        """What two statistics must share to be added."""
        moment = self.moment
        return (self.dim, self.need, *((moment.size, moment.seed) if isinstance(moment, SketchSum) else ()))

    def merge(self, other: InputStatistics) -> InputStatistics:
        """The statistics of both data sets together; neither argument changes.

        Raises:
            RecipeError: they differ in width, in what was asked for, or in form (exact, or sketch size and seed).
        """
        if self.form() != other.form():
            raise RecipeError(
                f"statistics of different forms cannot be merged: {self.form()} and {other.form()} "
                "(width, need, and for a sketch its size and seed); gather both with the same arguments"
            )
        merged = self.like()
        for part in (self, other):
            for mine, theirs in zip(merged.parts(), part.parts(), strict=True):
                mine += theirs.to(mine.device)
            merged.count += part.count
            merged.samples += part.samples
        return merged

    def parts(self) -> list[Tensor]:
        """The summed tensors: of the moment (float32), of squares and of columns (float64)."""
        return [self.moment.flat, self.squares, *([] if self.sum is None else [self.sum])]

    def restore(self, parts: list[Tensor]) -> None:
        """Take over sums in the order of `parts()`, of their very shapes and dtypes.

        Raises:
            ValueError: another shape or dtype.
        """
        for mine, given in zip(self.parts(), parts, strict=True):
            if mine.shape != given.shape or mine.dtype != given.dtype:
                raise ValueError(f"expected {mine.dtype}{tuple(mine.shape)}, not {given.dtype}{tuple(given.shape)}")
            mine.copy_(given)


def _pieces(X: Tensor, rows: TokenRows) -> Iterator[tuple[slice, Tensor]]:
    """The counted rows in pieces that fit a small temporary, with their places among the counted ones."""
    step = max(1, _CHUNK.get(X.device.type, _CHUNK["cpu"]) // max(1, X.shape[1]))
    for start in range(0, rows.count, step):
        span = slice(start, min(start + step, rows.count))
        yield span, X[span] if rows.index is None else X.index_select(0, rows.index[span])
