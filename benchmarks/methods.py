"""The ways to a Gauss-Newton product, each as a function that is prepared once and multiplies many vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Form, Tensors
from hfopt import GaussNewton
from hfopt.closure.differentiable import differentiable_attention
from hfopt.closure.recurrent_layers import replacing
from hfopt.curvature.linearisation import POLICIES


@dataclass(frozen=True)
class Vector:
    """One vector in parameter space: shaped like the parameters, and flat (P,), without copying."""

    tensors: Tensors
    flat: Tensor

    @classmethod
    def of(cls, tensors: Tensors) -> Vector:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        pieces = torch.split(flat, [t.numel() for t in tensors])
        return cls([piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)], flat)


# Names in the tables: the peer, and hfopt on torch's own recurrent layer, which it replaces inside a step.
CURVLINOPS = "curvlinops"
REPLACED = "hfopt, on torch's layer"

Product = Callable[[Vector], Tensors]


@dataclass(frozen=True)
class Method:
    """``prepare()`` does what is done once a step, and returns the product.

    ``form`` says whose parameters the product is about; ``cached``: something is kept between products.
    """

    name: str
    prepare: Callable[[], Product]
    form: Form
    cached: bool = False


def closure(model: nn.Module, case: Case) -> Callable[[], Tensor]:
    """An ordinary LBFGS closure."""

    def run() -> Tensor:
        model.zero_grad()
        loss: Tensor = case.criterion(model(case.inputs), case.targets)
        if torch.is_grad_enabled():
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return run


def gradient(model: nn.Module, case: Case) -> Callable[[], Tensors]:
    """Loss, forward and backward pass: the gradient in the order of the parameters."""
    params = list(model.parameters())

    def run() -> Tensors:
        loss = case.criterion(model(case.inputs), case.targets)
        return list(torch.autograd.grad(loss, params, materialize_grads=True))

    return run


def ours(form: Form, case: Case, policy: str) -> Product:
    """`hfopt.GaussNewton`, on flat vectors as conjugate gradients multiply them."""
    op = GaussNewton(closure(form.model, case), form.model.parameters(), linearisation=policy)
    out = torch.empty_like(op.gradient)

    def multiply(v: Vector) -> Tensors:
        return op.vector.views(op.multiply(v.flat, out))

    return multiply


def general(form: Form, case: Case) -> Product:
    """The same where nothing is replaced: torch's own layers, or a Python loop, differentiated as they are."""
    with replacing(False):
        return ours(form, case, "double-backward")


def curvlinops(form: Form, case: Case) -> Product:
    """The `GGNLinearOperator @ v`, its checks of determinism switched off, of curvlinops."""
    from curvlinops import GGNLinearOperator  # type: ignore[import-untyped, import-not-found, unused-ignore]

    op = GGNLinearOperator(
        form.model,
        case.criterion,
        list(form.model.parameters()),
        [(case.inputs, case.targets)],
        check_deterministic=False,
        num_data=case.inputs.shape[0],
    )

    def multiply(v: Vector) -> Tensors:
        with twice_differentiable(form.model):
            return list(op @ v.tensors)

    return multiply


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Kernels that can be differentiated twice: the plain attention, and recurrent layers without cuDNN."""
    cuda = any(p.is_cuda for p in model.parameters())
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    plain = torch.backends.cudnn.flags(enabled=False) if cuda and recurrent else nullcontext()
    with differentiable_attention(), plain:
        yield


def _loss_curvature(case: Case, z: Tensor, u: Tensor) -> Tensor:
    """``H_L u`` by differentiating the criterion's gradient."""
    z = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(case.criterion(z, case.targets), z, create_graph=True)
    return torch.autograd.grad(slope, z, u)[0]


def double_backward(form: Form, case: Case) -> Product:
    """Forward pass, backward pass and its derivative, all run for every product."""
    params = list(form.model.parameters())

    def multiply(v: Vector) -> Tensors:
        with twice_differentiable(form.model):
            z = form.model(case.inputs)
            w = torch.zeros_like(z, requires_grad=True)
            pulled = torch.autograd.grad(z, params, w, create_graph=True, materialize_grads=True)
            live = [(g, t) for g, t in zip(pulled, v.tensors, strict=True) if g.requires_grad]
            (u,) = torch.autograd.grad([g for g, _ in live], w, [t for _, t in live])
            w = _loss_curvature(case, z, u)
            return list(torch.autograd.grad(z, params, w, materialize_grads=True))

    return multiply


def jvp_and_vjp(form: Form, case: Case) -> Product:
    """`torch.func.jvp` and `torch.func.vjp`, both run for every product."""
    named = {name: p.detach() for name, p in form.model.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        z: Tensor = torch.func.functional_call(form.model, values, (case.inputs,))
        return z

    def multiply(v: Vector) -> Tensors:
        with twice_differentiable(form.model):
            pushed: Any = torch.func.jvp(outputs, (named,), (dict(zip(named, v.tensors, strict=True)),))
            u = pushed[1]
            found: Any = torch.func.vjp(outputs, named)
            z, pull = found
            return list(pull(_loss_curvature(case, z, u))[0].values())

    return multiply


def methods(case: Case) -> Iterator[Method]:
    """All methods of a case: hfopt's own first."""
    plain = Form(case.plain)
    best = case.ours or plain
    for policy in POLICIES:
        if policy == "checkpoint" and case.ours is None:
            continue  # it is about recurrences alone
        if policy == "differences":
            continue  # which is no exact product: a way out for models that have none
        yield Method(f"hfopt, {policy}", partial(ours, best, case, policy), best, policy != "recompute")
    if any(isinstance(m, nn.RNNBase) for m in case.plain.modules()):
        yield Method(REPLACED, partial(ours, plain, case, "double-backward"), plain, True)
    if case.ours is not None:
        yield Method("hfopt, general path", partial(general, plain, case), plain, True)
    peers = {CURVLINOPS: plain, **{f"{CURVLINOPS} on {name}": form for name, form in case.others.items()}}
    for name, form in peers.items():
        yield Method(name, partial(curvlinops, form, case), form)
    yield Method("double backward, re-run", partial(double_backward, plain, case), plain)
    yield Method("func.jvp + vjp, re-run", partial(jvp_and_vjp, plain, case), plain)


def reason(error: Exception) -> str:
    """One line on why a method was skipped."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
