"""Matrices that are only ever multiplied: the common input of every randomised decomposition here.

A randomised SVD needs `A X` and `A^T Y`, nothing else. So a stored weight, a product `W C` that is never
formed, and the inverse of a triangular product (whose *largest* components are the *smallest* of the
product) all go through the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmreg.errors import UnsupportedError, WeightError

__all__ = [
    "InverseProductOperator",
    "LinearOperator",
    "MatrixOperator",
    "ProductOperator",
    "ScaledOperator",
    "TransposedOperator",
    "as_operator",
    "compute_matrix",
    "is_finite",
]


class LinearOperator(Protocol):
    """What the decompositions ask of a matrix `A` of `shape (..., m, n)`; leading dimensions are a batch.

    Products are new tensors: the caller may overwrite them.
    """

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def matmul(self, X: Tensor) -> Tensor:
        """`A X`, `(..., n, k) -> (..., m, k)`."""
        ...

    def rmatmul(self, Y: Tensor) -> Tensor:
        """`A^T Y`, `(..., m, k) -> (..., n, k)`."""
        ...

    def dense(self) -> Tensor:
        """`A` itself, `(..., m, n)`; the only method that may allocate something of that size."""
        ...

    def squared_norm(self) -> Tensor | None:
        """`||A||_F^2` of each matrix in float64, `(...)`; None where it would take more than one reading."""
        ...


def compute_matrix(W: Tensor, name: str = "W") -> Tensor:
    """`W` checked and in the dtype the computation runs in: float64 stays, all else becomes float32.

    Raises:
        UnsupportedError: not a dense real floating-point tensor of at least two dimensions.
    """
    if not isinstance(W, Tensor):
        raise UnsupportedError(f"{name} is a {type(W).__name__}; a torch.Tensor is expected.")
    if W.layout != torch.strided or W.is_quantized or not W.is_floating_point():
        raise UnsupportedError(
            f"{name} is a {W.layout} tensor of {W.dtype}; a dense float64, float32, bfloat16 or float16 "
            "tensor is expected. Dequantise it first."
        )
    if W.is_meta:
        raise UnsupportedError(f"{name} is on the meta device and has no values; load it first.")
    if W.ndim < 2:
        raise UnsupportedError(f"{name} has shape {tuple(W.shape)}; a matrix (..., m, n) is expected.")
    return W.detach().to(torch.float64 if W.dtype == torch.float64 else torch.float32)


def is_finite(X: Tensor) -> bool:
    """Whether no entry is NaN or Inf: the extremes tell, in one reading; `abs()` would first copy the whole matrix."""
    return X.numel() == 0 or bool(torch.stack(torch.aminmax(X)).isfinite().all())


def _product(X: Tensor, Y: Tensor) -> Tensor:
    """`X @ Y`; on a CPU a batch one by one, where a batched product with one narrow side is several times slower."""
    if X.ndim == 3 and X.device.type == "cpu":
        return torch.stack([x @ y for x, y in zip(X, Y, strict=True)])
    return X @ Y


class MatrixOperator:
    """A stored matrix `(..., m, n)`; float32 and float64 in place, half precision converted once."""

    def __init__(self, W: Tensor) -> None:
        self._matrix = compute_matrix(W)

    @property
    def shape(self) -> torch.Size:
        return self._matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:
        return self._matrix.device

    def matmul(self, X: Tensor) -> Tensor:
        return _product(self._matrix, X)

    def rmatmul(self, Y: Tensor) -> Tensor:
        # On a CPU (Y^T W)^T is up to twice as fast as W^T Y when Y is narrow: W is read in its own order.
        return _product(Y.mT, self._matrix).mT

    def dense(self) -> Tensor:
        return self._matrix

    def squared_norm(self) -> Tensor | None:
        return torch.linalg.vector_norm(self._matrix, dim=(-2, -1)).to(torch.float64) ** 2


class ProductOperator:
    """`A = F1 F2 ... Fk`, never formed: multiplications go through the factors one after the other.

    Args:
        factors: matrices with matching inner and equal leading dimensions, one dtype after conversion.

    Raises:
        UnsupportedError: fewer than one factor, or shapes, dtypes or devices that do not fit together.
    """

    def __init__(self, *factors: Tensor) -> None:
        if not factors:
            raise UnsupportedError("ProductOperator() was given no factor; at least one matrix is expected.")
        self.factors = [compute_matrix(factor, f"factor {i + 1}") for i, factor in enumerate(factors)]
        for i, (left, right) in enumerate(zip(self.factors, self.factors[1:], strict=False)):
            fits = left.shape[-1] == right.shape[-2] and left.shape[:-2] == right.shape[:-2]
            if not fits or left.dtype != right.dtype or left.device != right.device:
                raise UnsupportedError(
                    f"factor {i + 1} is {tuple(left.shape)} {left.dtype} on {left.device} and factor {i + 2} "
                    f"is {tuple(right.shape)} {right.dtype} on {right.device}; they cannot be multiplied. "
                    "Expected: (..., m, k) and (..., k, n) of one dtype on one device."
                )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.factors[0].shape[:-1], self.factors[-1].shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.factors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.factors[0].device

    def matmul(self, X: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            X = factor @ X
        return X

    def rmatmul(self, Y: Tensor) -> Tensor:
        for factor in self.factors:
            Y = (Y.mT @ factor).mT
        return Y

    def dense(self) -> Tensor:
        product = self.factors[0]
        for factor in self.factors[1:]:
            product = product @ factor
        return product

    def squared_norm(self) -> Tensor | None:
        return None


class TransposedOperator:
    """`A^T` of another operator, so that the shorter side can always be the right one."""

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator

    @property
    def shape(self) -> torch.Size:
        shape = self._operator.shape
        return torch.Size((*shape[:-2], shape[-1], shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        return self._operator.device

    def matmul(self, X: Tensor) -> Tensor:
        return self._operator.rmatmul(X)

    def rmatmul(self, Y: Tensor) -> Tensor:
        return self._operator.matmul(Y)

    def dense(self) -> Tensor:
        return self._operator.dense().mT

    def squared_norm(self) -> Tensor | None:
        return self._operator.squared_norm()


class ScaledOperator:
    """`A / scale` of another operator, with one `scale (..., 1, 1)` for each matrix; divides the products."""

    def __init__(self, operator: LinearOperator, scale: Tensor) -> None:
        self._operator = operator
        self.scale = scale

    @property
    def shape(self) -> torch.Size:
        return self._operator.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        return self._operator.device

    def matmul(self, X: Tensor) -> Tensor:
        return self._operator.matmul(X) / self.scale

    def rmatmul(self, Y: Tensor) -> Tensor:
        return self._operator.rmatmul(Y) / self.scale

    def dense(self) -> Tensor:
        return self._operator.dense() / self.scale

    def squared_norm(self) -> Tensor | None:
        norm = self._operator.squared_norm()
        return None if norm is None else norm / self.scale[..., 0, 0].to(torch.float64) ** 2


class InverseProductOperator:
    """`(R1 R2 ... Rk)^{-1}` of upper triangular matrices, applied by triangular solves.

    The product is never formed, so the condition number of each solve is that of one factor.

    Args:
        factors: upper triangular `(..., n, n)` matrices without a zero on the diagonal.
    """

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self._factors = list(factors)

    @property
    def shape(self) -> torch.Size:
        return self._factors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self._factors[0].dtype

    @property
    def device(self) -> torch.device:
        return self._factors[0].device

    def matmul(self, X: Tensor) -> Tensor:
        for factor in self._factors:
            X = torch.linalg.solve_triangular(factor, X, upper=True)
        return X

    def rmatmul(self, Y: Tensor) -> Tensor:
        for factor in reversed(self._factors):
            Y = torch.linalg.solve_triangular(factor.mT, Y, upper=False)
        return Y

    def dense(self) -> Tensor:
        identity = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        return self.matmul(identity.expand(self.shape))

    def squared_norm(self) -> Tensor | None:
        return None


def as_operator(A: Tensor | LinearOperator) -> LinearOperator:
    """A tensor as a `MatrixOperator`; an operator as it is."""
    if isinstance(A, Tensor):
        return MatrixOperator(A)
    if not all(hasattr(A, name) for name in ("shape", "dtype", "device", "matmul", "rmatmul")):
        raise WeightError(f"{type(A).__name__} is neither a tensor nor a linear operator (matmul, rmatmul).")
    return A
