"""Pictures of tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.sizes import parameter_count
from runs.capacity.cells import cell_of
from runs.capacity.pictures import _ranks, _units, best_of_each, draw, importance
from runs.capacity.table import table


def row(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"architecture": "gru", "eval_loss": 1.0, "hparams": {}, "max_params": 500, "n_layers": 1}
    plain |= {"num_params": 490, "task_type": "per_cap", "train_loss": 1.0, "valid_loss": 1.0, "hyper_iter": 0}
    return {**plain, **changes}


def test_the_best_of_each_budget() -> None:
    rows = table([row(eval_loss=e, max_params=m) for e, m in ((3, 900), (2, 900), (5, 100), (7, 100))])
    ((pair, best),) = best_of_each(rows)
    assert pair == ("gru", 1)
    assert best["eval_loss"].tolist() == [5, 2]


def test_importance_is_a_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    lr, other = rng.uniform(size=60), rng.uniform(size=60)
    hparams = [
        {"lr_init": a, "l2_decay": b, "train_steps": 5, "optimizer": "Adam"} for a, b in zip(lr, other, strict=True)
    ]
    rows = table([row(eval_loss=np.exp(9 * h["lr_init"]), hparams=h) for h in hparams])
    found = importance(rows)
    assert list(found) == ["lr_init", "l2_decay"]
    assert found["lr_init"] == pytest.approx(1)
    assert found["l2_decay"] < 0.4
    assert importance(rows[:5]) == {}
    assert _ranks(np.array([3.0, 1.0, 3.0])).tolist() == [2.5, 1, 2.5]


def test_units_follow_from_parameters() -> None:
    count = parameter_count(cell_of("lstm"), 2, 64, 70, 64)
    assert _units(table([row(architecture="lstm", n_layers=2, num_params=count)])[0]) == 70
    assert _units(table([row(architecture="lstm", n_layers=2, num_params=count + 1)])[0]) == 0


def test_every_task_has_its_picture(tmp_path: Path) -> None:
    names = {"per_cap", "mem_thru", "text8", "arithmetic"}
    rows = [
        row(task_type=task, max_params=size, num_params=size, eval_loss=size / 100, hparams={"lr_init": 0.1 * k})
        for task in sorted(names)
        for size in (300, 1000)
        for k in range(12)
    ]
    made = draw(table([*rows, row(eval_loss=np.inf)]), tmp_path)
    assert [path.stem for path in made] == [
        "capacity",
        "memory",
        "losses",
        "trials",
    ]  # the losses do not vary in a group
    assert all(path.read_bytes()[1:4] == b"PNG" for path in made)
    varied = [{**one, "eval_loss": one["eval_loss"] + k} for k, one in enumerate(rows)]
    assert [path.stem for path in draw(table(varied), tmp_path)][-1] == "importance"
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(table([row(eval_loss=np.inf)]), tmp_path)
