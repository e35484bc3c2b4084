"""The mode for minibatches: what it is made of, its state, and what bad batches do to it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt import AverageRatio, FullStep, RisingDecay, for_minibatches
from hfopt.step.settings import Closures
from hfopt.step.step import Step
from tests.hfopt.tools import flat, generator, mlp, theta

Batch = tuple[Tensor, Tensor]


def test_the_average_decides() -> None:
    """``m <- s m + (1 - s) rho``, from the middle of the two thresholds."""
    rule = AverageRatio(8.0, smoothing=0.75, low=0.0, high=0.5, increase=2.0, decrease=0.5)
    average, value = 0.25, 8.0
    for rho, accepted, seen in [
        (1.0, True, 1.0),
        (0.9, True, 0.9),
        (50.0, True, 2.0),
        (-80.0, True, -1.0),
        (math.nan, True, -1.0),
        (1.0, False, -1.0),
        (0.3, True, 0.3),
        (math.inf, True, -1.0),
    ]:
        average = 0.75 * average + 0.25 * seen
        value *= 2.0 if average < 0.0 else 0.5 if average > 0.5 else 1.0
        rule.update(rho, accepted)
        assert rule.value == pytest.approx(value)
        assert rule.state_dict()["average"] == pytest.approx(average)
    other = AverageRatio(1.0, smoothing=0.75)
    other.load_state_dict(rule.state_dict())
    assert other.state_dict() == rule.state_dict()
    other.load_state_dict({"value": 3.0})
    assert other.state_dict() == {"value": 3.0, "reference": 3.0, "average": pytest.approx(0.15), "refused": 0.0}


def test_several_steps_in_a_row_that_were_not_taken() -> None:
    """The first may be a bad batch; the others raise lambda at once, until one is taken."""
    rule = AverageRatio(1.0, smoothing=0.99)
    found = []
    for accepted in (False, False, False, True, False, False):
        rule.update(0.2, accepted)
        found.append(rule.value)
    assert found == [1.0, 4.0, 16.0, 16.0, 16.0, 64.0]
    other = AverageRatio(1.0)
    other.load_state_dict(rule.state_dict())
    other.update(0.2, False)
    assert other.value == 256.0


def test_the_average_keeps_within_its_bounds() -> None:
    rule = AverageRatio(1.0)
    for _ in range(1000):
        rule.update(math.nan, False)
    assert rule.value == pytest.approx(1e10)
    for _ in range(1000):
        rule.update(1.0, True)
    assert rule.value == pytest.approx(1e-10)


def test_full_steps() -> None:
    def never(s: float) -> float:
        raise AssertionError("no other length is tried")

    rule = FullStep(rise=0.5, outlier=10.0)

    def length(f0: float, slope: float, full: float) -> float:
        found = rule.search(never, f0, slope, full)
        assert found.tries == 1
        assert found.value == (full if found.length else f0)
        return found.length

    assert length(2.0, -1.0, 1.0) == 1.0
    assert length(2.0, -1.0, 3.0) == 1.0  # a rise by half
    assert length(2.0, -1.0, 3.1) == 0.0
    assert length(-2.0, -1.0, -1.1) == 1.0
    for value in (math.nan, math.inf):
        assert length(2.0, -1.0, value) == 0.0
    assert rule.state_dict()["usual"] == pytest.approx(1.0)
    assert length(2.0, -10.1, 1.0) == 0.0  # out of proportion, whatever it does to its own batch
    usual = 0.9 + 0.1 * 10
    assert rule.state_dict()["usual"] == pytest.approx(usual)
    assert length(2.0, -10.1, 1.0) == 1.0
    assert length(2.0, math.nan, 1.0) == 0.0
    rule.load_state_dict({"usual": 0.5})
    assert length(2.0, 6.0, 1.0) == 0.0
    rule.load_state_dict({})
    assert length(2.0, -1e6, 1.0) == 1.0


def test_a_rejected_first_step_is_no_measure_of_others() -> None:
    rule = FullStep()
    assert rule.search(lambda s: 0.0, 1.0, -1e9, 1e9).length == 0.0
    assert rule.state_dict() == {"usual": None}


def test_a_change_of_scale_is_followed() -> None:
    """Steps a thousand times as large for good are believed after a few."""
    rule = FullStep()
    rule.search(lambda s: 0.0, 1.0, -1.0, 0.5)
    lengths = [rule.search(lambda s: 0.0, 1.0, -1000.0, 0.5).length for _ in range(10)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0.0, 1.0)


def test_a_decay_that_rises() -> None:
    """Solves start at that multiple of the last solution, by the number of the step."""
    decay = RisingDecay(0.5, 0.9, 2)
    assert [decay(t) for t in (0, 1, 2, 9)] == pytest.approx([0.5, 1 - math.sqrt(0.05), 0.9, 0.9])
    model = mlp(3, 4, 2, seed=1)
    optimizer = for_minibatches(model.parameters(), decay=decay, damping=0.1)
    x, y = torch.ones(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    for t in range(4):
        before = [s["cg_start"].clone() for s in optimizer.state.values()]
        given = optimizer._given(Closures(closure(model, (x, y))))
        step = Step(given, lambda scaler: None)
        step.objective.begin()
        start = step.systems.cg_start().get("x0")
        if t:
            assert start is not None
            assert torch.allclose(start, decay(t) * flat(before), rtol=1e-12)
        else:
            assert start is None
        optimizer.step(closure(model, (x, y)))
    again = copy.deepcopy(optimizer)
    assert again.cg.decay == decay
    wrong = hfopt.HessianFree(model.parameters(), cg=hfopt.CG(decay=wrong_schedule))
    wrong.step(closure(model, (x, y)))
    with pytest.raises(ValueError, match=r"decay gave 1\.5 after 1 steps"):
        wrong.step(closure(model, (x, y)))


def wrong_schedule(t: int) -> float:
    return 1.5


def test_what_is_refused() -> None:
    for call, message in [
        (lambda: AverageRatio(smoothing=1.0), "smoothing is 1.0"),
        (lambda: AverageRatio(low=0.5, high=0.2), "low <= high"),
        (lambda: FullStep(rise=-0.1), "rise must not be negative"),
        (lambda: RisingDecay(0.9, 0.5), "need 0 <= first <= last < 1"),
        (lambda: hfopt.CG(decay=1.2), r"decay is 1\.2, but must be in \[0, 1\]"),
        (lambda: FullStep(outlier=1.0), "outlier must be above 1"),
        (lambda: for_minibatches(mlp(2, 2).parameters(), iterations=0), "iterations must satisfy"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_its_settings_can_be_replaced() -> None:
    optimizer = for_minibatches(mlp(2, 2).parameters(), 0.5, iterations=7, decay=0.3)
    assert (optimizer.cg.max_iterations, optimizer.cg.decay, optimizer.backtracking) == (7, 0.3, "none")
    assert optimizer.param_groups[0]["lr"] == 0.5
    fixed = hfopt.FixedDamping(1.0)
    other = for_minibatches(mlp(2, 2).parameters(), damping=fixed, curvature="hessian", cg=hfopt.CG(decay=0.0))
    assert (other.damping, other.curvature, other.cg.decay) == (fixed, "hessian", 0.0)
    assert copy.deepcopy(optimizer).line_search == optimizer.line_search


# -- training ---------------------------------------------------------------------------------------------------------


def stream(seed: int, size: int = 100) -> Iterator[Batch]:
    """Noisy values of a smooth function, never the same twice."""
    draws = generator(seed)
    while True:
        x = torch.randn(size, 8, generator=draws, dtype=torch.float64)
        noise = torch.randn(size, 1, generator=draws, dtype=torch.float64)
        yield x, (x[:, :1] * x[:, 1:2]).tanh() + x[:, 2:3].sin() + 0.1 * noise


def closure(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    return lambda: F.mse_loss(model(batch[0]), batch[1])


def error(model: nn.Module) -> float:
    with torch.no_grad():
        return float(closure(model, next(stream(99, 1000)))())


def train(
    model: nn.Module, optimizer: hfopt.HessianFree, batches: Iterator[Batch], steps: int, judged: bool = True
) -> list[float]:
    found = []
    for _ in range(steps):
        evaluation = closure(model, next(batches)) if judged else None
        optimizer.step(closure(model, next(batches)), evaluation=evaluation)
        s = optimizer.stats[-1]
        found += [s.loss, s.new_loss, s.damping, s.new_damping, float(s.cg_iterations)]
    return found


def test_it_learns_from_batches_that_no_step_sees_twice() -> None:
    model = mlp(8, 30, 1, seed=1)
    before = error(model)
    optimizer = for_minibatches(model.parameters())
    train(model, optimizer, stream(1), 25)
    assert error(model) < 0.1 * before
    steps = optimizer.stats[1:]
    assert {s.cg_iterations for s in steps} == {10}
    assert {s.step_length for s in steps} <= {0.0, 1.0}
    factors = [s.new_damping / s.damping for s in steps]
    assert all(any(f == pytest.approx(g) for g in (1.1, 1.0, 1 / 1.1)) for f in factors)


def test_twenty_further_steps_are_the_same_bits() -> None:
    """After a rejected step and in the middle of an average, through torch.save and the safe loader."""
    model = mlp(8, 10, 1, seed=1)
    optimizer = for_minibatches(model.parameters())
    train(model, optimizer, stream(1), 4)
    x, y = next(stream(5))
    optimizer.step(closure(model, (x, 1e9 * y)), evaluation=closure(model, (x, y)))
    train(model, optimizer, stream(2), 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    record = train(model, optimizer, stream(3), 20)
    other = mlp(8, 10, 1, seed=2)
    resumed = for_minibatches(other.parameters())
    train(other, resumed, stream(7), 2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, stream(3), 20) == record
    assert torch.equal(theta(other), theta(model))


def test_the_loss_may_have_any_scale() -> None:
    ends = []
    for scale in (1e-6, 1.0, 1e6):
        model = mlp(8, 10, 1, seed=1)
        optimizer = for_minibatches(model.parameters())
        batches = stream(1)
        for _ in range(8):
            one, two = (closure(model, next(batches)) for _ in range(2))
            optimizer.step(
                lambda f=one, s=scale: s * f(), evaluation=lambda f=two, s=scale: s * f()  # type: ignore[misc]
            )  # fmt: skip
        ends.append(theta(model))
    for end in ends:
        assert float((end - ends[1]).norm() / ends[1].norm()) < 1e-6


BAD: dict[str, Callable[[Tensor, Tensor], Batch]] = {
    "nan": lambda x, y: (x * math.nan, y),
    "infinite": lambda x, y: (x, y * 1e200),
    "targets": lambda x, y: (x, y * 1e3),
    "inputs": lambda x, y: (x * 1e3, y),
    "one case": lambda x, y: (x, torch.where(torch.arange(len(y)).unsqueeze(1) == 0, 1e6, y)),
    "huge": lambda x, y: (x, y * 1e12),
}


@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite before the step")
@pytest.mark.parametrize("mode", ["minibatches", "defaults"])
@pytest.mark.parametrize("bad", BAD)
def test_recovery_from_a_bad_batch(mode: str, bad: str) -> None:
    """Judged on other data, a step for a bad batch is not taken, and lambda is what it was within five steps."""
    make = for_minibatches if mode == "minibatches" else hfopt.HessianFree
    model = mlp(8, 30, 1, seed=1)
    optimizer = make(model.parameters())
    batches = stream(1)
    train(model, optimizer, batches, 12)
    before, damping, wrong = theta(model), optimizer.damping.value, error(model)
    assert damping is not None
    optimizer.step(closure(model, BAD[bad](*next(batches))), evaluation=closure(model, next(batches)))
    assert error(model) < 1.2 * wrong
    if mode == "minibatches":
        assert torch.equal(theta(model), before)
        lambdas = [optimizer.damping.value]
        train(model, optimizer, batches, 5)
        lambdas += [s.new_damping for s in optimizer.stats[-5:]]
        assert all(value is not None and damping / 1.5 <= value <= 1.5 * damping for value in lambdas)
    else:
        train(model, optimizer, batches, 5)
    assert error(model) < 1.2 * wrong


@pytest.mark.filterwarnings("ignore:the loss or its gradient is not finite before the step")
@pytest.mark.parametrize("bad", BAD)
def test_recovery_without_other_data(bad: str) -> None:
    """A batch that judges itself may be fitted, if its step is not out of proportion; a few steps undo that."""
    model = mlp(8, 30, 1, seed=1)
    optimizer = for_minibatches(model.parameters())
    batches = stream(1)
    train(model, optimizer, batches, 12, judged=False)
    damping, wrong = optimizer.damping.value, error(model)
    assert damping is not None
    optimizer.step(closure(model, BAD[bad](*next(batches))))
    train(model, optimizer, batches, 5, judged=False)
    assert error(model) < 1.5 * wrong
    assert optimizer.damping.value is not None
    assert damping / 2 <= optimizer.damping.value <= 2 * damping
