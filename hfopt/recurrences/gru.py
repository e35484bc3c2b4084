"""Gated recurrent units over a whole sequence, with the arithmetic of `torch.nn.GRU`.

    r_t, z_t = sigmoid([x_t K_x + h_{t-1} K_h]_{r,z}),   m_t = [h_{t-1} K_h]_n + b_n
    n_t = tanh([x_t K_x]_n + r_t m_t),   h_t = (1 - z_t) n_t + z_t h_{t-1}

with columns of K_h (h, 3h) and K_x (V, 3h) in the order r, z, n. All that a vector meets at a step are the
coefficients, with s = (1 - z) (1 - n^2),

    p_r = s m r (1 - r),   p_z = (h_{t-1} - n) z (1 - z),   p_m = s r:

    tangent:  dh_t = p_r da_r + p_z da_z + p_m dm + s dx_n + z dh_{t-1},   da = dx + dh_{t-1} K_h,  dm likewise
    adjoint:  gh_t = u_t + z_{t+1} gh_{t+1} + da_{t+1} K_h',   da_t = (p_r, p_z, p_m) gh_t,   dx_n = s gh_t

where dx stands for the change of x_t K_x.

Reference: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014 (there the reset gate is
applied before the matrix, here behind it).
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


class GRUCell(Cell):
    """(X (T, B, V), K_h (h, 3h), K_x (V, 3h), b_n (h,), h0 (B, h)) -> (H (T, B, h),).

    Stored besides: the gates r, z, n after their nonlinearities (T, B, 3h) and M (T, B, h).
    """

    name = "gru"
    arguments = 5
    places = MappingProxyType({4: 0})
    outputs = 1
    results = 3

    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """(T, B, h), (T, B, 3h), (T, B, h)."""
        X, *_, h0 = arguments
        sequence = (X.shape[0], *h0.shape)
        return [sequence, (*sequence[:2], 3 * h0.shape[1]), sequence]

    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """(H,) by a loop over time."""
        X, Kh, Kx, b, h = arguments
        states = []
        for x in (X @ Kx).unbind():
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), (h @ Kh).chunk(3, -1)
            z = (x_z + h_z).sigmoid()
            n = (x_n + (x_r + h_r).sigmoid() * (h_n + b)).tanh()
            h = n + z * (h - n)
            states.append(h)
        return (torch.stack(states),)

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """(H, gates, M)."""
        X, Kh, Kx, b, h0 = arguments
        hidden = h0.shape[1]
        H, gates, M = (X.new_empty(shape) for shape in self.shapes(arguments))
        h, m = H.unbind(), M.unbind()
        both, r, z, n = (gates[..., i * hidden : j * hidden].unbind() for i, j in ((0, 2), (0, 1), (1, 2), (2, 3)))
        K_rz, K_n = Kh[:, : 2 * hidden], Kh[:, 2 * hidden :]
        before = h0
        for start, stop in blocks(gates):
            project_(gates[start:stop], (X[start:stop], Kx))
            for t in range(start, stop):
                both[t].addmm_(before, K_rz)
                both[t].sigmoid_()
                torch.addmm(b, before, K_n, out=m[t])
                n[t].addcmul_(r[t], m[t]).tanh_()
                torch.lerp(n[t], before, z[t], out=h[t])
                before = h[t]
        return [H, gates, M]

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """(R_h,), (T, *N, B, h), of (dX, dK_h, dK_x, db_n, dh0)."""
        dX, dKh, dKx, db, dh0 = tangents
        X, Kh, Kx, _, h0 = arguments
        H, gates, _ = results
        hidden, vectors, ranges = h0.shape[1], batch_of_vectors(tangents, arguments), blocks(gates)
        inputs = dX is not None or dKx is not None
        R = H.new_empty(with_vectors(H.shape, vectors))
        rows, r = steps_of(R)
        z = gates[..., hidden : 2 * hidden].unbind()
        whole, moved, P, S = _space(gates, ranges, vectors, vectors if inputs else None, ())
        before, state = (None, None) if dh0 is None else (dh0.reshape(-1, hidden), dh0)
        for start, stop in ranges:
            block = whole[: stop - start]
            project_(block, (lagged(H, h0, start, stop), dKh))
            if db is not None:
                block[..., 2 * hidden :].add_(db.unsqueeze(-2))
            p, s = _coefficients(results, lagged(H, h0, start, stop), start, stop, P, S)
            fresh: Maybe = None
            if inputs:
                fresh = moved[: stop - start]
                project_(fresh, (X[start:stop], dKx), (None if dX is None else dX[start:stop], Kx))
                block[..., : 2 * hidden].add_(fresh[..., : 2 * hidden])
                fresh = fresh[..., 2 * hidden :].mul_(s if not vectors else s.unsqueeze(1))
            a_rows, a = steps_of(block)
            inner = in_gates(block, 3).unbind()
            for k, t in enumerate(range(start, stop)):
                if before is not None:
                    a_rows[k].addmm_(before, Kh)
                a[k].mul_(p[k])
                torch.sum(inner[k], -2, out=r[t])
                if fresh is not None:
                    r[t].add_(fresh[k])
                if state is not None:
                    r[t].addcmul_(z[t], state)
                before, state = rows[t], r[t]
        return [R]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """(dX, dK_h, dK_x, db_n, dh0) of (U,), (T, *N, B, h)."""
        (U,) = cotangents
        assert U is not None
        X, Kh, Kx, b, h0 = arguments
        H, gates, _ = results
        hidden, vectors, ranges = h0.shape[1], batch_of_vectors(cotangents, (H,)), blocks(gates)
        Kht, Kxt, inputs = Kh.t().contiguous(), Kx.t(), needed[0] or needed[2]
        dX = X.new_empty(with_vectors(X.shape, vectors) if needed[0] else (0,))
        dKh, dKx, db = (
            x.new_zeros(with_vectors(x.shape, vectors) if on else (0,))
            for x, on in zip((Kh, Kx, b), needed[1:4], strict=True)
        )
        u, z = U.reshape(len(U), -1, hidden).unbind(), gates[..., hidden : 2 * hidden].unbind()
        carry, on_state = (h0.new_zeros((*vectors, *h0.shape)) for _ in range(2))
        flat = on_state.view(-1, hidden)
        spare, other, P, S = _space(gates, ranges, vectors, vectors, ())
        G = S.new_empty(with_vectors(S.shape, vectors)) if inputs else S
        following: Maybe = None
        for start, stop in reversed(ranges):
            spare, other = other, spare
            block = spare[: stop - start]
            before = lagged(H, h0, start, stop)
            p, s = _coefficients(results, before, start, stop, P, S)
            p_all, rows, inner = in_gates(p, 3).unbind(), steps_of(block)[0], in_gates(block, 3).unbind()
            for k, t in zip(range(stop - start - 1, -1, -1), range(stop - 1, start - 1, -1), strict=True):
                pull_(u[t], following, Kht, flat)
                on_state.add_(carry)
                torch.mul(p_all[k], on_state.unsqueeze(-2), out=inner[k])
                if inputs:
                    torch.mul(s[k], on_state, out=G[k])
                torch.mul(z[t], on_state, out=carry)
                following = rows[k]
            if needed[1]:
                correlate_(dKh, before, block)
            if needed[3]:
                db.add_(block[..., 2 * hidden :].sum(-2).sum(0))
            if inputs:
                # The step before this block pulls back along p_m, not s.
                first = block[0].clone()
                block[..., 2 * hidden :].copy_(G[: stop - start])
                if needed[0]:
                    project_(dX[start:stop], (block, Kxt))
                if needed[2]:
                    correlate_(dKx, X[start:stop], block)
                following = first.view(-1, 3 * hidden)
        pull_(None, following, Kht, flat)
        return [dX, dKh, dKx, db, on_state.add_(carry) if needed[4] else h0.new_empty(0)]


def _space(gates: Tensor, ranges: list[tuple[int, int]], *vectors: tuple[int, ...] | None) -> list[Tensor]:
    """Memory for the longest range of steps: a tensor like the gates for each of `vectors`, and one for s."""
    shape = (max(stop - start for start, stop in ranges), *gates.shape[1:])
    like_gates = [gates.new_empty(0 if n is None else with_vectors(shape, n)) for n in vectors]
    return [*like_gates, gates.new_empty(*shape[:2], shape[2] // 3)]


def _coefficients(
    results: Tensors, before: Tensor, start: int, stop: int, P: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """(p_r, p_z, p_m) in one tensor (n, B, 3h), and s (n, B, h), of the steps from start to stop, in P and S."""
    _, gates, M = results
    P, S = P[: stop - start], S[: stop - start]
    (r, z, n), (p_r, p_z, p_m) = gates[start:stop].chunk(3, -1), P.chunk(3, -1)
    torch.sub(1, z, out=p_m)
    _tanh_scale(p_m, n, grad_input=S)
    torch.mul(S, M[start:stop], out=p_m)
    _sigmoid_scale(p_m, r, grad_input=p_r)
    torch.sub(before, n, out=p_m)
    _sigmoid_scale(p_m, z, grad_input=p_z)
    torch.mul(S, r, out=p_m)
    return P, S


register(GRUCell())


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
    X, reached = ended(given["inputs"], lengths)
    K_x, b_n = given["weight_ih"].t(), X.new_zeros(hidden)
    bias = given.get("bias_ih")
    if "bias_hh" in given:
        b_rz, b_n = given["bias_hh"][: 2 * hidden], given["bias_hh"][2 * hidden :]
        bias = plus(bias, torch.cat((b_rz, torch.zeros_like(b_n))))
    if bias is not None:
        X = with_ones(X)
        K_x = torch.cat((K_x, bias.unsqueeze(0)))
    (H,) = run("gru", X, given["weight_hh"].t(), K_x, b_n, h)
    return finished(H, reached)
