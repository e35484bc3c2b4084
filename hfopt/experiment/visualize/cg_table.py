"""One step's conjugate gradients as a picture: the quadratic model, the loss, and which iterate was taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfopt.experiment.visualize.style import COLOURS, INK, SOFT, Given, as_run, legend_above, styled, whole_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def draw_cg_table(run: Given, step: int | None = None) -> Figure:
    """The checks of one step: damped model and change of the loss by iteration, the choice, residual and length.

    Backtracking compares the loss at some iterates, and takes one of them: the one that is circled, with the change
    that the step made, line search included. Losses are those with the penalty of weight decay. Where the loss leaves
    the model, its region of trust ends.

    Args:
        run: a run or its name.
        step: of which to draw; by default the last one that has checks.

    Raises:
        ValueError: there are no checks of this step.
    """
    from matplotlib import pyplot as plt

    run = as_run(run)
    there = np.unique(run.checks["step"])
    if step is None and len(there):
        step = int(there[-1])
    checks = run.checks[run.checks["step"] == step] if step is not None else run.checks[:0]
    if not len(checks):
        known = f"there are those of steps {there[0]} to {there[-1]}" if len(there) else "its optimizer has none"
        raise ValueError(f"{run.path} has no CG checks{'' if step is None else f' of step {step}'}; {known}")
    row = run.steps[run.steps["step"] == step][0]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.5, 5.2), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    iterations, looked = checks["iteration"], np.isfinite(checks["evaluation"])
    above.axhline(0.0, color=SOFT, linewidth=0.8)
    above.plot(iterations, checks["model"], color=COLOURS[0], marker=".", label="damped model")
    above.plot(
        iterations[looked], checks["evaluation"][looked], color=COLOURS[1], marker="s", markersize=4, label="loss"
    )
    taken = int(row["backtracked"])
    # Not every iterate that was looked at is a row of the table; rho tells of the one that was taken.
    change = row["rho"] * row["quadratic"]
    if taken > 0 and np.isfinite(change):
        options = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "label": f"taken: {taken}"}
        above.plot([taken], [change], "s", color=COLOURS[1], markersize=4)
        above.plot([taken], [change], "o", **options)
    above.margins(y=0.12)
    above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    above.yaxis.get_offset_text().set_visible(False)
    legend_above(above, 4)
    figure.canvas.draw()  # decides on the power of ten
    power = above.yaxis.get_offset_text().get_text()
    above.set_ylabel(f"change in this step{f' ({power})' if power else ''}")
    for name, label, colour in (("residual", "residual", COLOURS[2]), ("norm", "iterate", COLOURS[3])):
        below.plot(iterations, checks[name], color=colour, marker=".", label=f"norm of the {label}")
    below.set_yscale("log")
    below.set_ylabel("Euclidean norm")
    below.set_xlabel("iteration of conjugate gradients")
    below.set_xlim(left=0)
    whole_steps(below)
    legend_above(below)
    reason = row["cg_reason"].decode("ascii", "replace")
    length = "rejected" if not row["accepted"] else f"step length {row['step_length']:.3g}"
    figure.suptitle(
        f"{run.name}, step {step}: λ = {row['damping']:.2e}, ρ = {row['rho']:.2f}, {length}; "
        f"{row['cg_iterations']} iterations of CG, ended by: {reason}",
        color=INK,
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure
