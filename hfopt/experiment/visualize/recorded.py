"""Pictures of what recorders kept: hidden states, gradients by lag, eigenvalues, curvature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfopt.experiment.hooks import Experiment
from hfopt.experiment.progress import Bar, shown
from hfopt.experiment.recorders.base import taken
from hfopt.experiment.recorders.hidden_states import HiddenStates
from hfopt.experiment.store.reader import SavedRun
from hfopt.experiment.store.recorded import Frame, Recorded
from hfopt.experiment.visualize.sequence import SequencePicture
from hfopt.experiment.visualize.style import (
    INK,
    SOFT,
    Array,
    Given,
    as_run,
    bar_of_steps,
    colours_of_steps,
    evenly,
    said_of,
    styled,
    whole_steps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVES = 7  # that one panel shows well


# -- hidden states ----------------------------------------------------------------------------------------


def draw_hidden_states(run: Given | Experiment, step: int | None = None, sequence: int = 0) -> Figure:
    """Hidden units, predictions and targets of a recorded test sequence, as before one update.

    Args:
        run: a run with :class:`hfopt.HiddenStates` recorded, or its name; or an experiment (:class:`hfopt.HF`, such as
            :func:`hfopt.load_run` returns), whose present model is shown.
        step: the recorded one nearest to it is drawn; by default the last.
        sequence: which of the recorded ones, or of the first test batch.

    Raises:
        KeyError: the run has no hidden states.
        IndexError: there is no such sequence.
        ValueError: nothing of an experiment's model gives hidden states.
    """
    if not isinstance(run, (SavedRun, str, Path)):
        return _present(run, sequence)
    run = as_run(run)
    recorded = run.recorded["hidden_states"]
    at = int(recorded.steps[-1]) if step is None else recorded.nearest(step)
    parts = _sequence(recorded.name, recorded.frame(at), sequence)
    return SequencePicture(**parts, title=_title(run, recorded, at, sequence)).figure


def _present(hf: Experiment, sequence: int) -> Figure:
    recorder = HiddenStates(sequences=max(1, sequence + 1 if sequence >= 0 else 8))
    recorder.attach(hf)
    frame, about = taken(recorder, hf)
    parts = _sequence("the first test batch", frame, sequence)
    return SequencePicture(**parts, title=f"{about['problem']}, test sequence {sequence}, after {hf.step} steps").figure


def animate_hidden_states(
    run: Given,
    output: Path | str,
    sequence: int = 0,
    *,
    frames_per_second: float = 3.0,
    dpi: int = 80,
    most: int = 200,
) -> Path:
    """A film of the hidden units over training: GIF, or MP4 where ffmpeg is installed.

    Colours and axes stay the same throughout.

    Args:
        run: a run with :class:`hfopt.HiddenStates` recorded, or its name.
        output: the file; its suffix is .gif or .mp4.
        sequence: which of the recorded ones.
        frames_per_second: of the film; the last frame stays for two seconds.
        dpi: dots per inch; the film is 8.6 by 6.2 inches.
        most: frames, evenly spaced among the recorded ones.

    Returns:
        The file.

    Raises:
        KeyError: the run has no hidden states.
        IndexError: there is no such sequence.
        ValueError: another suffix, or .mp4 without ffmpeg.
    """
    from matplotlib import animation
    from matplotlib import pyplot as plt

    run, output = as_run(run), Path(output)
    if output.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"{output} is a {output.suffix or 'file without suffix'}; films are .gif or .mp4")
    if output.suffix.lower() == ".mp4" and not animation.writers.is_available("ffmpeg"):
        raise ValueError(f"{output}: MP4 needs the program ffmpeg, which is not installed; write a .gif instead")
    recorded = run.recorded["hidden_states"]
    steps = evenly(recorded.steps, most)
    top, limits, parts = 0.0, [np.inf, -np.inf], {}
    for step in steps:  # one pass for axes that hold for all frames
        parts = _sequence(recorded.name, recorded.frame(step), sequence)
        top = max(top, float(np.abs(parts["hidden"]).max()))
        values = np.concatenate([parts["predictions"].ravel(), np.asarray(parts["targets"])[parts["scored"]].ravel()])
        limits = [min(limits[0], np.nanmin(values)), max(limits[1], np.nanmax(values))]
    room = 0.1 * (limits[1] - limits[0]) + 1e-6
    first = _sequence(recorded.name, recorded.frame(steps[0]), sequence)
    picture = SequencePicture(
        **first,
        title=_title(run, recorded, steps[0], sequence),
        top=top or 1.0,
        limits=(limits[0] - room, limits[1] + room),
    )
    writers: dict[str, Any] = {".gif": animation.PillowWriter, ".mp4": animation.FFMpegWriter}
    writer = writers[output.suffix.lower()](fps=frames_per_second)
    temporary = output.with_name(f".{output.stem}.part{output.suffix}")
    try:
        with shown(Bar("frame")) as bar, writer.saving(picture.figure, str(temporary), dpi):
            for done, step in enumerate(steps):
                found = _sequence(recorded.name, recorded.frame(step), sequence)
                picture.update(found["hidden"], found["predictions"], _title(run, recorded, step, sequence))
                if done == 0:  # the layout holds for all frames: nothing moves but what changed
                    picture.figure.canvas.draw()
                    picture.figure.set_layout_engine("none")
                writer.grab_frame()
                bar.at(done + 1, len(steps))
            for _ in range(round(2 * frames_per_second)):
                writer.grab_frame()
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(picture.figure)
    return output


def _sequence(whose: str, frame: Frame, b: int) -> dict[str, Any]:
    """What :class:`SequencePicture` wants of one sequence of a frame."""
    there = frame["hidden"].shape[-1]
    if not -there <= b < there:
        raise IndexError(f"sequence={b}: {whose} has {there} sequences, 0 to {there - 1}")
    hidden, outputs = frame["hidden"][..., b], frame["outputs"][..., b]
    T = len(hidden)
    if outputs.ndim == 1:  # of the last step alone
        outputs = np.concatenate([np.full((T - 1, len(outputs)), np.nan), outputs[None]])
    targets: Array = frame["targets"][..., b] if "targets" in frame else np.full(outputs.shape, np.nan)
    scored = np.zeros(T, bool)
    if "scored" in frame and frame["scored"].shape[0] == T:
        scored = frame["scored"][..., b].astype(bool)
    elif np.shape(targets)[:1] == (T,) or "targets" not in frame:
        scored[:] = "targets" in frame
    else:  # one target of the whole sequence, at its end
        targets = np.broadcast_to(targets, (T, *np.shape(targets)))
        scored[-1] = True
    if targets.ndim == 1 and targets.dtype.kind == "f":
        targets = targets[:, None]
    return {
        "inputs": frame["inputs"][..., b],
        "hidden": hidden,
        "predictions": outputs,
        "targets": targets,
        "scored": scored,
        "length": int(frame["lengths"][b]) if "lengths" in frame else None,
    }


def _title(run: SavedRun, recorded: Recorded, step: int, b: int) -> str:
    said = said_of(run, step)
    return (
        f"{recorded.about.get('problem', run.name)}, test sequence {b}, after {step} steps{f': {said}' if said else ''}"
    )


# -- gradients by lag -------------------------------------------------------------------------------------


@styled
def draw_gradient_by_lag(run: Given, steps: list[int] | None = None) -> Figure:
    """The norm of the loss's gradient in the hidden states against how long before the answer they occur.

    Args:
        run: a run with :class:`hfopt.GradientByLag` recorded, or its name.
        steps: of which to draw curves, each the nearest that was recorded; by default seven, evenly spaced.

    Raises:
        KeyError: the run has no such recording.
    """
    from matplotlib import pyplot as plt

    run = as_run(run)
    recorded = run.recorded["gradient_by_lag"]
    chosen = _chosen(recorded, steps)
    colours, mapped = colours_of_steps(chosen, recorded.steps.tolist())
    figure, axes = plt.subplots(figsize=(7.5, 4.0), layout="constrained")
    for step, colour in zip(chosen, colours, strict=True):
        frame = recorded.frame(step)
        known = frame["norm"] > 0
        axes.plot(frame["lag"][known], frame["norm"][known], color=colour)
    axes.set_yscale("log")
    axes.set_xlabel("steps before the last answer")
    axes.set_ylabel("norm of the gradient in the hidden states")
    whole_steps(axes)
    bar_of_steps(figure, mapped, axes, chosen)
    figure.suptitle(f"{run.name}: gradient by lag", color=INK, x=0.01, ha="left")
    return figure


def _chosen(recorded: Recorded, steps: list[int] | None) -> list[int]:
    if steps is None:
        return evenly(recorded.steps, _CURVES)
    return sorted({recorded.nearest(step) for step in steps})


# -- eigenvalues ------------------------------------------------------------------------------------------


@styled
def draw_spectrum(run: Given, steps: list[int] | None = None, name: str = "spectrum") -> Figure:
    """The recurrent matrix's eigenvalues in the complex plane over training, with the unit circle.

    Args:
        run: a run with :class:`hfopt.Spectrum` recorded, or its name.
        steps: of which to draw them, each the nearest that was recorded; by default seven, evenly spaced.
        name: of the recorder, where there are several.

    Raises:
        KeyError: the run has no such recording.
    """
    from matplotlib import pyplot as plt

    run = as_run(run)
    recorded = run.recorded[name]
    chosen = _chosen(recorded, steps)
    colours, mapped = colours_of_steps(chosen, recorded.steps.tolist())
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    circle = np.linspace(0, 2 * np.pi, 400)
    axes.plot(np.cos(circle), np.sin(circle), color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        "|z| = 1", (np.sqrt(0.5), -np.sqrt(0.5)), xytext=(3, -9), textcoords="offset points", color=SOFT, fontsize=8
    )
    for i, (step, colour) in enumerate(zip(chosen, colours, strict=True)):
        frame = recorded.frame(step)
        # The first and the last are what is compared; those between show the way.
        size, alpha = (26.0, 0.95) if i in (0, len(chosen) - 1) else (7.0, 0.6)
        axes.scatter(frame["real"], frame["imag"], s=size, color=colour, linewidths=0, alpha=alpha, zorder=2 + i)
    axes.set_aspect("equal", "datalim")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    bar_of_steps(figure, mapped, axes, chosen)
    matrix = recorded.about.get("matrix", "the recurrent matrix")
    figure.suptitle(f"{run.name}: eigenvalues of {matrix}", color=INK, x=0.01, ha="left")
    return figure


# -- curvature --------------------------------------------------------------------------------------------


@styled
def draw_curvature_density(run: Given, steps: list[int] | None = None) -> Figure:
    """The density of the Gauss-Newton matrix's eigenvalues over training, with each step's lambda.

    A triangle marks each step's lambda: directions of smaller eigenvalues, to the left of it, are damped. The leftmost
    bump stands for all eigenvalues that so few products cannot tell from each other, zeros among them.

    Args:
        run: a run with :class:`hfopt.CurvatureDensity` recorded, or its name.
        steps: of which to draw curves, each the nearest that was recorded; by default seven, evenly spaced.

    Raises:
        KeyError: the run has no such recording.
    """
    from matplotlib import pyplot as plt

    run = as_run(run)
    recorded = run.recorded["curvature_density"]
    chosen = _chosen(recorded, steps)
    colours, mapped = colours_of_steps(chosen, recorded.steps.tolist())
    figure, axes = plt.subplots(figsize=(7.5, 4.0), layout="constrained")
    dotted, highest, ends = False, 0.0, [np.inf, 0.0]
    for step, colour in zip(chosen, colours, strict=True):
        frame = recorded.frame(step)
        axes.plot(frame["grid"], frame["density"], color=colour)
        highest = max(highest, float(np.nanmax(frame["density"], initial=0.0)))
        seen = frame["grid"][frame["density"] > 1e-5 * highest]
        ends = [min(ends[0], *seen[:1]), max(ends[1], *seen[-1:])]
        row = run.steps[run.steps["step"] == step]
        damping = float(row["damping"][0]) if len(row) else np.nan
        if frame["grid"][0] < damping < frame["grid"][-1]:
            label = "" if dotted else "λ of the step"
            above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
            axes.plot([damping], [1.0], "v", color=colour, markersize=8, label=label, **above)
            dotted = True
    axes.set_xscale("log")
    axes.set_yscale("log")
    if highest:
        axes.set_ylim(1e-5 * highest, 2 * highest)
        axes.set_xlim(0.5 * ends[0], 2 * ends[1])
    axes.set_xlabel("eigenvalue of the Gauss-Newton matrix")
    axes.set_ylabel("share of eigenvalues per decade")
    if dotted:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, borderpad=0.2)
    bar_of_steps(figure, mapped, axes, chosen)
    figure.suptitle(f"{run.name}: curvature", color=INK, x=0.01, ha="left")
    return figure
