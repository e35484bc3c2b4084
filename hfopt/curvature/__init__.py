"""Curvature matrices about a fixed point: Gauss-Newton, Fisher and Hessian, and their linearisations."""

from hfopt.curvature.fisher import Fisher
from hfopt.curvature.gauss_newton import GaussNewton, Hessian

__all__ = ["Fisher", "GaussNewton", "Hessian"]
