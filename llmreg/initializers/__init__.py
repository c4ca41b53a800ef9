"""Weight (and, for data-driven methods, statistics) in, factors out; one file an initialiser.

Nothing here knows PEFT: an initialiser takes a float matrix and returns `Factors`.
"""

from .components import rank_of_energy, singular_components, sliced_components
from .corda import corda
from .corda_plus import allocate_ranks, compactness, select_covariance
from .eora import eora
from .factors import Factors
from .pissa import pissa
from .second_moment import SecondMoment, damp

__all__ = [
    "Factors",
    "SecondMoment",
    "allocate_ranks",
    "compactness",
    "corda",
    "damp",
    "eora",
    "pissa",
    "rank_of_energy",
    "select_covariance",
    "singular_components",
    "sliced_components",
]
