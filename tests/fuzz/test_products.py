"""Products on drawn models and losses against dense matrices obtained by another route, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import hfopt
from hfopt.closure.differentiable import differentiable_attention
from hfopt.curvature.linearisation import POLICIES
from tests.fuzz.criteria import CLOSED
from tests.fuzz.drawn import Drawn, Problem, drawn, searched
from tests.hfopt.tools import DENSE, SUMS, flat, hessian, randn, rounding

# Drawn models are small, but what they divide by may be small as well: a condition of some hundreds.
CLOSE = rounding(1000, 300)

# torch says so of operations that many vectors take one after another and of means of kl_div, and hfopt of slower
# ways than were asked for.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "There is a performance drop",
        "linearisation='checkpoint' needs",
        "products use 'linearize'",
        "reduction. 'mean' divides the total",
    )
]


def derivative(y: Tensor, params: Sequence[Tensor], *, create: bool = False) -> Tensor:
    """Of every number in ``y``, one by one, by all parameters: (numbers, P)."""
    found = []
    for number in y.reshape(-1):
        grads: Sequence[Tensor | None] = [None] * len(params)
        if number.requires_grad:
            grads = torch.autograd.grad(number, params, retain_graph=True, create_graph=create, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        found.append(torch.cat([g.reshape(-1) for g in pieces]))
    rows = torch.stack(found)
    return rows if create else rows.detach()


def dense_hessian(total: Tensor, params: Sequence[Tensor]) -> Tensor:
    """``d2 total / d theta2`` row by row."""
    return derivative(derivative(total, params, create=True)[0], params)


def reference(problem: Problem) -> Tensor:
    """``J' H J`` of the loss, and the Hessian of the penalty."""
    z = problem.loss.outputs(problem.model(problem.x))
    j = derivative(z, problem.params)
    h = hessian(problem.loss.rest, z)
    g = j.T @ h @ j
    return g + dense_hessian(problem.penalty(), problem.params) if problem.drawn.decay else g


def empirical(problem: Problem) -> Tensor:
    """``N sum_n g_n g_n'`` of the gradients of each case's share of the loss."""
    z = problem.loss.outputs(problem.model(problem.x))
    j = derivative(z, problem.params).reshape(*z.shape, -1)
    point = z.detach().requires_grad_()
    (t,) = torch.autograd.grad(problem.loss.rest(point), point)
    cases = torch.einsum("nk,nkp->np", t, j)
    f = len(z) * cases.T @ cases
    return f + dense_hessian(problem.penalty(), problem.params) if problem.drawn.decay else f


def scale(expected: Tensor) -> float:
    """What rounding errors are measured by."""
    return 1e-3 + float(expected.abs().max()) * len(expected) ** 0.5


def compare(op: hfopt.GaussNewton | hfopt.Hessian, problem: Problem, expected: Tensor) -> None:
    """Products with one and with many vectors, symmetry, gradient and loss."""
    v = randn(op.shape[0], 3, seed=problem.drawn.seed)
    unit = scale(expected)
    found = torch.stack([op @ column for column in v.t().contiguous()], 1)
    assert float((found - expected @ v).abs().max()) < 10 * CLOSE * unit
    assert float((op @ v - found).abs().max()) < CLOSE * unit
    quadratic = v.t() @ found
    assert float((quadratic - quadratic.t()).abs().max()) < CLOSE * unit * len(v)
    total = problem.total()
    gradient = derivative(total, problem.params)[0]
    assert float((op.gradient - gradient).abs().max()) < CLOSE * (1 + float(gradient.abs().max()))
    assert abs(float(op.loss) - total.item()) < DENSE * (1 + abs(total.item()))


def supported(build: Callable[[], hfopt.GaussNewton | hfopt.Hessian]) -> hfopt.GaussNewton | hfopt.Hessian | None:
    """The operator, or None where hfopt says in its own words that there is none, now or with the first product."""
    try:
        op = build()
        op @ randn(op.shape[0])
        return op
    except hfopt.HfoptError as error:
        told = str(error)
    assert len(told) > 40
    return None


def not_finite(problem: Problem) -> bool:
    """Nothing to compare, as where all targets are ignored, or batch normalisation has one case alone."""
    try:
        return not bool(problem.total().isfinite())
    except ValueError as error:
        told = str(error)
    assert "more than 1 value" in told
    return True


@searched(10, 30, drawn(), st.sampled_from(POLICIES))
def test_gauss_newton(d: Drawn, policy: str) -> None:
    problem = d.problem()
    assume(not not_finite(problem))
    op = supported(lambda: hfopt.GaussNewton(problem.closure(), problem.params, linearisation=policy))
    if op is not None:
        compare(op, problem, reference(problem))
        if d.criterion in CLOSED and not d.decay:
            v = randn(op.shape[0], seed=d.seed)
            assert float(v @ (op @ v)) >= -CLOSE


@searched(5, 15, drawn())
def test_hessian(d: Drawn) -> None:
    problem = d.problem()
    assume(not not_finite(problem))
    op = supported(lambda: hfopt.Hessian(problem.closure(), problem.params))
    if op is not None:
        with differentiable_attention():
            expected = dense_hessian(problem.total(), problem.params)
        compare(op, problem, expected)


@searched(5, 15, drawn(criteria=CLOSED), st.sampled_from(POLICIES))
def test_empirical_fisher(d: Drawn, policy: str) -> None:
    problem = d.problem()
    # Two shares of one loss count as cases of their own.
    assume(d.form != "twice" and not not_finite(problem))
    op = supported(lambda: hfopt.Fisher(problem.closure(), problem.params, kind="empirical", linearisation=policy))
    if op is not None:
        compare(op, problem, empirical(problem))


@searched(4, 8, drawn(criteria=CLOSED), st.sampled_from(POLICIES))
def test_sampled_fisher(d: Drawn, policy: str) -> None:
    """Symmetric, positive semi-definite, in the range of the Gauss-Newton matrix, and the same for many vectors."""
    problem = d.problem()
    assume(not not_finite(problem))

    def build() -> hfopt.Fisher:
        draws = torch.Generator().manual_seed(d.seed)
        return hfopt.Fisher(problem.closure(), problem.params, linearisation=policy, generator=draws)

    op = supported(build)
    if op is None:
        return
    dense = op.to_dense()
    unit = scale(dense)
    v = randn(op.shape[0], seed=d.seed)
    assert float((dense - dense.T).abs().max()) < CLOSE * unit
    assert float((op @ v - dense @ v).abs().max()) < CLOSE * unit
    if not d.decay:
        assert float(torch.linalg.eigvalsh(dense).min()) >= -CLOSE * unit
        # A vector that changes no output is in the null space of both.
        values, vectors = torch.linalg.eigh(reference(problem))
        null = vectors[:, values < 1e-12 * (1e-6 + float(values.max()))]
        assert float((dense @ null).abs().sum()) < 1e-5 * unit


@searched(5, 12, drawn(), st.integers(1, 5))
def test_lists_and_damping(d: Drawn, columns: int) -> None:
    """Every way of writing a product gives the same numbers."""
    problem = d.problem()
    assume(not not_finite(problem))
    op = supported(lambda: hfopt.GaussNewton(problem.closure(), problem.params))
    if op is None:
        return
    v = randn(op.shape[0], columns, seed=d.seed)
    many = op @ v
    unit = 1e-3 + float(many.abs().max())
    for i in range(columns):
        one = op @ v[:, i].contiguous()
        pieces = op @ op.vector.views(v[:, i].contiguous())
        assert float((one - many[:, i]).abs().max()) < CLOSE * unit
        assert float((flat(pieces) - one).abs().max()) < SUMS * unit
    assert torch.allclose(op.damped(0.3) @ v, many + 0.3 * v, rtol=CLOSE, atol=CLOSE * unit)
