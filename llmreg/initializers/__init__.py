"""Weight (and, for data-driven methods, statistics) in, factors out; one file an initialiser.

Nothing here knows PEFT: an initialiser takes a float matrix and returns `Factors`.
"""

from .components import rank_of_energy, singular_components, sliced_components
from .factors import Factors
from .pissa import pissa

__all__ = ["Factors", "pissa", "rank_of_energy", "singular_components", "sliced_components"]
