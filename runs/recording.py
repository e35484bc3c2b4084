"""What runs of recurrent nets record of themselves."""

from __future__ import annotations

import hfopt
from runs.optimizers import STOCHASTIC

_QUICK = 100  # steps of a stochastic optimizer take about as long as one of hf


def recorders(every: int, optimizer: str) -> list[hfopt.Recorder]:
    """Hidden states, gradients by lag, the recurrent matrix's eigenvalues, and, more rarely, the curvature's density.

    Args:
        every: how many steps of hf lie between two frames; 0 for no recorders.
        optimizer: its name; stochastic ones record every 100 times as many steps.
    """
    if every == 0:
        return []
    every *= _QUICK if optimizer in STOCHASTIC else 1
    return [
        hfopt.HiddenStates(every),
        hfopt.GradientByLag(every),
        hfopt.Spectrum(5 * every),
        hfopt.CurvatureDensity(5 * every),
    ]
