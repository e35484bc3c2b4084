"""Squares written by hand: ``(r ** 2).mean()``, ``r.norm() ** 2``, ``torch.dot(r, r)`` are squared error of ``r``.

While a closure runs, every square of a tensor that depends on parameters is taken down. Most are none of the loss: a
normalisation's, a variance's, those of weight decay. Which of them are is found from the graph once the loss is known
(see :mod:`hfopt.closure.decompose`); here is how a square is recognised, and what can be said of its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from hfopt.closure.criteria import CriterionCall, Site
from hfopt.closure.partial import Edge, edge_of
from hfopt.linalg import graph

POWERS = {torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power}
SQUARES = {torch.square, Tensor.square}
# Squares of their argument where both arguments are one tensor; the second kind for vectors only.
PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__}
INNER = {torch.dot, Tensor.dot, torch.vdot, Tensor.vdot, torch.inner, Tensor.inner}
INNER |= {torch.matmul, Tensor.matmul, Tensor.__matmul__}
NORMS = {torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm, torch.linalg.matrix_norm}
LOOKED_AT = POWERS | SQUARES | PRODUCTS | INNER | NORMS

# Nodes that bring no other curvature into what they are given, shapes and weights aside.
_AFFINE = {"Add", "Sub", "Rsub", "Neg", "Mul", "Div", "View", "UnsafeView", "ReshapeAlias", "Reshape", "Alias", "T"}
_AFFINE |= {"Transpose", "Permute", "Select", "Slice", "Cat", "Stack", "Clone", "Unsqueeze", "Squeeze", "Expand"}
_AFFINE |= {"ToCopy", "Unbind", "Split", "SplitWithSizes", "Sum", "Mean", "AsStrided"}
# A constant beside these is no input of a network: a target, an offset, a mask.
_BESIDE = {"Add", "Sub", "Rsub", "Where", "Cat", "Stack", "Maximum", "Minimum", "CopySlices", "CopyBackwards", "Clone"}
_GATHER = {"Index", "IndexSelect", "Embedding", "EmbeddingBag", "Gather", "Take", "TakeAlongDim"}


def argument(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """Return the tensor whose square, or norm (one of ``NORMS``), a call computes; None for all other calls."""
    given = (*args, *kwargs.values())
    if not given or not isinstance(given[0], Tensor):
        return None
    r, second = given[0], given[1] if len(given) > 1 else None
    if func in SQUARES or func in NORMS:
        return r
    if func in POWERS:
        return r if isinstance(second, (int, float)) and second == 2 else None
    return r if r is second and (func in PRODUCTS or r.dim() == 1) else None


@dataclass(frozen=True)
class Norm:
    """A Euclidean norm that was computed: of what, where in the closure, and along which dimensions."""

    argument: Tensor
    site: Site
    dims: tuple[int, ...]
    keepdim: bool


def norm_of(r: Tensor, value: Tensor, site: Site) -> Norm | None:
    """Return the norm that a node computes; None unless it is Euclidean."""
    node: Any = value.grad_fn
    if node is None or node.name() != "LinalgVectorNormBackward0" or node._saved_ord != 2:
        return None
    if node._saved_self.shape != r.shape:
        return None
    dims = node._saved_dim
    # A negative dimension is kept as an unsigned number.
    along = tuple(range(r.dim())) if dims is None else tuple((d + (1 << 63)) % (1 << 64) - (1 << 63) for d in dims)
    return Norm(r, site, tuple(d % max(r.dim(), 1) for d in along), bool(node._saved_keepdim))


class Square(CriterionCall):
    """A square seen in the closure: as a criterion, ``mse_loss(r, 0)`` without reduction."""

    def __init__(self, r: Tensor, value: Tensor, site: Site, norm: Norm | None = None) -> None:
        """``norm``: that whose square it is; ``r`` is its argument then."""
        self.norm, self.edge = norm, edge_of(value)
        self.outputs, self.sites = [r], [site]

    @property
    def name(self) -> str:
        """In messages."""
        return "a square"

    def bound(self) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
        """As a call of mse_loss."""
        z = self.outputs[0].detach()
        return F.mse_loss, (z, torch.zeros_like(z)), {"reduction": "none"}

    def is_input(self, t: Any) -> bool:
        """The only output is the input."""
        return True

    def factor(self, c: Tensor) -> Tensor:
        """``c = dL/dl`` for every element of r."""
        r = self.outputs[0]
        if self.norm is not None and not self.norm.keepdim:
            for d in sorted(self.norm.dims):
                c = c.unsqueeze(d)
        return c.expand(r.shape)

    def cotangents(self, c: Tensor) -> list[Tensor | None]:
        """``2 c r``."""
        r = self.outputs[0].detach()
        return [(2 * self.factor(c) * r).to(r.dtype)]

    def nested(self, squares: Collection[Edge]) -> bool:
        """Whether what is squared is a square itself: a fourth power is no squared error of anything."""
        r = self.outputs[0]
        return r.grad_fn is not None and edge_of(r) in squares

    def of_data(self, params: set[int]) -> bool:
        """Whether what is squared is a result of a network and not of the parameters alone.

        ``params``: identities. Penalties on parameters are regularisers, which enter a curvature matrix with their
        exact Hessian. In a network some operation has something else as its input: data.
        """
        nodes = list(graph.nodes(self.outputs)) if self.outputs[0].grad_fn is not None else []
        affine = all(_affine(n, params) for n in nodes) and (bool(nodes) or id(self.outputs[0]) in params)
        return not affine and uses_data(nodes, params)


def _kind(node: Node) -> str:
    return node.name().rpartition("::")[2].partition("Backward")[0]


def _affine(node: Node, params: set[int]) -> bool:
    if graph.is_leaf_node(node):
        return id(node.variable) in params  # type: ignore[attr-defined]
    if _kind(node) in ("Mul", "Div"):
        return sum(n is not None for n, _ in node.next_functions) == 1
    return _kind(node) in _AFFINE


def uses_data(nodes: Iterable[Node], params: set[int]) -> bool:
    """Whether some operation combines what depends on the parameters with an input: a constant, or another leaf."""
    return any(_uses_data(n, params) for n in nodes)


def _uses_data(node: Node, params: set[int]) -> bool:
    if graph.is_leaf_node(node):
        return id(node.variable) not in params  # type: ignore[attr-defined]
    kind = _kind(node)
    if kind in _GATHER:
        return True
    if kind in _BESIDE or all(n is not None for n, _ in node.next_functions):
        return False
    if kind in ("Mul", "Div"):
        factors = [getattr(node, name, None) for name in ("_saved_other", "_saved_self")]
        return any(isinstance(t, Tensor) and not t.requires_grad and t.dim() > 0 for t in factors)
    return True
