"""What an optimizer prints."""

from __future__ import annotations

import pytest

import hfopt
from hfopt.preconditioners import KFAC, LBFGS, EmpiricalFisherDiagonal, HutchinsonDiagonal, Nystrom
from tests.hfopt.tools import mlp


def test_repr_tells_the_groups() -> None:
    text = repr(hfopt.HessianFree(mlp(3, 2).parameters(), lr=0.5, weight_decay=0.1))
    assert "HessianFree" in text
    assert "lr: 0.5" in text
    assert "weight_decay: 0.1" in text


def test_repr_tells_the_settings() -> None:
    optimizer = hfopt.HessianFree(mlp(3, 2).parameters(), damping=0.25, structural_damping=0.1, backtracking="none")
    lines = repr(optimizer).splitlines()
    assert "backtracking: 'none'" in lines
    assert "structural_damping: 0.1" in lines
    assert any(line.startswith("damping: LevenbergMarquardt(initial=0.25") for line in lines)
    assert any(line.startswith("cg: CG(max_iterations=250") for line in lines)
    assert lines[-1] == ")"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (KFAC(probes=3), "KFAC(samples=1, probes=3, every=1, batch_dim=0, average=0.0)"),
        (Nystrom(7), "Nystrom(rank=7, every=1)"),
        (HutchinsonDiagonal(probes=2), "HutchinsonDiagonal(exponent=0.75, probes=2)"),
    ],
)
def test_preconditioners_tell_their_settings(made: object, text: str) -> None:
    assert repr(made) == text
    assert "object at 0x" not in repr(LBFGS()) + repr(EmpiricalFisherDiagonal())
