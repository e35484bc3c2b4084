"""Linear algebra on parameter space: flat vectors, symmetric operators, conjugate gradients and its shifted systems."""

from hfopt.linalg.cg import CG, RisingDecay
from hfopt.linalg.operators import Damped, Operator
from hfopt.linalg.vector import ParameterVector

__all__ = ["CG", "Damped", "Operator", "ParameterVector", "RisingDecay"]
