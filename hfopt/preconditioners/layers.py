"""Linear and convolution layers as they are used in a closure: their inputs and the gradients of their outputs.

Both are ``y = W x`` over rows: those of a linear layer's input, or the patches of a convolution's. With ``x_nt`` and
``g_nt = dL/dy_nt`` for case n and position t, case n's gradient of W is ``sum_t g_nt x_nt'``, that of the bias
``sum_t g_nt``. Outputs may be reshaped, joined, sliced or differentiated on their way to a criterion, so that its cases
tell nothing of a layer's; where no dimension of a layer is one of cases, each of its rows is taken for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hfopt.curvature.draws import case_dim
from hfopt.curvature.gauss_newton import GaussNewton
from hfopt.preconditioners.sequences import Sequences, known
from hfopt.recurrences.recorded import recording

CONVOLUTIONS = (F.conv1d, F.conv2d)
PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__)
LAYERS = (F.linear, *CONVOLUTIONS, *PRODUCTS, torch.addmm)
# Ways to write the transpose of a weight.
TRANSPOSES = {
    torch.t, torch.transpose, torch.permute, torch.swapaxes, torch.adjoint,
    *(getattr(Tensor, name) for name in ("t", "transpose", "permute", "swapaxes", "adjoint")),
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT", "H", "mH")),
}  # fmt: skip
# Numbers that the rows, patches and per-case gradients of one block of cases may have.
BLOCK = 1 << 23


@dataclass
class Layer:
    """One call of a layer.

    Attributes:
        weight, bias: which parameter each is; None where it is none of the parameters.
        x, y: input and output; ``y`` is in the graph.
        case: the dimension of ``x`` and ``y`` along which the cases of an output stand; None where there is none.
        patches: from inputs (n, ...) to patches (n, k, T) of a convolution; None for a linear layer.
        roots: weight and bias as the call had them, where they depend on parameters.
        g: ``dL/dy``, once it is there.
        turned: whether the parameter is the transpose of the weight (o, k), as in ``x @ W``.
    """

    weight: int | None
    bias: int | None
    x: Tensor
    y: Tensor
    case: int | None
    patches: Callable[[Tensor], Tensor] | None
    roots: tuple[Tensor | None, Tensor | None] = (None, None)
    g: Tensor | None = None
    turned: bool = False

    @property
    def cases(self) -> int:
        """Return the number of cases; of rows where cases are not known, and of inputs of a convolution."""
        if self.case is not None or self.patches is not None:
            return self.x.shape[self.case or 0]
        return self.x.numel() // max(1, self.x.shape[-1])

    @property
    def rows_in_all(self) -> int:
        """The rows of all cases."""
        return self.cases * self.positions

    @property
    def positions(self) -> int:
        """T, the number of rows of one case."""
        size = self.y[..., 0] if self.patches is None else self.y[:, 0]
        return size.numel() // max(1, self.cases)

    def sizes(self) -> tuple[int, int]:
        """Return the length of a row of the inputs, and of the outputs."""
        if self.patches is None:
            return self.x.shape[-1], self.y.shape[-1]
        return self.patches(self.x[:1].detach()).shape[1], self.y.shape[1]

    def numbers(self) -> int:
        """Return how many numbers a case takes: rows, and the gradient of the weight."""
        k, o = self.sizes()
        return max(1, self.positions * (k + o) + k * o)

    def block(self) -> int:
        """Return the number of cases whose rows are processed at once."""
        return max(1, BLOCK // max(1, self.positions * sum(self.sizes())))

    def rows(self, size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield blocks of ``size`` cases with ``x (n, T, k)`` and ``g (n, T, o)``."""
        for start in range(0, self.cases, size):
            block = slice(start, min(start + size, self.cases))
            yield block, *self.part(block, dtype)

    def part(self, block: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ``x (n, T, k)`` and ``g (n, T, o)`` of a block of cases."""
        assert self.g is not None
        if self.case is None and self.patches is None:
            x, g = (t.reshape(-1, 1, t.shape[-1])[block].to(dtype) for t in (self.x.detach(), self.g))
            return x, g
        x, g = (t.movedim(self.case or 0, 0)[block].to(dtype) for t in (self.x.detach(), self.g))
        if self.patches is not None:
            return self.patches(x).transpose(1, 2), g.flatten(2).transpose(1, 2)
        return x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])

    def gradients(self, block: slice, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return (root, gradients (n, *root's shape) of the block's n cases) for weight and bias."""
        x, g = self.part(block, dtype)
        weight, bias = self.roots
        found = []
        if weight is not None:
            found.append((weight, (g.transpose(1, 2) @ x).view(len(g), *weight.shape)))
        if bias is not None:
            found.append((bias, g.sum(1)))
        return found


class Watching(TorchFunctionMode):
    """Records every call of a layer whose weight or bias depends on parameters, while a closure runs."""

    def __init__(self, params: Sequence[Tensor], cases: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self._index = {id(p): i for i, p in enumerate(params)}
        self._transposed: dict[int, tuple[Tensor, int]] = {}  # by the tensor's id, which it keeps while it lives here
        self._cases = list(dict.fromkeys(cases))  # (dimension, number) of every output
        self.layers: list[Layer] = []
        self.inside: int = 0  # calls inside a transform of torch.func, whose results are no tensors of the graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in TRANSPOSES:
            self._note_transpose(result, *args)
        if func not in LAYERS:
            return result
        if torch._C._functorch.is_functorch_wrapped_tensor(result):
            self.inside += 1
            return result
        if not result.requires_grad:
            return result
        named = dict(kwargs or {})
        given = (*args, named.pop("input")) if "input" in named else args
        found = self._layer(func, result, *given, **named)
        if found is None:
            return result
        self.layers.append(found)
        return result.clone()  # what follows may be in place

    def _layer(
        self, func: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *more: Any, **named: Any
    ) -> Layer | None:
        if func is torch.addmm:
            if more or named or x.dim() != 1:  # a sum over something else than a bias
                return None
            assert bias is not None
            x, weight, bias = weight, bias, x
        w, b = self._index.get(id(weight)), None if bias is None else self._index.get(id(bias))
        turned = w is not None and id(weight) not in self._transposed and func in (*PRODUCTS, torch.addmm)
        if w is None and id(weight) in self._transposed:
            w, turned = self._transposed[id(weight)][1], func is F.linear
        if func in (*PRODUCTS, torch.addmm):
            if w is None or weight.dim() != 2:
                return None
            weight = weight.t()
        roots = weight if weight.requires_grad else None, bias if bias is not None and bias.requires_grad else None
        if roots == (None, None):
            return None
        if func not in CONVOLUTIONS:
            return None if weight.dim() != 2 else Layer(w, b, x, y, self._case_of(x), None, roots, turned=turned)
        patches = patches_of(weight, *more, **named)
        if patches is None or x.dim() != weight.dim():
            return None
        case = 0 if any(x.shape[0] == number for _, number in self._cases) else None
        return Layer(w, b, x, y, case, patches, roots)

    def _note_transpose(self, result: Tensor, of: Tensor, *dims: Any) -> None:
        index = self._index.get(id(of))
        if index is not None and of.dim() == 2 and result.stride() == of.stride()[::-1] and result is not of:
            self._transposed[id(result)] = result, index

    def _case_of(self, x: Tensor) -> int | None:
        lead = x.shape[:-1]
        for case, number in self._cases:
            for dim in (case, 0):
                if dim < len(lead) and lead[dim] == number:
                    return dim
        return None


def patches_of(
    weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Callable[[Tensor], Tensor] | None:
    """Return the patches (n, C k, T) that a convolution multiplies; None for groups or asymmetric padding."""
    kernel = tuple(weight.shape[2:])
    wide = [_each(v, len(kernel)) for v in (stride, dilation)]
    if groups != 1:
        return None
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(wide[1], kernel, strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            return None
        padding = [r // 2 if padding == "same" else 0 for r in reach]
    options = {"stride": wide[0], "dilation": wide[1], "padding": _each(padding, len(kernel))}
    if len(kernel) == 2:
        return lambda x: F.unfold(x, kernel, **options)
    flat = {name: (0 if name == "padding" else 1, value[0]) for name, value in options.items()}
    return lambda x: F.unfold(x.unsqueeze(2), (1, *kernel), **flat)


def _each(value: Any, count: int) -> tuple[int, ...]:
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return given * count if len(given) == 1 else given


@dataclass
class Watched:
    """The outputs of another run of the closure, and the layers and recurrences in it."""

    heads: list[Tensor]
    layers: list[Layer]
    sequences: list[Sequences]

    def backward(self, cotangents: Sequence[Tensor]) -> tuple[list[Layer], list[Sequences]]:
        """Set the gradients ``g`` for ``cotangents`` of the outputs; those that these depend on."""
        own = [y for s in self.sequences for y in s.recorded.outputs]
        ys = [*(layer.y for layer in self.layers), *own]
        found = list(
            torch.autograd.grad(self.heads, ys, list(cotangents), retain_graph=True, allow_unused=True) if ys else ()
        )
        for layer in self.layers:
            layer.g = found.pop(0)
        for s in self.sequences:
            s.g = [found.pop(0) for _ in s.recorded.outputs]
        layers = [layer for layer in self.layers if layer.g is not None]
        return layers, [s for s in self.sequences if any(g is not None for g in s.g)]


def visit(op: GaussNewton, batch_dim: int, use: Callable[[Sequence[int], list[Tensor], list[Layer]], None]) -> int:
    """Run the closure again; ``use(indices, heads, layers)`` for every part: which outputs, in the graph of this run.

    Returns:
        How many layers are out of sight, inside a transform of torch.func.
    """
    first = [0]
    for part in op.parts:
        first.append(first[-1] + part.count)
    mode = Watching(op.params, number_of_cases(op, batch_dim))

    def each(i: int, heads: list[Tensor]) -> None:
        layers, mode.layers = mode.layers, []
        use(range(first[i], first[i + 1]), heads, layers)

    with mode:
        op.outputs_by_part(each)
    return mode.inside


def number_of_cases(op: GaussNewton, batch_dim: int) -> list[tuple[int, int]]:
    """The dimension along which cases stand, and how many there are, for every output that has any."""
    outputs = [z for part in op.parts for z in part.space.outputs if z.dim()]
    return [(dim, z.shape[dim]) for z in outputs for dim in (case_dim(z, batch_dim),)]


def watched(op: GaussNewton, batch_dim: int) -> Watched | None:
    """Return the layers of another run of the closure; None unless it has one output, with several cases."""
    outputs = op.parts[0].space.outputs if len(op.parts) == 1 else []
    if len(outputs) != 1 or outputs[0].dim() == 0:
        return None
    cases = number_of_cases(op, batch_dim)
    with Watching(op.params, cases) as mode, recording() as found:
        heads = op.outputs_again()
    layers = [layer for layer in mode.layers if layer.case is not None]
    sequences = [Sequences(one) for one in found if known(one, cases[0][1])]
    return None if heads is None else Watched(heads, layers, sequences)
