"""The simple recurrence with its linear readout, o_t = [h_t, 1] K_o, as one operator: what the readout needs of the
hidden states never goes through memory where the passes are compiled.

    h_t = f(a_t),  a_t = [h_{t-1}, x_t] K

    tangent:  R_o,t = R_h,t K_o[:h] + [h_t, 1] dK_o,   R_h as in `loops.tangent`
    adjoint:  u_t = uo_t K_o[:h]',   dK_o = sum_t [h_t, 1]' uo_t,   the rest as in `loops.adjoint`

Reference: Martens & Sutskever, "Learning recurrent neural networks with Hessian-free optimization", ICML 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfopt import structural
from hfopt.recurrences import backends
from hfopt.recurrences.arguments import checked
from hfopt.recurrences.linear import apply, step_inputs
from hfopt.recurrences.nonlinearities import NONLINEARITIES, Nonlinearity
from hfopt.recurrences.products import correlate_
from hfopt.recurrences.registry import Cell, Maybe, Maybes, Tensors, batch_of_vectors, register, with_vectors
from hfopt.recurrences.sequence import run
from hfopt.recurrences.simple import Recurrence, layer_point


class ReadoutCell(Cell):
    """(X (T, B, V), K (h + V, h), h0 (B, h), K_o (h + 1, O)) -> (O (T, B, O),), or (O, A) under a name with "+a".

    A (T, B, h) are the pre-activations. Stored besides: H (T, B, h).
    """

    arguments = 4

    def __init__(self, f: Nonlinearity, preactivations: bool) -> None:
        self.f, self.preactivations = f, preactivations
        self.name = f"readout_{f.name}" + "+a" * preactivations
        self.outputs = 1 + preactivations
        self.results = 2 + preactivations

    def shapes(self, arguments: Tensors) -> list[tuple[int, ...]]:
        """(T, B, O), then (T, B, h) once or twice."""
        X, _, h0, Ko = arguments
        sequence = (X.shape[0], *h0.shape)
        return [(*sequence[:2], Ko.shape[1])] + [sequence] * self.outputs

    def plain(self, arguments: Tensors) -> tuple[Tensor, ...]:
        """(O,) or (O, A), the readout applied to the hidden states of all steps at once."""
        X, K, h0, Ko = arguments
        # Derivatives of second order go this way: the recurrence without readout has them in closed form.
        H, *A = apply(Recurrence, None, X, K, h0, self.f.name, self.preactivations)
        return (_read(H, Ko), *A)

    def forward(self, arguments: Tensors) -> list[Tensor]:
        """(O, H) or (O, A, H)."""
        X, K, h0, Ko = arguments
        H = backends.forward(None, X, K, h0, self.f.name)
        O = _read(H, Ko)
        return [O, step_inputs(X, H, h0) @ K, H] if self.preactivations else [O, H]

    def tangent(self, tangents: Maybes, arguments: Tensors, results: Tensors) -> list[Tensor]:
        """(R_o,) or (R_o, R_a) of (dX, dK, dh0, dK_o)."""
        dX, dK, dh0, dKo = tangents
        X, K, h0, Ko = arguments
        H, hidden, vectors = results[-1], h0.shape[1], batch_of_vectors(tangents, arguments)
        R: Maybe = None
        Ra: Maybe = None
        if dX is not None or dK is not None or dh0 is not None:
            inputs = None if dX is None else dX @ K[hidden:]
            if vectors:
                # The loops carry many vectors without a dK.
                if dK is not None:
                    moved = step_inputs(X, H, h0).unsqueeze(1) @ dK
                    inputs = moved if inputs is None else inputs.add_(moved)
                    dK = None
                if inputs is None:
                    inputs = H.new_zeros(()).expand(with_vectors(H.shape, vectors))
            R, Ra = backends.tangent(inputs, dK, dh0, X, H, h0, K, self.f.name, self.preactivations)
        read = results[0].new_zeros(with_vectors(results[0].shape, vectors)) if R is None else R @ Ko[:-1]
        if dKo is not None:
            states = H.unsqueeze(1) if vectors else H
            read = read.add_(states @ dKo[..., :-1, :]).add_(dKo[..., -1:, :])
        if not self.preactivations:
            return [read]
        return [read, H.new_zeros(with_vectors(H.shape, vectors)) if Ra is None else Ra]

    def adjoint(self, cotangents: Maybes, arguments: Tensors, results: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """(dX, dK, dh0, dK_o) of (U_o, U_a)."""
        Uo, Ua = (*cotangents, None)[:2]
        X, K, h0, Ko = arguments
        H, hidden = results[-1], h0.shape[1]
        U = None if Uo is None else Uo @ Ko[:-1].t()
        dA, dK, dh0 = backends.adjoint(U, Ua, X, H, h0, K, self.f.name, needed[0])
        vectors = dh0.shape[:-2]
        dKo = K.new_zeros(with_vectors(Ko.shape, tuple(vectors)))
        if Uo is not None:
            correlate_(dKo[..., :-1, :], H, Uo)
            dKo[..., -1, :] = Uo.sum((0, -2))
        dX = K.new_empty(0) if dA is None else dA @ K[hidden:].t()
        empty = K.new_empty(0)
        return [x if wanted else empty for x, wanted in zip((dX, dK, dh0, dKo), needed, strict=True)]


for _f in NONLINEARITIES.values():
    for _marked in (False, True):
        register(ReadoutCell(_f, _marked))


def _read(H: Tensor, Ko: Tensor) -> Tensor:
    return torch.addmm(Ko[-1], H.flatten(0, 1), Ko[:-1]).view(*H.shape[:2], -1)


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
    X, K, h0 = layer_point(inputs, weight_vh, weight_hh, h0, bias, nonlinearity, mask)
    _, W, *b = checked("bias_o", weight_hh=weight_hh, weight_ho=weight_ho, bias_o=bias_o).values()
    hidden = K.shape[1]
    if W.dim() != 2 or W.shape[0] != hidden:
        raise ValueError(f"weight_ho has shape {tuple(W.shape)}; with {hidden} hidden units it is ({hidden}, O)")
    if b and b[0].shape != (W.shape[1],):
        raise ValueError(f"bias_o has shape {tuple(b[0].shape)}; with weight_ho's outputs it is ({W.shape[1]},)")
    K_o = torch.cat((W, b[0].unsqueeze(0) if b else W.new_zeros(1, W.shape[1])))
    if h0.dim() == 1:
        h0 = h0.expand(X.shape[1], -1)
    if torch.compiler.is_compiling() or not structural.wanted():
        return run(f"readout_{nonlinearity}", X, K, h0, K_o)[0]
    O, A = run(f"readout_{nonlinearity}+a", X, K, h0, K_o)
    f = NONLINEARITIES[nonlinearity]
    H = A.detach().clone()
    f.apply_(H)
    structural.mark(A, f.distance(H), batch_dim=1, mask=mask)
    return O
