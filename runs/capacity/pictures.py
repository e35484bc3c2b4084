"""Pictures of tables: capacity, losses over sizes, distributions of trials, and what hyperparameters matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.sizes import parameter_count, units_for
from runs.capacity.cells import cell_of
from runs.capacity.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Part = tuple[str, Callable[..., None]]
Floats = npt.NDArray[np.float64]
_LABELS = {"text8": "bits per character", "mem_thru": "squared error per entry", "rcf": "squared error"}


def draw(rows: Table, folder: Path) -> list[Path]:
    """Draw all pictures that a table has the tasks for, as PNG files in a folder.

    They are capacity.png (bits, and bits per parameter, over parameters; of per_cap), memory.png (error over units in a
    layer; of mem_thru), losses.png (best loss over parameters; of the other tasks), trials.png (the distribution of
    losses), and importance.png.

    Raises:
        ValueError: no row of the table has a finite loss.
    """
    rows = rows[np.isfinite(rows["eval_loss"])]
    if not len(rows):
        raise ValueError("no trial of the table has a finite loss: there is nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = list(dict.fromkeys(rows["task_type"].tolist()))
    own = {task: rows[rows["task_type"] == task] for task in tasks}
    made = []
    if "per_cap" in own:
        bits: list[Part] = [
            ("bits", partial(_lines, rows=own["per_cap"], value=lambda best: -best["eval_loss"])),
            (
                "bits per parameter",
                partial(_lines, rows=own["per_cap"], value=lambda best: -best["eval_loss"] / best["num_params"]),
            ),
        ]
        made.append(_page(folder / "capacity.png", bits, "parameters"))
    if "mem_thru" in own:
        place, below = (_units, "units in a layer") if all(map(_units, own["mem_thru"])) else (_size, "parameters")
        memory = partial(_lines, rows=own["mem_thru"], value=_loss, place=place)
        made.append(_page(folder / "memory.png", [(_LABELS["mem_thru"], memory)], below))
    losses: list[Part] = [
        (f"{task}: {_LABELS.get(task, 'loss')}", partial(_lines, rows=own[task], value=_loss))
        for task in tasks
        if task not in ("per_cap", "mem_thru")
    ]
    if losses:
        made.append(_page(folder / "losses.png", losses, "parameters"))
    trials: list[Part] = [(f"{task}: loss", partial(_trials, rows=own[task])) for task in tasks]
    made.append(_page(folder / "trials.png", trials, "share of trials"))
    matter = {task: importance(own[task]) for task in tasks}
    bars: list[Part] = [(task, partial(_bars, found=found)) for task, found in matter.items() if found]
    if bars:
        made.append(_page(folder / "importance.png", bars, "rank correlation with the loss"))
    return made


def best_of_each(rows: Table) -> Iterator[tuple[tuple[str, int], Table]]:
    """For every architecture and depth, the best row of each budget, from the smallest on."""
    for pair in sorted(set(rows[["architecture", "n_layers"]].tolist())):
        own = rows[(rows["architecture"] == pair[0]) & (rows["n_layers"] == pair[1])]
        chosen = [own[own["max_params"] == size] for size in np.unique(own["max_params"])]
        yield pair, np.array([group[group["eval_loss"].argmin()] for group in chosen])


def importance(rows: Table, least: int = 10) -> dict[str, float]:
    """How strongly the loss goes with each numerical hyperparameter: the largest absolute rank correlation.

    Spearman's, of the trials of one architecture, depth and budget; of several such groups, the largest counts.
    Hyperparameters that do not vary are left out, and groups of fewer than `least` trials or of one loss.

    Returns:
        By name, the strongest first; empty if there are too few trials.
    """
    found: dict[str, float] = {}
    for group in np.unique(rows[["architecture", "n_layers", "max_params"]]):
        own = rows[(rows[["architecture", "n_layers", "max_params"]] == group)]
        if len(own) < least or len(np.unique(own["eval_loss"])) < 2:
            continue
        loss = _ranks(own["eval_loss"])
        for key in {key for hparams in own["hparams"] for key in hparams}:
            values = [hparams.get(key) for hparams in own["hparams"]]
            if not all(isinstance(value, (int, float)) for value in values) or len(set(values)) < 2:
                continue
            ranks = _ranks(np.array(values, float))
            found[key] = max(found.get(key, 0.0), abs(float(np.corrcoef(ranks, loss)[0, 1])))
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _units(row: Any) -> float:
    """Units of a layer of a network for mem_thru, from its parameters; 0 if it has not the published 64 inputs."""
    cell, depth = cell_of(row["architecture"]), int(row["n_layers"])
    units = units_for(max(int(row["num_params"]), parameter_count(cell, depth, 64, 1, 64)), cell, depth, 64, 64)
    return float(units) if parameter_count(cell, depth, 64, units, 64) == row["num_params"] else 0.0


def _size(row: Any) -> float:
    return float(row["num_params"])


def _loss(rows: Table) -> Any:
    return rows["eval_loss"]


def _ranks(values: Floats) -> Floats:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], float)


def _lines(ax: Axes, rows: Table, value: Callable[[Table], Any], place: Callable[[Any], float] = _size) -> None:
    for (cell, depth), best in best_of_each(rows):
        ax.plot([place(row) for row in best], value(best), marker=".", label=f"{cell}, {depth}")
    ax.set_xscale("log")
    ax.legend(fontsize="x-small", title="cell, layers", title_fontsize="x-small")


def _trials(ax: Axes, rows: Table) -> None:
    for cell in np.unique(rows["architecture"]):
        losses = np.sort(rows["eval_loss"][rows["architecture"] == cell])
        ax.plot(np.arange(1, len(losses) + 1) / len(losses), losses, drawstyle="steps-pre", label=cell)
    if (rows["eval_loss"] > 0).all():
        ax.set_yscale("log")
    ax.legend(fontsize="x-small")


def _bars(ax: Axes, found: dict[str, float]) -> None:
    names = list(found)[::-1]
    ax.barh(names, [found[name] for name in names])
    ax.tick_params(axis="y", labelsize="x-small")


def _page(path: Path, parts: list[Part], below: str) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(parts), 4), layout="constrained")
    for ax, (label, fill) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        fill(ax)
        ax.set_ylabel(label)
        ax.set_xlabel(below)
    figure.savefig(path, dpi=130)
    return path
