"""Long short-term memory over a whole sequence: its passes, and the layer with the weights of `torch.nn.LSTM`.

    a_t = [h_{t-1}, x_t] K, columns in the order i, f, g, o;   i, f, o = sigmoid(a), g = tanh(a)
    c_t = f c_{t-1} + i g,   y_t = tanh(c_t),   h_t = o y_t

All that a vector meets at a step are the coefficients

    p_i = g i (1 - i),  p_f = c_{t-1} f (1 - f),  p_g = i (1 - g^2),  p_o = y o (1 - o),  q = o (1 - y^2):

    tangent:  dc_t = f dc_{t-1} + p_i da_i + p_f da_f + p_g da_g,   dh_t = q dc_t + p_o da_o
    adjoint:  gh_t = u_t + da_{t+1} W',  gc_t = uc_t + f_{t+1} gc_{t+1} + q gh_t,  da_{i,f,g} = p gc_t, da_o = p_o gh_t

Reference: Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997; Gers, Schmidhuber & Cummins,
"Learning to forget", Neural Computation 2000.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from hfopt.recurrences.arguments import checked, ended, finished, gated, initial, with_ones
from hfopt.recurrences.linear import plus
from hfopt.recurrences.loops import blocks
from hfopt.recurrences.products import correlate_, in_gates, lagged, project_, pull_, steps_of
from hfopt.recurrences.registry import Cell, Maybe, Maybes, Tensors, batch_of_vectors, register, with_vectors
from hfopt.recurrences.sequence import run

_sigmoid_scale = torch.ops.aten.sigmoid_backward.grad_input
_tanh_scale = torch.ops.aten.tanh_backward.grad_input


class LSTMCell(Cell):
    """(X (T, B, V), K (h + V, 4h), h0 (B, h), c0 (B, h)) -> (H, C), each (T, B, h).

    Stored besides: the gates after their nonlinearities (T, B, 4h) and Y (T, B, h).
    """

    name = "lstm"
    arguments = 4
    places = MappingProxyType({2: 0, 3: 1})
    outputs = 2
    results = 4

    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """(T, B, h), (T, B, h), (T, B, 4h), (T, B, h)."""
        X, _, h0, _ = arguments
        sequence = (X.shape[0], *h0.shape)
        return [sequence, sequence, (*sequence[:2], 4 * h0.shape[1]), sequence]

    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """(H, C) by a loop over time."""
        X, K, h, c = arguments
        W, Wx = K[: h.shape[1]], K[h.shape[1] :]
        states, cells = [], []
        for x in (X @ Wx).unbind():
            i, f, g, o = (x + h @ W).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
            cells.append(c)
        return torch.stack(states), torch.stack(cells)

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """(H, C, gates, Y)."""
        X, K, h0, c0 = arguments
        hidden = h0.shape[1]
        W, Wx = K[:hidden], K[hidden:]
        H, C, gates, Y = (X.new_empty(shape) for shape in self.shapes(arguments))
        a, h, c, y = gates.unbind(), H.unbind(), C.unbind(), Y.unbind()
        both, out = gates[..., : 2 * hidden].unbind(), gates[..., 3 * hidden :].unbind()
        i, f, g = (gates[..., k * hidden : (k + 1) * hidden].unbind() for k in range(3))
        before, memory = h0, c0
        for start, stop in blocks(gates):
            project_(gates[start:stop], (X[start:stop], Wx))
            for t in range(start, stop):
                a[t].addmm_(before, W)
                both[t].sigmoid_()
                g[t].tanh_()
                out[t].sigmoid_()
                torch.mul(f[t], memory, out=c[t]).addcmul_(i[t], g[t])
                torch.tanh(c[t], out=y[t])
                torch.mul(out[t], y[t], out=h[t])
                before, memory = h[t], c[t]
        return [H, C, gates, Y]

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """(R_h, R_c), each (T, *N, B, h), of (dX, dK, dh0, dc0)."""
        dX, dK, dh0, dc0 = tangents
        X, K, h0, c0 = arguments
        H, C, gates, Y = results
        hidden, vectors = h0.shape[1], batch_of_vectors(tangents, arguments)
        W, Wx = K[:hidden], K[hidden:]
        dW, dWx = (None, None) if dK is None else (dK[..., :hidden, :], dK[..., hidden:, :])
        R, Rc = (H.new_empty(with_vectors(H.shape, vectors)) for _ in range(2))
        rows, r = steps_of(R)
        c, f = Rc.unbind(), gates[..., hidden : 2 * hidden].unbind()
        before = None if dh0 is None else dh0.reshape(-1, hidden)
        memory = dc0
        ranges = blocks(gates)
        whole, *coefficients = _space(gates, ranges, vectors)
        for start, stop in ranges:
            block = whole[: stop - start]
            project_(
                block,
                (lagged(H, h0, start, stop), dW),
                (X[start:stop], dWx),
                (None if dX is None else dX[start:stop], Wx),
            )
            P, Q = _coefficients(gates, Y, lagged(C, c0, start, stop), start, stop, *coefficients)
            a_rows, a = steps_of(block)
            inner, p, q = in_gates(block, 4).unbind(), P.unbind(), Q.unbind()
            for k, t in enumerate(range(start, stop)):
                if before is not None:
                    a_rows[k].addmm_(before, W)
                a[k].mul_(p[k])
                torch.sum(inner[k][..., :3, :], -2, out=c[t])
                if memory is not None:
                    c[t].addcmul_(f[t], memory)
                torch.addcmul(inner[k][..., 3, :], q[k], c[t], out=r[t])
                before, memory = rows[t], c[t]
        return [R, Rc]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """(dX, dK, dh0, dc0) of (U, U_c), each (T, *N, B, h)."""
        U, Uc = cotangents
        X, K, h0, c0 = arguments
        H, C, gates, Y = results
        hidden, vectors = h0.shape[1], batch_of_vectors(cotangents, (H, C))
        # BLAS is slower on small matrices when one of them is a transposed view.
        Wt, Wxt = K[:hidden].t().contiguous(), K[hidden:].t()
        dX = X.new_empty(with_vectors(X.shape, vectors) if needed[0] else 0)
        dK = K.new_zeros(with_vectors(K.shape, vectors)) if needed[1] else K.new_empty(0)
        gc, gh = h0.new_zeros((*vectors, *h0.shape)), h0.new_empty((*vectors, *h0.shape))
        flat = gh.view(-1, hidden)
        u = None if U is None else U.reshape(len(U), -1, hidden).unbind()
        uc, f = None if Uc is None else Uc.unbind(), gates[..., hidden : 2 * hidden].unbind()
        following: Maybe = None
        ranges = blocks(gates)
        # What a step pulls back is read by the one before, in the next block: two take turns.
        spare, other, *coefficients = _space(gates, ranges, vectors, vectors)
        for start, stop in reversed(ranges):
            spare, other = other, spare
            block = spare[: stop - start]
            P, Q = _coefficients(gates, Y, lagged(C, c0, start, stop), start, stop, *coefficients)
            p, q = in_gates(P, 4).unbind(), Q.unbind()
            rows, inner = steps_of(block)[0], in_gates(block, 4).unbind()
            for k, t in zip(range(stop - start - 1, -1, -1), range(stop - 1, start - 1, -1), strict=True):
                pull_(None if u is None else u[t], following, Wt, flat)
                gc.addcmul_(q[k], gh)
                if uc is not None:
                    gc.add_(uc[t])
                torch.mul(p[k][..., :3, :], gc.unsqueeze(-2), out=inner[k][..., :3, :])
                torch.mul(p[k][..., 3, :], gh, out=inner[k][..., 3, :])
                gc.mul_(f[t])
                following = rows[k]
            if needed[0]:
                project_(dX[start:stop], (block, Wxt))
            if needed[1]:
                correlate_(dK[..., :hidden, :], lagged(H, h0, start, stop), block)
                correlate_(dK[..., hidden:, :], X[start:stop], block)
        pull_(None, following, Wt, flat)
        return [dX, dK, gh if needed[2] else h0.new_empty(0), gc if needed[3] else c0.new_empty(0)]


def _space(gates: Tensor, ranges: list[tuple[int, int]], *vectors: tuple[int, ...]) -> list[Tensor]:
    """Memory for the longest range of steps: a tensor like the gates for each of `vectors`; one for p, one for q."""
    longest = max(stop - start for start, stop in ranges)
    shape = (longest, *gates.shape[1:])
    like_gates = [gates.new_empty(with_vectors(shape, n)) for n in (*vectors, ())]
    return [*like_gates, gates.new_empty(*shape[:2], shape[2] // 4)]


def _coefficients(
    gates: Tensor, Y: Tensor, before: Tensor, start: int, stop: int, P: Tensor, Q: Tensor
) -> tuple[Tensor, Tensor]:
    """(p_i, p_f, p_g, p_o) in one tensor (n, B, 4h), and q (n, B, h), of the steps from start to stop, in P and Q."""
    y, P, Q = Y[start:stop], P[: stop - start], Q[: stop - start]
    (i, f, g, o), (p_i, p_f, p_g, p_o) = gates[start:stop].chunk(4, -1), P.chunk(4, -1)
    _sigmoid_scale(g, i, grad_input=p_i)
    _sigmoid_scale(before, f, grad_input=p_f)
    _tanh_scale(i, g, grad_input=p_g)
    _sigmoid_scale(y, o, grad_input=p_o)
    _tanh_scale(o, y, grad_input=Q)
    return P, Q


register(LSTMCell())


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
    X, reached = ended(given["inputs"], lengths)
    bias = plus(given.get("bias_ih"), given.get("bias_hh"))
    rows = [given["weight_hh"].t(), given["weight_ih"].t()]
    if bias is not None:
        X = with_ones(X)
        rows.append(bias.unsqueeze(0))
    H, C = run("lstm", X, torch.cat(rows), h, c)
    outputs, h_n = finished(H, reached)
    return outputs, (h_n, C[-1] if reached is None else reached.final(C))
