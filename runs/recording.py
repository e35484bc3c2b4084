"""What runs of recurrent nets record of themselves."""

from __future__ import annotations

import hfopt
from runs.optimizers import STOCHASTIC

_QUICK = 100  # steps of a stochastic optimizer take about as long as one of hf


def recorders(every: int, optimizer: str) -> list[hfopt.Recorder]:
    """Hidden states, gradients by lag, and, more rarely, eigenvalues of the recurrent matrix and of the curvature.

    On the demo they take less than 2% of the time (benchmarks/recording.py).

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
        hfopt.CurvatureDensity(20 * every, iterations=16, cases=50),
    ]
