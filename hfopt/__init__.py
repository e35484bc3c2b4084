"""Hessian-free optimization for PyTorch: Gauss-Newton products, conjugate gradients, damping.

Names are imported when they are first used: an optimizer's user needs neither HDF5 nor rich, and who lists runs does
not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfopt.curvature.fisher import Fisher
    from hfopt.curvature.gauss_newton import GaussNewton
    from hfopt.curvature.hessian import Hessian
    from hfopt.damping import AverageRatio, FixedDamping, KrylovDamping, LevenbergMarquardt
    from hfopt.errors import CheckFailed, ClosureError, HfoptError, NotDifferentiable
    from hfopt.experiment import visualize
    from hfopt.experiment.driver import HF
    from hfopt.experiment.loading import load_run
    from hfopt.experiment.own_loop import Run
    from hfopt.experiment.recorders import CurvatureDensity, GradientByLag, HiddenStates, Recorder, Samples, Spectrum
    from hfopt.experiment.roles import Growth
    from hfopt.experiment.store.format import RunError
    from hfopt.experiment.store.reader import SavedRun, read_run
    from hfopt.experiment.store.recorded import Recorded
    from hfopt.linalg.cg import CG, RisingDecay
    from hfopt.linalg.operators import Damped
    from hfopt.line_search import FullStep, LineSearch
    from hfopt.optimizer import HessianFree, for_minibatches
    from hfopt.preconditioners import EmpiricalFisherDiagonal
    from hfopt.step.stats import StepStats

_LAZY = {
    "AverageRatio": "hfopt.damping",
    "CG": "hfopt.linalg.cg",
    "CheckFailed": "hfopt.errors",
    "ClosureError": "hfopt.errors",
    "CurvatureDensity": "hfopt.experiment.recorders",
    "Damped": "hfopt.linalg.operators",
    "EmpiricalFisherDiagonal": "hfopt.preconditioners",
    "Fisher": "hfopt.curvature.fisher",
    "FixedDamping": "hfopt.damping",
    "FullStep": "hfopt.line_search",
    "GaussNewton": "hfopt.curvature.gauss_newton",
    "GradientByLag": "hfopt.experiment.recorders",
    "Growth": "hfopt.experiment.roles",
    "HF": "hfopt.experiment.driver",
    "Hessian": "hfopt.curvature.hessian",
    "HessianFree": "hfopt.optimizer",
    "HfoptError": "hfopt.errors",
    "HiddenStates": "hfopt.experiment.recorders",
    "KrylovDamping": "hfopt.damping",
    "LevenbergMarquardt": "hfopt.damping",
    "LineSearch": "hfopt.line_search",
    "NotDifferentiable": "hfopt.errors",
    "Recorded": "hfopt.experiment.store.recorded",
    "Recorder": "hfopt.experiment.recorders",
    "RisingDecay": "hfopt.linalg.cg",
    "Run": "hfopt.experiment.own_loop",
    "RunError": "hfopt.experiment.store.format",
    "Samples": "hfopt.experiment.recorders",
    "SavedRun": "hfopt.experiment.store.reader",
    "Spectrum": "hfopt.experiment.recorders",
    "StepStats": "hfopt.step.stats",
    "for_minibatches": "hfopt.optimizer",
    "load_run": "hfopt.experiment.loading",
    "read_run": "hfopt.experiment.store.reader",
}

# Those that `hfopt.<name>` reaches without an import of their own.
_ROOMS = (
    "closure", "curvature", "damping", "draws", "errors", "experiment", "line_search", "linalg", "losses", "optimizer",
    "preconditioners", "recurrences", "step", "structural",
)  # fmt: skip

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
    "SavedRun",
    "Spectrum",
    "StepStats",
    "for_minibatches",
    "load_run",
    "read_run",
    "visualize",
]


def __getattr__(name: str) -> Any:
    """Import a name, or a folder of the package, when it is first asked for."""
    value: Any
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name == "visualize":  # pictures of runs, as functions of a module
        value = import_module("hfopt.experiment.visualize")
    elif name in _ROOMS:
        return import_module(f"hfopt.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
