"""Terms added to a loss: one file a regulariser, pure functions of tensors; nothing here knows TRL."""

from .consistency import ConsistencyRegularizer
from .diversity import DiversityRegularizer
from .low_probability import LowProbabilityRegularizer
from .orthonormal import OrthonormalRegularizer
from .singular_values import SingularValueRegularizer
from .targeted_entropy import TargetedEntropyRegularizer

__all__ = [
    "REGULARIZERS",
    "ConsistencyRegularizer",
    "DiversityRegularizer",
    "LowProbabilityRegularizer",
    "OrthonormalRegularizer",
    "SingularValueRegularizer",
    "TargetedEntropyRegularizer",
]

#: By name, as recipes write them.
REGULARIZERS = {
    kind.name: kind
    for kind in (
        OrthonormalRegularizer,
        ConsistencyRegularizer,
        DiversityRegularizer,
        SingularValueRegularizer,
        LowProbabilityRegularizer,
        TargetedEntropyRegularizer,
    )
}
