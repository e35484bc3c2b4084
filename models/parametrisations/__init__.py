"""Constraints on weights as torch's parametrisations: orthogonal matrices, Schur forms, products of rotations.

They go onto a weight of any module. The matrix is formed from its free parameters whenever the weight is used,
once a sequence in the networks of `models`. Fast recurrences, curvature products and optimizers need not know of it.
"""

from __future__ import annotations

from models.parametrisations.angles import INITS, skew_start
from models.parametrisations.exponential import exponential_of_skew
from models.parametrisations.givens import STYLES, Givens, givens
from models.parametrisations.orthogonal import SkewExponential, orthogonal
from models.parametrisations.schur import Schur, schur
from models.parametrisations.structure import PARTS, Structure, parts_of

__all__ = [
    "INITS",
    "PARTS",
    "STYLES",
    "Givens",
    "Schur",
    "SkewExponential",
    "Structure",
    "exponential_of_skew",
    "givens",
    "orthogonal",
    "parts_of",
    "schur",
    "skew_start",
]
