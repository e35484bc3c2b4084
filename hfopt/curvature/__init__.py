"""Curvature matrices about a fixed point, and their linearisations.

    Gauss-Newton   G = J' H_L J + d2R/dtheta2        (Schraudolph, Neural Computation 2002)
    Hessian        H = d2L/dtheta2                   (Pearlmutter, Neural Computation 1994)
    Fisher         F = E[J' g g' J]                  with g = dL/dz for targets drawn from the model, or the data's own

All are symmetric (P, P); G and F are positive semi-definite for convex losses and regularisers. Where gradient hooks of
the parameters are a projection P, they are ``P G P``, ``P H P`` and ``P F P`` (:mod:`hfopt.curvature.gradient_hooks`).
"""

from hfopt.curvature.fisher import Fisher
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.curvature.hessian import Hessian

__all__ = ["Fisher", "GaussNewton", "Hessian"]
