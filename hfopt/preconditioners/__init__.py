"""Preconditioners of conjugate gradients: ``z = M^-1 r``, M symmetric positive definite and cheap to invert.

===================== ========================================== ================================================
name                  M                                          a refresh costs about
===================== ========================================== ================================================
``auto``              that of K-FAC where it pays, else none     that of ``kfac``; see :class:`Automatic`
``empirical-fisher``  :class:`EmpiricalFisherDiagonal`           four gradients, or a pass per case or probe
``hutchinson``        :class:`HutchinsonDiagonal`                16 products at once
``nystrom``           :class:`Nystrom`                           20 products at once
``kfac``              :class:`KFAC`                              three gradients, and the factors' inverses
``lbfgs``             :class:`LBFGS`                             nothing: the last solve's products
===================== ========================================== ================================================
"""

from __future__ import annotations

from collections.abc import Callable

from hfopt.preconditioners.automatic import Automatic
from hfopt.preconditioners.base import Preconditioner
from hfopt.preconditioners.diagonal import Diagonal, EmpiricalFisherDiagonal, HutchinsonDiagonal
from hfopt.preconditioners.kfac import KFAC
from hfopt.preconditioners.lbfgs import LBFGS
from hfopt.preconditioners.nystrom import Nystrom

__all__ = [
    "KFAC",
    "LBFGS",
    "Automatic",
    "Diagonal",
    "EmpiricalFisherDiagonal",
    "HutchinsonDiagonal",
    "Nystrom",
    "Preconditioner",
    "as_preconditioner",
]


def as_preconditioner(preconditioner: str | Preconditioner | None, batch_dim: int = 0) -> Preconditioner | None:
    """Return the optimizer's ``preconditioner`` argument as an object; ``batch_dim`` is for one given by name.

    Raises:
        ValueError: an unknown name.
    """
    if preconditioner is None or isinstance(preconditioner, Preconditioner):
        return preconditioner
    made: dict[str, Callable[[], Preconditioner | None]] = {
        "none": lambda: None,
        "auto": lambda: Automatic(batch_dim=batch_dim),
        "empirical-fisher": lambda: EmpiricalFisherDiagonal(batch_dim=batch_dim),
        "hutchinson": HutchinsonDiagonal,
        "nystrom": Nystrom,
        "kfac": lambda: KFAC(batch_dim=batch_dim),
        "lbfgs": LBFGS,
    }
    if preconditioner not in made:
        raise ValueError(
            f"preconditioner is {preconditioner!r}, but must be None, one of {', '.join(map(repr, made))}, or a "
            "Preconditioner"
        )
    return made[preconditioner]()
