"""Squared gradients of single cases: exactly from layers and recurrences, or case by case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hfopt.curvature.columns import cannot_batch, columns_at_once
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.linalg import graph
from hfopt.preconditioners.layers import BLOCK, Layer, watched
from hfopt.preconditioners.sequences import Sequences


def random_signs(n: int, draws: torch.Generator, like: Tensor) -> Tensor:
    """Return random signs (n,), each + or - with probability 1/2."""
    return (torch.randint(0, 2, (n,), generator=draws, device=like.device) * 2 - 1).to(like.dtype)


def along(signs: Tensor, z: Tensor, dim: int) -> Tensor:
    """Return ``signs (n,)`` in a shape that multiplies ``z`` along ``dim``."""
    shape = [1] * z.dim()
    shape[dim % z.dim()] = len(signs)
    return signs.view(shape)


def cases(op: GaussNewton, batch_dim: int) -> list[int]:
    """Return the number of cases of each output."""
    return [t.shape[batch_dim % t.dim()] if t.dim() else 1 for t in op.cotangents]


def by_cases(op: GaussNewton, batch_dim: int) -> Tensor:
    """Return sums of squared gradients of single cases, times their number, (P,): one adjoint pass per case."""
    total = torch.zeros(op.vector.size, dtype=op.dtype, device=op.device)
    for i, (t, n) in enumerate(zip(op.cotangents, cases(op, batch_dim), strict=True)):
        own = op.linearisation.column_bytes() + 2 * t.numel() * t.element_size()
        width = columns_at_once(own, op.vector.size, op.memory_budget, op.device)
        for start in range(0, n, width):
            for pulled in _pulled(op, i, _single(t, batch_dim, start, min(start + width, n))):
                total.add_(pulled.square().sum(1), alpha=n)
    return total


def _single(t: Tensor, batch_dim: int, start: int, stop: int) -> Tensor:
    """``t`` with all cases but one set to zero, for the cases from start to stop, (k, *shape)."""
    if t.dim() == 0:
        return t.unsqueeze(0)
    n, dim = t.shape[batch_dim % t.dim()], batch_dim % t.dim()
    chosen = torch.eye(n, dtype=t.dtype, device=t.device)[start:stop]
    shape = [stop - start, *(n if d == dim else 1 for d in range(t.dim()))]
    return t.unsqueeze(0) * chosen.view(shape)


def _pulled(op: GaussNewton, output: int, w: Tensor) -> Iterator[Tensor]:
    """``J' w`` for the k cotangents ``w`` of one output, (P, k); one by one where the model cannot be batched."""
    count = len(op.cotangents)
    try:
        yield op.pull_many([w if j == output else None for j in range(count)])
        return
    except RuntimeError as error:
        if not cannot_batch(error):
            raise
    zeros = [torch.zeros_like(t) for t in op.cotangents]
    for one in w:
        yield op.pull([one if j == output else zeros[j] for j in range(count)]).unsqueeze(1)


def by_layers(op: GaussNewton, batch_dim: int, draws: torch.Generator) -> dict[int, Tensor]:
    """Return sums of squared gradients of cases, times their number, for parameters that layers cover.

    With signs s, ``sum_n s_n dL_n/dtheta`` is found from the layers and by one adjoint pass. They agree for all
    signs if and only if the layers' per-case gradients are the true ones.
    """
    seen = watched(op, batch_dim)
    if seen is None or not (seen.layers or seen.sequences):
        return {}
    (cotangent,) = op.cotangents
    layers, sequences = seen.backward([cotangent])
    n = cotangent.shape[batch_dim % cotangent.dim()]
    signs = random_signs(n, draws, cotangent)
    truth = op.vector.views(op.pull([cotangent * along(signs, cotangent, batch_dim)]))
    found = _through_roots(op.params, layers, sequences, signs)
    for i, p in enumerate(op.params):
        used = [(layer, layer.weight == i) for layer in layers if i in (layer.weight, layer.bias)]
        if used and i not in found:
            found[i] = _of_parameter(used, signs, p.numel())
    exact: dict[int, Tensor] = {}
    for i, (signed, square) in found.items():
        wrong = signed.to(op.dtype) - truth[i].reshape(-1)
        precision = torch.finfo(op.params[i].dtype).eps ** 0.5
        # The sum of squares is the scale: the signed sum itself may vanish.
        if bool(wrong.square().sum() <= precision * square.sum()):
            exact[i] = (n * square).to(op.dtype)
    return exact


def _of_parameter(used: Sequence[tuple[Layer, bool]], signs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sum of a parameter's per-case gradients with signs, and that of their squares, flat; over all its uses.

    ``used``: the layers, each with whether the parameter is its weight.
    """
    signed = torch.zeros(size, dtype=signs.dtype, device=signs.device)
    square = torch.zeros_like(signed)
    block = max(1, BLOCK // sum(layer.numbers() for layer, _ in used))
    alone = len(used) == 1 and used[0][0].positions == 1
    for parts in zip(*(layer.rows(block, signs.dtype) for layer, _ in used), strict=True):
        s = signs[parts[0][0]]
        if alone:
            # (g x')^2 = g^2 (x^2)': no case's gradient is ever formed.
            _, x, g = parts[0]
            x, g = x[:, 0] if used[0][1] else x.new_ones(len(x), 1), g[:, 0]
            signed += ((s.unsqueeze(1) * g).t() @ x).reshape(-1)
            square += (g.square().t() @ x.square()).reshape(-1)
            continue
        total = torch.zeros(len(s), size, dtype=signs.dtype, device=signs.device)
        for (_, x, g), (_, weight) in zip(parts, used, strict=True):
            total += (g.transpose(1, 2) @ x).reshape(len(s), -1) if weight else g.sum(1)
        signed += s @ total
        square += total.square().sum(0)
    return signed, square


def _through_roots(
    params: Sequence[Tensor], layers: Sequence[Layer], sequences: Sequence[Sequences], signs: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """As :func:`_of_parameter`, for the parameters that stand behind the weights of recurrences and behind weights that
    are computed (transposed, normalised): gradients of these are pulled back to the parameters, case by case.
    """
    every: list[Layer | Sequences] = [*layers, *sequences]
    behind: set[int] = set()
    for call in every:
        for root in call.roots:
            if root is not None and (isinstance(call, Sequences) or not root.is_leaf):
                behind |= _reached(root, params)
    if not behind:
        return {}
    calls = [c for c in every if any(r is not None and _reached(r, params) & behind for r in c.roots)]
    chosen = sorted(behind)
    among, sizes = [params[i] for i in chosen], [params[i].numel() for i in chosen]
    signed = torch.zeros(sum(sizes), dtype=signs.dtype, device=signs.device)
    square = torch.zeros_like(signed)
    width = max(1, BLOCK // (sum(call.numbers() for call in calls) + 2 * sum(sizes)))
    for start in range(0, len(signs), width):
        block = slice(start, min(start + width, len(signs)))
        total = signed.new_zeros(block.stop - start, len(signed))
        pieces = torch.split(total, sizes, 1)
        try:
            for call in calls:
                for root, g in call.gradients(block, signs.dtype):
                    _pull_into(pieces, root, g, among)
        except RuntimeError as error:
            if not cannot_batch(error):
                raise
            return {}
        signed += signs[block] @ total
        square += total.square_().sum(0)
    return dict(zip(chosen, zip(torch.split(signed, sizes), torch.split(square, sizes), strict=True), strict=True))


def _reached(root: Tensor, params: Sequence[Tensor]) -> set[int]:
    """The parameters from which a tensor was computed."""
    leaves = {id(root)} if root.is_leaf else graph.reached_leaves([root])
    return {i for i, p in enumerate(params) if id(p) in leaves}


def _pull_into(pieces: Sequence[Tensor], root: Tensor, g: Tensor, params: Sequence[Tensor]) -> None:
    """Add the gradients ``g (n, *)`` of a root, as gradients of the parameters it was computed from."""
    if root.is_leaf:
        for piece, p in zip(pieces, params, strict=True):
            if p is root:
                piece.add_(g.reshape(len(g), -1))
        return
    for piece, found in zip(pieces, graph.gradients([root], params, [g.to(root.dtype)], batched=True), strict=True):
        if found is not None:
            piece.add_(found.reshape(len(g), -1))
