"""The table of trials: one row each, with the columns of the published data set."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

COLUMNS = np.dtype(
    [
        ("architecture", "U8"),
        ("eval_loss", "f8"),
        ("hparams", "O"),
        ("max_params", "i8"),
        ("n_layers", "i8"),
        ("num_params", "i8"),
        ("task_type", "U16"),
        ("train_loss", "f8"),
        ("valid_loss", "f8"),
        ("hyper_iter", "i8"),
    ]
)
"""Names and order as published (jazcollins/cap-n-train-hps), and their kinds: text, numbers, integers, dictionaries."""
Table = npt.NDArray[Any]


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A structured array of rows by column.

    Raises:
        ValueError: a row lacks a column.
    """
    made = list(rows)
    found = np.empty(len(made), COLUMNS)
    for i, row in enumerate(made):
        missing = set(COLUMNS.names or ()) - row.keys()
        if missing:
            raise ValueError(f"row {i} of the table lacks {', '.join(sorted(missing))}")
        for column in COLUMNS.names or ():
            found[column][i] = dict(row[column]) if column == "hparams" else row[column]
    return found


def export(rows: Table, path: Path) -> Path:
    """Write a table: as a pickled array as in the published data set (`.p`), as `.npy`, or as HDF5 (`.h5`).

    In HDF5 each column is a data set, and hyperparameters are JSON. An existing file is not replaced.

    Raises:
        FileExistsError: there is such a file.
        ValueError: another ending.
    """
    if path.suffix not in (".p", ".npy", ".h5"):
        raise ValueError(f"{path} ends in {path.suffix!r}; a table is written to .p, .npy or .h5")
    if path.exists():
        raise FileExistsError(f"{path} is there already; export to another file, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".h5":
        with h5py.File(part, "w") as file:
            for column in COLUMNS.names or ():
                values: Any = rows[column]
                if column == "hparams":
                    values = np.array([json.dumps(h, sort_keys=True) for h in values], object)
                text = values.dtype.kind in "UO"
                file.create_dataset(
                    column, data=values.astype(object) if text else values, dtype=h5py.string_dtype() if text else None
                )
    else:
        with part.open("wb") as handle:
            if path.suffix == ".p":
                pickle.dump(rows, handle, protocol=4)
            else:
                np.save(handle, rows)
    part.replace(path)
    return path


def best(rows: Table, *, task_type: str, architecture: str) -> Any:
    """The row of a task and an architecture with the lowest eval_loss.

    Raises:
        ValueError: there is none, or none with a finite loss; the message says which there are.
    """
    chosen = rows[(rows["task_type"] == task_type) & (rows["architecture"] == architecture)]
    if not len(chosen):
        pairs = sorted({f"{task} {cell}" for task, cell in rows[["task_type", "architecture"]].tolist()})
        raise ValueError(f"the table has no {task_type} with {architecture}; it has {', '.join(pairs) or 'no rows'}")
    losses = np.where(np.isfinite(chosen["eval_loss"]), chosen["eval_loss"], np.inf)
    if not np.isfinite(losses).any():
        raise ValueError(f"every run of {task_type} with {architecture} in the table diverged")
    return chosen[losses.argmin()]


def sentences(row: Any) -> str:
    """A row in the words of the published data set's example."""
    first = (
        f"best {row['architecture'].upper()} had final loss {row['eval_loss']:f}, was {row['n_layers']}-layers, "
        f"{row['num_params']} parameters, and had HPs:"
    )
    return "\n".join([first, *(f"{key}: {value}" for key, value in row["hparams"].items())])
