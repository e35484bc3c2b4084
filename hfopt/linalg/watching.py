"""Telling somebody of every product of a damped matrix: what a step spends its time on, while it is going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_watcher: ContextVar[Callable[[], None] | None] = ContextVar("hfopt_watcher", default=None)


def product_made() -> None:
    """Say that one more product has begun; does nothing unless somebody is :func:`watching`."""
    told = _watcher.get()
    if told is not None:
        told()


@contextmanager
def watching(told: Callable[[], None]) -> Iterator[None]:
    """Call `told` at every product inside the block; those that CUDA graphs replay are not noticed."""
    token = _watcher.set(told)
    try:
        yield
    finally:
        _watcher.reset(token)
