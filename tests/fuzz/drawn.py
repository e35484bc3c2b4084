"""Strategies: models, losses and closures drawn as plain data, and what is built from them.

Everything is built from a :class:`Drawn` alone, so that a failing example can be pasted into a regression test. How
many examples are tried, and whether always the same ones, is decided by
:func:`examples` and :func:`searched`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz.criteria import NAMES, REDUCTIONS, Loss, loss_of
from tests.fuzz.models import FAMILIES, input_of, model_of
from tests.hfopt.tools import generator

# Set to a number, this environment variable asks for so many examples of every property, new ones in each run.
SEARCH = "HFOPT_FUZZ"


def examples(number: int) -> settings:
    """So many examples, the same ones in each run; or as many as ``HFOPT_FUZZ`` says, drawn again."""
    asked = int(os.environ.get(SEARCH, "0"))
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=asked or number,
        derandomize=not asked,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        print_blob=False,
        report_multiple_bugs=False,
    )


def searched(
    few: int, many: int, *drawn: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a property two tests: a quick one of few examples, and one of many that is marked ``slow``."""

    def decorate(holds: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(number: int) -> None:
            examples(number)(given(*drawn)(holds))()

        test.__name__, test.__qualname__, test.__doc__ = holds.__name__, holds.__qualname__, holds.__doc__
        test.__module__ = holds.__module__
        return test

    return decorate


@dataclass(frozen=True)
class Drawn:
    """One model with data, a loss and a form of closure.

    ``frozen``: bits that say which parameters require no gradient, ``left``: which are not the optimizer's (always all
    but the first trainable one at most).
    """

    family: str
    variant: int
    width: int
    outputs: int
    cases: int
    criterion: str
    reduction: str
    option: int
    form: str
    dtype: torch.dtype = torch.float64
    frozen: int = 0
    left: int = 0
    decay: bool = False
    seed: int = 0

    def problem(self) -> Problem:
        """The model, its data and its loss."""
        torch.manual_seed(self.seed)
        model = model_of(self.family, self.variant, self.width, self.outputs).to(self.dtype)
        x = input_of(self.family, self.cases, generator(self.seed))
        x = x.to(self.dtype) if x.is_floating_point() else x
        loss = loss_of(self.criterion, self.reduction, self.option, self.cases, self.outputs, self.dtype, self.seed)
        params = list(model.parameters())
        for i, p in enumerate(params):
            p.requires_grad_(not self.frozen >> i & 1)
        trainable = [p for p in params if p.requires_grad]
        if not trainable:
            params[0].requires_grad_()
            trainable = params[:1]
        given = [p for i, p in enumerate(trainable) if not self.left >> i & 1] or trainable[:1]
        return Problem(self, model, x, loss, given)


@dataclass
class Problem:
    """What was built; ``params`` are those given to the optimizer, all of them trainable."""

    drawn: Drawn
    model: nn.Module
    x: Tensor
    loss: Loss
    params: list[nn.Parameter]

    def penalty(self) -> Tensor:
        """A regulariser of all trainable parameters that is no quadratic."""
        pieces = [(p**2).sum() + (p**4).sum() for p in self.model.parameters() if p.requires_grad]
        return torch.stack(pieces).sum() * 1e-3

    def total(self) -> Tensor:
        """The loss with its graph."""
        value = self.loss.value(self.model(self.x))
        return value + self.penalty() if self.drawn.decay else value

    def closure(self, zero_grad: Callable[[], None] | None = None) -> Callable[[], Any]:
        """The drawn form of closure around :meth:`total`."""
        clear = self.model.zero_grad if zero_grad is None else zero_grad

        def backward() -> Tensor:
            clear()
            loss = self.total()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        def twice() -> Tensor:
            """The same loss in two shares."""
            clear()
            shown = torch.zeros(())
            for share in (0.25, 0.75):
                loss = self.total() * share
                loss.backward()  # type: ignore[no-untyped-call]
                shown = shown + loss.detach()
            return shown

        def pair() -> tuple[Tensor, Tensor]:
            z = self.model(self.x)
            value = self.loss.value(z)
            return z, value + self.penalty() if self.drawn.decay else value

        return {"backward": backward, "value": self.total, "pair": pair, "twice": twice}[self.drawn.form]


FORMS = ("backward", "value", "pair", "twice")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def drawn(
    dtypes: Iterable[torch.dtype] = (torch.float64,),
    families: Iterable[str] = FAMILIES,
    criteria: Iterable[str] = NAMES,
    reductions: Iterable[str] = REDUCTIONS,
) -> st.SearchStrategy[Drawn]:
    """Problems of a few dozen parameters."""
    return st.builds(
        Drawn,
        family=st.sampled_from(list(families)),
        variant=st.integers(0, 1 << 12),
        width=st.integers(1, 3),
        outputs=st.integers(1, 3),
        cases=st.integers(1, 4),
        criterion=st.sampled_from(list(criteria)),
        reduction=st.sampled_from(list(reductions)),
        option=st.integers(0, 15),
        form=st.sampled_from(FORMS),
        dtype=st.sampled_from(list(dtypes)),
        frozen=st.integers(0, 255).map(lambda bits: bits & bits >> 4),
        left=st.integers(0, 255).map(lambda bits: bits & bits >> 4),
        decay=st.booleans(),
        seed=st.integers(0, 1000),
    )
