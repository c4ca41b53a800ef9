"""Terms added to a loss: one file a regulariser, pure functions of tensors; nothing here knows TRL."""

from .low_probability import LowProbabilityRegularizer
from .orthonormal import OrthonormalRegularizer
from .targeted_entropy import TargetedEntropyRegularizer

__all__ = ["LowProbabilityRegularizer", "OrthonormalRegularizer", "TargetedEntropyRegularizer"]
