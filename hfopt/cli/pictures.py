"""`hfopt plot` and `hfopt states`: pictures of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from hfopt.cli import choose
from hfopt.experiment import report


def add(commands: choose.Commands) -> None:
    """Add the commands."""
    plot_ = choose.command(commands, "plot", "draw the curves of one or several runs into a picture")
    plot_.add_argument("path", nargs="+", help=choose.NAMES)
    plot_.add_argument("-o", "--output", type=Path, help="the picture (default: curves.png in the first run's folder)")
    plot_.add_argument("-c", "--checks", type=int, metavar="STEP", help="the CG checks of this step, of one run")
    plot_.set_defaults(run=plot)
    states_ = choose.command(commands, "states", "draw hidden states of a recorded test sequence; .gif and .mp4 move")
    states_.add_argument("path", help=choose.NAMES)
    states_.add_argument("-q", "--sequence", type=int, default=0, metavar="N", help="which sequence (default 0)")
    states_.add_argument("-s", "--step", type=int, metavar="STEP", help="as before this update (default: the last)")
    states_.add_argument("-o", "--output", type=Path, help="the picture (default: states-<N>.png in the run's folder)")
    states_.set_defaults(run=states)


def plot(chosen: argparse.Namespace) -> None:
    """Draw curves."""
    runs = choose.runs(chosen.path, chosen.root)
    from hfopt.experiment.visualize import draw_cg_table, plot_runs

    if chosen.checks is None:
        name, figure = "curves.png", plot_runs(runs)
    elif len(runs) == 1:
        name, figure = f"checks-{chosen.checks}.png", draw_cg_table(runs[0], chosen.checks)
    else:
        raise ValueError("--checks draws those of one run")
    output = runs[0].path / name if chosen.output is None else chosen.output
    figure.savefig(output, dpi=130)
    print(report.short(output))


def states(chosen: argparse.Namespace) -> None:
    """Draw the hidden states of one sequence, at one step or over all that were recorded."""
    run = choose.run(chosen.path, chosen.root)
    from hfopt.experiment.visualize import animate_hidden_states, draw_hidden_states

    output: Path = run.path / f"states-{chosen.sequence}.png" if chosen.output is None else chosen.output
    if output.suffix.lower() not in (".gif", ".mp4"):
        draw_hidden_states(run, chosen.step, chosen.sequence).savefig(output, dpi=130)
    else:
        with Console(stderr=True).status("drawing frames"):
            animate_hidden_states(run, output, chosen.sequence)
    print(report.short(output))
