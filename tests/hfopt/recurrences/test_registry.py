"""Every defined cell on every backend, in float64: its passes against autograd through its definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hfopt import structural
from hfopt.recurrences import cell_layer
from hfopt.recurrences.layers import outputs_of
from hfopt.recurrences.native import build, threads
from hfopt.recurrences.native.compile import library
from hfopt.recurrences.native.generated import Compiled
from hfopt.recurrences.registry import Passes
from hfopt.recurrences.segments import checkpointing
from hfopt.recurrences.sequence import run
from tests.hfopt.recurrences.plain import Calls
from tests.hfopt.recurrences.registry import (
    MARKED,
    NAMES,
    PROJECTED,
    READ,
    adjoint_by_autograd,
    arguments,
    cell,
    each,
    like,
    of_masks,
    tangent_by_autograd,
    whole,
)

# Rounding of float64 in sums of a few dozen terms, over few steps.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def compiled_passes(name: str) -> Passes:
    if build.library() is None:
        pytest.skip("no C compiler here")
    assert library(cell(name).definition) is not None  # otherwise torch's operations would do the work
    return Compiled(whole(name))


def torch_passes(name: str) -> Passes:
    return whole(name)


BACKENDS = {"torch": torch_passes, "c": compiled_passes}
ALL = (*NAMES, *MARKED, *PROJECTED, *READ)
everywhere = pytest.mark.parametrize(("backend", "name"), list(itertools.product(BACKENDS, ALL)))


def subsets(count: int) -> list[tuple[bool, ...]]:
    """All, each alone, and each left out."""
    rows = torch.eye(count, dtype=torch.bool)
    found = [*rows.tolist(), *(~rows).tolist(), [True] * count]
    return list(dict.fromkeys(tuple(x) for x in found if any(x)))


@everywhere
def test_forward_is_the_definition(backend: str, name: str) -> None:
    for steps, batch in ((5, 3), (1, 1)):
        given = arguments(name, steps, batch)
        results = BACKENDS[backend](name).forward(given)
        assert [tuple(r.shape) for r in results] == whole(name).shapes(given)
        assert_close(tuple(results[: whole(name).outputs]), whole(name).plain(given), **EXACT)


@pytest.mark.quick(where=lambda backend, name, vectors: (backend == "c") == (vectors == ()))
@everywhere
@pytest.mark.parametrize("vectors", [(), (2,)])
def test_tangent_is_autograds(backend: str, name: str, vectors: tuple[int, ...]) -> None:
    c, passes = whole(name), BACKENDS[backend](name)
    for steps, batch in ((5, 3), (1, 1), (2, 40)):
        given = arguments(name, steps, batch)
        results = passes.forward(given)
        for chosen in subsets(len(given)):
            d = [v if on else None for v, on in zip(like(given, 1, vectors), chosen, strict=True)]
            moved = passes.tangent(d, given, results)
            for k in range(vectors[0]) if vectors else (None,):
                one, at = (each(moved, k), each(d, k)) if k is not None else (moved, d)
                assert_close(tuple(one), tangent_by_autograd(c, given, at), **EXACT)


@everywhere
@pytest.mark.parametrize("vectors", [(), (2,)])
def test_adjoint_is_autograds(backend: str, name: str, vectors: tuple[int, ...]) -> None:
    c, passes = whole(name), BACKENDS[backend](name)
    for steps, batch in ((5, 3), (1, 1), (2, 40)):
        given = arguments(name, steps, batch)
        results = passes.forward(given)
        outputs = results[: c.outputs]
        for chosen in subsets(c.outputs):
            u = [v if on else None for v, on in zip(like(outputs, 2, vectors), chosen, strict=True)]
            pulled = passes.adjoint(u, given, results, [True] * len(given))
            for k in range(vectors[0]) if vectors else (None,):
                one, at = (each(pulled, k), each(u, k)) if k is not None else (pulled, u)
                assert_close(tuple(one), adjoint_by_autograd(c, given, at, outputs), **EXACT)
        u = like(outputs, 3)
        whole_ = passes.adjoint(u, given, results, [True] * len(given))
        for i in range(len(given)):
            needed = [k == i for k in range(len(given))]
            part = passes.adjoint(u, given, results, needed)
            assert [x.numel() > 0 for x in part] == [n and x.numel() > 0 for n, x in zip(needed, whole_, strict=True)]
            assert_close(part[i], whole_[i], **EXACT)


@everywhere
def test_adjoint_is_the_transpose_of_the_tangent(backend: str, name: str) -> None:
    c, passes = whole(name), BACKENDS[backend](name)
    given = arguments(name, steps=9, batch=4)
    results = passes.forward(given)
    d, u = like(given, 1), like(results[: c.outputs], 2)
    for i in of_masks(c):
        d[i].zero_()
    moved = passes.tangent(d, given, results)
    pulled = passes.adjoint(u, given, results, [True] * len(given))
    left = sum(torch.vdot(x.flatten(), y.flatten()) for x, y in zip(u, moved, strict=True))
    right = sum(torch.vdot(x.flatten(), y.flatten()) for x, y in zip(d, pulled, strict=True))
    assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_gauss_newton_matrix_is_the_dense_one(name: str) -> None:
    """Columns of J'J by cached double backward, against J as a matrix through the definition."""
    c = whole(name)
    given = arguments(name, steps=3, batch=2)
    live = [i for i in range(len(given)) if i not in of_masks(c) and i > 0]

    def at(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        full = list(given)
        for i, y in zip(live, x, strict=True):
            full[i] = y
        return tuple(full)

    leaves = tuple(given[i].clone().requires_grad_() for i in live)
    outputs = run(c.name, *at(leaves))
    u = tuple(torch.zeros_like(y, requires_grad=True) for y in outputs)
    g = torch.autograd.grad(outputs, leaves, u, create_graph=True)
    J = torch.func.jacrev(lambda x: torch.cat([y.flatten() for y in c.plain(at(x))]))(leaves)
    dense = torch.cat([j.flatten(1) for j in J], 1)
    G = dense.t() @ dense
    v = like(leaves, 4)
    R = torch.autograd.grad(g, u, v, retain_graph=True)
    product = torch.autograd.grad(outputs, leaves, R)
    expected = G @ torch.cat([x.flatten() for x in v])
    assert_close(torch.cat([x.flatten() for x in product]), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_second_derivatives_are_the_definitions(name: str) -> None:
    c = whole(name)
    given = tuple(x.requires_grad_() for x in arguments(name, steps=3, batch=2))
    live = tuple(x for i, x in enumerate(given) if i not in of_masks(c) and x.numel())
    v = like(live, 5)

    def product(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = sum((y.sin() + 0.3 * y.pow(3)).sum() for y in outputs)
        g = torch.autograd.grad(total, live, create_graph=True)
        return torch.autograd.grad(g, live, v, materialize_grads=True)

    assert_close(product(run(c.name, *given)), product(c.plain(given)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_rows_and_deltas_give_the_gradients_of_single_sequences(name: str) -> None:
    c = whole(name)
    given = arguments(name, steps=4, batch=3)
    results = c.forward(given)
    u = like(results[: c.outputs], 6)
    weights, parameters, starts = c.rows_and_deltas(u, given, results)
    base = cell(name)
    for b in range(3):
        masked = [torch.zeros_like(x) for x in u]
        for m, x in zip(masked, u, strict=True):
            m[:, b] = x[:, b]
        pulled = adjoint_by_autograd(c, given, masked, results[: c.outputs])
        alone = base.parts(pulled[: base.arguments])
        for (rows, deltas), wanted in zip(weights, (alone.Kx, *alone.K, *pulled[base.arguments :]), strict=True):
            if wanted.numel():
                assert_close(torch.einsum("tk,tm->km", rows[:, b], deltas[:, b]), wanted, **EXACT)
        for found, wanted in zip(parameters, alone.parameters, strict=True):
            assert_close(found[b], wanted, **EXACT)
        for found, wanted in zip(starts, alone.states, strict=True):
            assert_close(found[b], wanted[b], **EXACT)


def layer_arguments(name: str, steps: int, batch: int) -> dict[str, Any]:
    """Those of `cell_layer`, with inputs as wide as the units."""
    c = cell(name)
    p = c.parts(arguments(name, steps, batch, inputs=4))
    bias = torch.linspace(-0.5, 0.5, p.Kx.shape[1], dtype=torch.float64)
    return {
        "inputs": p.X, "weight_ih": p.Kx, "weights_hh": p.K, "bias": bias, "parameters": p.parameters,
        "masks": p.masks, "states": p.states,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_those_of_sequences_run_alone(name: str) -> None:
    d = cell(name).definition
    given = layer_arguments(name, 6, 4)
    lengths = torch.tensor([6, 1, 4, 3])
    spoiled = given["inputs"].clone()
    for b, n in enumerate(lengths.tolist()):
        spoiled[n:, b] = float("nan")
    whole = cell_layer(d, **{**given, "inputs": spoiled}, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        one = {**given, "inputs": given["inputs"][:n, b : b + 1]}
        one |= {k: [x[b : b + 1] for x in given[k]] for k in ("masks", "states")}
        alone = cell_layer(d, **one)
        assert_close(whole.output[:n, b : b + 1], alone.output, **EXACT)
        assert not whole.output[n:, b].any()
        assert not whole.hidden[n:, b].any()
        for final, wanted in zip(whole.final, alone.final, strict=True):
            assert_close(final[b : b + 1], wanted, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_segments_give_the_gradients_and_products_of_the_whole(name: str) -> None:
    c = cell(name)
    given = arguments(name, steps=7, batch=2)
    live = [i for i in range(len(given)) if i not in of_masks(c)]

    def product(checkpointed: bool) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(i in live) for i, x in enumerate(given)]
        with checkpointing(checkpointed):
            outputs = outputs_of(c.definition, leaves, None)
            u = [y.detach().clone().requires_grad_() for y in outputs]
            at = [leaves[i] for i in live]
            g = torch.autograd.grad(outputs, at, u, create_graph=True)
            v = like([given[i] for i in live], 7)
            R = torch.autograd.grad(g, u, v, retain_graph=True)
            return *outputs, *g, *torch.autograd.grad(outputs, at, R, retain_graph=True)

    assert_close(product(True), product(False), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_found_for_structural_damping(name: str) -> None:
    given = layer_arguments(name, 3, 2)
    with structural.collecting(True) as found:
        hidden = cell_layer(cell(name).definition, **given, lengths=torch.tensor([3, 2])).hidden
    (mark,) = found
    assert mark.preactivations.shape == hidden.shape
    if (distance := cell(name).definition.distance) is not None:
        f = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}
        kind = next(kind for kind in f if name.startswith(kind) or name == "mrnn")
        assert_close(f[kind](mark.preactivations[:2]), hidden[:2], **EXACT)
        assert_close(2 * mark.weight[:2], distance(hidden[:2]), **EXACT)
        assert not mark.weight[2, 1].any()
        return
    assert_close(mark.preactivations[:2], hidden[:2], **EXACT)
    ends = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    # Half the squared distance, as a mean over the two sequences.
    assert_close(mark.weight, (ends / 2).unsqueeze(-1).expand(hidden.shape), rtol=0, atol=0)


def test_many_vectors_ride_along_in_one_pass() -> None:
    c = cell("rhn")
    given = tuple(x.requires_grad_() for x in arguments("rhn"))
    outputs = run(c.name, *given)
    us = [torch.stack(x) for x in zip(*(like(outputs, seed) for seed in range(3)), strict=True)]
    with Calls() as calls:
        many = torch.vmap(lambda *u: torch.autograd.grad(outputs, given, u, retain_graph=True))(*us)
    assert calls.recurrent == {"hfopt::sequence_adjoint": 1}
    for k in range(3):
        wanted = torch.autograd.grad(outputs, given, [u[k] for u in us], retain_graph=True)
        assert_close(tuple(m[k] for m in many), wanted, **EXACT)


@pytest.mark.skipif(build.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_compiled_passes_in_tiles_and_ranges(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranges of sequences, tiles that are not all full, sums that are put off for two steps, long rows."""
    monkeypatch.setattr("hfopt.recurrences.native.generated.parts", lambda *_: [(0, 6), (6, 7), (7, 20)])
    monkeypatch.setattr("hfopt.recurrences.native.generated.tile", lambda *_: 5)
    monkeypatch.setattr("hfopt.recurrences.native.generated.accumulation_steps", lambda _: 2)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    c, passes = whole(name), compiled_passes(name)
    exact = arguments(name, steps=7, batch=20, inputs=37, units=37, factors=18)
    given = [x.to(dtype) for x in exact]
    results = passes.forward(given)
    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 3e-4}
    assert_close(results, [x.to(dtype) for x in c.forward(exact)], **close)
    at = [x.double() for x in results]
    for vectors in ((), (2,)):
        d, u = like(exact, 1, vectors), like(at[: c.outputs], 2, vectors)
        moved = passes.tangent([x.to(dtype) for x in d], given, results)
        assert_close(moved, [x.to(dtype) for x in c.tangent(d, exact, at)], **close)
        wanted = c.adjoint(u, exact, at, [True] * len(exact))
        pulled = passes.adjoint([x.to(dtype) for x in u], given, results, [True] * len(exact))
        for x, y in zip(pulled, wanted, strict=True):
            scale = y.abs().max().clamp(min=1.0) if y.numel() else 1.0
            assert_close(x.double() / scale, y / scale, **close)


@pytest.mark.skipif(build.library() is None, reason="no C compiler here")
def test_nan_and_infinity_go_through_compiled_passes() -> None:
    for name in ("gru2014", "relu", "modrelu"):
        passes, given = compiled_passes(name), list(arguments(name, steps=3, batch=2))
        given[0] = given[0].clone()
        given[0][1, 0, 0] = float("nan")
        given[0][0, 1, 0] = float("inf")
        found, wanted = passes.forward(given)[0], cell(name).forward(given)[0]
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())
        assert found[1:, 0].isnan().all()


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfopt.recurrences.native.generated.library", lambda _: None)
    given = arguments("ugrnn")
    passes, c = Compiled(cell("ugrnn")), cell("ugrnn")
    assert all(map(torch.equal, passes.forward(given), c.forward(given)))
