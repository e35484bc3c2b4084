"""Deep feed-forward nets: what they compute, how they start, and that they refuse what they cannot be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hfopt
from models import FNN

NUMPY = {
    "logistic": lambda a: 1 / (1 + np.exp(-a)),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
    "linear": lambda a: a,
    "identity": lambda a: a,
}


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(model: FNN, v: Tensor) -> list[np.ndarray]:
    """All layers' units, in numpy."""
    units = [v.numpy()]
    for layer, name in zip(model.layers, model.nonlinearities, strict=True):
        bias = 0 if layer.bias is None else layer.bias.detach().numpy()
        units.append(NUMPY[name](units[-1] @ layer.weight.detach().numpy().T + bias))
    return units


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("biases", [True, False])
def test_forward_is_the_formula(name: str, biases: bool) -> None:
    model = FNN([4, 7, 5, 3], nonlinearity=name, biases=biases, dtype=torch.float64)
    v = inputs(6, 4)
    expected = by_hand(model, v)
    torch.testing.assert_close(model(v).detach().numpy(), expected[-1], rtol=1e-12, atol=1e-12)
    states = model.hidden_states(v)
    assert [tuple(s.shape) for s in states] == [(6, 7), (6, 5)]
    for state, unit in zip(states, expected[1:-1], strict=True):
        assert not state.requires_grad
        torch.testing.assert_close(state.numpy(), unit, rtol=1e-12, atol=1e-12)


def test_leading_dimensions_are_free() -> None:
    model = FNN([4, 5, 2], dtype=torch.float64)
    v = inputs(3, 6, 4)
    assert model(v).shape == (3, 6, 2)
    torch.testing.assert_close(model(v)[1], model(v[1]))
    torch.testing.assert_close(model(v[1, 2]), model(v)[1, 2])


def test_nonlinearities_of_layers() -> None:
    model = FNN([4, 5, 6, 3], nonlinearity=["tanh", "relu"], output="logistic", dtype=torch.float64)
    assert model.nonlinearities == ("tanh", "relu", "logistic")
    out = model(inputs(8, 4))
    torch.testing.assert_close(out.detach().numpy(), by_hand(model, inputs(8, 4))[-1])
    assert bool(((out > 0) & (out < 1)).all())
    assert FNN([4, 3]).nonlinearities == ("linear",)


def test_autoencoder_mirrors_its_encoder() -> None:
    model = FNN.autoencoder([9, 8, 6, 2])
    assert model.sizes == (9, 8, 6, 2, 6, 8, 9)
    assert model.code == 3
    assert model.nonlinearities == ("logistic", "logistic", "linear", "logistic", "logistic", "linear")
    assert FNN.autoencoder([9, 4], nonlinearity="tanh", code_nonlinearity="tanh").nonlinearities == ("tanh", "linear")


@pytest.mark.parametrize(
    ("encoder", "parameters"),
    [
        ((784, 400, 200, 100, 50, 25, 6), 842_340),
        ((784, 1000, 500, 250, 30), 2_837_314),
        ((625, 2000, 1000, 500, 30), 7_537_655),
    ],
)
def test_published_nets_have_their_numbers_of_parameters(encoder: tuple[int, ...], parameters: int) -> None:
    model = FNN.autoencoder(encoder, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_codes_lie_between_encoder_and_decoder() -> None:
    model = FNN.autoencoder([9, 8, 2], dtype=torch.float64)
    v = inputs(5, 9)
    codes = model.encode(v)
    assert codes.shape == (5, 2)
    assert codes.requires_grad
    torch.testing.assert_close(codes, model.hidden_states(v)[1])
    torch.testing.assert_close(model.decode(codes), model(v), rtol=0, atol=0)
    # The code is linear: it scales with its own weights.
    with torch.no_grad():
        model.layers[1].weight.mul_(3)
        model.layers[1].bias.mul_(3)
    torch.testing.assert_close(model.encode(v), 3 * codes)


def test_sparse_init_has_few_connections_of_unit_variance() -> None:
    model = FNN([50, 400, 300, 8], dtype=torch.float64).sparse_init(3)
    for layer in model.layers:
        assert torch.equal((layer.weight != 0).sum(1), torch.full((layer.out_features,), 15))
        assert not layer.bias.any()
    entries = torch.cat([layer.weight[layer.weight != 0] for layer in model.layers]).detach()
    assert float(entries.mean()) == pytest.approx(0, abs=4 / math.sqrt(len(entries)))
    assert float(entries.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / len(entries)))
    # The rows are drawn for each unit: no input is favoured.
    used = (model.layers[0].weight != 0).sum(0).double()
    assert float(used.mean()) == 400 * 15 / 50
    assert float(used.std()) == pytest.approx(math.sqrt(400 * 0.3 * 0.7), rel=0.5)


def test_sparse_init_of_small_layers_is_full() -> None:
    model = FNN([4, 20, 20]).sparse_init(0)
    assert bool((model.layers[0].weight != 0).all())
    assert torch.equal((model.layers[1].weight != 0).sum(1), torch.full((20,), 15))
    assert torch.equal((FNN([30, 6]).sparse_init(0, connections=4).layers[0].weight != 0).sum(1), torch.full((6,), 4))


def test_sparse_init_is_seeded_and_scaled() -> None:
    model, other = FNN([30, 20, 10]).sparse_init(5), FNN([30, 20, 10]).sparse_init(6)
    assert not torch.equal(model.layers[0].weight, other.layers[0].weight)
    before = torch.get_rng_state()
    other.sparse_init(torch.Generator().manual_seed(5))
    assert torch.equal(before, torch.get_rng_state())
    for own, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, same)
    # Weights and biases have scales of their own.
    wide = FNN([30, 2000, 10]).sparse_init(5, scale=0.5, bias_scale=0.1)
    weights, bias = wide.layers[0].weight.detach(), wide.layers[0].bias.detach()
    assert float(weights[weights != 0].std()) == pytest.approx(0.5, rel=0.05)
    assert float(bias.std()) == pytest.approx(0.1, rel=0.1)
    assert float(bias.mean()) == pytest.approx(0, abs=0.01)


def test_tanh_units_begin_as_logistic_ones() -> None:
    logistic, plain = FNN([30, 20, 20, 20, 5]).sparse_init(1), ["logistic", "tanh", "tanh"]
    mixed = FNN([30, 20, 20, 20, 5], nonlinearity=plain).sparse_init(1)
    sums = [[float(layer.weight.detach().abs().sum()) for layer in model.layers] for model in (mixed, logistic)]
    ratios = [tanhs / logistics for tanhs, logistics in zip(*sums, strict=True)]
    # W_i joins layers i and i+1: inputs-logistic, logistic-tanh, tanh-tanh, tanh-outputs.
    assert ratios == pytest.approx([1, 1 / 2, 1 / 4, 1 / 2])
    assert [float(layer.bias.detach().mean()) for layer in mixed.layers] == [0, 0.5, 0.5, 0]
    off = FNN([30, 20, 20, 20, 5], nonlinearity=plain).sparse_init(1, tanh_as_logistic=False)
    for a, b in zip(logistic.parameters(), off.parameters(), strict=True):
        assert torch.equal(a, b)


def test_halved_weights_make_tanh_units_logistic() -> None:
    """With (1 + tanh)/2 for the units and biases to match, the two nets are the same function."""
    logistic = FNN([6, 5, 4, 3], dtype=torch.float64).sparse_init(0)
    tanh = FNN([6, 5, 4, 3], nonlinearity="tanh", dtype=torch.float64).sparse_init(0)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(logistic.layers, tanh.layers, strict=True)):
            # b_i of tanh units that take h = 2y - 1: half the row sums of W_i, halved once more if they are tanh.
            b.bias.copy_(0 * a.bias if i == 0 else a.weight.sum(1) / (4 if i < 2 else 2))
    v = inputs(7, 6)
    torch.testing.assert_close(tanh(v), logistic(v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["logistic", "tanh", "relu"])
def test_gauss_newton_products_agree_with_the_dense_matrix(nonlinearity: str) -> None:
    model = FNN.autoencoder([5, 4, 2], nonlinearity=nonlinearity, dtype=torch.float64).sparse_init(2, connections=3)
    v, n = inputs(6, 5).sigmoid(), 6
    names, values = zip(*model.named_parameters(), strict=True)

    def outputs(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (v,))

    J = torch.cat([j.flatten(2) for j in torch.autograd.functional.jacobian(outputs, values)], dim=2)  # (n, 5, P)
    p = model(v).detach().sigmoid()
    expected = torch.einsum("nop,no,noq->pq", J, p * (1 - p), J) / n
    op = hfopt.GaussNewton(lambda: F.binary_cross_entropy_with_logits(model(v), v) * 5, model.parameters())
    direction = inputs(J.shape[2], seed=1)
    torch.testing.assert_close(op @ direction, expected @ direction, rtol=1e-9, atol=1e-12)


def test_it_reproduces_few_images_through_a_code() -> None:
    """An autoencoder of 4 layers learns eight images by heart, from sparse random weights."""
    images = (inputs(8, 16) > 0).to(torch.float64)
    model = FNN.autoencoder([16, 12, 3], dtype=torch.float64).sparse_init(0)
    optimizer = hfopt.HessianFree(model.parameters())
    for _ in range(40):
        optimizer.step(lambda: F.binary_cross_entropy_with_logits(model(images), images) * 16)
        if torch.equal(model(images) > 0, images > 0):
            break
    assert torch.equal(model(images) > 0, images > 0)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((4,), {}, "sizes is"),
        ((4, 0, 2), {}, "each at least 1"),
        ((4, 3, 2), {"nonlinearity": "softplus"}, "nonlinearity is 'softplus'; it is one of 'logistic', 'tanh'"),
        ((4, 3, 2), {"nonlinearity": ["tanh", "tanh"]}, "has 2 names; there are 1 hidden"),
        ((4, 3, 2), {"output": "softmax"}, "output is 'softmax'"),
        ((4, 3, 2), {"code": 2}, "code is 2"),
        ((4, 3, 2), {"code": 0}, "code is 0"),
        ((4, 3, 2), {"code": 1, "code_nonlinearity": "x"}, "nonlinearity is 'x'"),
    ],
)
def test_refusals(sizes: tuple[int, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FNN(sizes, **options)


def test_more_refusals() -> None:
    model = FNN([4, 3, 2])
    with pytest.raises(ValueError, match=r"inputs has shape \(5, 3\); its last dimension is 4"):
        model(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"no code; give code= or build it with FNN\.autoencoder"):
        model.encode(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="codes has shape"):
        FNN.autoencoder([4, 3]).decode(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="encoder is"):
        FNN.autoencoder([4])
    with pytest.raises(ValueError, match="connections is 0"):
        model.sparse_init(0, connections=0)


def test_it_prints_its_shape() -> None:
    assert "4-3-4, nonlinearities=('linear', 'linear'), code=1" in repr(FNN.autoencoder([4, 3]))
