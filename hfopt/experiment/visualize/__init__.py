"""Pictures of runs and of sequences, each a function that returns a matplotlib figure."""

from hfopt.experiment.visualize.curves import plot_runs
from hfopt.experiment.visualize.sequence import draw_sequence

__all__ = ["draw_sequence", "plot_runs"]
