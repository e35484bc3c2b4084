"""The multiplicative recurrence, whose recurrent matrix W_hf diag(x_t W_xf) K_f depends on the input, in factored form.

    e_t = x_t W_xf,   g_t = h_{t-1} W_hf,   a_t = [e_t g_t, x_t] K,   h_t = f(a_t)

    tangent:  da_t = d[e_t g_t] K_f + dx_t K_x + [e_t g_t, x_t] dK,   d[e_t g_t] = e_t dg_t + g_t de_t,
              dg_t = dh_{t-1} W_hf + h_{t-1} dW_hf
    adjoint:  da_t = f'(a_t) (u_t + dg_{t+1} W_hf') + ua_t,   dp_t = da_t K_f',   dg_t = e_t dp_t,   de_t = g_t dp_t

with K (F + V, h), K_f = K[:F] and K_x = K[F:].

Reference: Sutskever, Martens & Hinton, "Generating text with recurrent neural networks", ICML 2011, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from hfopt import structural
from hfopt.recurrences.arguments import (
    check_inputs,
    check_shapes,
    checked,
    ended,
    finished,
    initial,
    looked_for,
    with_ones,
)
from hfopt.recurrences.loops import blocks
from hfopt.recurrences.nonlinearities import NONLINEARITIES, Nonlinearity
from hfopt.recurrences.products import correlate_, lagged, project_, pull_, steps_of
from hfopt.recurrences.registry import Cell, Maybe, Maybes, Tensors, batch_of_vectors, register, with_vectors
from hfopt.recurrences.sequence import run

MULTIPLICATIVE = ("tanh", "relu", "sigmoid")


class MRNNCell(Cell):
    """(X (T, B, V), W_xf (V, F), W_hf (h, F), K (F + V, h), h0 (B, h)) -> (H,), or (H, A) under a name with "+a".

    A (T, B, h) are the pre-activations. Stored besides: E and G, each (T, B, F).
    """

    arguments = 5
    places = MappingProxyType({4: 0})

    def __init__(self, f: Nonlinearity, preactivations: bool) -> None:
        self.f, self.preactivations = f, preactivations
        self.name = f"mrnn_{f.name}" + "+a" * preactivations
        self.outputs = 1 + preactivations
        self.results = 3 + preactivations

    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """(T, B, h) once or twice, (T, B, F) twice."""
        X, Wxf, *_, h0 = arguments
        sequence = (X.shape[0], *h0.shape)
        return [sequence] * self.outputs + [(*sequence[:2], Wxf.shape[1])] * 2

    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """(H,) or (H, A) by a loop over time."""
        X, Wxf, Whf, K, h = arguments
        Kf, Kx = K[: Wxf.shape[1]], K[Wxf.shape[1] :]
        states, inputs = [], []
        for e, x in zip((X @ Wxf).unbind(), (X @ Kx).unbind(), strict=True):
            a = x + (e * (h @ Whf)) @ Kf
            h = getattr(torch, self.f.name)(a)
            inputs.append(a)
            states.append(h)
        return (torch.stack(states), torch.stack(inputs))[: self.outputs]

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """(H, E, G) or (H, A, E, G)."""
        X, Wxf, Whf, K, h0 = arguments
        factors = Wxf.shape[1]
        Kf, Kx = K[:factors], K[factors:]
        results = [X.new_empty(shape) for shape in self.shapes(arguments)]
        H, E, G = results[0], *results[-2:]
        h, e, g = H.unbind(), E.unbind(), G.unbind()
        a = results[1].unbind() if self.preactivations else h
        product = e[0].new_empty(e[0].shape)
        before = h0
        for start, stop in blocks(H):
            x = X[start:stop]
            project_(E[start:stop], (x, Wxf))
            project_((results[1] if self.preactivations else H)[start:stop], (x, Kx))
            for t in range(start, stop):
                torch.mm(before, Whf, out=g[t])
                torch.mul(e[t], g[t], out=product)
                a[t].addmm_(product, Kf)
                if self.preactivations:
                    h[t].copy_(a[t])
                self.f.apply_(h[t])
                before = h[t]
        return results

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """(R_h,) or (R_h, R_a), each (T, *N, B, h), of (dX, dW_xf, dW_hf, dK, dh0)."""
        dX, dWxf, dWhf, dK, dh0 = tangents
        X, Wxf, Whf, K, h0 = arguments
        H, E, G = results[0], *results[-2:]
        hidden, factors = Whf.shape
        vectors, ranges = batch_of_vectors(tangents, arguments), blocks(E)
        Kf, Kx = K[:factors], K[factors:]
        dKf, dKx = (None, None) if dK is None else (dK[..., :factors, :], dK[..., factors:, :])
        moves = [H.new_empty(with_vectors(H.shape, vectors)) for _ in range(self.outputs)]
        R, Ra = moves[0], moves[-1]
        (r_rows, r), (a_rows, a) = steps_of(R), steps_of(Ra)
        h, e = H.unbind(), E.unbind()
        changes, by_input, product = _space(E, ranges, vectors, vectors, ())
        recurrent = E.new_empty((*vectors, *E.shape[1:]))
        flat = recurrent.view(-1, factors)
        before = None if dh0 is None else dh0.reshape(-1, hidden)
        for start, stop in ranges:
            x, dx = X[start:stop], None if dX is None else dX[start:stop]
            e_block, g_block = (_beside(Y[start:stop], vectors) for Y in (E, G))
            # d[e g] less the part that recurs: e (h dW_hf) + g de.
            block = changes[: stop - start]
            project_(block, (lagged(H, h0, start, stop), dWhf)).mul_(e_block)
            if dX is not None or dWxf is not None:
                block.addcmul_(g_block, project_(by_input[: stop - start], (x, dWxf), (dx, Wxf)))
            p = torch.mul(E[start:stop], G[start:stop], out=product[: stop - start]) if dKf is not None else None
            project_(Ra[start:stop], (p, dKf), (x, dKx), (dx, Kx))
            q_rows, q = steps_of(block)
            for k, t in enumerate(range(start, stop)):
                if before is not None:
                    torch.mm(before, Whf, out=flat)
                    q[k].addcmul_(e[t], recurrent)
                a_rows[t].addmm_(q_rows[k], Kf)
                self.f.scale(a[t], h[t], r[t])
                before = r_rows[t]
        return moves

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """(dX, dW_xf, dW_hf, dK, dh0) of (U,) or (U, U_a), each (T, *N, B, h)."""
        U, Ua = (*cotangents, None)[:2]
        X, Wxf, Whf, K, h0 = arguments
        H, E, G = results[0], *results[-2:]
        hidden, factors = Whf.shape
        vectors, ranges = batch_of_vectors(cotangents, results[: self.outputs]), blocks(E)
        Whft, Kft, Kxt = Whf.t().contiguous(), K[:factors].t().contiguous(), K[factors:].t()
        dX = X.new_empty(with_vectors(X.shape, vectors) if needed[0] else (0,))
        dWxf, dWhf, dK = (
            x.new_zeros(with_vectors(x.shape, vectors) if on else (0,))
            for x, on in zip((Wxf, Whf, K), needed[1:4], strict=True)
        )
        u = None if U is None else U.reshape(len(U), -1, hidden).unbind()
        ua = None if Ua is None else Ua.unbind()
        h, e = H.unbind(), E.unbind()
        spare, other, changes, product = _space(E, ranges, vectors, vectors, vectors, ())
        on_a = H.new_empty(with_vectors((len(spare), *H.shape[1:]), vectors))
        following: Maybe = None
        for start, stop in reversed(ranges):
            spare, other = other, spare
            length, x = stop - start, X[start:stop]
            dg, dp, da = spare[:length], changes[:length], on_a[:length]
            (dg_rows, dg_all), (dp_rows, dp_all), (da_rows, da_all) = map(steps_of, (dg, dp, da))
            for k, t in zip(range(length - 1, -1, -1), range(stop - 1, start - 1, -1), strict=True):
                pull_(None if u is None else u[t], following, Whft, da_rows[k])
                self.f.scale(da_all[k], h[t], da_all[k])
                if ua is not None:
                    da_all[k].add_(ua[t])
                torch.mm(da_rows[k], Kft, out=dp_rows[k])
                torch.mul(e[t], dp_all[k], out=dg_all[k])
                following = dg_rows[k]
            de = dp.mul_(_beside(G[start:stop], vectors))
            if needed[0]:
                project_(dX[start:stop], (da, Kxt), (de, Wxf.t()))
            if needed[1]:
                correlate_(dWxf, x, de)
            if needed[2]:
                correlate_(dWhf, lagged(H, h0, start, stop), dg)
            if needed[3]:
                p = torch.mul(E[start:stop], G[start:stop], out=product[:length])
                correlate_(dK[..., :factors, :], p, da)
                correlate_(dK[..., factors:, :], x, da)
        dh0 = h0.new_empty((*vectors, *h0.shape) if needed[4] else (0,))
        if needed[4]:
            pull_(None, following, Whft, dh0.view(-1, hidden))
        return [dX, dWxf, dWhf, dK, dh0]


def _space(E: Tensor, ranges: list[tuple[int, int]], *vectors: tuple[int, ...]) -> list[Tensor]:
    """Memory for the longest range of steps, (n, *N, B, F), for each of `vectors`."""
    longest = max(stop - start for start, stop in ranges)
    return [E.new_empty(with_vectors((longest, *E.shape[1:]), n)) for n in vectors]


def _beside(X: Tensor, vectors: tuple[int, ...]) -> Tensor:
    """X (n, B, F) so that it broadcasts with (n, *N, B, F)."""
    return X.unsqueeze(1) if vectors else X


for _name in MULTIPLICATIVE:
    for _preactivations in (False, True):
        register(MRNNCell(NONLINEARITIES[_name], _preactivations))


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
    rows = [given["weight_fh"], given["weight_xh"]]
    if "bias" in given:
        X = with_ones(X)
        rows.append(given["bias"].unsqueeze(0))
        Wxf = torch.cat((Wxf, Wxf.new_zeros(1, factors)))
    marked = looked_for()
    H, *A = run(f"mrnn_{nonlinearity}" + "+a" * marked, X, Wxf, Whf, torch.cat(rows), h)
    if marked:
        curvature = NONLINEARITIES[nonlinearity].distance(H.detach())
        structural.mark(A[0], curvature, batch_dim=1, mask=None if reached is None else reached.mask)
    return finished(H, reached, mark=False)
