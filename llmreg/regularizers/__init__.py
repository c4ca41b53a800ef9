"""Terms added to a loss: one file a regulariser, pure functions of tensors; nothing here knows TRL."""

from .orthonormal import OrthonormalRegularizer

__all__ = ["OrthonormalRegularizer"]
