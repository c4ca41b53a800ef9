"""Weight (and, for data-driven methods, statistics) in, factors out; one file an initialiser.

Nothing here knows PEFT: an initialiser takes a float matrix and returns `Factors`.
"""

from .components import rank_of_energy, singular_components, sliced_components
from .corda import corda
from .corda_plus import allocate_ranks, compactness, select_covariance
from .damping import damp
from .eora import eora
from .eva import EvaComponents, component_cosines, eva, eva_components, has_converged, whiten
from .eva_ranks import most_components, redistribute, scaled_alpha
from .factors import Factors
from .pissa import pissa
from .quantized_residual import QuantizedResidual, ResidualError, quantized_residual
from .second_moment import SecondMoment

__all__ = [
    "EvaComponents",
    "Factors",
    "QuantizedResidual",
    "ResidualError",
    "SecondMoment",
    "allocate_ranks",
    "compactness",
    "component_cosines",
    "corda",
    "damp",
    "eora",
    "eva",
    "eva_components",
    "has_converged",
    "most_components",
    "pissa",
    "quantized_residual",
    "rank_of_energy",
    "redistribute",
    "scaled_alpha",
    "select_covariance",
    "singular_components",
    "sliced_components",
    "whiten",
]
