"""Networks of long memory: the formulas, published starts and sizes, curvature by another route, and training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import hfopt
import models
from models.long_memory import NETS, NONLINEARITIES, cell_of
from models.parametrisations import SkewExponential, parts_of, skew_start
from tests.hfopt.tools import dense_gauss_newton, generator, randn, theta

PHI = {
    "tanh": torch.tanh,
    "relu": lambda a: a.clamp(min=0),
    "sigmoid": torch.sigmoid,
    "none": lambda a: a,
}


def build(net: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return models.long_memory(net, 3, 4, 2, **{"dtype": torch.float64, "seed": 1, **options})


def outputs(network: Any, x: Tensor) -> Tensor:
    """By a loop over time with the formulas."""
    h, c, found = torch.zeros(x.shape[1], 4, dtype=x.dtype), torch.zeros(x.shape[1], 4, dtype=x.dtype), []
    W = network.W_hh
    bias = 0 if network.b_h is None else network.b_h
    for x_t in x:
        a = x_t @ network.W_vh + h @ W + bias
        if network.cell.name == "lstm":
            gates = dict(zip([g.name for g in network.cell.input_columns], a.split(4, 1), strict=True))
            i, f, o, g = (gates[n] for n in "ifog")
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif network.cell.name == "modrelu":
            h = a.sign() * (a.abs() + network.b).clamp(min=0)
        else:
            h = PHI[network.cell.name.replace("identity", "none")](a)
        found.append(h)
    return torch.stack(found) @ network.W_ho + network.b_o


@pytest.mark.parametrize("net", NETS)
def test_outputs_and_curvature_are_those_of_the_formulas(net: str) -> None:
    network = build(net)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(3), dtype=p.dtype))
    x, y = randn(5, 3, 3, seed=1), torch.randint(0, 2, (15,), generator=generator(2))
    assert_close(network(x), outputs(network, x), rtol=1e-11, atol=1e-12)
    G = dense_gauss_newton(network, lambda m: outputs(m, x).flatten(0, 1), lambda z: F.cross_entropy(z, y))
    op = hfopt.GaussNewton(lambda: F.cross_entropy(network(x).flatten(0, 1), y), network.parameters())
    assert_close(op.to_dense(), G, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("net", NETS)
def test_hessian_free_trains_it(net: str) -> None:
    network = build(net)
    x, y = randn(5, 20, 3, seed=1), torch.randint(0, 2, (100,), generator=generator(2))
    optimizer = hfopt.HessianFree(network.parameters(), structural_damping=0.03)
    start = theta(network)
    losses = [float(optimizer.step(lambda: F.cross_entropy(network(x).flatten(0, 1), y))) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.02
    assert not torch.equal(theta(network), start)
    if net in ("expRNN", "EURNN"):
        W = network.W_hh
        assert_close(W @ W.t(), torch.eye(4, dtype=W.dtype), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a batch of products through Householder vectors
@pytest.mark.parametrize("kind", ["cayley", "householder"])
def test_torchs_own_orthogonal_weights_serve_as_well(kind: str) -> None:
    network = build("RNN-orth", nonlinearity="tanh")
    nn.utils.parametrizations.orthogonal(network, "W_hh", orthogonal_map=kind)
    x, y = randn(5, 20, 3, seed=1), torch.randint(0, 2, (100,), generator=generator(2))
    optimizer = hfopt.HessianFree(network.parameters())
    losses = [float(optimizer.step(lambda: F.cross_entropy(network(x).flatten(0, 1), y))) for _ in range(3)]
    assert losses[-1] < losses[0]
    W = network.W_hh
    assert_close(W @ W.t(), torch.eye(4, dtype=W.dtype), rtol=0, atol=1e-12)


def test_the_matrix_is_formed_once_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("expRNN")
    calls: list[int] = []
    own = SkewExponential.forward
    monkeypatch.setattr(SkewExponential, "forward", lambda self, *free: (calls.append(1), own(self, *free))[1])
    network(randn(50, 3, 3)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("net", ["expRNN", "nnRNN"])
def test_gradients_in_segments_are_the_same(net: str) -> None:
    """Under activation checkpointing the weight that is formed is an argument of every segment."""
    x = randn(40, 3, 3, seed=1)
    found = []
    for segmented in (False, True):
        network = build(net)
        loss = checkpoint(network, x, use_reentrant=False) if segmented else network(x)
        loss.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


# -- the defects of the program that was released with the paper, each of which fails here -------------------------


@pytest.mark.parametrize("init", ["henaff", "cayley", "random"])
@pytest.mark.parametrize("net", ["RNN", "RNN-orth", "expRNN", "nnRNN"])
def test_the_start_that_is_asked_for_is_the_one_that_is_taken(net: str, init: str) -> None:
    """There, nnRNN and RNN start from whatever the memory held, and `--rinit` has no effect."""
    network = models.long_memory(net, 3, 20, 2, rinit=init, seed=1, dtype=torch.float64)
    with torch.no_grad():
        if net == "nnRNN":
            (free,) = parts_of(network)["orthogonal"]
            A = torch.zeros(20, 20, dtype=free.dtype)
            i, j = torch.triu_indices(20, 20, 1)
            A[i, j] = free
            W = torch.matrix_exp(A - A.t())
        else:
            W = network.W_hh
    angles = torch.angle(torch.linalg.eigvals(W)).abs()
    assert_close(W @ W.t(), torch.eye(20, dtype=W.dtype), rtol=0, atol=1e-9)
    if init == "cayley":
        assert angles.max() < 1
    else:
        assert angles.max() > 2  # 20 angles uniform in (0, pi), or those of a random rotation
    dense = torch.count_nonzero(W.abs() > 1e-9)
    assert dense == (400 if init == "random" else 40)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("net", ["RNN", "expRNN", "nnRNN", "EURNN"])
def test_every_nonlinearity_is_applied(net: str, nonlinearity: str) -> None:
    """There, "relu" is no nonlinearity at all, and expRNN ignores the choice."""
    network = build(net, nonlinearity=nonlinearity)
    x = (200 if net == "EURNN" else 3) * randn(6, 5, 3, seed=1)  # U of EURNN starts very small
    assert_close(network(x), outputs(network, x), rtol=1e-11, atol=1e-12)
    hidden = network.hidden_states(x)
    assert ((hidden == 0).any() and (hidden >= 0).all()) == (nonlinearity == "relu")
    assert (hidden.abs() <= 1).all() == (nonlinearity in ("tanh", "sigmoid"))


@torch.no_grad()
def test_starts_of_the_other_weights() -> None:
    network = models.long_memory("nnRNN", 50, 400, 60, seed=1)
    assert network.W_vh.std() == pytest.approx(math.sqrt(2 / 450), rel=0.03)
    assert network.W_ho.std() == pytest.approx(math.sqrt(2 / 460), rel=0.03)
    assert network.b_h is None
    assert 0.009 < network.b.abs().max() <= 0.01
    assert torch.equal(network.h_init, torch.zeros(400))
    assert "h_init" not in dict(network.named_parameters())
    network = models.long_memory("EURNN", 50, 400, 60, seed=1)
    assert 0.009 < network.W_vh.abs().max() <= 0.01
    assert (network.b == 0.01).all()
    network = models.long_memory("expRNN", 50, 400, 60, iinit="kaiming", seed=1)
    assert math.sqrt(6 / 50) * 0.99 < network.W_vh.abs().max() <= math.sqrt(6 / 50)
    network = models.long_memory("LSTM", 50, 400, 60, seed=1)
    assert network.W_hh.std() == pytest.approx(math.sqrt(2 / 850), rel=0.03)
    assert network.b_h.abs().max() <= 1 / math.sqrt(450)
    network = models.constrain(models.LanguageModel(cell_of("expRNN", "modrelu"), 50, 100, embedding=20), "expRNN")
    assert 0.09 < network.W_in.abs().max() <= 0.1
    assert 0.09 < network.W_ho.abs().max() <= 0.1
    assert (network.b_o == 0).all()
    assert parametrize.is_parametrized(network, "W_hh")
    assert_close(skew_start(4, "henaff", generator(1)), skew_start(4, "henaff", generator(1)))


def test_published_sizes_come_out_of_the_budgets() -> None:
    """18.9 thousand parameters for copy with one-hot inputs, 269 thousand for pixels, 1.32 million for characters."""
    size = models.units_of_equal_size
    assert [size(net, 18_900, 10, 9) for net in ("nnRNN", "RNN-orth", "expRNN")] == [128, 128, 176]
    assert [size(net, 269_000, 1, 10) for net in ("nnRNN", "expRNN")] == [512, 722]
    assert size("nnRNN", 1_318_000, 50, 50, embedding=200) == 1024
    assert size("expRNN", 1_318_000, 50, 50, embedding=200) == 1386
    for net, count in (("RNN", 1), ("LSTM", 4)):
        h = size(net, 20_000, 10, 9)
        assert count * (h**2 + 19 * h) + 9 <= 20_000 < count * ((h + 1) ** 2 + 19 * (h + 1)) + 9
    assert size("EURNN", 18_900, 10, 9, capacity=108) == 258
    with pytest.raises(ValueError, match="parameters is 30; nnRNN with 2"):
        size("nnRNN", 30, 10, 9)


def test_the_count_is_that_of_the_free_parameters() -> None:
    """A, T, angles and moduli are n^2 - n/2 + n/2 - n/2 numbers; and there are U, the readout, and modReLU's bias."""
    network = models.long_memory("nnRNN", 10, 128, 9)
    found = sum(p.numel() for p in network.parameters())
    n = 128
    skew, blocks, triangle = n * (n - 1) // 2, n, n * (n - 1) // 2 - n // 2
    assert found == skew + blocks + triangle + 10 * n + 9 * n + 9 + n
    assert found == round(n**2 + (19 - 1 / 2) * n + 9) + n


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="net is 'GRU'"):
        models.long_memory("GRU", 1, 4, 1)
    with pytest.raises(ValueError, match="nonlinearity is 'elu'"):
        models.long_memory("RNN", 1, 4, 1, nonlinearity="elu")
    with pytest.raises(ValueError, match="rinit is 'xavier', which is not orthogonal; nnRNN starts from"):
        models.long_memory("nnRNN", 1, 4, 1, rinit="xavier")
    with pytest.raises(ValueError, match="iinit is 'x'"):
        models.long_memory("nnRNN", 1, 4, 1, iinit="x")
    with pytest.raises(ValueError, match="has 2 layers"):
        models.constrain(models.Stack(cell_of("RNN", "tanh"), 2, 1, 4, 1), "RNN")
    with pytest.raises(ValueError, match="even"):
        models.long_memory("nnRNN", 1, 5, 1)
