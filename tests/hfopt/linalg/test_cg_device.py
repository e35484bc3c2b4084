"""CG that never waits for its device: the same solves as on the host, without a number read between checks."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.linalg.cg import CG
from hfopt.linalg.cg_device import DeviceCG
from hfopt.linalg.cg_host import HostCG
from hfopt.linalg.solution import Solution
from hfopt.linalg.vector import norm
from hfopt.preconditioners import EmpiricalFisherDiagonal
from hfopt.recurrences import simple_rnn
from tests.hfopt.linalg.test_cg import Breaks, Matrix, diagonal
from tests.hfopt.tape import NoReads, Reading, Recorder
from tests.hfopt.tools import mlp, randn, spd

Preconditioner = Callable[[Tensor], Tensor]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def rounds_alike() -> bool:
    """Whether this machine's ``add`` with a factor and ``addcmul`` round alike, fused or not."""
    x, d, a = randn(1001, seed=1), randn(1001, seed=2), randn(seed=3)
    pairs = [(t.to(x.dtype), u.to(x.dtype)) for t, u in ((x, d), (x.float(), d.float()))]
    return all(torch.equal(t.add(u, alpha=float(a)), t.addcmul(u, a.to(t.dtype))) for t, u in pairs)


ALIKE = rounds_alike()


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, or nearly where the two loops' operations cannot round alike."""
    if isinstance(a, Tensor):
        return torch.equal(a, b) if ALIKE else torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    return bool(a == b if ALIKE else a == pytest.approx(b, rel=1e-4))


def host(cg: CG, op: Any, b: Tensor, x0: Tensor | None = None, m: Preconditioner | None = None) -> Solution:
    return HostCG(cg, op, b, x0, m).iterate(norm(b), None)


def device(
    cg: CG,
    op: Any,
    b: Tensor,
    x0: Tensor | None = None,
    m: Preconditioner | None = None,
    recorder: Recorder | None = None,
    augment: Tensor | None = None,
) -> Solution:
    run = DeviceCG(cg, op, b, x0, m, recorder, augment=augment)
    if recorder is not None:
        recorder.run = run
    return run.iterate(norm(b), None)


def assert_same(ours: Solution, expected: Solution) -> None:
    assert (ours.reason, ours.iterations) == (expected.reason, expected.iterations)
    assert same(ours.x, expected.x)
    assert [i.iteration for i in ours.iterates] == [i.iteration for i in expected.iterates]
    for mine, other in zip(ours.iterates, expected.iterates, strict=True):
        assert same(mine.x, other.x)
        assert same(mine.phi, other.phi)
    assert [c.iteration for c in ours.checks] == [c.iteration for c in expected.checks]
    for row, other_row in zip(ours.checks, expected.checks, strict=True):
        assert same([row.model, row.residual, row.norm], [other_row.model, other_row.residual, other_row.norm])


def system(dtype: torch.dtype, n: int = 200) -> tuple[Tensor, Tensor]:
    a = spd(torch.logspace(0, -4, n, dtype=torch.float64), seed=16)
    b = a @ randn(n, seed=17) + 0.1 * randn(n, seed=18)
    return a.to(dtype), b.to(dtype)


@DTYPES
@pytest.mark.parametrize("tolerance", [5e-3, 5e-5, 0.0, None])
@pytest.mark.parametrize("check_every", [1, 4, 10, 1000])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_every_solve_ends_where_it_does_on_the_host(
    dtype: torch.dtype, tolerance: float | None, check_every: int, preconditioned: bool
) -> None:
    """Progress, or the limit: the same iteration and the same iterates, whenever the host happens to look."""
    a, b = system(dtype)
    cg = CG(tolerance=tolerance, check_every=check_every, max_iterations=103)
    m, x0 = (diagonal(a), randn(200, seed=3).to(dtype)) if preconditioned else (None, None)
    expected, ours = host(cg, Matrix(a), b, x0, m), device(cg, Matrix(a), b, x0, m)
    assert_same(ours, expected)
    # Products after the end go on up to the next check, and no further.
    last = min(-(-expected.iterations // check_every) * check_every, 103)
    assert ours.products == expected.products + last - expected.iterations


@DTYPES
@pytest.mark.parametrize("decades", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("check_every", [1, 7, 1000])
def test_exact_systems_end_where_they_do_on_the_host(dtype: torch.dtype, decades: float, check_every: int) -> None:
    """Progress waits for the residual in the same iterations."""
    a = spd(torch.logspace(0, -decades, 200, dtype=torch.float64), seed=16).to(dtype)
    b = randn(200, seed=17).to(dtype)
    cg = CG(check_every=check_every, max_iterations=120)
    expected = HostCG(cg, Matrix(a), b, None, None, exact=True).iterate(norm(b), None)
    assert_same(DeviceCG(cg, Matrix(a), b, None, None, exact=True).iterate(norm(b), None), expected)
    assert (expected.iterations > host(cg, Matrix(a), b).iterations) is (decades < 4.0)


@DTYPES
@pytest.mark.parametrize("repair_every", [1, 3, 7])
def test_residuals_from_scratch(dtype: torch.dtype, repair_every: int) -> None:
    a, b = system(dtype)
    cg = CG(tolerance=5e-5, max_iterations=64, repair_every=repair_every)
    assert_same(device(cg, Matrix(a), b), host(cg, Matrix(a), b))


@DTYPES
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("residual", [1e-1, 1e-3, 3e-5])
def test_small_residuals(dtype: torch.dtype, preconditioned: bool, residual: float) -> None:
    a, b = system(dtype)
    m = diagonal(a) if preconditioned else None
    cg = CG(tolerance=0.0, residual=residual, max_iterations=500)
    expected = host(cg, Matrix(a), b, None, m)
    assert expected.reason == "residual"
    assert_same(device(cg, Matrix(a), b, None, m), expected)


@DTYPES
@pytest.mark.parametrize(
    "eigenvalues", [[10.0, 5.0, 2.0, 1.0, -0.01], [-1.0, -2.0, -3.0], [0.0, 0.0], [1.0, 1.0, 1.0], [3.0]]
)
@pytest.mark.parametrize("start", [False, True])
def test_indefinite_and_singular_systems(dtype: torch.dtype, eigenvalues: list[float], start: bool) -> None:
    a, b = spd(eigenvalues, seed=27).to(dtype), randn(len(eigenvalues), seed=28).to(dtype)
    x0 = randn(len(eigenvalues), seed=29).to(dtype) if start else None
    cg = CG(tolerance=0.0, residual=1e-14, max_iterations=30)
    assert_same(device(cg, Matrix(a), b, x0), host(cg, Matrix(a), b, x0))


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 2, 8, 21])
@pytest.mark.parametrize("warm", [False, True])
def test_products_that_are_not_finite(dtype: torch.dtype, value: float, n: int, warm: bool) -> None:
    """What comes after the first of them, up to the check that sees it, has touched nothing."""
    a, b = system(dtype)
    cg, x0 = CG(tolerance=0.0, residual=0.0), b if warm else None
    ours = device(cg, Breaks(a, n, value), b, x0)
    assert_same(ours, host(cg, Breaks(a, n, value), b, x0))
    assert torch.isfinite(ours.x).all()


def test_preconditioners_that_are_not_finite() -> None:
    a, b = system(torch.float64)
    for breaks_at in (1, 5):
        solutions = []
        for solve in (host, device):
            calls = []

            def m(r: Tensor, calls: list[int] = calls, breaks_at: int = breaks_at) -> Tensor:
                calls.append(1)
                return r * (math.nan if len(calls) >= breaks_at else 1.0)

            solutions.append(solve(CG(), Matrix(a), b, None, m))
        assert solutions[0].reason == "not finite"
        assert_same(solutions[1], solutions[0])


def test_zero_right_hand_side_and_a_start_at_the_solution() -> None:
    a, b = system(torch.float64, 20)
    x = torch.linalg.solve(a, b)
    cg = CG(residual=1e-8)
    for rhs, x0 in ((torch.zeros_like(b), None), (b, x)):
        expected = host(cg, Matrix(a), rhs, x0)
        assert (expected.reason, expected.iterations) == ("residual", 0)
        assert_same(device(cg, Matrix(a), rhs, x0), expected)


def test_stopped_by_the_caller() -> None:
    a, b = system(torch.float64)
    seen: list[tuple[int, float]] = []

    def stop(i: int, x: Tensor, value: float) -> bool:
        seen.append((i, float(0.5 * x @ a @ x - b @ x) - value))
        return i >= 30

    ours = DeviceCG(CG(tolerance=0.0), Matrix(a), b, None, None).iterate(norm(b), stop)
    assert (ours.reason, ours.iterations) == ("stopped", 30)
    assert [i for i, _ in seen] == [10, 20, 30]
    assert all(abs(error) < 1e-9 for _, error in seen)
    assert same(ours.x, host(CG(tolerance=0.0, max_iterations=30), Matrix(a), b).x)


def test_an_operator_with_a_memory_of_its_own() -> None:
    """One that answers in another tensor than the one it is given."""

    class Own(Matrix):
        def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
            return super().multiply(v)

    a, b = system(torch.float64)
    assert_same(device(CG(), Own(a), b), host(CG(), Matrix(a), b))


class Silent(DeviceCG):
    """Raises where anything is read between checks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reads = 0

    def advance(self, i: int) -> None:
        with NoReads():
            super().advance(i)

    def settle(self, i: int) -> None:
        with NoReads():
            super().settle(i)

    def read(self, start: int, stop: int) -> list[list[float]]:
        self.reads += 1
        return super().read(start, stop)


@pytest.mark.parametrize("check_every", [3, 10])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_nothing_is_read_between_checks(check_every: int, preconditioned: bool) -> None:
    x, y = randn(30, 6, seed=1), randn(30, 4, seed=2)
    model = mlp(6, 8, 4, seed=3)
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y) + 1e-3 * model[0].weight.square().sum(), model.parameters())
    m = EmpiricalFisherDiagonal() if preconditioned else None
    if m is not None:
        m.refresh(op, 0)
        m.damp(0.1, 0.0)
    cg = CG(tolerance=0.0, residual=0.0, max_iterations=40, check_every=check_every, repair_every=11)
    run = Silent(cg, op.damped(0.1), -op.gradient, None, m)
    solution = run.iterate(norm(op.gradient), None)
    assert_same(solution, host(cg, op.damped(0.1), -op.gradient, None, m))
    assert run.reads <= 2 + math.ceil(40 / check_every) + 1  # the first iteration, the checks, and the end


def test_a_read_between_checks_would_be_noticed() -> None:
    class Reads(Matrix):
        def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
            return super().multiply(v, out) if self.products < 5 or v[0].item() < 1e9 else v

    a, b = system(torch.float64)
    with pytest.raises(Reading, match="scalar"):
        Silent(CG(), Reads(a), b, None, None).iterate(norm(b), None)


def problems() -> dict[str, Callable[[], Any]]:
    """Curvature operators, each built again."""
    x, y = randn(12, 5, seed=4), randn(12, 3, seed=5)
    labels = torch.arange(12) % 3

    def network(loss: Callable[[Tensor], Tensor], **options: Any) -> Any:
        model = mlp(5, 7, 3, seed=6)
        return hfopt.GaussNewton(lambda: loss(model(x)), model.parameters(), **options)

    def hessian() -> Any:
        model = mlp(5, 7, 3, seed=6)
        return hfopt.Hessian(lambda: F.mse_loss(model(x), y), model.parameters())

    def recurrent() -> Any:
        projected, w, h0 = randn(6, 4, 5, seed=7), nn.Parameter(0.3 * randn(5, 5, seed=8)), randn(4, 5, seed=9)
        target = randn(6, 4, 5, seed=10)
        return hfopt.GaussNewton(lambda: F.mse_loss(simple_rnn(projected, w, h0), target), [w], structural=True)

    return {
        "squared error": lambda: network(lambda z: F.mse_loss(z, y)),
        "cross-entropy": lambda: network(lambda z: F.cross_entropy(z, labels)),
        "by autograd": lambda: network(lambda z: F.soft_margin_loss(z, y.sign())),
        "Hessian": hessian,
        "recurrent": recurrent,
    }


@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_recorded_iteration_repeats_the_whole_of_one(name: str, preconditioned: bool) -> None:
    """Product, damping, preconditioner and updates, from the tensors and operations of one iteration alone."""
    op = problems()[name]()
    m = diagonal(torch.eye(op.shape[0]).double() * 2) if preconditioned else None
    cg = CG(tolerance=1e-7, max_iterations=60, check_every=7, repair_every=13)
    damping = 5.0 if name == "Hessian" else 0.05  # so that it is positive definite
    damped, start = op.damped(damping, 0.5 if op.has_structural else 0.0, 1e-3), 0.1 * randn(op.shape[0], seed=11)
    expected = host(cg, damped, -op.gradient, start, m)
    before = op.products, damped.products
    recorder = Recorder()
    ours = device(cg, damped, -op.gradient, start, m, recorder)
    assert_same(ours, expected)
    assert recorder.proven
    assert recorder.refused is None
    assert recorder.watched == 1
    assert recorder.repeated >= ours.iterations - 2 >= 5
    assert (op.products - before[0], damped.products - before[1]) == (ours.products, ours.products)


@DTYPES
@pytest.mark.parametrize("directions", [1, 8, 40, 500])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_directions_are_those_of_the_host(dtype: torch.dtype, directions: int, warm: bool, recorded: bool) -> None:
    """Recorded or not, and whatever iterations after the end have written."""
    a, b = system(dtype)
    start = randn(200, seed=3).to(dtype) if warm else None
    cg = CG(max_iterations=103, check_every=9, repair_every=0 if dtype == torch.float64 else 20)
    expected = HostCG(cg, Matrix(a), b, start, None, directions).iterate(norm(b), None)
    recorder = Recorder() if recorded else None
    run = DeviceCG(cg, Matrix(a), b, start, None, recorder, directions)
    if recorder is not None:
        recorder.run = run
    ours = run.iterate(norm(b), None)
    assert_same(ours, expected)
    assert ours.pairs is not None
    assert expected.pairs is not None
    assert len(ours.pairs[0]) == warm + min(directions + 1, ours.iterations)
    for mine, other in zip(ours.pairs, expected.pairs, strict=True):
        assert mine.shape == other.shape
        assert same(mine, other)


def test_negative_curvature_at_once_leaves_its_direction() -> None:
    a, b = spd([-1.0, -2.0, -3.0], seed=5), randn(3, seed=6)
    expected = HostCG(CG(), Matrix(a), b, None, None, 4).iterate(norm(b), None)
    ours = DeviceCG(CG(), Matrix(a), b, None, None, None, 4).iterate(norm(b), None)
    assert ours.pairs is not None
    assert expected.pairs is not None
    assert same(ours.pairs[0], expected.pairs[0])
    assert torch.equal(expected.pairs[0], b.unsqueeze(0))


def test_a_proven_recording_is_not_compared_again() -> None:
    a, b = system(torch.float64)
    recorder = Recorder(proven=True)
    cg = CG(tolerance=0.0, max_iterations=30)
    op = Matrix(a)
    assert_same(device(cg, op, b, None, None, recorder), host(cg, Matrix(a), b))
    assert recorder.repeated == 28  # all but the first two
    assert op.products == 30


def test_an_iteration_allocates_no_vector() -> None:
    a, b = system(torch.float32)
    recorder = Recorder(proven=True)
    device(CG(tolerance=0.0, max_iterations=20), Matrix(a), b, None, None, recorder)
    assert recorder.tape is not None
    assert recorder.tape.fresh(200) == []


def test_a_recording_that_does_something_else_is_refused() -> None:
    """A product that depends on more than its argument cannot be recorded; it is noticed, and the solve is right."""

    class Counting(Matrix):
        def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
            if torch._C._len_torch_dispatch_stack():  # as something would that runs on no recorded stream
                return torch.mul(v, 3.0, out=out)
            return super().multiply(v, out)

    a, b = system(torch.float64)
    recorder = Recorder()
    assert_same(device(CG(), Counting(a), b, None, None, recorder), host(CG(), Matrix(a), b))
    assert recorder.refused is not None
    assert "other state" in recorder.refused
    assert not recorder.proven
    assert recorder.repeated == 1


def test_a_solve_leaves_no_cycle_behind() -> None:
    """What it took, and the operator with its graph, goes with the last reference."""
    op = problems()["squared error"]()
    run = DeviceCG(CG(max_iterations=12), op.damped(0.1), -op.gradient, None, None)
    run.iterate(norm(op.gradient), None)
    alive = [weakref.ref(op), weakref.ref(run)]
    gc.disable()
    try:
        del op, run
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_going_on_without_a_recording() -> None:
    class Fails(Recorder):
        def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
            return None

    a, b = system(torch.float64)
    recorder = Fails()
    assert_same(device(CG(), Matrix(a), b, None, None, recorder), host(CG(), Matrix(a), b))
    assert (recorder.watched, recorder.repeated) == (1, 0)


@pytest.mark.parametrize("preconditioner", [None, "empirical-fisher"])
def test_whole_steps(preconditioner: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer whose solves are recorded takes the same steps; lambda is found at the first one."""
    recorders: list[Recorder] = []

    def recorded(*args: Any, **named: Any) -> DeviceCG:
        recorders.append(Recorder(proven=bool(recorders)))
        recorders[-1].run = DeviceCG(*args, recorders[-1], **named)
        return recorders[-1].run

    steps = []
    for run in (HostCG, recorded):
        monkeypatch.setattr(hfopt.linalg.cg, "HostCG", run)
        v, w, h0 = randn(6, 8, 5, seed=7), nn.Parameter(0.3 * randn(5, 5, seed=8)), nn.Parameter(randn(5, seed=9))
        readout, target = nn.Parameter(randn(5, 2, seed=10)), randn(6, 8, 2, seed=11)
        options: dict[str, Any] = {"structural": 0.3, "preconditioner": preconditioner, "batch_dim": 1, "solver": "cg"}
        optimizer = hfopt.HessianFree([w, h0, readout], weight_decay=1e-3, **options)
        for _ in range(4):
            optimizer.step(
                lambda v=v, w=w, h0=h0, out=readout, target=target: F.mse_loss(simple_rnn(v, w, h0) @ out, target)
            )
        steps.append(optimizer.stats)
    assert sum(r.repeated for r in recorders) > 20
    for ours, expected in zip(steps[1], steps[0], strict=True):
        assert (ours.cg_reason, ours.cg_iterations) == (expected.cg_reason, expected.cg_iterations)
        assert same([ours.new_loss, ours.rho, ours.damping], [expected.new_loss, expected.rho, expected.damping])
        assert ours.products >= expected.products


@DTYPES
@pytest.mark.parametrize("seed", range(4))
def test_a_system_without_a_solution_ends_where_the_host_ends(seed: int, dtype: torch.dtype) -> None:
    eigenvalues = torch.cat([torch.logspace(0, -2, 20, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)])
    a, b = spd(eigenvalues, seed=seed).to(dtype), randn(30, seed=50 + seed).to(dtype)
    cg = CG(tolerance=0.0)
    ours, theirs = device(cg, Matrix(a), b), host(cg, Matrix(a), b)
    # In the null space, rounding alone gives a direction its curvature and the sign of that.
    assert {ours.reason, theirs.reason} <= {"singular", "negative curvature"}
    assert abs(ours.iterations - theirs.iterations) <= 1
    if (ours.reason, ours.iterations) == (theirs.reason, theirs.iterations):
        assert same(ours.x, theirs.x)
    flat = torch.finfo(dtype).eps ** (2 / 3) * 1e-2
    assert norm(ours.x) < norm(b) * 30 / flat
