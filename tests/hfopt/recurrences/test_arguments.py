"""What the recurrence accepts, and what it says when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hfopt.recurrences import simple_rnn
from tests.hfopt.recurrences.plain import plain_rnn, problem

P, W, H0 = problem(5, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((P[0], W, H0), ValueError, r"inputs_projected has shape \(3, 4\)"),
        ((P[:0], W, H0), ValueError, r"inputs_projected has shape \(0, 3, 4\).*none of them 0"),
        ((P[:, :0], W, H0[:0]), ValueError, "inputs_projected .*none of them 0"),
        ((P, W[:3], H0), ValueError, r"weight_hh has shape \(3, 4\).*\(4, 4\)"),
        ((P, W, H0[:2]), ValueError, r"h0 has shape \(2, 4\).*\(3, 4\) or \(4,\)"),
        ((P, W, H0, "gelu"), ValueError, "nonlinearity is 'gelu'.*'tanh', 'sigmoid', 'relu', 'identity'"),
        ((P, W, H0, "tanh", torch.ones(3, 5, dtype=torch.bool)), ValueError, r"mask is .*\(3, 5\).*\(5, 3\)"),
        ((P, W, H0, "tanh", torch.ones(5, 3)), ValueError, "mask is torch.float32.*bool"),
        ((P.long(), W, H0), TypeError, "inputs_projected has dtype torch.int64"),
        ((P, W.float(), H0), TypeError, "weight_hh is torch.float32 .*inputs_projected is torch.float64"),
        ((P, W, H0.float()), TypeError, "h0 is torch.float32"),
        ((P, W.to("meta"), H0), TypeError, "weight_hh is torch.float64 on meta"),
        ((P.tolist(), W, H0), TypeError, "inputs_projected is a list, not a tensor"),
        ((P, W, None), TypeError, "h0 is a NoneType, not a tensor"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simple_rnn(*arguments)


@pytest.mark.parametrize(
    "shuffled",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: x[..., :1].expand(x.shape),
    ],
)
def test_any_layout(shuffled: Callable[[Tensor], Tensor]) -> None:
    """Strided arguments, and cotangents strided by what follows, give the same values and gradients."""

    def results(rnn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        point = tuple(shuffled(x).detach().requires_grad_() for x in (P, W, H0))
        H = rnn(*point)
        u = shuffled(torch.linspace(-1, 1, H.numel(), dtype=H.dtype).view(H.shape)).requires_grad_()
        g = torch.autograd.grad(H, point, u, create_graph=True)
        v = tuple(shuffled(torch.cos(x.detach())) for x in point)
        return H, *g, *torch.autograd.grad(g, u, v)

    assert_close(results(simple_rnn), results(plain_rnn), rtol=1e-11, atol=1e-12)


def test_one_start_for_all_sequences() -> None:
    start = H0[0].clone().requires_grad_()
    shared = simple_rnn(P, W, start)
    assert_close(shared, plain_rnn(P, W, start.expand(3, 4)), rtol=1e-11, atol=1e-12)
    (gradient,) = torch.autograd.grad(shared.sum(), start)
    (expected,) = torch.autograd.grad(plain_rnn(P, W, start.expand(3, 4)).sum(), start)
    assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


def test_arguments_are_left_as_they_are() -> None:
    copies = [x.clone() for x in (P, W, H0)]
    point = tuple(x.clone().requires_grad_() for x in (P, W, H0))
    H = simple_rnn(*point)
    kept, u = H.detach().clone(), torch.ones_like(H, requires_grad=True)
    g = torch.autograd.grad(H, point, u, create_graph=True)
    v = tuple(torch.ones_like(x) for x in point)
    for _ in range(2):
        torch.autograd.grad(g, u, v, retain_graph=True)
        torch.autograd.grad(H, point, u.detach(), retain_graph=True)
    for now, before in zip((*point, H, u, *v), (*copies, kept, *map(torch.ones_like, (u, *v))), strict=True):
        assert torch.equal(now, before)
