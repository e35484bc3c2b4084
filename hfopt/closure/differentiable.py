"""Run a closure with every operation in a form that can be differentiated twice.

- Attention: of the forms of scaled dot-product attention, only the plain one has second derivatives.
- What ``torch.compile`` has compiled runs as it was written: what the default backend makes of it has first derivatives
  only, rounds otherwise, and draws other numbers for dropout.
- Activation checkpointing with ``use_reentrant=True`` is done as with False: the former knows ``backward()`` alone, and
  to every other derivative its parameters seem unused. What is computed again is computed in this form, too.

All of it holds for the present thread alone; torch's switches for the whole process stay as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from hfopt.closure.patch import Method, Patch
from hfopt.draws import generators, repeated

_BUILT_IN = F.scaled_dot_product_attention
_ATTENTION = {
    _BUILT_IN,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale Q K' + mask) V``, as ``torch.nn.functional.scaled_dot_product_attention``, by its plain form."""
    device = query.device.type
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # As torch does before it chooses a form.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        # Autocast casts the arguments of the function as a whole, and none of what happens inside it.
        to = torch.get_autocast_dtype(device)
        query, key, value, attn_mask = (_cast(t, to) for t in (query, key, value, attn_mask))  # type: ignore[assignment]
    with torch.autocast(device, enabled=False) if autocast else ExitStack():
        output: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    return output


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(dtype)


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of a torch function that a closure calls, in the form that can be differentiated twice."""
    if kwargs:
        repeated.using(kwargs)
    if func in _ATTENTION:
        return plain_attention(*args, **kwargs)
    return func(*args, **kwargs)


@runtime_checkable
class Repeated(Protocol):
    """A mode that a closure runs under, and under which a piece of it must be repeated to be the same function."""

    def repeated(self) -> Callable[[], AbstractContextManager[None]]:
        """Return the context of a piece that is computed again."""


def _attention(_plain: Method) -> Method:
    return plain_attention


def _eager(_plain: Method) -> Method:
    return lambda _callback: None


def _not_reentrant(_plain: Method) -> Method:
    """Return the replacement of ``CheckpointFunction.apply``."""

    def apply(_cls: type, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    return apply


def _again_in_block(plain: Method) -> Method:
    """Checkpointing whose function, when it is computed again outside the block, is so inside another."""

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = generators.torch_state() if generators.apart() else None
        modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        seen = next((m for m in reversed(modes) if isinstance(m, Repeated)), None)
        around = nullcontext if seen is None else seen.repeated()

        @functools.wraps(function)
        def again(*inputs: Any, **keywords: Any) -> Any:
            drawn = nullcontext() if state is None else generators.drawing_from(state)
            with around(), twice_differentiable(), drawn:
                return function(*inputs, **keywords)

        return plain(again, *args, **kwargs)

    return checkpoint


# Whoever calls it by the name in torch.nn.functional, as torch's own layers do; other calls are seen by :func:`call`.
_attention_patch = Patch(F, "scaled_dot_product_attention", _attention)
_checkpoints = Patch(torch.utils.checkpoint.CheckpointFunction, "apply", _not_reentrant)
_computed_again = Patch(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", _again_in_block)


@functools.cache
def _compiler() -> Patch:
    """Return the patch of the function that tells compiled code to run as it was written."""
    return Patch(sys.modules["torch._dynamo.eval_frame"], "_callback_from_stance", _eager)


def differentiable_attention() -> AbstractContextManager[None]:
    """The block in which scaled dot-product attention takes the plain form, the only one to be differentiated twice."""
    return _attention_patch.block()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """See the module's docstring."""
    # Who has compiled something has imported the compiler, which takes seconds.
    compiler = _compiler().block() if "torch._dynamo.eval_frame" in sys.modules else nullcontext()
    with differentiable_attention(), compiler, _checkpoints.block(), _computed_again.block():
        yield
