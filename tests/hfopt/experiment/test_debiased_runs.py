"""The data role of debiased steps in experiments: batches, the record, and resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hfopt
from hfopt.experiment.driver import HF
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import Running, Sums


class Roles(torch.optim.SGD):
    """An optimizer that notes the loss of every role and leaves the parameters alone."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.0)
        self.calls: list[dict[str, float | None]] = []

    def step(self, closure: Any = None, *, curvature: Any = None, evaluation: Any = None, debias: Any = None) -> Any:  # type: ignore[override]
        closures = {"gradient": closure, "curvature": curvature, "evaluation": evaluation, "debias": debias}
        with torch.enable_grad():
            losses = {name: None if f is None else f() for name, f in closures.items()}
        self.calls.append({name: None if v is None else float(v.detach()) for name, v in losses.items()})
        return losses["gradient"]


def driver(path: Path, optimizer: Any, **options: Any) -> HF:
    torch.manual_seed(0)
    return HF(path, Running(), Sums(), optimizer=optimizer, threshold=0.0, quiet=True, overwrite=True, **options)


@pytest.mark.parametrize(
    ("options", "judged"),
    [
        ({"debias_batches": [2]}, None),  # by the batches of the step lengths, which is what None says
        ({"debias_batches": [2], "evaluation_batches": [0, 1]}, [0, 1]),
        ({"evaluation_batches": [2]}, [2]),
    ],
)
def test_the_role_has_its_batches(tmp_path: Path, options: dict[str, Any], judged: list[int] | None) -> None:
    hf = driver(tmp_path / "run", Roles, gradient_batches=[0, 1], curvature_batches=[0, 1], max_steps=1, **options)
    hf.optimize()
    assert isinstance(hf.optimizer, Roles)
    (call,) = hf.optimizer.calls
    hf.problem.forget()
    batches = read_run(tmp_path / "run").configuration["batches"]
    assert batches.get("debias") == options.get("debias_batches")
    assert ("debias" in batches["roles"]) == ("debias_batches" in options)
    assert (call["debias"] is None) == ("debias_batches" not in options)
    assert (call["evaluation"] is None) == (judged is None)
    assert call["curvature"] is None
    assert batches["evaluation"] == (options["debias_batches"] if judged is None else judged)
    told = (tmp_path / "run" / "results").read_text("utf-8")
    assert ("1 for step lengths" in told) == ("debias_batches" in options)


def test_other_optimizers_have_no_such_role(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="debias_batches: the step of SGD takes no debias="):
        driver(tmp_path / "run", lambda p: torch.optim.SGD(p, lr=0.1), debias_batches=[2])
    with pytest.raises(ValueError, match=r"debias_batches=\[7\]"):
        driver(tmp_path / "run", Roles, debias_batches=[7])


def test_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    roles = {"gradient_batches": [0, 1], "debias_batches": [2], "save_freq": 2}
    whole = driver(tmp_path / "whole", hfopt.HessianFree, max_steps=6, **roles)
    whole.optimize()
    driver(tmp_path / "half", hfopt.HessianFree, max_steps=3, **roles).optimize()
    rest = driver(tmp_path / "half", hfopt.HessianFree, max_steps=6, **roles)
    rest.load()
    rest.optimize()
    a, b = (read_run(tmp_path / name).steps for name in ("whole", "half"))
    for column in ("train_loss", "rho", "damping", "products"):
        assert a[column].tobytes() == b[column].tobytes()
    for p, q in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(RunError, match="debias"):
        driver(tmp_path / "half", hfopt.HessianFree, gradient_batches=[0, 1], evaluation_batches=[2]).load()
