"""The two forms in which `X^T X` is summed over batches: whole, as a packed triangle, or times a test matrix.

Both are plain float32 sums, so they merge over batches and processes in any order. `TriangleSum` holds the exact
matrix at about half its size and half its arithmetic; `SketchSum` holds `Y = X^T (X Omega)` (Tropp et al. 2017), from
which `llmreg.linalg.nystrom` reads a low-rank factor, at about 2 k / in of the arithmetic of the whole product.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llmreg.linalg import gaussian_sketch, make_generator
from llmreg.linalg.nystrom import nystrom_factor

__all__ = ["SketchSum", "TriangleSum", "sketch_bytes", "triangle_bytes"]

HALVES = (torch.bfloat16, torch.float16)
_FLOAT_BYTES = 4


class TriangleSum:
    """`sum X^T X` of a (dim, dim) symmetric matrix, float32: its block rows from the diagonal on, in one buffer.

    Attributes:
        flat: the packed block rows; adding two of equal `dim` adds the matrices.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu", flat: Tensor | None = None) -> None:
        self.dim = dim
        self.flat = torch.zeros(_packed_size(dim), device=device) if flat is None else flat
        self._rows, start = [], 0
        for first, last in _blocks(dim):
            size = (last - first) * (dim - first)
            self._rows.append((first, last, self.flat[start : start + size].view(last - first, dim - first)))
            start += size

    def add(self, X: Tensor, scale: Tensor | None = None) -> None:
        """Add `X^T X` of `X` (tokens, dim), float32, its rows times `scale` (tokens,)."""
        X = X if scale is None else X * scale.unsqueeze(1)
        with _full_precision():
            for first, last, row in self._rows:
                row.addmm_(X[:, first:last].mT, X[:, first:])

    def add_half(self, X: Tensor, weight: Tensor | None) -> None:
        """Add `weight * X^T X` of a half-precision `X` on CUDA: exact products, float32 sums, on tensor cores."""
        for first, last, row in self._rows:
            left, right = X[:, first:last].mT, X[:, first:]
            if weight is not None:
                row.addcmul_(_half_product(left, right), weight)
            elif X.is_cuda:
                torch.addmm(row, left, right, out_dtype=torch.float32, out=row)
            else:
                row.add_(_half_product(left, right))

    def dense(self) -> Tensor:
        """The whole symmetric (dim, dim) matrix, float32."""
        full = self.flat.new_empty(self.dim, self.dim)
        for first, last, row in self._rows:
            diagonal = row[:, : last - first].triu()  # the product's rounding need not be symmetric
            full[first:last, first:] = row
            full[first:, first:last] = row.mT
            full[first:last, first:last] = diagonal + diagonal.triu(1).mT
        return full


class SketchSum:
    """`sum X^T (X Omega)`, (dim, size) float32, with `Omega` Gaussian, in bfloat16, and drawn from `seed` alone.

    Attributes:
        flat: the sum; adding two of equal `dim`, `size` and `seed` adds the sketches.
    """

    def __init__(
        self, dim: int, size: int, seed: int, device: torch.device | str = "cpu", flat: Tensor | None = None
    ) -> None:
        self.dim, self.size, self.seed = dim, size, seed
        self.flat = torch.zeros(dim, size, device=device) if flat is None else flat
        self._omega: dict[torch.dtype, Tensor] = {}

    @property
    def omega(self) -> Tensor:
        """The test matrix (dim, size), bfloat16 numbers in float32; shared by all sketches of one size and seed."""
        return self._omega_in(torch.float32)

    def _omega_in(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._omega:
            self._omega[dtype] = _test_matrix(self.dim, self.size, self.seed, self.flat.device, dtype)
        return self._omega[dtype]

    def add(self, X: Tensor, scale: Tensor | None = None) -> None:
        """Add `X^T (X Omega)` of `X` (tokens, dim), float32, its rows times `scale` (tokens,)."""
        with _full_precision():
            Z = X @ self.omega
            self.flat.addmm_(X.mT, Z if scale is None else Z.mul_(scale.square().unsqueeze(1)))

    def add_half(self, X: Tensor, scale: Tensor | None) -> None:
        """The same of a bfloat16 `X` on CUDA, on tensor cores, to float32's accuracy.

        The test matrix is bfloat16 anyway; `X Omega` becomes three bfloat16 terms, which hold a float32 whole.
        """
        Z = _half_product(X, self._omega_in(torch.bfloat16))
        Z = Z if scale is None else Z.mul_(scale.square().unsqueeze(1))
        terms = Z.new_empty(Z.shape[0], 3, self.size, dtype=torch.bfloat16)
        for number in range(3):
            terms[:, number] = Z
            if number < 2:
                Z -= terms[:, number]
        Y = _half_product(X.mT, terms.flatten(1))
        self.flat += Y.view(self.dim, 3, self.size).sum(1)

    def factor(self, mean: Tensor | None = None, count: int = 0) -> Tensor:
        """`F` (dim, size) with `F F^T ~ sum X^T X`, less `count mean mean^T` where a mean is given (float64)."""
        Y = self.flat
        if mean is not None:
            Y = (Y.double() - count * torch.outer(mean, mean @ self.omega.double())).float()
        return nystrom_factor(Y, self.omega)


def triangle_bytes(dim: int) -> int:
    """Bytes of a `TriangleSum`."""
    return _FLOAT_BYTES * _packed_size(dim)


def sketch_bytes(dim: int, size: int) -> int:
    """Bytes of a `SketchSum`; its test matrix takes as many again, once for all sketches of one shape."""
    return _FLOAT_BYTES * dim * size


def _blocks(dim: int) -> Iterator[tuple[int, int]]:
    """Block rows: narrow ones waste little of the triangle, wide ones keep the products efficient."""
    width = 256 if dim < 4096 else 512
    for first in range(0, dim, width):
        yield first, min(first + width, dim)


def _packed_size(dim: int) -> int:
    return sum((last - first) * (dim - first) for first, last in _blocks(dim))


_TEST_MATRICES: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()


def _test_matrix(dim: int, size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    key = (dim, size, seed, device, dtype)
    omega = _TEST_MATRICES.get(key)
    if omega is None:
        omega = gaussian_sketch(dim, size, generator=make_generator(seed)).div_(dim**0.5).bfloat16().to(device, dtype)
        _TEST_MATRICES[key] = omega
    return omega


def _half_product(X: Tensor, Y: Tensor) -> Tensor:
    """`X @ Y` of half-precision matrices in float32: their products are exact there. On CUDA nothing is converted."""
    if X.is_cuda:
        return torch.mm(X, Y, out_dtype=torch.float32)
    return X.float() @ Y.float()


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products stay float32 where the user allows the model TF32 (CUDA) or bfloat16 (CPU)."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend, precision in zip(backends, before, strict=True):
        if precision != "ieee":
            backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            if precision != "ieee":
                backend.fp32_precision = precision
