"""Self-checks on models that are in order, no trace of them, and when they are made."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from tests.hfopt.step.test_checks import CG, CLASSES, Tripled, X, Y, fails, step
from tests.hfopt.tools import mlp, randn


class Padded(nn.Module):
    """The row of an embedding's padding has no gradient, though outputs depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.words((x[:, :3] > 0).long() * 2).mean(1).tanh())
        return z


class Read(nn.Module):
    """A recurrent layer, read out at its last step."""

    def __init__(self, kind: Any, outputs: int = 2) -> None:
        super().__init__()
        self.layer, self.last = kind(3, 5), nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.layer(x)[0][-1])
        return z


def images(activation: nn.Module, zero: bool) -> nn.Module:
    first = nn.Conv2d(1, 4, 3, padding=1)
    if zero:  # with images that are zero in places, rectifiers are on their kinks
        nn.init.zeros_(first.bias)
    norm = nn.Identity() if zero else nn.BatchNorm2d(4)
    return nn.Sequential(first, norm, activation, nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 2))


def sequences(seed: int) -> Tensor:
    return randn(10, 6, 3, seed=seed)


def pictures(seed: int) -> Tensor:
    return randn(6, 1, 8, 8, seed=seed).relu()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "tanh": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), lambda s: randn(6, 3, seed=s)),
    "relu": (
        lambda: nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2)),
        lambda s: randn(6, 3, seed=s),
    ),
    "cnn": (lambda: images(nn.ReLU(), False), pictures),
    "cnn on kinks": (lambda: images(nn.ReLU(), True), pictures),
    "padded": (Padded, lambda s: randn(6, 3, seed=s)),
    "rnn": (lambda: Read(nn.RNN), sequences),
    "lstm": (lambda: Read(nn.LSTM), sequences),
    "gru": (lambda: Read(nn.GRU), sequences),
}
LABELS, TARGETS, BITS = torch.arange(6) % 2, randn(6, 2, seed=5), (randn(6, 2, seed=6) > 0).double()
CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda z: F.mse_loss(z, TARGETS.to(z.dtype)),
    "ce": lambda z: F.cross_entropy(z, LABELS),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, BITS.to(z.dtype)),
    "smooth l1": lambda z: F.smooth_l1_loss(z, TARGETS.to(z.dtype), beta=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_models_in_order(name: str, dtype: torch.dtype) -> None:
    for seed, criterion in enumerate(CRITERIA.values()):
        torch.manual_seed(seed)
        model, x = MODELS[name][0]().to(dtype), MODELS[name][1](seed).to(dtype)
        curvature = ("gauss-newton", "hessian")[seed % 2]
        step(model, lambda model=model, x=x, c=criterion: c(model(x)), curvature=curvature)


@pytest.mark.parametrize("name", ["tanh", "relu", "cnn"])
def test_low_precision(name: str) -> None:
    """Under autocast differences are rough, and checks that cannot tell say nothing."""
    for seed, criterion in enumerate(CRITERIA.values()):
        torch.manual_seed(seed)
        model, x = MODELS[name][0](), MODELS[name][1](seed).float()

        def closure(model: nn.Module = model, x: Tensor = x, c: Any = criterion) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return c(model(x))  # type: ignore[no-any-return]

        step(model, closure)


# -- no trace -------------------------------------------------------------------------------------------------------


def record(check: bool | int, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the closure's own draws
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
    x, y = X.float(), Y.float()
    optimizer = hfopt.HessianFree(model.parameters(), cg=CG, check=check, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        random.random()
        np.random.rand()  # noqa: NPY002
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    stats = [[getattr(s, n) for n in s.__dataclass_fields__ if n != "seconds"] for s in optimizer.stats]
    grads = [p.grad for p in model.parameters()]
    numpy = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002
    draws = torch.get_rng_state(), random.getstate(), numpy
    return str(stats), {**model.state_dict(), **{str(i): g for i, g in enumerate(grads)}}, draws


@pytest.mark.parametrize(
    "options",
    [{}, {"curvature": "hessian"}, {"curvature": "fisher", "weight_decay": 0.1}, {"linearisation": "recompute"}],
)
def test_checks_leave_no_trace(options: dict[str, Any]) -> None:
    plain, checked = record(False, **options), record(1, **options)
    assert plain[0] == checked[0]
    assert all(torch.equal(value, checked[1][name]) for name, value in plain[1].items())
    assert torch.equal(plain[2][0], checked[2][0])
    assert plain[2][1:] == checked[2][1:]


def test_a_failed_check_leaves_the_parameters() -> None:
    model = mlp(3, 4, 2)
    before = copy.deepcopy(model.state_dict())
    with fails("wrong"):
        step(model, lambda: F.mse_loss(Tripled.apply(model(X)), Y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- when -----------------------------------------------------------------------------------------------------------


def checked_steps(check: bool | int, steps: int = 7, change: int = 99) -> list[int]:
    """At which steps a broken closure is found out, if it was not broken before."""
    found = []
    for broken in range(steps):
        model = mlp(3, 4, 2)
        optimizer = hfopt.HessianFree(model.parameters(), cg=CG, check=check)
        for i in range(broken + 1):
            wrong = 3.0 if i == broken else 1.0

            def closure(model: nn.Module = model, wrong: float = wrong, other: bool = i >= change) -> Tensor:
                z = model(X)
                z = wrong * z + (1 - wrong) * z.detach()
                return F.cross_entropy(z, CLASSES) if other else F.mse_loss(z, Y)

            try:
                optimizer.step(closure)
            except hfopt.CheckFailed:
                found.append(i)
    return found


def test_when_checks_are_made() -> None:
    assert checked_steps(False, 2) == []
    assert checked_steps(True, 4) == [0]
    assert checked_steps(True, 5, change=3) == [0, 3]
    assert checked_steps(2, 5) == [0, 2, 4]


def test_copies_and_pickles_remember() -> None:
    model = mlp(3, 4, 2)
    optimizer = hfopt.HessianFree(model.parameters(), cg=CG, check=True)
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301 - made here
        assert other.check is True
        assert other.checked == optimizer.checked != set()


@pytest.mark.parametrize("check", [-1, 0, 1.5, "yes", None])
def test_wrong_arguments(check: Any) -> None:
    with pytest.raises(ValueError, match=r"check is .*but must be True, False, or after how many steps"):
        hfopt.HessianFree(mlp(3, 2).parameters(), check=check)
