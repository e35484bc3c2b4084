"""Weights under constraints: formulas, the constraint in float32, starts, refusals, and curvature by another route."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close

import hfopt
from models.parametrisations import (
    INITS,
    exponential_of_skew,
    givens,
    orthogonal,
    parts_of,
    schur,
    skew_start,
)
from models.parametrisations.angles import random_rotation, skew_logarithm
from models.parametrisations.exponential import upper_places
from models.parametrisations.schur import above_blocks
from tests.hfopt.tools import dense_gauss_newton, generator, randn, theta

Impose = Callable[[nn.Module, str], nn.Module]
KINDS: dict[str, Impose] = {
    "orthogonal": lambda m, n: orthogonal(m, n, generator=generator(1)),
    "schur": lambda m, n: schur(m, n, generator=generator(1)),
    "tunable": lambda m, n: givens(m, n, capacity=4, generator=generator(1)),
    "fft": lambda m, n: givens(m, n, "fft", generator=generator(1)),
}


def skew(values: Tensor, n: int) -> Tensor:
    A = torch.zeros(n, n, dtype=values.dtype)
    i, j = torch.triu_indices(n, n, 1)
    A[i, j] = values
    return A - A.t()


def expm(A: Tensor) -> Tensor:
    """exp(A) of a skew-symmetric A by its eigenvalues, which is closer to it than torch.matrix_exp."""
    values, V = torch.linalg.eigh(torch.complex(torch.zeros_like(A), -A))
    return (V * torch.exp(1j * values) @ V.conj().t()).real


def linear(n: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n, n, dtype=dtype)


def originals(module: nn.Module) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if "original" in name]


@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize(("scale", "error"), [(0.1, 1e-13), (3.0, 2e-13)])
def test_the_exponential_is_that_of_eigenvalues(n: int, scale: float, error: float) -> None:
    values = scale * randn(n * (n - 1) // 2, seed=n) / math.sqrt(n)
    found = exponential_of_skew(values, n, upper_places(n))
    assert_close(found, expm(skew(values, n)), rtol=0, atol=error)


def test_its_derivative_is_the_frechet_derivative_of_the_exponential() -> None:
    """By its eigenvalues: V ((V* E V) o psi) V*, psi the divided differences of exp (Daleckii & Krein)."""
    n = 6
    values, direction = randn(15, seed=1), randn(15, seed=2)
    _, found = torch.func.jvp(lambda v: exponential_of_skew(v, n, upper_places(n)), (values,), (direction,))
    A, E = skew(values, n), skew(direction, n)
    t, V = torch.linalg.eigh(torch.complex(torch.zeros_like(A), -A))
    e, apart = torch.exp(1j * t), 1j * (t[:, None] - t)
    psi = torch.where(apart == 0, e[:, None], (e[:, None] - e) / torch.where(apart == 0, 1, apart))
    wanted = (V @ (psi * (V.conj().t() @ E.to(V.dtype) @ V)) @ V.conj().t()).real
    assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_autocast_leaves_it_alone() -> None:
    layer = linear(8, torch.float32)
    orthogonal(layer, generator=generator(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W = layer.weight
    assert (W.t() @ W - torch.eye(8)).abs().max() < 1e-5


@pytest.mark.parametrize("n", [4, 7, 20])
def test_angles_of_the_starts(n: int) -> None:
    for init, low in (("henaff", -math.pi), ("cayley", -math.tan(math.pi / 4))):
        A = skew(skew_start(n, init, generator(3)), n)
        s = A.diagonal(1)[::2]
        assert ((low < s) & (s < 0)).all()
        assert torch.count_nonzero(A) == 2 * (n // 2)
        angles = torch.angle(torch.linalg.eigvals(expm(A)))
        expected = torch.cat((s, -s, s.new_zeros(n % 2)))
        assert_close(angles.sort().values, expected.sort().values, rtol=0, atol=1e-12)
    values = skew_start(n, "random", generator(3))
    assert_close(expm(skew(values, n)), random_rotation(n, generator(3)), rtol=0, atol=1e-12)


def test_the_logarithm_undoes_the_exponential() -> None:
    A = skew(0.5 * randn(28, seed=4), 8)
    A *= 3 / torch.linalg.matrix_norm(A, 2)
    assert_close(skew_logarithm(expm(A)), A, rtol=0, atol=1e-12)
    for Q in (torch.diag(torch.tensor([1.0, 1.0, -1.0])), 2 * torch.eye(3)):
        with pytest.raises(ValueError, match="no rotation"):
            skew_logarithm(Q)


@pytest.mark.parametrize("init", INITS)
def test_an_orthogonal_weight_is_the_exponential_of_its_start(init: str) -> None:
    layer = linear(6)
    orthogonal(layer, "weight", init, generator(5))
    assert_close(layer.weight, expm(skew(skew_start(6, init, generator(5)), 6)), rtol=0, atol=1e-13)
    Q = random_rotation(6, generator(6))
    layer.weight = Q
    assert_close(layer.weight, Q, rtol=0, atol=1e-12)


def test_a_schur_form_by_its_formula() -> None:
    layer = linear(6)
    schur(layer, "weight", "cayley", generator(5))
    A, angles, deviation, T = (p.detach() for p in originals(layer))
    assert (deviation == 0).all()
    assert (T == 0).all()
    W = layer.weight
    assert_close(W.t() @ W, torch.eye(6, dtype=W.dtype), rtol=0, atol=1e-13)
    with torch.no_grad():
        for p in originals(layer)[1:]:
            p.copy_(randn(len(p), seed=len(p)))
    _, angles, deviation, T = (p.detach() for p in originals(layer))
    S = torch.zeros(6, 6, dtype=torch.float64)
    upper = [(i, j) for i in range(6) for j in range(6) if i // 2 < j // 2]
    for (i, j), t in zip(upper, T, strict=True):
        S[i, j] = t
    for k in range(3):
        c, s = torch.cos(angles[k]), torch.sin(angles[k])
        S[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = (1 + deviation[k]) * torch.tensor([[c, -s], [s, c]])
    P = expm(skew(A, 6))
    assert_close(layer.weight, P @ S @ P.t(), rtol=1e-12, atol=1e-12)
    # Whatever T is, the moduli of the eigenvalues are the gammas.
    moduli = torch.linalg.eigvals(layer.weight).abs().sort().values
    assert_close(moduli, (1 + deviation).abs().repeat(2).sort().values, rtol=1e-9, atol=1e-9)
    assert len(above_blocks(6)) == 12


@pytest.mark.parametrize(("style", "n", "capacity"), [("tunable", 6, 4), ("tunable", 2, 2), ("fft", 8, 2)])
def test_rotations_by_their_formula(style: str, n: int, capacity: int) -> None:
    layer = linear(n)
    givens(layer, "weight", style, capacity, generator(5))
    angles = iter(originals(layer)[0].tolist())
    if style == "fft":
        pairs = [[(i, i + 2**l) for i in range(n) if not i >> l & 1] for l in range(3)]
    else:
        pairs = [[(i, i + 1) for i in range(l % 2, n - 1, 2)] for l in range(capacity)]
    W = torch.eye(n, dtype=torch.float64)
    for layer_pairs in pairs:
        for i, j in layer_pairs:
            t = next(angles)
            R = torch.eye(n, dtype=torch.float64)
            R[i, i] = R[j, j] = math.cos(t)
            R[i, j], R[j, i] = -math.sin(t), math.sin(t)
            W = W @ R
    assert next(angles, None) is None
    assert_close(layer.weight, W, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_orthogonal_over_many_updates(kind: str) -> None:
    layer = linear(16, torch.float32)
    KINDS[kind](layer, "weight")
    x, y = randn(40, 16, seed=1).float(), randn(40, 16, seed=2).float()
    free = parts_of(layer)
    trained = [*free["orthogonal"], *free["angle"]]  # T and gamma leave the group by design
    optimizer = torch.optim.RMSprop(trained, lr=1e-3)
    before = layer.weight.detach()
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
    W = layer.weight.detach()
    assert (W - before).abs().max() > 0.1
    assert (W.t() @ W - torch.eye(16)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "linearisation", ["double-backward", "recompute", pytest.param("linearize", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_products_of_torchs_rnn(kind: str, linearisation: str) -> None:
    """The Jacobian by torch.func.jacrev, through the parametrisation and a loop over time."""
    torch.manual_seed(2)
    rnn = nn.RNN(3, 4, dtype=torch.float64)
    KINDS[kind](rnn, "weight_hh_l0")
    with torch.no_grad():
        for p in originals(rnn):
            p.add_(0.3 * randn(len(p), seed=7))
    x, y = randn(5, 3, 3, seed=1), randn(5, 3, 4, seed=2)

    def outputs(m: nn.Module) -> Tensor:
        h, found = torch.zeros(3, 4, dtype=torch.float64), []
        for x_t in x:
            W: Tensor = m.weight_hh_l0  # type: ignore[assignment]
            h = torch.tanh(x_t @ m.weight_ih_l0.t() + m.bias_ih_l0 + h @ W.t() + m.bias_hh_l0)  # type: ignore[operator]
            found.append(h)
        return torch.stack(found)

    optimizer = hfopt.HessianFree(rnn.parameters(), linearisation=linearisation)
    assert_close(rnn(x)[0], outputs(rnn), rtol=0, atol=1e-13)
    G = dense_gauss_newton(rnn, outputs, lambda z: F.mse_loss(z, y))
    op = hfopt.GaussNewton(lambda: F.mse_loss(rnn(x)[0], y), rnn.parameters(), linearisation=linearisation)
    assert_close(op.to_dense(), G, rtol=1e-9, atol=1e-11)
    before = theta(rnn)
    optimizer.step(lambda: F.mse_loss(rnn(x)[0], y))
    assert not torch.equal(theta(rnn), before)


def test_the_gamma_penalty_is_a_weight_decay_of_the_deviation() -> None:
    layer = linear(4)
    schur(layer, generator=generator(1))
    (deviation,) = parts_of(layer)["gamma"]
    with torch.no_grad():
        deviation.copy_(torch.tensor([0.2, -0.1]))
    gamma = torch.linalg.eigvals(layer.weight).abs().sort().values[::2]
    assert_close(gamma, torch.tensor([0.9, 1.2], dtype=torch.float64))


def test_kinds_of_parameters() -> None:
    net = nn.Sequential(linear(4), linear(4), linear(4), linear(4))
    orthogonal(net[0])
    schur(net[1])
    givens(net[2])
    nn.utils.parametrizations.orthogonal(net[3])
    parts = parts_of(net)
    assert {kind: [p.numel() for p in found] for kind, found in parts.items()} == {
        "orthogonal": [6, 6, 16],
        "triangular": [4],
        "gamma": [2],
        "angle": [2, 3],
        "rest": [4, 4, 4, 4],
    }
    assert sum(map(len, parts.values())) == len(list(net.parameters()))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="n is 6; rotations in the style of the FFT need a power of 2"):
        givens(linear(6), style="fft")
    with pytest.raises(ValueError, match=r"n is 5; .* even number of units"):
        givens(linear(5))
    with pytest.raises(ValueError, match="capacity is 3"):
        givens(linear(4), capacity=3)
    with pytest.raises(ValueError, match="style is 'x'"):
        givens(linear(4), style="x")
    with pytest.raises(ValueError, match=r"weight has 5 rows; .* even"):
        schur(linear(5))
    with pytest.raises(ValueError, match="init is 'xavier'"):
        orthogonal(linear(4), init="xavier")
    with pytest.raises(ValueError, match=r"of shape \(2, 3\)"):
        orthogonal(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="weight_hh of Linear is missing"):
        orthogonal(nn.Linear(3, 3), "weight_hh")
    layer = orthogonal(linear(4))
    with pytest.raises(ValueError, match="has a parametrisation already"):
        schur(layer)
    layer = schur(linear(4))
    with pytest.raises(ValueError, match="a weight that is a Schur cannot be assigned"):
        layer.weight = torch.eye(4, dtype=torch.float64)


def test_states_are_saved_and_loaded() -> None:
    for kind, impose in KINDS.items():
        first, second = linear(8), linear(8)
        impose(first, "weight")
        impose(second, "weight")
        with torch.no_grad():
            for p in originals(first):
                p.add_(0.1)
        assert not torch.equal(first.weight, second.weight), kind
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.weight, second.weight), kind
        assert not any("places" in key or "partner" in key for key in first.state_dict())
    assert parametrize.is_parametrized(first)
