"""Second derivatives of traced cells with one product in a step, for all steps at once.

With the step y_t = phi(c_t, s_{t-1}, b), the columns c_t = x_t K_x + v_t K, v_t a function of s_{t-1}, and cotangents

    a_t = phi_c' G_t,    G_{t-1} = u_{t-1} + phi_s' G_t + v_s' a_t K'

of columns and states, the Hessian of <U, f> times p (whose tangents are marked by a dot) is made of

    q_e,t = the change of phi_e' G_t along the tangents, G fixed, in e = c, s, b      pointwise
    w_t   = q_c,t K' + a_t dK'                                                       cotangent of v_t
    sum over t:   v_t' q_c,t + dv_t' a_t,   x_t' q_c,t + dx_t' a_t,   q_b,t          gradients of K, K_x, b

and what q_s + v_s' w, as cotangents of the states, give in one more adjoint pass. q is found by symbols, so nothing is
worked out where phi is piecewise linear.

Reference: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hfopt.recurrences.definition import Definition
from hfopt.recurrences.expression import Expression, evaluate, ordered, partials, pull, push
from hfopt.recurrences.products import correlate, lag, plus, projected
from hfopt.recurrences.registry import Bent, Maybe, Maybes, Tensors
from hfopt.recurrences.roles import Roles, cut
from hfopt.recurrences.structure import Column

Found = dict[Expression, Expression]


def _slopes(e: Expression) -> tuple[Expression, ...]:
    return partials(e, lambda node: node)


class Program:
    """Formulas of one step.

    Attributes:
        vector: v.
        columns: those of the product.
        G, nu: leaves for the cotangents of what the step returns, by node, and for that of v.
        w: another one for v, of which `by_vector` is a function.
        first: cotangents of columns, states, parameters and raw inputs.
        by_vector: what the cotangent of v is in them.
        rates: of each of these and each node returned, the derivative in which `first` has its cotangent.
        moved: leaves for the tangents of these and of what is returned.
        second: the change of `first` along them.
        vector_moved: the tangent of v.
    """

    def __init__(self, d: Definition) -> None:
        self.definition, g = d, d.graph
        (product,) = d.products
        self.vector, self.columns = product.vector, [c.node for c in product.columns]
        inputs = [*(c.node for c in d.input_columns), *self.columns, *d.before.values()]
        inputs += [g.leaf("parameter", b) for b in d.parameters]
        inputs += [] if d.raw is None else [d.raw]
        inputs = list(dict.fromkeys(inputs))
        returned = list(d.returned.values())
        self.G = {e: g.leaf("G", n) for n, e in d.returned.items()}
        self.nu, self.w = g.leaf("nu"), g.leaf("w")
        ends = frozenset((*self.columns, *(c.node for c in d.input_columns)))
        order = ordered((*returned, self.vector))

        def pulled(seeds: Found) -> Found:
            found = pull(order, seeds, ends, _slopes)
            return {e: found[e] for e in inputs if e in found and found[e].number != 0}

        seeds = dict(self.G)
        seeds[self.vector] = g.add(seeds[self.vector], self.nu) if self.vector in seeds else self.nu
        self.first, self.by_vector = pulled(seeds), pulled({self.vector: self.w})
        rates = {r: pulled({r: g.constant(1)}) for r in returned}
        self.rates = {e: {r: c[e] for r, c in rates.items() if e in c} for e in inputs}
        self.moved = {e: g.leaf("moved", e.index) for e in (*inputs, *returned)}
        self.second: Found = {}
        for e, formula in self.first.items():
            change = push(ordered((formula,), self.moved), self.moved, _slopes).get(formula)
            if change is not None and change.number != 0:
                self.second[e] = change
        self.vector_moved = push(ordered((self.vector,), self.moved), self.moved, _slopes).get(self.vector)


@cache
def _program(d: Definition) -> Program:
    return Program(d)


def program_of(d: Definition) -> Program | None:
    """The formulas of a definition; None if its step cannot be traced or has not exactly one product."""
    return _program(d) if d.untraceable is None and len(d.products) == 1 else None


def _lagged_rows(H: Tensor, first: Maybe, Y: Tensor) -> Tensor:
    """The sum over t of H_{t-1}' Y_t with H_{-1} = first; a None is zero."""
    found = correlate(H[:-1], Y[1:])
    return found if first is None else torch.addmm(found, first.t(), Y[0])


def _times(*pairs: tuple[Maybe, Maybe]) -> Maybe:
    """The sum of X W' over the pairs, X (T, B, k) and W (m, k); a pair with a None is zero."""
    total: Maybe = None
    shape: tuple[int, ...] = ()
    for X, W in pairs:
        if X is not None and W is not None:
            flat, shape = X.flatten(0, 1), (*X.shape[:2], W.shape[0])
            total = flat @ W.t() if total is None else torch.addmm(total, flat, W.t())
    return None if total is None else total.reshape(shape)


def _lead(X: Tensor) -> Tensor:
    """X_{t+1} for t = 0..T-1, with X_T = 0."""
    return torch.cat((X[1:], torch.zeros_like(X[:1])))


def _lag_of_tangent(H: Tensor, R: Maybe, first: Maybe) -> Any:
    """The tangent of H_{t-1} by that of H and of the first state; a None is zero."""
    if R is None and first is None:
        return 0.0
    return lag(torch.zeros_like(H) if R is None else R, torch.zeros_like(H[0]) if first is None else first)


class _Point:
    """Values, tangents and cotangents at all steps, each worked out when a formula asks for it."""

    def __init__(self, cell: Roles, program: Program, arguments: Tensors, outputs: Tensors, p: Maybes, R: Maybes):
        self.cell, self.program, self.definition = cell, program, cell.definition
        self.arguments, self.at, self.by = arguments, cell.parts(arguments), cell.parts(p)
        self.sizes, d, self.outputs, self.R = cell.sizes(arguments), cell.definition, outputs, R
        # The state that v is, if it is one: then no lagged copy is needed for the sums.
        before = list(d.before.values())
        self._state = before.index(program.vector) if program.vector in before else None
        self.known: dict[Expression, Any] = cell.constants(self.at)
        self.known |= zip(d.returned.values(), outputs, strict=True)
        moved = program.moved
        self.known |= {moved[e]: 0.0 if r is None else r for e, r in zip(d.returned.values(), R, strict=True)}
        for b, db in zip(d.parameters, self.by.parameters, strict=True):
            self.known[moved[d.graph.leaf("parameter", b)]] = 0.0 if db is None else db
        if d.raw is not None:
            width, dX = self.at.states[0].shape[-1], self.by.X
            self.known |= {d.raw: self.at.X[..., :width], moved[d.raw]: 0.0 if dX is None else dX[..., :width]}
        self._later: dict[Expression, Callable[[], Any]] = {}
        for e, first, dfirst, H, r in zip(d.before.values(), self.at.states, self.by.states, outputs, R, strict=False):
            self._later[e] = partial(lag, H, first)
            self._later[moved[e]] = partial(_lag_of_tangent, H, r, dfirst)
        self.columns = {*program.columns, *(c.node for c in d.input_columns)}
        for names, inputs, product in (
            ({e: e for e in self.columns}, "_inputs", "_product"),
            (moved, "_inputs_moved", "_product_moved"),
        ):
            for e in self.columns:
                columns = d.products[0].columns if e in program.columns else d.input_columns
                find = product if e in program.columns else inputs
                self._later[names[e]] = partial(self._column, e, columns, find)

    def _column(self, e: Expression, columns: Sequence[Column], find: str) -> Tensor:
        i = next(i for i, c in enumerate(columns) if c.node is e)
        return cut(getattr(self, find), columns, self.sizes)[i]

    def value(self, formula: Expression, more: dict[Expression, Any] | None = None) -> Maybe:
        """The formula at all steps; None if it is zero. `more`: values for this time."""
        given = more or {}
        for e in ordered((formula,), {*self.known, *self._later, *given}):
            if e in self._later and e not in self.known:
                self.known[e] = self._later[e]()
        found = evaluate(formula, {**self.known, **given} if given else self.known)
        return found if isinstance(found, Tensor) else None if found == 0 else self.at.X.new_full((), found)

    @property
    def vector(self) -> Tensor:
        """The vector v (T, B, .)."""
        v = self.value(self.program.vector)
        assert v is not None
        return v

    @property
    def vector_moved(self) -> Maybe:
        """The tangent of v."""
        change = self.program.vector_moved
        return None if change is None else self.value(change)

    def rows(self, Y: Maybe) -> Maybe:
        """The sum over t of v_t' Y_t."""
        if Y is None:
            return None
        i = self._state
        return correlate(self.vector, Y) if i is None else _lagged_rows(self.outputs[i], self.at.states[i], Y)

    def rows_moved(self, Y: Maybe) -> Maybe:
        """The same with the tangents of v_t."""
        i = self._state
        if Y is not None and i is not None and (R := self.R[i]) is not None:
            return _lagged_rows(R, self.by.states[i], Y)
        dv = None if Y is None else self.vector_moved
        return None if Y is None or dv is None else correlate(dv, Y)

    @cached_property
    def _inputs(self) -> Tensor:
        """Columns of the inputs."""
        return projected(self.arguments)[0]

    @cached_property
    def _inputs_moved(self) -> Tensor:
        X, Kx, dX, dKx = self.at.X, self.at.Kx, self.by.X, self.by.Kx
        inside = Kx.shape[0] > 0
        found = plus(dX @ Kx if dX is not None and inside else dX, X @ dKx if dKx is not None and inside else None)
        return torch.zeros_like(self._inputs) if found is None else found

    @cached_property
    def _product(self) -> Tensor:
        """Columns of the product, with what the inputs add to those that are shared."""
        return self._with_shared(self.vector @ self.at.K[0], self._inputs)

    @cached_property
    def _product_moved(self) -> Tensor:
        dv, K, dK = self.vector_moved, self.at.K[0], self.by.K[0]
        found = plus(None if dv is None else dv @ K, None if dK is None else self.vector @ dK)
        moved = self._inputs_moved
        return self._with_shared(moved.new_zeros(*moved.shape[:2], K.shape[1]) if found is None else found, moved)

    def _with_shared(self, product: Tensor, inputs: Tensor) -> Tensor:
        # Shared columns are the last of the inputs' and the first of the product's.
        shared = sum(self.sizes[c.size] for c in self.definition.products[0].columns if c.kind == "a")
        if shared == 0:
            return product
        first = inputs[..., inputs.shape[-1] - shared :] + product[..., :shared]
        return first if shared == product.shape[-1] else torch.cat((first, product[..., shared:]), -1)

    def joined(self, columns: Iterable[Expression], values: dict[Expression, Maybe]) -> Maybe:
        """Those of the columns beside each other, (T, B, .); None if they are all zero."""
        columns, d = list(columns), self.definition
        if all(values.get(e) is None for e in columns):
            return None
        lead = self.at.X.shape[:2]
        parts = []
        for e in columns:
            y = values.get(e)
            parts.append(self.at.X.new_zeros(*lead, self.sizes[d.size(e)]) if y is None else y)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def cotangents(point: _Point, U: Maybes, alpha: Maybe) -> dict[Expression, Maybe]:
    """Set G and that of v among the point's values, and return those of all columns.

    `alpha` (T, B, .) has those of the inputs' columns, of an adjoint pass, or is None.
    """
    program, d, K = point.program, point.definition, point.at.K[0]
    found: dict[Expression, Maybe] = {}
    if alpha is not None:
        parts = cut(alpha, d.input_columns, point.sizes)
        found = {c.node: y for c, y in zip(d.input_columns, parts, strict=True)}
    wanted = [*program.second.values(), *(f for e, f in program.first.items() if e in point.columns and e not in found)]
    if not {*program.G.values(), program.nu} & set(ordered(wanted)):
        return found
    unknown = [e for e in program.columns if e not in found]
    weights = dict(zip(program.columns, cut(K, d.products[0].columns, point.sizes), strict=True))
    some = [e for e in program.columns if e in found]
    nu: Maybe = None
    if some:
        left = point.joined(some, found)
        assert left is not None
        nu = left @ (K if not unknown else torch.cat([weights[e] for e in some], -1)).t()
    G = dict(zip(d.returned.values(), U, strict=True))
    states = {e: d.returned[s] for s, e in d.before.items()}
    direct = any(program.rates[e] for e in states)
    if not direct and not unknown:
        for e, node in states.items():
            by = None if e not in program.by_vector else point.value(program.by_vector[e], {program.w: nu})
            G[node] = plus(G[node], None if by is None else _lead(by))
    else:
        nu = _loop(point, G, nu, unknown, weights)
    known = point.known
    for node, leaf in program.G.items():
        known[leaf] = 0.0 if G[node] is None else G[node]
    known[program.nu] = nu
    for e in point.columns & program.first.keys() - found.keys():
        found[e] = point.value(program.first[e])
    return found


def _loop(
    point: _Point,
    G: dict[Expression, Maybe],
    nu: Maybe,
    unknown: Sequence[Expression],
    weights: dict[Expression, Tensor],
) -> Tensor:
    """Go back over the steps where states or columns not known have cotangents of their own; set G, return v's."""
    program, d, X = point.program, point.definition, point.at.X
    states = {e: d.returned[s] for s, e in d.before.items()}
    rates: dict[Expression, list[tuple[Expression, Any]]] = {}
    for e in (*states, *unknown):
        rates[e] = [(r, _steps(point.value(c), len(X))) for r, c in program.rates[e].items()]
    ones = X.new_ones(())
    through = {e: _steps(point.value(c, {program.w: ones}), len(X)) for e, c in program.by_vector.items()}
    given = {node: [None] * len(X) if u is None else list(u.unbind()) for node, u in G.items()}
    zeros = {node: torch.zeros_like(point.known[node][0]) for node in given}
    on: dict[Expression, list[Tensor]] = {node: [] for node in given}
    before = None if nu is None else nu.unbind()
    vectors = []
    carry: dict[Expression, Maybe] = {}
    for t in range(len(X) - 1, -1, -1):
        now: dict[Expression, Tensor] = {}
        for node, us in given.items():
            total = plus(us[t], carry.get(node))
            now[node] = zeros[node] if total is None else total
            on[node].append(now[node])

        def pulled(e: Expression, t: int = t, now: dict[Expression, Tensor] = now) -> Maybe:
            return plus(*(c[t] * now[r] for r, c in rates[e]))

        back = None if before is None else before[t]
        for e in unknown:
            a = pulled(e)
            back = plus(back, None if a is None else a @ weights[e].t())
        vector = torch.zeros_like(point.vector[t]) if back is None else back
        vectors.append(vector)
        for e, node in states.items():
            carry[node] = plus(pulled(e), through[e][t] * vector if e in through else None)
    for node, found in on.items():
        G[node] = torch.stack(found[::-1])
    return torch.stack(vectors[::-1])


def _steps(x: Maybe, steps: int) -> Sequence[Tensor]:
    """What a formula is at every step."""
    assert x is not None
    return x.unbind() if x.dim() == 3 else (x,) * steps


def bent(
    cell: Roles, arguments: Tensors, outputs: Tensors, p: Maybes, R: Maybes, U: Maybes, alpha: Maybe,
    needed: Sequence[bool],
) -> Bent:  # fmt: skip
    """As of a `Cell`, for one that `program_of` knows."""
    d = cell.definition
    program = program_of(d)
    assert program is not None
    point = _Point(cell, program, arguments, outputs, p, R)
    first = cotangents(point, U, alpha)
    at, by, want, K, dK = point.at, point.by, cell.parts(needed), point.at.K[0], point.by.K[0]
    q: dict[Expression, Maybe] = {e: point.value(change) for e, change in program.second.items()}
    a, bend = (point.joined(program.columns, x) for x in (first, q))
    w = _times((bend, K), (a, dK))
    if w is not None:
        for e, formula in program.by_vector.items():
            q[e] = plus(q.get(e), point.value(formula, {program.w: w}))

    columns = [c.node for c in d.input_columns]
    ax, qx = (point.joined(columns, x) for x in (first, q))
    by_X = by_Kx = None
    if at.Kx.shape[0] == 0:
        by_X = qx
    else:
        if want.X:
            by_X = _times((qx, at.Kx), (ax, by.Kx))
        if want.Kx:
            by_Kx = plus(
                None if qx is None else correlate(at.X, qx), None if ax is None or by.X is None else correlate(by.X, ax)
            )
    if d.raw is not None and want.X and (raw := q.get(d.raw)) is not None:
        by_X = plus(by_X, torch.nn.functional.pad(raw, (0, at.X.shape[-1] - raw.shape[-1])))
    by_K = plus(point.rows(bend), point.rows_moved(a)) if want.K[0] else None
    on_parameters = [q.get(d.graph.leaf("parameter", b)) for b in d.parameters]
    by_parameters = [None if x is None else x.sum((0, 1)) for x in on_parameters]
    on_states = [q.get(e) for e in d.before.values()]
    first_states = [None if x is None else x[0] for x in on_states]
    on_outputs: list[Maybe] = [None if x is None else _lead(x) for x in on_states]
    on_outputs += [None] * (cell.outputs - len(on_outputs))
    return Bent(on_outputs, [by_X, by_Kx, by_K, *by_parameters, *[None] * len(d.masks), *first_states])


__all__ = ["bent", "program_of"]
