"""Hessian-free optimization for PyTorch: Gauss-Newton products, conjugate gradients, damping.

The optimizer's names are imported at once. Those of the experiment layer (:class:`HF`, :func:`read_run`, ...) are
imported when they are first used, so that an optimizer's user needs neither HDF5 nor rich.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hfopt.curvature.fisher import Fisher
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.curvature.hessian import Hessian
from hfopt.damping import AverageRatio, FixedDamping, KrylovDamping, LevenbergMarquardt
from hfopt.errors import CheckFailed, ClosureError, HfoptError, NotDifferentiable
from hfopt.linalg.cg import CG, RisingDecay
from hfopt.linalg.operators import Damped
from hfopt.line_search import FullStep, LineSearch
from hfopt.optimizer import HessianFree, for_minibatches
from hfopt.preconditioners import EmpiricalFisherDiagonal
from hfopt.step.stats import StepStats

if TYPE_CHECKING:
    from hfopt.experiment import visualize
    from hfopt.experiment.driver import HF
    from hfopt.experiment.loading import load_run
    from hfopt.experiment.recorders import CurvatureDensity, GradientByLag, HiddenStates, Recorder, Samples, Spectrum
    from hfopt.experiment.roles import Growth
    from hfopt.experiment.store.format import RunError
    from hfopt.experiment.store.reader import Run, read_run
    from hfopt.experiment.store.recorded import Recorded

_LAZY = {
    "HF": "hfopt.experiment.driver",
    "CurvatureDensity": "hfopt.experiment.recorders",
    "GradientByLag": "hfopt.experiment.recorders",
    "Growth": "hfopt.experiment.roles",
    "HiddenStates": "hfopt.experiment.recorders",
    "Recorded": "hfopt.experiment.store.recorded",
    "Recorder": "hfopt.experiment.recorders",
    "Run": "hfopt.experiment.store.reader",
    "RunError": "hfopt.experiment.store.format",
    "Samples": "hfopt.experiment.recorders",
    "Spectrum": "hfopt.experiment.recorders",
    "load_run": "hfopt.experiment.loading",
    "read_run": "hfopt.experiment.store.reader",
}

__all__ = [
    "CG",
    "HF",
    "AverageRatio",
    "CheckFailed",
    "ClosureError",
    "CurvatureDensity",
    "Damped",
    "EmpiricalFisherDiagonal",
    "Fisher",
    "FixedDamping",
    "FullStep",
    "GaussNewton",
    "GradientByLag",
    "Growth",
    "Hessian",
    "HessianFree",
    "HfoptError",
    "HiddenStates",
    "KrylovDamping",
    "LevenbergMarquardt",
    "LineSearch",
    "NotDifferentiable",
    "Recorded",
    "Recorder",
    "RisingDecay",
    "Run",
    "RunError",
    "Samples",
    "Spectrum",
    "StepStats",
    "for_minibatches",
    "load_run",
    "read_run",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """Import a name of the experiment layer when it is first asked for."""
    if name not in _LAZY and name != "visualize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: Any
    if name == "visualize":  # pictures of runs, as functions of a module
        value = import_module("hfopt.experiment.visualize")
    else:
        value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
