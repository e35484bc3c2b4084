"""Pictures of runs, recordings and sequences: each a function that returns a matplotlib figure.

They take a run (:func:`hfopt.read_run`) or its name, and need matplotlib, which is imported when one is drawn.
"""

from hfopt.experiment.visualize.cg_table import draw_cg_table
from hfopt.experiment.visualize.curves import compare_runs, plot_runs
from hfopt.experiment.visualize.recorded import (
    animate_hidden_states,
    draw_curvature_density,
    draw_gradient_by_lag,
    draw_hidden_states,
    draw_spectrum,
)
from hfopt.experiment.visualize.sequence import SequencePicture, draw_sequence

__all__ = [
    "SequencePicture",
    "animate_hidden_states",
    "compare_runs",
    "draw_cg_table",
    "draw_curvature_density",
    "draw_gradient_by_lag",
    "draw_hidden_states",
    "draw_sequence",
    "draw_spectrum",
    "plot_runs",
]
