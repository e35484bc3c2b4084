"""Whole steps on drawn problems: they work, or say in a sentence of hfopt's own what is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

import hfopt
from hfopt.curvature.linearisation import POLICIES
from hfopt.optimizer import CURVATURES
from tests.fuzz.drawn import DTYPES, Drawn, drawn, searched
from tests.hfopt.tools import flat

PRECONDITIONERS = [None, "empirical-fisher", "hutchinson", "nystrom", "kfac", "lbfgs"]
OURS = (hfopt.HfoptError, ValueError, TypeError)


def options() -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of the optimizer."""
    return st.fixed_dictionaries(
        {
            "curvature": st.sampled_from(CURVATURES),
            "linearisation": st.sampled_from(POLICIES),
            "preconditioner": st.sampled_from(PRECONDITIONERS),
            "damping": st.sampled_from([None, 0.0, 1e-3, 10.0]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "lr": st.sampled_from([1.0, 0.3]),
            "backtracking": st.sampled_from(["walk", "smallest", "none"]),
            "replace_recurrences": st.booleans(),
        }
    )


def take(optimizer: hfopt.HessianFree, closure: Callable[[], Any], steps: int = 2) -> hfopt.HfoptError | None:
    """Steps, or the error in which hfopt refuses them; torch's own on what it is given are plain as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in range(steps):
                optimizer.step(closure)
            return None
        except OURS as error:
            found = error
    assert len(str(found)) > 40, found
    return found if isinstance(found, hfopt.HfoptError) else hfopt.HfoptError(str(found))


@searched(8, 30, drawn(dtypes=DTYPES), options(), st.booleans())
def test_steps(d: Drawn, settings: dict[str, Any], groups: bool) -> None:
    """Losses are finite and do not rise, and nothing but the given parameters moves."""
    problem = d.problem()
    params: Any = problem.params
    if groups:
        params = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "weight_decay": 0.01}]
    others = [p for p in problem.model.parameters() if not any(p is q for q in problem.params)]
    before = flat(others) if others else torch.zeros(0)
    cg = hfopt.CG(max_iterations=8)
    optimizer = hfopt.HessianFree(params, cg=cg, **settings)
    if take(optimizer, problem.closure(optimizer.zero_grad)) is not None:
        return
    rounding = 8 * torch.finfo(d.dtype).eps
    for s in optimizer.stats:
        if s.cg_reason == "not finite":
            assert not s.accepted
            continue
        assert math.isfinite(s.loss)
        assert math.isfinite(s.new_loss)
        assert s.new_damping >= 0
        if s.accepted and not settings["weight_decay"] and not groups:
            assert s.new_loss <= s.loss + rounding * (1 + abs(s.loss))
    assert all(bool(p.isfinite().all()) for p in problem.params)
    assert torch.equal(flat(others) if others else torch.zeros(0), before)


@searched(6, 24, drawn(dtypes=DTYPES), st.sampled_from(CURVATURES), st.booleans())
def test_checks_find_nothing(d: Drawn, curvature: str, replaced: bool) -> None:
    """Self-checks on problems that are in order raise nothing, and change nothing."""
    # A padding row that is an output's weights as well has a gradient that lacks a part.
    assume(not (d.family == "embedded" and d.variant % 2 and d.variant // 4 % 2))
    ends = []
    for check in (False, 1):
        problem = d.problem()
        optimizer = hfopt.HessianFree(
            problem.params,
            curvature=curvature,
            cg=hfopt.CG(max_iterations=3),
            replace_recurrences=replaced,
            check=check,
        )
        error = take(optimizer, problem.closure(optimizer.zero_grad))
        if isinstance(error, hfopt.CheckFailed):
            # A sum over cases is none of what the empirical Fisher matrix is for.
            assert curvature == "empirical-fisher"
            assert "mean over cases" in str(error)
            return
        ends.append((flat(problem.params), str(error)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
