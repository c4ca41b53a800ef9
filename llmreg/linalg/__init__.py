"""Linear algebra of the initialisers: tensors in, tensors out.

Truncated SVD (exact and randomised) of a matrix or of a product that is never formed, the smallest
components by shift-invert, Cholesky-QR, sketches, signs. Knows nothing of models, methods or PEFT.
"""

from llmreg.linalg.operators import LinearOperator, MatrixOperator, ProductOperator
from llmreg.linalg.orthonormal import cholesky_qr
from llmreg.linalg.signs import fix_signs
from llmreg.linalg.sketch import gaussian_sketch, make_generator
from llmreg.linalg.smallest import smallest_svd
from llmreg.linalg.svd import SketchPlan, plan_sketch, truncated_svd

__all__ = [
    "LinearOperator",
    "MatrixOperator",
    "ProductOperator",
    "SketchPlan",
    "cholesky_qr",
    "fix_signs",
    "gaussian_sketch",
    "make_generator",
    "plan_sketch",
    "smallest_svd",
    "truncated_svd",
]
