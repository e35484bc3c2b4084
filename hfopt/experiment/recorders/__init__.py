"""Recorders: what an experiment keeps of its inner life over training, for pictures and pages."""

from hfopt.experiment.recorders.base import Recorder
from hfopt.experiment.recorders.curvature_density import CurvatureDensity
from hfopt.experiment.recorders.gradient_by_lag import GradientByLag
from hfopt.experiment.recorders.hidden_states import HiddenStates
from hfopt.experiment.recorders.samples import Samples, text_of
from hfopt.experiment.recorders.spectrum import Spectrum

__all__ = ["CurvatureDensity", "GradientByLag", "HiddenStates", "Recorder", "Samples", "Spectrum", "text_of"]
