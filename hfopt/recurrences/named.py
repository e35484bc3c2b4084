"""Layers of the classic cells with the weights of torch's own: simple RNN, LSTM, GRU, and the multiplicative RNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt.recurrences import cells
from hfopt.recurrences.arguments import (
    check_inputs,
    check_shapes,
    checked,
    ended,
    finished,
    gated,
    initial,
    with_ones,
)
from hfopt.recurrences.cells.mrnn import MULTIPLICATIVE
from hfopt.recurrences.cells.simple import NONLINEARITIES
from hfopt.recurrences.definition import Definition
from hfopt.recurrences.layers import outputs_of, readout_of
from hfopt.recurrences.products import plus

Maybe = Tensor | None


def simple_rnn(
    inputs_projected: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    nonlinearity: str = "tanh",
    mask: Tensor | None = None,
) -> Tensor:
    """Hidden states of a simple recurrent network: h_t = f(h_{t-1} W + p_t) for t = 0..T-1, with h_{-1} = h0.

    A Jacobian-vector product is one tangent pass, a vector-Jacobian product one adjoint pass over the stored states.
    Both can be differentiated again, any number of times in reverse mode and also in forward mode (third derivatives
    by two nested forward modes excepted, which torch does not carry). While an optimizer looks for hidden states
    (structural damping), the pre-activations a_t = h_{t-1} W + p_t are marked with D'', the curvature of their
    distance: 1 - h^2 for tanh, h (1 - h) for sigmoid, 1 for identity, f'(a)^2 (squared distance of h) for relu.

    Args:
        inputs_projected: p (T, B, h), each unit's input at each step, bias included.
        weight_hh: W (h, h); W[i, j] leads from unit i to unit j.
        h0: (B, h), or (h,) for the same start of every sequence.
        nonlinearity: f, one of "tanh", "relu", "sigmoid", "identity".
        mask: (T, B) bool, False beyond a sequence's end. It changes no state: it keeps those steps out of structural
            damping.

    Returns:
        H (T, B, h).

    Raises:
        ValueError: a wrong shape, an empty sequence or an unknown nonlinearity; the message names the argument.
        TypeError: an argument that is no floating-point tensor, or has another dtype or device than the first.

    Reference: Martens & Sutskever, "Learning recurrent neural networks with Hessian-free optimization", ICML 2011.
    """
    P, W, h0 = checked(inputs_projected=inputs_projected, weight_hh=weight_hh, h0=h0).values()
    cell = _simple(nonlinearity)
    if P.dim() != 3 or P.numel() == 0:
        raise ValueError(
            f"inputs_projected has shape {tuple(P.shape)}; it is (T, B, h), steps, sequences and units, none of them 0"
        )
    steps, batch, hidden = P.shape
    _check_shapes(steps, batch, hidden, W, h0, mask)
    return outputs_of(cell, (P, P.new_empty(0, hidden), W, h0.expand(batch, hidden)), mask)[0]


def simple_rnn_layer(
    inputs: Tensor,
    weight_vh: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    bias: Tensor | None = None,
    nonlinearity: str = "tanh",
    mask: Tensor | None = None,
) -> Tensor:
    """Hidden states of a simple recurrent network from its inputs: h_t = f(h_{t-1} W_hh + v_t W_vh + b), h_{-1} = h0.

    `simple_rnn(inputs @ weight_vh + bias, weight_hh, h0, ...)` with the projection inside the operator, where it never
    goes through memory; the same in all else.

    Args:
        inputs: v (T, B, V).
        weight_vh: W_vh (V, h).
        weight_hh: W_hh (h, h); W_hh[i, j] leads from unit i to unit j.
        h0: (B, h), or (h,) for the same start of every sequence.
        bias: b (h,), or None.
        nonlinearity: f, one of "tanh", "relu", "sigmoid", "identity".
        mask: (T, B) bool, False beyond a sequence's end; as in `simple_rnn`.

    Returns:
        H (T, B, h).

    Raises:
        ValueError, TypeError: as `simple_rnn`.
    """
    cell, point = _point(inputs, weight_vh, weight_hh, h0, bias, nonlinearity, mask)
    return outputs_of(cell, point, mask)[0]


def simple_rnn_readout(
    inputs: Tensor,
    weight_vh: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    bias: Tensor | None,
    weight_ho: Tensor,
    bias_o: Tensor | None = None,
    nonlinearity: str = "tanh",
    mask: Tensor | None = None,
) -> Tensor:
    """Outputs of a simple recurrent network: h_t = f(h_{t-1} W_hh + v_t W_vh + b), o_t = h_t W_ho + b_o, h_{-1} = h0.

    `simple_rnn_layer(...) @ weight_ho + bias_o` as one operator; the same in all else.

    Args:
        inputs, weight_vh, weight_hh, h0, bias, nonlinearity, mask: as in `simple_rnn_layer`.
        weight_ho: W_ho (h, O).
        bias_o: b_o (O,), or None.

    Returns:
        O (T, B, O).

    Raises:
        ValueError, TypeError: as `simple_rnn_layer`.
    """
    cell, point = _point(inputs, weight_vh, weight_hh, h0, bias, nonlinearity, mask)
    return outputs_of(cell, point, mask, readout_of(weight_ho, bias_o, weight_hh.shape[0], point[1]))[0]


def _point(
    inputs: Tensor, weight_vh: Tensor, weight_hh: Tensor, h0: Tensor, bias: Maybe, nonlinearity: str, mask: Maybe
) -> tuple[Definition, tuple[Tensor, ...]]:
    """The cell and its arguments, which are checked: X with a column of ones if there is a bias."""
    given = checked("bias", inputs=inputs, weight_vh=weight_vh, weight_hh=weight_hh, h0=h0, bias=bias)
    X, Wx, W, h0, *biases = given.values()
    cell = _simple(nonlinearity)
    check_inputs(X)
    if Wx.dim() != 2 or Wx.shape[0] != X.shape[2]:
        raise ValueError(f"weight_vh has shape {tuple(Wx.shape)}; with the {X.shape[2]} inputs it is ({X.shape[2]}, h)")
    steps, batch, hidden = X.shape[0], X.shape[1], Wx.shape[1]
    _check_shapes(steps, batch, hidden, W, h0, mask)
    for b in biases:
        if b.shape != (hidden,):
            raise ValueError(f"bias has shape {tuple(b.shape)}; with the {hidden} units of weight_vh it is ({hidden},)")
    if biases:
        X, Wx = with_ones(X), torch.cat((Wx, biases[0].unsqueeze(0)))
    return cell, (X, Wx, W, h0.expand(batch, hidden))


def _simple(nonlinearity: str) -> Definition:
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(map(repr, NONLINEARITIES))}")
    return NONLINEARITIES[nonlinearity]


def _check_shapes(steps: int, batch: int, hidden: int, W: Tensor, h0: Tensor, mask: Maybe) -> None:
    if W.shape != (hidden, hidden):
        raise ValueError(f"weight_hh has shape {tuple(W.shape)}; with {hidden} hidden units it is {hidden, hidden}")
    if h0.shape not in ((batch, hidden), (hidden,)):
        raise ValueError(f"h0 has shape {tuple(h0.shape)}; here it is {batch, hidden} or ({hidden},)")
    if mask is not None and (mask.shape != (steps, batch) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; here it is bool of {steps, batch}")


def lstm_layer(
    inputs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states of a long short-term memory, with the weights of `torch.nn.LSTM` and the same numbers.

    i, f, o = sigmoid(a), g = tanh(a) with a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh in four parts i, f, g, o;
    c_t = f c_{t-1} + i g, h_t = o tanh(c_t). One node of the autograd graph: a Jacobian-vector product is one tangent
    pass, a vector-Jacobian product one adjoint pass, and both can be differentiated again. While an optimizer looks
    for hidden states (structural damping), the h_t are marked with D'' = 1: half their squared distance.

    Args:
        inputs: x (T, B, V).
        weight_ih: W_ih (4h, V).
        weight_hh: W_hh (4h, h).
        bias_ih: b_ih (4h,), or None.
        bias_hh: b_hh (4h,), or None.
        h0: (B, h), or (h,) for the same start of every sequence (one that is learned); None: zeros.
        c0: as h0, for the cells' memory.
        lengths: (B,) integers from 1 to T: how many steps of each sequence count, in any order.

    Returns:
        H (T, B, h), zero beyond a sequence's end, and the states (h_n, c_n), each (B, h), of its last step.

    Raises:
        ValueError: a wrong shape or length, or an empty sequence; the message names the argument.
        TypeError: an argument that is no floating-point tensor, or has another dtype or device than the first.

    Reference: Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997.
    """
    given = checked(
        "bias_ih", "bias_hh", "h0", "c0",
        inputs=inputs, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh, h0=h0, c0=c0,
    )  # fmt: skip
    hidden = gated(given, 4)
    h, c = (initial(name, given.get(name), given["inputs"], hidden) for name in ("h0", "c0"))
    bias = plus(given.get("bias_ih"), given.get("bias_hh"))
    H, *last = _gated(
        cells.lstm, given["inputs"], given["weight_ih"].t(), given["weight_hh"], bias, (), (h, c), lengths
    )
    return H, (last[0], last[1])


def gru_layer(
    inputs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of gated recurrent units, with the weights of `torch.nn.GRU` and the same numbers.

    With W_ih x_t + b_ih and W_hh h_{t-1} + b_hh each in three parts r, z, n: r and z are the sigmoids of the sums,
    n_t = tanh([W_ih x_t + b_ih]_n + r_t [W_hh h_{t-1} + b_hh]_n), h_t = (1 - z_t) n_t + z_t h_{t-1}. One node of the
    autograd graph: a Jacobian-vector product is one tangent pass, a vector-Jacobian product one adjoint pass, and both
    can be differentiated again. While an optimizer looks for hidden states (structural damping), the h_t are marked
    with D'' = 1: half their squared distance.

    Args:
        inputs: x (T, B, V).
        weight_ih: W_ih (3h, V).
        weight_hh: W_hh (3h, h).
        bias_ih: b_ih (3h,), or None.
        bias_hh: b_hh (3h,), or None.
        h0: (B, h), or (h,) for the same start of every sequence (one that is learned); None: zeros.
        lengths: (B,) integers from 1 to T: how many steps of each sequence count, in any order.

    Returns:
        H (T, B, h), zero beyond a sequence's end, and the state h_n (B, h) of its last step.

    Raises:
        ValueError: a wrong shape or length, or an empty sequence; the message names the argument.
        TypeError: an argument that is no floating-point tensor, or has another dtype or device than the first.

    Reference: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    """
    given = checked(
        "bias_ih", "bias_hh", "h0",
        inputs=inputs, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh, h0=h0,
    )  # fmt: skip
    hidden = gated(given, 3)
    h = initial("h0", given.get("h0"), given["inputs"], hidden)
    X = given["inputs"]
    K_x, b_n, bias = given["weight_ih"].t(), X.new_zeros(hidden), given.get("bias_ih")
    if "bias_hh" in given:
        b_rz, b_n = given["bias_hh"][: 2 * hidden], given["bias_hh"][2 * hidden :]
        bias = plus(bias, torch.cat((b_rz, torch.zeros_like(b_n))))
    # The cell has the inputs' part of n first, since r and z share their columns with the recurrent product.
    K_x, bias = K_x.roll(hidden, -1), None if bias is None else bias.roll(hidden)
    H, last = _gated(cells.gru, X, K_x, given["weight_hh"], bias, (b_n,), (h,), lengths)
    return H, last


def _gated(
    cell: Definition, X: Tensor, K_x: Tensor, weight_hh: Tensor, bias: Maybe, parameters: Sequence[Tensor],
    states: Sequence[Tensor], lengths: Maybe,
) -> list[Tensor]:  # fmt: skip
    """H (T, B, h), zero beyond the ends, and the last states (B, h)."""
    X, reached = ended(X, lengths)
    if bias is not None:
        X, K_x = with_ones(X), torch.cat((K_x, bias.unsqueeze(0)))
    mask = None if reached is None else reached.mask
    H, *others = outputs_of(cell, (X, K_x, weight_hh.t(), *parameters, *states), mask)
    return [*finished(H, reached), *(S[-1] if reached is None else reached.final(S) for S in others)]


def mrnn_layer(
    inputs: Tensor,
    weight_xf: Tensor,
    weight_hf: Tensor,
    weight_fh: Tensor,
    weight_xh: Tensor,
    h0: Tensor | None = None,
    bias: Tensor | None = None,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of a multiplicative recurrent network: h_t = f([(x_t W_xf) (h_{t-1} W_hf)] W_fh + x_t W_xh + b).

    The product of the two brackets, F factors each, is element by element, so that every input has a recurrent matrix
    W_hf diag(x_t W_xf) W_fh of its own. One node of the autograd graph: a Jacobian-vector product is one tangent pass,
    a vector-Jacobian product one adjoint pass, and both can be differentiated again. While an optimizer looks for
    hidden states (structural damping), the pre-activations are marked with the curvature of their distance, as in
    `simple_rnn`.

    Args:
        inputs: x (T, B, V).
        weight_xf: W_xf (V, F).
        weight_hf: W_hf (h, F).
        weight_fh: W_fh (F, h).
        weight_xh: W_xh (V, h).
        h0: (B, h), or (h,) for the same start of every sequence (one that is learned); None: zeros.
        bias: b (h,), or None.
        nonlinearity: f, one of "tanh", "relu", "sigmoid".
        lengths: (B,) integers from 1 to T: how many steps of each sequence count, in any order.

    Returns:
        H (T, B, h), zero beyond a sequence's end, and the state h_n (B, h) of its last step.

    Raises:
        ValueError: a wrong shape or length, an empty sequence or an unknown nonlinearity; the message names the
            argument.
        TypeError: an argument that is no floating-point tensor, or has another dtype or device than the first.

    Reference: Sutskever, Martens & Hinton, "Generating text with recurrent neural networks", ICML 2011, section 3.
    """
    given = checked(
        "h0", "bias",
        inputs=inputs, weight_xf=weight_xf, weight_hf=weight_hf, weight_fh=weight_fh, weight_xh=weight_xh, h0=h0,
        bias=bias,
    )  # fmt: skip
    if nonlinearity not in MULTIPLICATIVE:
        raise ValueError(f"nonlinearity is {nonlinearity!r}; it is one of {', '.join(map(repr, MULTIPLICATIVE))}")
    X, Wxf, Whf = given["inputs"], given["weight_xf"], given["weight_hf"]
    check_inputs(X)
    for name, W in (("weight_xf", Wxf), ("weight_hf", Whf)):
        if W.dim() != 2 or W.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(W.shape)}; it is a matrix with a column for each factor")
    (hidden, factors), columns = Whf.shape, X.shape[2]
    wanted = {
        "weight_xf": (columns, factors),
        "weight_fh": (factors, hidden),
        "weight_xh": (columns, hidden),
        "bias": (hidden,),
    }
    check_shapes(given, wanted, f"{columns} inputs and weight_hf {hidden, factors}, units and factors,")
    h = initial("h0", given.get("h0"), X, hidden)
    X, reached = ended(X, lengths)
    K_x = torch.cat((Wxf, given["weight_xh"]), -1)
    if "bias" in given:
        bias = torch.cat((Wxf.new_zeros(factors), given["bias"]))
        X, K_x = with_ones(X), torch.cat((K_x, bias.unsqueeze(0)))
    mask = None if reached is None else reached.mask
    return finished(outputs_of(cells.mrnn(nonlinearity), (X, K_x, Whf, given["weight_fh"], h), mask)[0], reached)
