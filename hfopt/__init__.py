"""Hessian-free optimization for PyTorch: Gauss-Newton products, conjugate gradients, damping."""

from hfopt.cg import CG
from hfopt.curvature import GaussNewton, Hessian
from hfopt.damping import FixedDamping, KrylovDamping, LevenbergMarquardt
from hfopt.errors import CheckFailed, ClosureError, HfoptError, NotDifferentiable
from hfopt.experiment import Growth
from hfopt.fisher import Fisher
from hfopt.hf import HF
from hfopt.linesearch import LineSearch
from hfopt.minibatches import AverageRatio, FullStep, RisingDecay, for_minibatches
from hfopt.operators import Damped
from hfopt.optimizer import HessianFree
from hfopt.preconditioners import EmpiricalFisherDiagonal
from hfopt.runfile import RunError
from hfopt.runreader import Run, read_run
from hfopt.stats import StepStats

__all__ = [
    "CG",
    "HF",
    "AverageRatio",
    "CheckFailed",
    "ClosureError",
    "Damped",
    "EmpiricalFisherDiagonal",
    "Fisher",
    "FixedDamping",
    "FullStep",
    "GaussNewton",
    "Growth",
    "Hessian",
    "HessianFree",
    "HfoptError",
    "KrylovDamping",
    "LevenbergMarquardt",
    "LineSearch",
    "NotDifferentiable",
    "RisingDecay",
    "Run",
    "RunError",
    "StepStats",
    "for_minibatches",
    "read_run",
]
